"""int8 is a decision, not a flag: is a candidate as accurate as the reference on the same images, and which to ship?

    found = paired(reference_right, candidate_right)     # two arrays of booleans over the same images
    found.drop, found.low, found.high                    # in shares, with one-sided 95 % bounds
    found.verdict(limit=0.01)                            # accepted, refused, inconclusive

Bounds of a paired difference of proportions by Tango's score method (Statistics in Medicine 17, 1998), which holds its
level where few images, or none, change sides. Where several candidates are looked at until one is accepted, the bounds
hold for all of them together (Bonferroni): else four looks would accept a bad one up to four times as often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Verdict = Literal["accepted", "refused", "inconclusive", "unproven on target"]

LEVEL = 0.05  # chance of accepting, or refusing, against the truth


@dataclass(frozen=True, kw_only=True)
class Paired:
    """images compared; worse: right before and wrong now; better: the other way. drop, low, high in shares; looks: how
    many such comparisons the bounds hold for together."""

    images: int
    worse: int
    better: int
    drop: float
    low: float
    high: float
    looks: int = 1

    def verdict(self, limit: float) -> Verdict:
        """accepted: at most `limit` is lost, with 95 % confidence; refused: more is, with the same; else neither."""
        if self.high <= limit:
            return "accepted"
        return "refused" if self.low > limit else "inconclusive"

    def images_to_settle(self, limit: float) -> int:
        """Images that would settle it, at this share of changed sides; one look and none changed: about 2.7 / limit."""
        z = _z(self.looks)
        share = (self.worse + self.better) / max(1, self.images)
        gap = max(abs(limit - self.drop), limit / 10)
        return math.ceil(max(z * z * (1 - limit) / limit, z * z * share / gap**2))


def _z(looks: int) -> float:
    return NormalDist().inv_cdf(1 - LEVEL / looks)


def paired(reference: Array, candidate: Array, looks: int = 1) -> Paired:
    """Two boolean arrays (N,), whether each image was answered right, in the same order."""
    worse, better = int((reference & ~candidate).sum()), int((~reference & candidate).sum())
    images = len(reference)
    low, high = bounds(worse, better, images, looks)
    return Paired(images=images, worse=worse, better=better, drop=(worse - better) / max(1, images), low=low, high=high,
                  looks=looks)  # fmt: skip


def bounds(worse: int, better: int, images: int, looks: int = 1) -> tuple[float, float]:
    """One-sided 95 % bounds of the true drop: where Tango's score statistic reaches the normal quantile."""
    if images == 0:
        return -1.0, 1.0

    def score(drop: float) -> float:
        a = 2.0 * images
        b = -worse - better + (2 * images - worse + better) * drop
        c = -better * drop * (1 - drop)
        root = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # share "better", most likely at this drop
        variance = images * (2 * root + drop * (1 - drop))
        return (worse - better - images * drop) / math.sqrt(variance) if variance > 0 else math.inf

    def solve(wanted: float, low: float, high: float) -> float:
        for _ in range(60):  # score falls as drop rises
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return (low + high) / 2

    drop = (worse - better) / images
    return solve(_z(looks), -1.0, drop), solve(-_z(looks), drop, 1.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant in the decision table, on val. ratio: its latency over fp32's, median of interleaved runs;
    ratio_high: upper end of its 95 % interval. p50_ms, p95_ms: one thread, one photograph.

    in_8_bits: operators that run in 8 bits (0 for the other precisions) of heavy ones; kept: those left in float.
    verdict: fp32 is the reference. reason: in words, what the verdict rests on.
    """

    name: str
    verdict: str
    reason: str
    accuracy: float
    paired: Paired | None = None
    sqnr_db: float | None = None
    in_8_bits: int = 0
    heavy: int = 0
    kept: tuple[str, ...] = ()
    ratio: float | None = None
    ratio_high: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    size_bytes: int = 0
    peak_rss_bytes: int | None = None

    @property
    def shippable(self) -> bool:
        """Whether it may become model.onnx."""
        return self.verdict in ("reference", "accepted")


def judge(found: Paired, limit: float, ratio_high: float | None) -> tuple[Verdict, str]:
    """Verdict on a candidate and its reason. ratio_high: upper bound of its latency over fp32's; None: not measured."""
    verdict = found.verdict(limit)
    points = f"{found.drop * 100:+.2f} points [{found.low * 100:+.2f}, {found.high * 100:+.2f}]"
    if ratio_high is not None and ratio_high >= 1:
        return "refused", f"not faster than fp32: ratio up to {ratio_high:.2f}; accuracy drop {points}"
    if verdict != "accepted":
        more = f"; about {found.images_to_settle(limit)} val images would settle it" * (verdict == "inconclusive")
        return verdict, f"accuracy drop {points} on {found.images} images, limit {limit * 100:.2f}{more}"
    if ratio_high is None:
        return (
            "unproven on target",
            f"accuracy drop {points}; its latency on the target is unknown. Try --latency FILE",
        )
    return "accepted", f"accuracy drop {points}; latency at most {ratio_high:.2f} of fp32's"


def choose(
    rows: Sequence[Row], p95_ms: float | None, size_mb: float | None, memory_mb: float | None
) -> tuple[Row, str]:
    """(row, which budget it misses): the fastest shippable row that meets every budget, the smaller of two as fast.

    Where none does, the row that misses by the smallest factor, and that budget in words.
    """

    def misses(row: Row) -> list[tuple[float, str]]:
        measured = (("p95 ms", row.p95_ms, p95_ms), ("size in MB", row.size_bytes / 1e6, size_mb),
                    ("memory in MB", row.peak_rss_bytes and row.peak_rss_bytes / 1e6, memory_mb))  # fmt: skip
        return [(value / limit, f"{name} {value:.4g}, limit {limit:g}") for name, value, limit in measured
                if limit is not None and value is not None and not value <= limit]  # fmt: skip

    allowed = [row for row in rows if row.shippable]
    meeting = [row for row in allowed if not misses(row)]
    if meeting:
        return min(meeting, key=lambda row: (row.p50_ms or 0, row.size_bytes)), ""
    nearest = min(allowed, key=lambda row: max(misses(row))[0])
    return nearest, max(misses(nearest))[1]
