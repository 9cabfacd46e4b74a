"""Which of the scored and timed networks to take.

    front = non_dominated(points)
    choice = pick(points, budgets, 0.01, judge.compare, competed=250)
    choice.point, choice.against, choice.missed

A point is better than another if it is at least as accurate (by the metric of the task) and at least as
fast, and one of both is more so. The pick is the fastest that meets the budgets and surely loses no
more than `max_drop` against the most accurate of all. The bounds hold for all networks that competed
for a place on the front: the luckiest of many looks better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ftkit.searching.candidates import Candidate
from ftkit_export.proof.decision import Comparison
from ftkit_export.runtime.arrays import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A network in one precision.

    evidence: of each image, by a model that had not seen it, what networks are compared by
    (judge.Judge). figure: accuracy, or the task's own metric, with low and high, its 95 % interval, None
    where it is not known; rising: whether a higher figure is better. p50_ms, p95_ms: of the whole file, one
    thread, None where it was not timed; core_ms: p50 without preprocessing, of the front only.
    size_bytes: of the file. peak_rss_bytes, cold_ms: of one process that opens and runs it, the latter
    from a running interpreter to the first answer. trained: whether by stages, or a head in closed
    form. run: of a trained one, its folder in the search.
    """

    candidate: Candidate
    precision: str
    evidence: Array = field(repr=False)
    figure: float
    low: float | None
    high: float | None
    rising: bool = True
    p50_ms: float | None = None
    p95_ms: float | None = None
    core_ms: float | None = None
    size_bytes: int | None = None
    peak_rss_bytes: int | None = None
    cold_ms: float | None = None
    trained: bool = False
    run: str = ""

    @property
    def score(self) -> float:
        """By which points are ordered: higher is better; below all others for a figure that is none."""
        score = self.figure if self.rising else -self.figure
        return score if math.isfinite(score) else -math.inf

    @property
    def cost(self) -> float:
        """By which points are compared: p50 in ms or, where it was not timed, millions of
        multiplications."""
        return self.candidate.multiplications / 1e6 if self.p50_ms is None else self.p50_ms

    @property
    def name(self) -> str:
        """For people."""
        kind = f"{self.candidate.name}, {self.precision}"
        return f"{kind}, trained" if self.trained else kind


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pick, or the nearest to the budgets.

    against: the most accurate point, and the paired comparison with it (None for itself). missed:
    budget -> by how much it is exceeded, as a factor; empty for a pick. `max_drop` is one of them where
    it was asked for, and all that meet the others surely lose more. open: faster points that may lose as
    little, but it is not settled, with their comparison.
    """

    point: Point
    best: Point
    against: Comparison | None
    missed: Mapping[str, float]
    open: Sequence[tuple[Point, Comparison]]


# (best, point, looks) -> what is lost from one to the other
Compare = Callable[[Point, Point, int], Comparison]


def non_dominated(points: Sequence[Point]) -> list[Point]:
    """The front, fastest first: no other timed point is as fast and as accurate.

    Where none was timed, by multiplications.
    """
    timed = sorted(_comparable(points), key=lambda point: (point.cost, -point.score))
    front: list[Point] = []
    for point in timed:
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def _comparable(points: Sequence[Point]) -> list[Point]:
    """Those that were timed; where none was, those of which there is a file."""
    timed = [point for point in points if point.p50_ms is not None]
    return timed or [point for point in points if point.size_bytes is not None]


def over(point: Point, budgets: Mapping[str, float]) -> dict[str, float]:
    """Budgets (p50_ms, p95_ms, size_mb, memory_mb) that a point exceeds, and by what factor."""
    figures = {
        "p50_ms": point.p50_ms,
        "p95_ms": point.p95_ms,
        "size_mb": point.size_bytes and point.size_bytes / 1e6,
        "memory_mb": point.peak_rss_bytes and point.peak_rss_bytes / 1e6,
    }
    factors = {
        name: (figures[name] or math.inf) / limit for name, limit in budgets.items() if limit
    }
    return {name: factor for name, factor in factors.items() if factor > 1}


def pick(
    points: Sequence[Point],
    budgets: Mapping[str, float],
    max_drop: float,
    compare: Compare,
    *,
    competed: int = 1,
) -> Choice:
    """Choose among timed points.

    budgets: as for `over`, and "max_drop" where it was asked for. competed: networks of which these
    are the best.
    """
    asked = "max_drop" in budgets
    budgets = {name: limit for name, limit in budgets.items() if name != "max_drop"}
    front = non_dominated(points)
    best = max(front, key=lambda point: point.score)
    meeting = non_dominated([point for point in points if not over(point, budgets)])
    looks = max(1, competed - 1, len({*front, *meeting}) - 1)
    if not meeting:
        nearest = min(_comparable(points), key=lambda point: max(over(point, budgets).values()))
        return Choice(
            point=nearest,
            best=best,
            against=None if nearest is best else compare(best, nearest, 1),
            missed=over(nearest, budgets),
            open=[],
        )

    unsettled: list[tuple[Point, Comparison]] = []
    for point in meeting:
        if point is best:
            break
        compared = compare(best, point, looks)
        verdict = compared.verdict(max_drop)
        if verdict == "accepted":
            return Choice(point=point, best=best, against=compared, missed={}, open=unsettled)
        if verdict == "inconclusive":
            unsettled.append((point, compared))

    point = max(meeting, key=lambda point: point.score)
    against = None if point is best else compare(best, point, looks)
    lost = against is not None and against.verdict(max_drop) == "refused" and not unsettled
    return Choice(
        point=point,
        best=best,
        against=against,
        missed={"max_drop": against.drop / max_drop if max_drop else math.inf}
        if asked and lost and against
        else {},
        open=[(each, compared) for each, compared in unsettled if each is not point],
    )
