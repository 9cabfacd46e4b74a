"""Score every depth of a network by a linear head on its pooled features, out of fold.

    scored = score(candidates, features, labels, masks, groups)
    kept, dropped = worth_going_on(scored, groups)

Heads in closed form rank networks as training does, in seconds; they underrate shallow ones, whose
last blocks gain most from training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftkit.searching.candidates import Candidate
from ftkit.searching.front import Point
from ftkit.training.closed_form import STRENGTHS, fit_head
from ftkit_export.proof.decision import paired
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.arrays import Array

COARSE = STRENGTHS[::3]  # of the ridge penalty: enough to rank networks by, in a third of the time


def score(
    space: Sequence[Candidate],
    features: Mapping[str, Array],
    labels: Array,
    masks: Sequence[Array],
    groups: Sequence[str],
    classes: int,
) -> list[Point]:
    """Points of one backbone at one input size, not yet timed.

    features: block name -> (n, features), of depths mean and maximum; masks: whether each image is
    held out, (n,) bool per fold.
    """
    points = []
    for candidate in space:
        values = features[candidate.cut]
        if candidate.cut and candidate.pooling == "mean":
            values = values[:, : values.shape[1] // 2]
        head = fit_head(values, labels, masks, classes, strengths=COARSE)
        points.append(as_point(candidate, head.logits.argmax(1) == labels, groups))
    return points


def as_point(candidate: Candidate, right: Array, groups: Sequence[str]) -> Point:
    """A point that is not timed. right: whether each image was answered correctly, (n,) bool."""
    low, high, _ = share_interval(right, groups)
    return Point(
        candidate=candidate,
        precision="fp32",
        right=right,
        accuracy=float(right.mean()),
        low=low,
        high=high,
    )


@dataclass(frozen=True)
class Dropped:
    """A corner of the space that is not searched further, and why."""

    backbone: str
    size: int
    reason: str


def worth_going_on(
    corners: Mapping[tuple[str, int], Sequence[Point]], groups: Sequence[str]
) -> list[Dropped]:
    """Corners (backbone, input size) that another one with no more multiplications surely beats.

    corners: their points on a part of the images. Surely: the best of one against the best of the
    other, paired, 95 % for all corners together.
    """
    best = {key: max(points, key=lambda point: point.accuracy) for key, points in corners.items()}
    dropped = []
    for key, point in best.items():
        for other, rival in best.items():
            cheaper = rival.candidate.multiplications <= point.candidate.multiplications
            if other == key or not cheaper or rival.accuracy <= point.accuracy:
                continue
            compared = paired(point.right, rival.right, groups, looks=len(best))
            if compared.high < 0:
                reason = (
                    f"{rival.name.removesuffix(', fp32')} needs no more and is better: "
                    f"{rival.accuracy:.3f} instead of {point.accuracy:.3f} on {len(point.right)} images"
                )
                dropped.append(Dropped(key[0], key[1], reason))
                break
    return dropped
