"""What a device sees without drift, from held-out images: the reference of runtime/drift.py.

    reference = make_reference(seen, classes)

Each rate is an upper confidence bound, so that images like the held-out ones exceed none of them,
with a confidence of 99 % for all events of a stream together; cluster-robust where images have
groups. The fewer images or groups, the higher the rates, and the more drift it takes to be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ftkit_export.proof.intervals import PROVEN_SHARE, clopper_pearson, design, has_groups
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.drift import STREAMS, Event, Reference

ERROR = 0.01  # of all rates of a stream together
# Shares of the held-out images in the tails that are watched; 0: none of them
SCORE_TAILS = (0.5, 0.2, 0.05, 0.01, 0.0)
CONFIDENCE_TAILS = (0.5, 0.2, 0.05, 0.01)
DIRECTION_TAILS = (0.2, 0.05)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Held-out images as the model sees them: scores (N,), probabilities (N,) of the answers, and
    answers (N,) by class number; groups: one name an image.

    coordinates (M, K), with groups of their own: of images that the shipped weights have not seen.
    """

    scores: Array
    probabilities: Array
    answers: Array
    groups: Sequence[str]
    coordinates: Array
    coordinate_groups: Sequence[str]


def make_reference(seen: Seen, classes: Sequence[str]) -> Reference:
    """The reference for a bundle. Needs at least one image of each kind."""
    tails = [
        *_tails("score", "score", seen.scores, True, SCORE_TAILS),
        *_tails("confidence", "confidence", seen.probabilities, False, CONFIDENCE_TAILS),
    ]
    for number, name in enumerate(classes):
        answered = (seen.answers == number).astype(float)
        tails += [("classes", f"class {name}", answered, above, 0.5) for above in (True, False)]
    for number, column in enumerate(seen.coordinates.T):
        for above in (True, False):
            tails += _tails("embedding", f"direction {number}", column, above, DIRECTION_TAILS)

    counts = {name: sum(tail[0] == name for tail in tails) for name in STREAMS}
    events = []
    for stream, value, column, above, threshold in tails:
        shown = column > threshold if above else column < threshold
        groups = seen.coordinate_groups if stream == "embedding" else seen.groups
        rate = _highest(shown, groups, 1 - ERROR / counts[stream])
        if rate < 1:  # else nothing that happens would be too often
            events.append(
                Event(
                    stream=stream,
                    value=value,
                    above=above,
                    threshold=float(threshold),
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
    )


def _tails(
    stream: str, value: str, column: Array, above: bool, shares: Sequence[float]
) -> list[tuple[str, str, Array, bool, float]]:
    """Events beyond each of these shares of the images."""
    quantiles = [1 - share if above else share for share in shares]
    return [
        (stream, value, column, above, threshold) for threshold in np.quantile(column, quantiles)
    ]


def _highest(shown: Array, groups: Sequence[str], level: float) -> float:
    """Upper bound of the share of images that show an event, at confidence `level`."""
    sample = design(shown.astype(float), groups, PROVEN_SHARE)
    if sample.df <= 0:
        return 1.0
    count = sample.images / sample.effect
    count *= (float(stats.norm.ppf(level)) / sample.quantile(level)) ** 2
    return clopper_pearson(float(shown.mean()), count, level)[1]


def _group_size(groups: Sequence[str]) -> int:
    """Images of a typical image's group."""
    names, sizes = np.unique(np.array(groups), return_counts=True)
    sizes = np.where(names == "", 1, sizes)
    return max(1, round(float((sizes**2).sum() / sizes.sum())))
