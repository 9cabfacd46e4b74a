"""Score every depth of a network by a linear head on its pooled features, out of fold.

    scored = score(candidates, features, masks, judge)
    dropped = worth_going_on(scored, judge)

Heads in closed form rank networks in seconds. They do not show what training the last blocks would
bring, so the best are trained before one is picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.searching.candidates import Candidate
from ftkit.searching.front import Point
from ftkit.searching.judge import Judge
from ftkit.training.closed_form import STRENGTHS, fit_linear
from ftkit_export.runtime.arrays import Array

COARSE = STRENGTHS[::3]  # of the ridge penalty: enough to rank networks by, in a third of the time


def score(
    space: Sequence[Candidate],
    features: Mapping[str, Array],
    masks: Sequence[Array],
    judge: Judge,
) -> list[Point]:
    """Points of one backbone at one input size, not yet timed.

    features: block name -> (n, features), of depths mean and maximum; masks: whether each image is
    held out, (n,) bool per fold; judge: of these images.
    """
    points = []
    aim = judge.aim
    for candidate in space:
        parts = [features[name] for name in candidate.cut.split("+")]
        if candidate.cut and candidate.pooling == "mean":
            parts = [values[:, : values.shape[1] // 2] for values in parts]
        values = np.concatenate(parts, axis=1)
        head = fit_linear(values, aim, masks, COARSE)
        points.append(judge.point(candidate, judge.evidence(head.logits)))
    return points


@dataclass(frozen=True)
class Dropped:
    """A corner of the space that is not searched further, and why."""

    backbone: str
    size: int
    reason: str


def worth_going_on(
    corners: Mapping[tuple[str, int], Sequence[Point]], judge: Judge
) -> list[Dropped]:
    """Corners (backbone, input size) of which every depth is surely beaten by one of another corner.

    corners: their points on a part of the images; judge: of that part. Beaten: by a network with no
    more multiplications; surely: paired, 95 % for all depths of all corners together.
    """
    every = [(key, point) for key, points in corners.items() for point in points]
    dropped = []
    for key, points in corners.items():
        rivals = [point for other, point in every if other != key]
        if not all(_beaten(point, rivals, judge, len(every)) for point in points):
            continue
        best = max(points, key=lambda point: point.score)
        rival = _rival(best, rivals)
        assert rival  # it is beaten
        reason = (
            f"{rival.name.removesuffix(', fp32')} needs no more and is better: {judge.text(rival.figure)} "
            f"instead of {judge.text(best.figure)} on {len(best.evidence)} images"
        )
        dropped.append(Dropped(key[0], key[1], reason))
    return dropped


def _rival(point: Point, rivals: Sequence[Point]) -> Point | None:
    """The most accurate of those that need no more multiplications."""
    most = point.candidate.multiplications
    cheaper = [rival for rival in rivals if rival.candidate.multiplications <= most]
    return max(cheaper, key=lambda rival: rival.score, default=None)


def _beaten(point: Point, rivals: Sequence[Point], judge: Judge, looks: int) -> bool:
    rival = _rival(point, rivals)
    if rival is None or rival.score <= point.score:
        return False
    return judge.compare(point, rival, looks).high < 0
