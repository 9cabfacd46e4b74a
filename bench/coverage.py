"""Simulated coverage of the intervals and error rates of the verdicts; a file timed against itself.

python bench/coverage.py                                   (about 8 minutes on 2 cores)
python bench/coverage.py --what races --bundle BUNDLE      (100 races of three sessions' files, about 6 minutes)

Groups: `correlated 0.1` draws each group's accuracy from a beta distribution with that intraclass
correlation; `rates vary 1` draws each group's share of changed images from a gamma distribution
whose standard deviation is that many times its mean, separately for images that got worse and
better.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import log_softmax, softmax

from ftkit.evaluation.metrics import abstain_threshold, fit_temperature
from ftkit_export.proof.intervals import (
    Design,
    difference_bounds,
    difference_design,
    share_interval,
)
from ftkit_export.runtime.latency import PROCESSES, machine, race

Array = np.ndarray[Any, Any]

TRIALS = 4000
ONE_IN_TEN = math.inf  # only every tenth group changes, ten times as much


def tango(worse: int, better: int, images: int, level: float) -> tuple[float, float]:
    """Score bounds of a paired difference (Tango 1998), the method ftkit used before."""

    def score(drop: float) -> float:
        a = 2.0 * images
        b = -worse - better + (2 * images - worse + better) * drop
        c = -better * drop * (1 - drop)
        root = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = images * (2 * root + drop * (1 - drop))
        return (worse - better - images * drop) / math.sqrt(variance) if variance > 0 else math.inf

    def solve(wanted: float, low: float, high: float) -> float:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return (low + high) / 2

    z, drop = float(stats.norm.ppf(level)), (worse - better) / images
    return solve(z, -1.0, drop), solve(-z, drop, 1.0)


def sizes(rng: np.random.Generator, clusters: int, images: int, unequal: bool) -> Array:
    """Number of images in each group."""
    if not unequal:
        return np.full(clusters, images // clusters)
    return np.maximum(
        1, (images / clusters * rng.gamma(2.8, 1 / 2.8, clusters)).round().astype(int)
    )


def names(counts: Array) -> list[str]:
    """Group name of each image."""
    return [str(number) for number, count in enumerate(counts) for _ in range(count)]


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells: str) -> None:
    """Print the header of a Markdown table."""
    row(*cells)
    row(*["---"] * len(cells))


def shares() -> None:
    """Coverage of the 95 % interval of an accuracy."""
    rng = np.random.default_rng(0)
    head(
        "images", "groups", "how alike", "accuracy 0.70", "0.85", "0.95", "as if independent, 0.85"
    )
    settings = [
        (50, 0, 0.0, False),
        (200, 0, 0.0, False),
        (2000, 0, 0.0, False),
        (50, 10, 0.0, False),
    ]

    settings += [
        (n, g, c, u)
        for n, g in ((50, 10), (200, 20), (2000, 20), (2000, 50))
        for c in (0.05, 0.2)
        for u in (False, True)
    ]

    settings += [(375, 7, 0.1, False), (375, 7, 0.1, True)]
    settings += [(n, g, ONE_IN_TEN, False) for n, g in ((200, 20), (2000, 20), (375, 7))]
    for images, clusters, correlation, unequal in settings:
        cells, naive = [], 0
        for share in (0.70, 0.85, 0.95):
            covered = 0
            for _ in range(TRIALS):
                if clusters:
                    counts = sizes(rng, clusters, images, unequal)
                    if correlation == ONE_IN_TEN:
                        chances = 1 - min(1.0, 10 * (1 - share)) * (rng.random(clusters) < 0.1)
                    else:
                        spread = 1 / correlation - 1 if correlation else 0.0
                        chances = (
                            rng.beta(share * spread, (1 - share) * spread, clusters)
                            if spread
                            else share
                        )

                    right = rng.random(counts.sum()) < np.repeat(
                        np.broadcast_to(chances, clusters), counts
                    )
                    low, high, _ = share_interval(right, names(counts))
                    alone = share_interval(right)
                    naive += share == 0.85 and alone[0] <= share <= alone[1]
                else:
                    low, high, _ = share_interval(rng.random(images) < share)

                covered += low <= share <= high

            # Bad groups, a tenth of all, cannot lower the accuracy below 0.9
            known = correlation != ONE_IN_TEN or share > 0.9
            cells.append(f"{covered / TRIALS:.3f}" if known else "")

        if clusters:
            group = f"{clusters}{', unequal' if unequal else ''}"
            how = "one group in ten" if correlation == ONE_IN_TEN else f"correlated {correlation:g}"
            row(images, group, how, *cells, f"{naive / TRIALS:.3f}")
        else:
            row(images, "none", "", *cells, "")


def drawn(
    rng: np.random.Generator, counts: Array, worse: float, better: float, vary: float
) -> tuple[Array, Array]:
    """Draw which images changed for the worse and for the better."""

    def rates(share: float) -> Array:
        if vary == ONE_IN_TEN:
            factor = 10.0 * (rng.random(len(counts)) < 0.1)
        else:
            factor = rng.gamma(1 / vary**2, vary**2, len(counts)) if vary else np.ones(len(counts))
        return np.minimum(0.45, share * factor)

    one, other = np.repeat(rates(worse), counts), np.repeat(rates(better), counts)
    place = rng.random(len(one))
    return place < one, place > 1 - other


def differences() -> None:
    """How often a drop exactly at the limit is accepted, and how often it is refused."""
    rng = np.random.default_rng(1)
    head(
        "images",
        "groups",
        "rates vary",
        "drop, others better",
        "level",
        "accepted",
        "refused",
        "as if independent",
        "Tango",
    )

    settings = [
        (n, 0, 0.0, drop, better)
        for n in (50, 200, 2000)
        for drop, better in ((0.02, 0.0), (0.01, 0.02))
    ]
    settings += [
        (n, g, v, drop, better)
        for n, g in ((600, 30), (600, 15), (2000, 20))
        for v in (0.0, 1.0, 2.0)
        for drop, better in ((0.02, 0.02), (0.01, 0.03))
    ]

    settings += [(200, 20, 1.0, 0.02, 0.02), (600, 30, 2.0, 0.02, 0.0), (375, 7, 1.0, 0.02, 0.02)]
    settings += [
        (n, g, ONE_IN_TEN, 0.02, better)
        for n, g in ((600, 30), (2000, 20), (375, 7))
        for better in (0.0, 0.02)
    ]
    for images, clusters, vary, drop, better in settings:
        for level in (0.05, 0.0125):
            told = np.zeros(6)
            for _ in range(TRIALS):
                counts = (
                    sizes(rng, clusters, images, unequal=False)
                    if clusters
                    else np.ones(images, int)
                )
                worse, up = drawn(rng, counts, drop + better, better, vary)
                groups = names(counts) if clusters else None
                observed = float(worse.mean()), float(up.mean())
                low, high = difference_bounds(
                    *observed, difference_design(worse, up, groups), 1 - level
                )
                plain = difference_bounds(*observed, Design(images=len(worse)), 1 - level)
                score = (
                    (0.0, 1.0)
                    if clusters
                    else tango(int(worse.sum()), int(up.sum()), len(worse), 1 - level)
                )
                told += (
                    high <= drop,
                    low > drop,
                    plain[1] <= drop,
                    plain[0] > drop,
                    score[1] <= drop,
                    score[0] > drop,
                )

            part = [f"{100 * value / TRIALS:.1f}" for value in told]
            how = "one group in ten" if vary == ONE_IN_TEN else vary
            row(
                images,
                clusters or "none",
                how if clusters else "",
                f"{100 * drop:g}, {100 * better:g} points",
                f"{100 * level:g} %",
                f"{part[0]} %",
                f"{part[1]} %",
                f"{part[2]} / {part[3]} %" if clusters else "",
                "" if clusters else f"{part[4]} / {part[5]} %",
            )


def temperatures() -> None:
    """Change of the NLL on 4,000 other images by a temperature fitted on few: mean and worst."""
    rng = np.random.default_rng(2)
    head(
        "val images",
        "accuracy",
        "true temperature",
        "kept",
        "NLL, mean",
        "worst of 200",
        "best possible",
    )

    def make(count: int, spread: float, true: float) -> tuple[Array, Array]:
        logits = rng.normal(0, spread, (count, 4))
        place = rng.random(count)[:, None] < softmax(logits, axis=1).cumsum(1)
        return logits * true, place.argmax(1)

    def nll(logits: Array, labels: Array, scale: float) -> float:
        return float(-log_softmax(logits / scale, axis=1)[np.arange(len(labels)), labels].mean())

    for spread in (3.0, 12.0):
        for images in (20, 50, 200, 1000):
            for true in (0.6, 1.0, 1.8):
                logits, labels = make(4000, spread, true)
                found = [fit_temperature(*make(images, spread, true)) for _ in range(200)]
                change = [nll(logits, labels, value) - nll(logits, labels, 1.0) for value in found]
                best = nll(logits, labels, true) - nll(logits, labels, 1.0)
                row(
                    images,
                    f"{(logits.argmax(1) == labels).mean():.2f}",
                    true,
                    f"{np.mean(np.array(found) != 1):.2f}",
                    f"{np.mean(change):+.4f}",
                    f"{max(change):+.4f}",
                    f"{best:+.4f}",
                )


def thresholds() -> None:
    """How often an abstain threshold falls short of the precision of 0.95 that it promises."""
    rng = np.random.default_rng(3)
    head("val images", "proven", "of these broken", "the empirical share's, broken", "answered")
    many = rng.normal(0, 4, (100_000, 4))
    many_labels = (rng.random(len(many))[:, None] < softmax(many, axis=1).cumsum(1)).argmax(1)
    top, right = softmax(many, axis=1).max(1), many.argmax(1) == many_labels

    for images in (100, 200, 500, 2000):
        proven = broken = observed = wrong = 0
        answered = []
        for _ in range(500):
            rows = rng.integers(0, len(many), images)
            threshold, sure = abstain_threshold(
                softmax(many[rows], axis=1), many_labels[rows], 0.95
            )
            if threshold is not None and sure:
                proven += 1
                answered.append((top >= threshold).mean())
                broken += right[top >= threshold].mean() < 0.95

            order = np.sort(top[rows])
            good = [value for value in order if right[rows][top[rows] >= value].mean() >= 0.95]
            if good:
                observed += 1
                wrong += right[top >= min(good)].mean() < 0.95

        share = f"{np.mean(answered):.2f}" if answered else ""
        row(images, f"{proven} of 500", broken, f"{wrong} of {observed}", share)


def races(bundle: Path, trials: int) -> None:
    """Time a file against two copies of itself; count "faster" and "slower" verdicts."""
    core, image = bundle / "variants" / "fp32-core.onnx", bundle / "golden" / "00.png"

    faster = slower = 0
    widths = []
    for _ in range(trials // 2):
        for item in race([core, core, core], image)[1:]:
            faster += item.ratio_high < 1
            slower += item.ratio_low > 1
            widths.append(item.ratio_high - item.ratio_low)

    print(
        f"{trials} races of a file against itself, {PROCESSES} processes each: {faster} faster, {slower} slower; "
        f"median width of the 95 % interval {np.median(widths):.3f}"
    )


def main() -> None:
    """Print one table, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {
        "shares": shares,
        "differences": differences,
        "temperatures": temperatures,
        "thresholds": thresholds,
    }

    parser.add_argument("--what", choices=[*tables, "races", "all"], default="all")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    options = parser.parse_args()
    print(json.dumps(machine()))

    if options.what == "races":
        races(options.bundle, options.trials)
        return

    for name, table in tables.items():
        if options.what in (name, "all"):
            print(f"\n{name}\n")
            table()


if __name__ == "__main__":
    main()
