"""What a device sees without drift, from held-out images: the reference of runtime/drift.py.

    reference = make_reference(seen, classes)

Each rate is an upper confidence bound, so that images like the held-out ones exceed none of them,
with a confidence of 99 % for all events of a stream together; cluster-robust where images have
groups. The fewer images or groups, the higher the rates, and the more drift it takes to be found. The
frames' own figures do not depend on the model, so that training images count as well, as far as the
test images do not contradict them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ftkit_export.proof.intervals import PROVEN_SHARE, clopper_pearson, design, has_groups
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.drift import FRAME, SAMPLED, STREAMS, Event, Reference

ERROR = 0.01  # of all rates of a stream together
# Shares of the held-out images in the tails that are watched; 0: none of them
SCORE_TAILS = (0.2, 0.05, 0.01, 0.0)
CONFIDENCE_TAILS = (0.2, 0.05, 0.01)
DIRECTION_TAILS = (0.05, 0.0)
# Marks of the event that all images shift: octiles
OCTILES = tuple(number / 8 for number in range(1, 8))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Held-out images as the model sees them: scores (N,), probabilities (N,) of the answers, and
    answers (N,) by class number; groups: one name an image.

    coordinates (M, K), of test images, which the shipped weights have not seen, and frames (F, 5), of
    the same test images first and then of others, have groups of their own.
    """

    scores: Array
    probabilities: Array
    answers: Array
    groups: Sequence[str]
    coordinates: Array
    test_groups: Sequence[str]
    frames: Array
    frame_groups: Sequence[str]


def make_reference(seen: Seen, classes: Sequence[str]) -> Reference:
    """The reference for a bundle. Needs at least one image of each kind."""
    tails = [
        *_tails("score", "score", seen.scores, True, SCORE_TAILS),
        *_tails("confidence", "confidence", seen.probabilities, False, CONFIDENCE_TAILS),
    ]
    for number, name in enumerate(classes):
        answered = (seen.answers == number).astype(float)
        tails += [("classes", f"class {name}", answered, above, (0.5,)) for above in (True, False)]
    directions = [f"direction {number}" for number in range(seen.coordinates.shape[1])]
    for stream, names, values in (
        ("embedding", directions, seen.coordinates),
        ("frame", FRAME, seen.frames),
    ):
        for value, column in zip(names, values.T, strict=True):
            for above in (True, False):
                tails += _tails(stream, value, column, above, DIRECTION_TAILS)

    of_stream = {"embedding": seen.test_groups, "frame": seen.frame_groups}
    counts = {name: sum(tail[0] == name for tail in tails) for name in STREAMS}
    events = []
    for stream, value, column, above, marks in tails:
        beyond = np.stack([column > mark if above else column < mark for mark in marks])
        groups = of_stream.get(stream, seen.groups)
        shown = beyond.mean(0)
        level = 1 - ERROR / counts[stream]
        rate = _highest(shown, groups, level)
        if stream == "frame":
            # Training images are no evidence against a test split that another camera took
            of_test = shown[: len(seen.test_groups)]
            if of_test.mean() > rate:
                rate = _highest(of_test, seen.test_groups, level)
        if rate < 1:  # else nothing that happens would be too often
            events.append(
                Event(
                    stream=stream,
                    value=value,
                    above=above,
                    marks=[float(mark) for mark in marks],
                    rate=rate,
                )
            )

    grouped = has_groups(seen.groups)
    return Reference(
        events=events,
        classes=list(classes),
        directions=seen.coordinates.shape[1],
        images=len(seen.scores),
        groups=len(set(seen.groups)) if grouped else None,
        block=_group_size(seen.groups) if grouped else 1,
        sampled=SAMPLED,
    )


def _tails(
    stream: str, value: str, column: Array, above: bool, shares: Sequence[float]
) -> list[tuple[str, str, Array, bool, Sequence[float]]]:
    """Events beyond each of these shares of the images, and the event that all shift."""
    quantiles = [1 - share if above else share for share in shares]
    marks = [[mark] for mark in np.quantile(column, quantiles)]
    marks.append(np.unique(np.quantile(column, OCTILES)).tolist())
    return [(stream, value, column, above, each) for each in marks]


def _highest(shown: Array, groups: Sequence[str], level: float) -> float:
    """Upper bound of the mean of an event over images, at confidence `level`. shown: (N,), 0 to 1.

    Where images show it in part, its variance is smaller than that of a share with its mean, by
    a factor that counts as so many more images.
    """
    sample = design(shown, groups, PROVEN_SHARE)
    if sample.df <= 0:
        return 1.0
    mean = float(shown.mean())
    count = sample.images / sample.effect
    count *= (float(stats.norm.ppf(level)) / sample.quantile(level)) ** 2
    if 0 < mean < 1:
        count *= mean * (1 - mean) / max(float(shown.var()), 1e-12)
    return clopper_pearson(mean, count, level)[1]


def _group_size(groups: Sequence[str]) -> int:
    """Images of a typical image's group."""
    names, sizes = np.unique(np.array(groups), return_counts=True)
    sizes = np.where(names == "", 1, sizes)
    return max(1, round(float((sizes**2).sum() / sizes.sum())))
