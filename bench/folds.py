"""How often does the fold-by-fold decision on a stage err? Simulated.

    python bench/folds.py                      # answers drawn with a planted gain
    python bench/folds.py --what features      # heads fitted to synthetic features, stages 1 point apart
    python bench/folds.py --what divisions     # the same, repeated on other divisions into folds

Each trial goes through the folds as `ftkit train` does: after each fold the paired bounds are looked
at, and the stage is settled when they exclude zero, or lie within one point of it. "Surely" against
the truth is an error; 5 % a side is the most that is meant, over all looks together.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from ftkit.training.closed_form import fit_head
from ftkit.training.fold_decision import DIVISIONS, NARROWED
from ftkit.training.folds import AUTO
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.arrays import Array

TRIALS = 400
ACCURACY = 0.8
CHANGED = 0.08  # share of answers that differ between the stages, beside the planted gain
GAINS = (-0.03, -0.01, 0.0, 0.01, 0.03)
LIMIT = 0.01
FEATURES = 24
STRENGTH = (0.01,)
TRUTH = 20_000  # images on which the true gain is measured


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
    """(better, worse, equal or open; folds trained), as training.fold_decision decides."""
    names = [f"g{group}" for group in groups]
    for last in range(AUTO):
        rows = np.flatnonzero(folds <= last)
        looks = 2 if last == AUTO - 1 else 2 * (AUTO - 1)
        found = paired(before[rows], after[rows], [names[row] for row in rows], looks=looks)
        if found.high < 0:
            return "better", last + 1
        if found.low > 0:
            return "worse", last + 1
        if max(-found.low, found.high) <= LIMIT:
            return "equal", last + 1
    return "open", AUTO


def planted(trials: int) -> None:
    """Print a row per planted gain, for answers drawn with it."""
    print(
        "| groups | spread | gain, points | surely better | surely worse | surely within 1 | open | folds trained |"
    )
    print("|---|---|---|---|---|---|---|---|")

    for count, size, spread in ((37, 50, 0.0), (37, 50, 1.0), (200, 10, 1.0), (2000, 1, 0.0)):
        for gain in GAINS:
            rng = np.random.default_rng(0)
            verdicts: Counter[str] = Counter()
            trained = 0
            for _ in range(trials):
                groups = np.repeat(np.arange(count), size)
                folds = rng.permutation(np.arange(count) % AUTO)[groups]
                verdict, used = decide(*answers(groups, gain, spread, rng), groups, folds)
                verdicts[verdict] += 1
                trained += used

            _row(f"{count} x {size} | {spread:g} | {100 * gain:+.0f}", verdicts, trained, trials)


def _row(first: str, verdicts: Counter[str], trained: int, trials: int) -> None:
    shares = [verdicts[name] / trials for name in ("better", "worse", "equal", "open")]
    cells = " | ".join(f"{share:.1%}" for share in shares)
    print(f"| {first} | {cells} | {trained / trials:.1f} |", flush=True)


class World:
    """Synthetic features of two classes in groups: what is seen of them is blurred by noise.

    A stage is a noise level; its head is fitted in closed form on what it sees.
    """

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._direction = rng.standard_normal(FEATURES)
        self._direction /= np.linalg.norm(self._direction)

    def draw(self, groups: Array) -> tuple[Array, Array]:
        """(features (n, FEATURES), labels (n,)); every group has an offset of its own."""
        labels = self._rng.integers(0, 2, len(groups))
        offsets = 0.4 * self._rng.standard_normal((groups.max() + 1, FEATURES))
        features = self._rng.standard_normal((len(groups), FEATURES)) + offsets[groups]
        return features + np.outer(2.0 * labels - 1, 1.1 * self._direction), labels

    def seen(self, features: Array, noise: float) -> Array:
        """The features as a stage sees them."""
        return features + noise * self._rng.standard_normal(features.shape)


def _trial(seed: int, noises: tuple[float, float]) -> tuple[str, int, float]:
    """(verdict, folds trained, true gain) of one set of 2,000 images in 40 groups."""
    rng = np.random.default_rng(seed)
    world = World(rng)
    groups = np.repeat(np.arange(40), 50)
    features, labels = world.draw(groups)
    folds = rng.permutation(np.arange(40) % AUTO)[groups]
    masks = [folds == fold for fold in range(AUTO)]
    fresh, truth = world.draw(np.repeat(np.arange(TRUTH // 50), 50))

    right, true = [], []
    for noise in noises:
        head = fit_head(world.seen(features, noise), labels, masks, 2, strengths=STRENGTH)
        right.append(head.logits.argmax(1) == labels)
        logits = world.seen(fresh, noise) @ head.weight.T + head.bias
        true.append(float((logits.argmax(1) == truth).mean()))

    return *decide(right[0], right[1], groups, folds), true[1] - true[0]


def _trial_repeated(seed: int, noises: tuple[float, float]) -> tuple[str, int, float]:
    """(verdict, divisions, true gain): heads of several divisions into folds compared together, as
    of a head stage."""
    rng = np.random.default_rng(seed)
    world = World(rng)
    groups = np.repeat(np.arange(40), 50)
    names = [f"g{group}" for group in groups]
    features, labels = world.draw(groups)
    seen = [world.seen(features, noise) for noise in noises]
    fresh, truth = world.draw(np.repeat(np.arange(TRUTH // 50), 50))
    fresh_seen = [world.seen(fresh, noise) for noise in noises]

    right: list[list[Array]] = [[], []]
    width = np.inf
    while True:
        folds = rng.permutation(np.arange(40) % AUTO)[groups]
        masks = [folds == fold for fold in range(AUTO)]
        heads = [fit_head(each, labels, masks, 2, strengths=STRENGTH) for each in seen]
        for answers_, head in zip(right, heads, strict=True):
            answers_.append(head.logits.argmax(1) == labels)

        before, after = (np.stack(answers_, axis=1) for answers_ in right)
        found = paired(before, after, names)
        if len(right[0]) == DIVISIONS or found.high - found.low > NARROWED * width:
            break
        width = found.high - found.low

    verdict = "better" if found.high < 0 else "worse" if found.low > 0 else "open"
    if verdict == "open" and max(-found.low, found.high) <= LIMIT:
        verdict = "equal"
    logits = [
        each @ head.weight.T + head.bias for each, head in zip(fresh_seen, heads, strict=True)
    ]
    before_true, after_true = (float((each.argmax(1) == truth).mean()) for each in logits)
    return verdict, len(right[0]), after_true - before_true


def on_features(trials: int, *, repeated: bool) -> None:
    """Print a row per planted stage: its noise makes it about a point better, worse or equal."""
    last = "divisions" if repeated else "folds trained"
    print(f"| true gain, points | surely better | surely worse | surely within 1 | open | {last} |")
    print("|---|---|---|---|---|---|")
    for noises in ((0.3, 0.45), (0.45, 0.45), (0.45, 0.3), (0.3, 0.8)):
        verdicts: Counter[str] = Counter()
        trained = 0
        gains = []
        for seed in range(trials):
            verdict, used, gain = (_trial_repeated if repeated else _trial)(seed, noises)
            verdicts[verdict] += 1
            trained += used
            gains.append(gain)
        _row(f"{100 * np.mean(gains):+.1f}", verdicts, trained, trials)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--what", choices=("answers", "features", "divisions"), default="answers")
    options = parser.parse_args()
    if options.what == "answers":
        planted(options.trials)
    else:
        on_features(options.trials, repeated=options.what == "divisions")


if __name__ == "__main__":
    main()
