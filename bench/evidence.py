"""What folds bring: questions settled, and accuracy of a refit on all images against train only.

    python bench/evidence.py                 # 10 seeds, random split: about 20 minutes on 2 cores
    python bench/evidence.py --group         # by module
    python bench/evidence.py --digits        # scikit-learn's digits as pictures, ten classes
    python bench/evidence.py --splits        # are test images as hard as those out of fold? One minute

Each seed cuts another test split of the photographs, at 128 pixels; the recipe is trained with
a val split (`--folds 0`) and with folds, and the run with folds is exported. A stage is settled when
it is surely better, worse, or within the limit; int8 when its best form is accepted or refused. Time
and size: of int8's whole file over fp32's, one thread.

--splits: by scikit-learn's logistic regression on frozen features (lite0, 96 pixels, behind block 4),
accuracy on test less accuracy out of fold, over 40 random splits by ftkit and 40 by scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from search import write_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler

from ftkit.cli.demo import GROUPS, SETTINGS, write_elpv
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.searching.candidates import backbone_of
from ftkit.searching.features import features
from ftkit_export.runtime.arrays import Array

SMALL = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128")


def _ftkit(*arguments: object) -> None:
    command = [sys.executable, "-m", "ftkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)


def _decided(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of fp32 and of the int8 form that the export decided on, of the bundle whatever its
    verdict."""
    manifest = next(iter(sorted(out.parent.glob(f"{out.name}*/manifest.json"))))
    rows = json.loads(manifest.read_text())["evidence"]["decision"]
    order = ("accepted", "inconclusive", "refused")
    row: dict[str, Any] = min(rows[1:], key=lambda row: order.index(row["verdict"]))
    return rows[0], row


def _splits(photos: Path) -> None:
    """Print how much easier test images are than those out of fold, for each way to split."""
    images = read_images(photos, 0)
    backbone = backbone_of("efficientnet_lite0")
    preprocess = backbone.preprocess.at(96)
    canvases = build_canvases(images, preprocess)
    every = np.arange(len(images.images))
    frozen = StandardScaler().fit_transform(
        features(backbone, canvases, preprocess, every)["blocks.4"]
    )
    inputs = PCA(100).fit_transform(frozen)
    labels = np.array([image.label for image in images.images])
    places = {image.path: place for place, image in enumerate(images.images)}

    def right(train: Array, test: Array) -> Array:
        model = LogisticRegression(C=0.003, max_iter=300).fit(inputs[train], labels[train])
        found: Array = model.predict(inputs[test]) == labels[test]
        return found

    def easier(test: Array) -> float:
        train = np.setdiff1d(every, test)
        folds = StratifiedKFold(4, shuffle=True, random_state=0).split(train, labels[train])
        held = np.concatenate([right(train[seen], train[held]) for seen, held in folds])
        return float(right(train, test).mean() - held.mean())

    ours, theirs = [], []
    for seed in range(40):
        cut = read_images(photos, seed).images
        test = np.array([places[image.path] for image in cut if image.split == "test"])
        ours.append(easier(test))
        drawn = StratifiedShuffleSplit(1, test_size=len(test), random_state=seed)
        theirs.append(easier(next(drawn.split(inputs, labels))[1]))
    for name, gaps in (("ftkit", ours), ("scikit-learn", theirs)):
        error = 100 * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
        print(
            f"{name}: test less out of fold {100 * np.mean(gaps):+.2f} points, standard error {error:.2f}, standard "
            f"deviation {100 * np.std(gaps, ddof=1):.2f}; seed 0: {100 * gaps[0]:+.1f}"
        )


def main() -> None:
    """Print a row per seed, and what they come to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed, to go on with")
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--splits", action="store_true")
    options = parser.parse_args()
    if options.splits:
        with tempfile.TemporaryDirectory() as scratch:
            write_elpv(Path(scratch) / "photos", split=False)
            _splits(Path(scratch) / "photos")
        return
    if options.digits and options.group:
        parser.error("digits have no groups: give one of --digits and --group")
    gains = []
    print(
        "| seed | val split: test | seconds | folds: test | seconds | stages | int8 | images | drop | time | size |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if options.digits:
            write_digits(place / "photos")
            plan = SMALL
        else:
            write_elpv(place / "photos", split=False)
            plan = (*SETTINGS, *SMALL, *(GROUPS if options.group else ()))
        for seed in range(options.first, options.first + options.seeds):
            row = []
            for folds in ("0", "auto"):
                run = place / f"{seed}-{folds}"
                begun = time.perf_counter()
                seeded = ("--folds", folds, "--seed", seed)
                _ftkit("train", place / "photos", "--out", run, *seeded, *plan)
                data = json.loads((run / "run.json").read_text())
                row += [data["metrics"]["test"]["accuracy"], time.perf_counter() - begun]

            gains.append(row[2] - row[0])
            stages = ", ".join(
                f"{stage['verdict']} {100 * stage['gain'][0]:+.1f}" for stage in data["stages"]
            )
            _ftkit("export", run, "--out", place / f"{seed}", "--quick")
            fp32, int8 = _decided(place / f"{seed}")
            drop = int8["paired"]
            print(
                f"| {seed} | {row[0]:.4f} | {row[1]:.0f} | {row[2]:.4f} | {row[3]:.0f} | {stages} | {int8['verdict']} "
                f"({int8['name']}) | {drop['images']} | {100 * drop['drop']:+.1f} [{100 * drop['low']:+.1f}, "
                f"{100 * drop['high']:+.1f}] | {int8['ratio']:.2f} | "
                f"{int8['size_bytes'] / fp32['size_bytes']:.2f} |",
                flush=True,
            )

    if len(gains) < 2:
        return
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    half = stats.t.ppf(0.975, len(gains) - 1) * error
    print(
        f"\nfolds and refit over a val split: {100 * np.mean(gains):+.2f} points +-{100 * half:.2f}"
    )


if __name__ == "__main__":
    main()
