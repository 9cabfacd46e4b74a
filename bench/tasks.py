"""Several labels, and numbers: what one file is worth, and whether its intervals hold.

    python bench/tasks.py --what coverage        # simulation: jackknife, conformal intervals (4 min)
    python bench/tasks.py --what division        # simulation: how evenly folds divide labels (1 min)
    python bench/tasks.py --what labels          # ELPV's two attributes in one file, and in two (15 min)
    python bench/tasks.py --what values          # ELPV's defect probability, over all cells (12 min)

labels: mono or not, defect or not (not known where the experts were not certain), modules whole; against
two single-label files trained on the same cells, on the same test cells. values: the probability of a
defect, 0, 1/3, 2/3 or 1; against a single-label model of the certain cells, whose probability is the
value it would give.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from ftkit.cli.demo import GROUP
from ftkit.data.dataset import read_images
from ftkit.data.strata import strata_of
from ftkit.data.stratify import divide
from ftkit.evaluation.multilabel import fit_labels
from ftkit.evaluation.regression import fit_values
from ftkit.tasks.task import Regression
from ftkit_export.proof.jackknife import jackknife
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.predict import Classifier, load_model
from ftkit_export.runtime.readout import sigmoid

WORLDS = 400
LABEL_FROM = 0.8  # true values above it have the simulated label
PRECISION = 0.9  # asked of its threshold


def coverage() -> str:
    """Share of simulated worlds whose true value lies in the interval meant to hold it 95 % (90 %)."""
    lines = [
        "| statistic | images | groups | interval meant | covered |",
        "|---|---|---|---|---|",
    ]
    for images, groups in ((300, None), (2000, None), (600, 10), (1800, 37)):
        for name, statistic in STATISTICS.items():
            covered = np.mean([_holds(statistic, images, groups, seed) for seed in range(WORLDS)])
            lines.append(
                f"| {name} | {images} | {groups or 'none'} | 95 % | {100 * covered:.1f} % |"
            )
    for images in (60, 300, 2000):
        share = np.mean([_conformal(images, seed) for seed in range(WORLDS)])
        lines.append(f"| conformal interval | {images} | none | 90 % | {100 * share:.1f} % |")

    lines += ["", "| images | groups | proven | of these below 0.9 | of the others | mean |"]
    lines.append("|" + "---|" * 6)
    for images, groups in ((300, None), (2000, None), (1800, 37)):
        found = [_given(images, groups, seed) for seed in range(WORLDS)]
        proven = np.array([each[0] for each in found])
        precision = np.array([each[1] for each in found])
        below = (precision < PRECISION) & ~np.isnan(precision)
        counts = (int((below & which).sum()) for which in (proven, ~proven))
        lines.append(
            f"| {images} | {groups or 'none'} | {proven.sum()} of {WORLDS} | {next(counts)} "
            f"| {next(counts)} of {(~proven).sum()} | {np.nanmean(precision):.3f} |"
        )
    return "\n".join(lines)


def division() -> str:
    """How far the share of images that have a label is off in five folds, by way of dividing them."""
    lines = ["| images | labels | groups of | by | mean | largest | size |", "|" + "---|" * 7]
    for images, labels, size in ((200, 5, 1), (1000, 20, 1), (500, 5, 10), (2000, 10, 50)):
        found: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(20):
            rng = np.random.default_rng(seed)
            groups = rng.integers(0, images // size, images) if size > 1 else np.arange(images)
            targets = _correlated(rng, groups, labels)
            for name, part in _divided(targets, groups, seed).items():
                shares = np.stack([targets[part == fold].mean(0) for fold in range(5)])
                off = np.abs(shares / targets.mean(0) - 1)
                uneven = float(np.ptp(np.bincount(part)) / images * 5)
                found.setdefault(name, []).append((off.mean(), off.max(), uneven))
        for name, rows in found.items():
            mean, largest, uneven = 100 * np.mean(rows, 0)
            lines.append(
                f"| {images} | {labels} | {size} | {name} | {mean:.1f} % | {largest:.0f} % | {uneven:.0f} % |"
            )
    return "\n".join(lines)


def _correlated(rng: np.random.Generator, groups: np.ndarray, labels: int) -> np.ndarray:
    """Labels of 2 to 50 % of the images, related to each other and within a group, (n, labels)."""
    share = rng.uniform(0.02, 0.5, labels)
    mixed = rng.normal(size=(groups.max() + 1, 4)) @ rng.normal(size=(4, labels))
    mixed = mixed[groups] / mixed.std(0) + 1.3 * rng.normal(size=(len(groups), labels))
    levels = [np.quantile(column, 1 - part) for column, part in zip(mixed.T, share, strict=True)]
    targets = mixed > levels
    return targets[:, targets.sum(0) >= 10].astype(float)


def _divided(targets: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The fold of each image, by the name of the way."""
    rarest, _ = strata_of("multi-label", targets, [str(n) for n in range(targets.shape[1])])
    found = {}
    for name, splitter, labels in (
        ("chance", GroupKFold(5, shuffle=True, random_state=seed), rarest),
        ("rarest label", StratifiedGroupKFold(5, shuffle=True, random_state=seed), rarest),
    ):
        found[name] = np.zeros(len(targets), np.int64)
        for fold, (_, held) in enumerate(splitter.split(targets, labels, groups)):
            found[name][held] = fold
    found["ftkit"] = divide(targets, groups, [0.2] * 5, seed)
    return found


