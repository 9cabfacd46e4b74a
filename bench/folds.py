"""How often does the fold-by-fold decision on a stage err? Simulated.

    python bench/folds.py

Each trial draws right and wrong answers of a stage that stands and of one that follows, image by
image in groups, and goes through the folds as `ftkit train --folds` does: after each fold the paired
bounds are looked at, and the stage is settled when they exclude zero. "Surely" against the truth is
an error; 5 % a side is the most that is meant, over all looks together.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from ftkit_export.proof.decision import paired
from ftkit_export.runtime.arrays import Array

TRIALS = 400
FOLDS = 5
ACCURACY = 0.8
CHANGED = 0.08  # share of answers that differ between the stages, beside the planted gain
GAINS = (-0.03, -0.01, 0.0, 0.01, 0.03)


def answers(
    groups: Array, gain: float, spread: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """(before, after), whether each image is right (n,) bool. spread: standard deviation between
    groups of the logit of being right, and of the direction in which answers change."""
    count = groups.max() + 1
    middle = np.log(ACCURACY / (1 - ACCURACY)) * np.sqrt(1 + 0.35 * spread**2)
    share = 1 / (1 + np.exp(-(middle + spread * rng.standard_normal(count))))
    before = rng.random(len(groups)) < share[groups]

    # Of the changed answers, the balance of better over worse differs by group
    tilt = 0.02 * spread * rng.standard_normal(count)
    tilt -= np.average(tilt, weights=np.bincount(groups, minlength=count))
    net = (gain + tilt)[groups]
    better = (CHANGED + net) / 2 / max(1 - before.mean(), 1e-9)
    worse = (CHANGED - net) / 2 / max(before.mean(), 1e-9)
    draw = rng.random(len(groups))
    after = np.where(before, draw >= worse.clip(0, 1), draw < better.clip(0, 1))
    return before, after


def decide(before: Array, after: Array, groups: Array, folds: Array) -> tuple[str, int]:
    """(better, worse or open, folds trained), as training.folded decides."""
    names = [f"g{group}" for group in groups]
    for last in range(FOLDS):
        rows = np.flatnonzero(folds <= last)
        found = paired(before[rows], after[rows], [names[row] for row in rows], looks=FOLDS)
        if found.high < 0:
            return "better", last + 1
        if found.low > 0:
            return "worse", last + 1
    return "open", FOLDS


def main() -> None:
    """Print a row per planted gain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    options = parser.parse_args()
    print(
        "| groups | spread | gain, points | surely better | surely worse | open | folds trained |"
    )
    print("|---|---|---|---|---|---|---|")

    for count, size, spread in ((37, 50, 0.0), (37, 50, 1.0), (200, 10, 1.0), (2000, 1, 0.0)):
        for gain in GAINS:
            rng = np.random.default_rng(0)
            verdicts: Counter[str] = Counter()
            trained = 0
            for _ in range(options.trials):
                groups = np.repeat(np.arange(count), size)
                folds = rng.permutation(np.arange(count) % FOLDS)[groups]
                verdict, used = decide(*answers(groups, gain, spread, rng), groups, folds)
                verdicts[verdict] += 1
                trained += used

            shares = [verdicts[name] / options.trials for name in ("better", "worse", "open")]
            cells = " | ".join(f"{share:.1%}" for share in shares)
            print(
                f"| {count} x {size} | {spread:g} | {100 * gain:+.0f} | {cells} | {trained / options.trials:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