Statistic = Callable[[np.ndarray, np.ndarray], float]
STATISTICS: dict[str, Statistic] = {
    "average precision": lambda true, said: float(average_precision_score(true > LABEL_FROM, said)),
    "mean absolute error": lambda true, said: float(np.abs(true - said).mean()),
    "rank correlation": lambda true, said: float(spearmanr(true, said).statistic),
}


def _world(images: int, groups: int | None, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """True values, what a model says of them, and groups that share a quarter of its errors' variance."""
    draw = np.random.default_rng(seed)
    of = np.arange(images) if groups is None else draw.integers(0, groups, images)
    shared = draw.normal(size=int(of.max()) + 1)[of] if groups else draw.normal(size=images)
    true = draw.normal(size=images)
    said = 0.8 * true + 0.6 * (0.5 * shared + np.sqrt(0.75) * draw.normal(size=images))
    return true, said, [str(number) for number in of] if groups else [""] * images


def _holds(statistic: Statistic, images: int, groups: int | None, seed: int) -> bool:
    if (statistic, groups) not in TRUTHS:
        far = 200 if groups is None else 4000
        true, said, _ = _world(200_000, far if groups else None, 10**6)
        TRUTHS[statistic, groups] = statistic(true, said)
    true, said, names = _world(images, groups, seed)
    found = jackknife(lambda rows: statistic(true[rows], said[rows]), images, names)
    low, high = found.interval()
    return bool(low <= TRUTHS[statistic, groups] <= high)


TRUTHS: dict[tuple[Any, int | None], float] = {}


def _conformal(images: int, seed: int) -> float:
    draw = np.random.default_rng(seed)
    task = Regression(means=(0.0,), spreads=(1.0,), units=("",))
    errors = draw.standard_t(3, (images + 1000, 1))
    zero = np.zeros_like(errors)
    readout = fit_values(zero[:images], errors[:images], task, 0.9)
    return float((np.abs(errors[images:]) <= readout.margins[0]).mean())


def _given(images: int, groups: int | None, seed: int) -> tuple[bool, float]:
    """Whether a label's threshold for PRECISION was proven, and the precision of new images that are given
    the label with it."""
    true, said, names = _world(images, groups, seed)
    said = true + (said - 0.8 * true) / 2  # a label as well recognised as the demo's
    own = (true > LABEL_FROM).astype(float)[:, None]
    readout, (proven,) = fit_labels(6 * said[:, None] - 4, own, names, PRECISION)
    threshold, temperature = readout.thresholds[0], readout.temperatures[0]
    true, said, _ = _world(100_000, 4000 if groups else None, 10**6 + seed)
    said = true + (said - 0.8 * true) / 2
    given = sigmoid((6 * said - 4) / temperature) >= threshold
    return proven, float((true[given] > LABEL_FROM).mean()) if given.any() else float("nan")


Cell = tuple[Path, float, str, int]  # picture, probability, kind, module


def cells() -> list[Cell]:
    """All 2,624 cells."""
    with resources.as_file(resources.files("elpv_dataset") / "data") as source:
        rows = [line.split() for line in (source / "labels.csv").read_text().splitlines()]
        return [
            (source / name, round(float(p) * 3) / 3, kind, (int(Path(name).stem[4:]) - 1) // GROUP)
            for name, p, kind in rows
        ]


def _table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", *columns))
        writer.writerows(rows)
    return path


def _ftkit(*arguments: object) -> float:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "ftkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise RuntimeError(done.stderr)
    return time.perf_counter() - begun


def _made(place: Path, name: str, table: Path, *options: object) -> tuple[Path, float, float]:
    """A run's bundle, whatever its verdict, and the seconds of training and export."""
    run = place / name
    trained = _ftkit("train", table, "--out", run, "--set", "augment.vflip=true", *options)
    exported = _ftkit("export", run, "--out", place / f"{name}-bundle", "--quick")
    (bundle,) = place.glob(f"{name}-bundle*")
    return bundle, trained, exported


def _splits(place: Path) -> dict[Path, str]:
    """The split of each cell, by module: that of a table with both attributes."""
    rows = [(path, "a|b" if n % 2 else "", m) for n, (path, _, _, m) in enumerate(cells())]
    table = _table(place / "splits.csv", ("labels", "group"), rows)
    return {image.path: image.split for image in read_images(table, cut_val=False).images}


def labels(place: Path) -> str:
    """One file for both attributes, and two."""
    splits = _splits(place)
    every = [(*cell, splits[cell[0]]) for cell in cells()]
    both = [
        (path, int(kind == "mono"), int(p) if p in (0, 1) else "", split, module)
        for path, p, kind, module, split in every
    ]
    columns = ("mono", "defect", "split", "group")
    one, *seconds = _made(
        place, "both", _table(place / "both.csv", columns, both), "--recipe", "lite0_multilabel"
    )
    kinds = [(path, kind, split, module) for path, _, kind, module, split in every]
    states = [
        (path, "defect" if p else "ok", split, module)
        for path, p, _, module, split in every
        if p in (0, 1)
    ]
    single = [
        _made(place, name, _table(place / f"{name}.csv", ("label", "split", "group"), rows))
        for name, rows in (("kind", kinds), ("state", states))
    ]

    model = load_model(one)
    test = [cell for cell in every if cell[4] == "test"]
    said = np.stack([model.answers(model.decode(path)) for path, *_ in test])
    apart = [Classifier(bundle) for bundle, _, _ in single]
    alone = np.stack(
        [
            [
                each.probabilities(each.decode(path))[each.labels.index(name)]
                for each, name in zip(apart, ("mono", "defect"), strict=True)
            ]
            for path, *_ in test
        ]
    )
    mono = np.array([kind == "mono" for _, _, kind, _, _ in test], float)
    defect = np.array([p if p in (0, 1) else np.nan for _, p, *_ in test])
    groups = [str(module) for *_, module, _ in test]
    lines = [
        "| label | test cells | one file for both: AP | a file each: AP | difference in points [95 %] |",
        "|---|---|---|---|---|",
    ]
    for name, truth, place_of in (("mono", mono, 1), ("defect", defect, 0)):
        known = np.flatnonzero(~np.isnan(truth))

        def ap(
            rows: np.ndarray, scores: np.ndarray, t: np.ndarray = truth, k: Any = known
        ) -> float:
            return float(average_precision_score(t[k[rows]], scores[k[rows]]))

        ours, theirs = said[:, place_of], alone[:, 1 - place_of]
        found = jackknife(
            lambda rows, a=ours, b=theirs, f=ap: f(rows, a) - f(rows, b),  # type: ignore[misc]
            len(known),
            [groups[int(row)] for row in known],
        )
        low, high = found.interval()
        whole = np.arange(len(known))
        lines.append(
            f"| {name} | {len(known)} | {ap(whole, ours):.4f} | {ap(whole, theirs):.4f} | "
            f"{100 * found.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] |"
        )

    files = [one / "model.onnx", *(bundle / "model.onnx" for bundle, _, _ in single)]
    raced = race(files, test[0][0])
    times = [item.p50_ms for item in raced]
    spent = [sum(seconds), sum(t + e for _, t, e in single)]
    lines += [
        "",
        f"One file: p50 {times[0]:.2f} ms, trained and exported in {spent[0]:.0f} s; two: "
        f"{times[1]:.2f} + {times[2]:.2f} ms, {spent[1]:.0f} s.",
    ]
    return "\n".join(lines)


def values(place: Path) -> str:
    """The defect's probability as a number, and as a classifier's."""
    splits = _splits(place)
    every = [(*cell, splits[cell[0]]) for cell in cells()]
    rows = [(path, f"{p:.6f}", split, module) for path, p, _, module, split in every]
    table = _table(place / "values.csv", ("probability", "split", "group"), rows)
    number, *seconds = _made(place, "values", table, "--recipe", "lite0_regression")
    certain = [
        (path, "defect" if p else "ok", split, module)
        for path, p, _, module, split in every
        if p in (0, 1)
    ]
    table = _table(place / "certain.csv", ("label", "split", "group"), certain)
    classes, *_ = _made(place, "certain", table)

    test = [cell for cell in every if cell[4] == "test"]
    model = load_model(number)
    classify = Classifier(classes)
    defect = classify.labels.index("defect")
    true = np.array([p for _, p, *_ in test])
    estimates = [model(path) for path, *_ in test]
    first = [next(iter(item.values.values())) for item in estimates]  # type: ignore[union-attr]
    said = {
        "regression, all cells": np.array([item.value for item in first]),
        "single-label, certain cells": np.array(
            [classify.probabilities(classify.decode(path))[defect] for path, *_ in test]
        ),
    }
    groups = [str(module) for *_, module, _ in test]
    inside = np.mean(
        [item.low <= truth <= item.high for item, truth in zip(first, true, strict=True)]
    )
    lines = [
        f"| model | MAE on {len(test)} test cells [95 %] | rank correlation [95 %] |",
        "|---|---|---|",
    ]
    for name, answer in said.items():
        cells_of = [
            jackknife(lambda r, f=statistic, a=answer: f(true[r], a[r]), len(test), groups)  # type: ignore[misc]
            for statistic in (STATISTICS["mean absolute error"], STATISTICS["rank correlation"])
        ]
        told = []
        for found in cells_of:
            low, high = found.interval()
            told.append(f"{found.value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {name} | {told[0]} | {told[1]} |")
    lines += [
        "",
        f"Intervals meant to hold 90 % of the true values hold {100 * inside:.1f} %; trained and exported in "
        f"{sum(seconds):.0f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="coverage,division,labels,values")
    wanted = parser.parse_args().what.split(",")
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ.setdefault("FTKIT_CACHE", str(place / "cache"))
        for name, made in (
            ("coverage", coverage),
            ("division", division),
            ("labels", lambda: labels(place)),
            ("values", lambda: values(place)),
        ):
            if name in wanted:
                print(f"\n## {name}\n\n{made()}", flush=True)


if __name__ == "__main__":
    main()
