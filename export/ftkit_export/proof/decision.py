"""Decide by evidence whether int8 ships: is a candidate as accurate as the reference?

    found = paired(reference_right, candidate_right, groups)     # two arrays of booleans over the same images
    found.drop, found.low, found.high                            # fractions, one-sided 95 % bounds
    found.verdict(limit=0.01)                                    # accepted, refused, inconclusive

The bounds are those of `intervals.difference_bounds`: valid where few predictions, or none, change,
and where images come in groups. Where several candidates are tested until one is accepted, they
hold for all of them jointly (Bonferroni): otherwise four looks would accept a bad one up to four
times as often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ftkit_export.proof.intervals import Design, difference_bounds, difference_design, ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.targets import Precision

Verdict = Literal["accepted", "refused", "inconclusive", "unproven on target"]

ERROR_RATE = 0.05  # probability of accepting, or refusing, wrongly
POWER = 0.8  # probability that the stated number of images settles a question
MOST_TIMES = 1000.0  # largest multiple of the present images that is suggested


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Accuracy of a candidate compared with the reference on the same images.

    images compared; worse: right before and wrong now; better: the other way (means, where the
    answers were repeated). drop, low, high: fractions; looks: number of comparisons that the bounds
    hold for jointly. clusters: number of groups, None where images have none and count as
    independent; effect: the design effect; df: degrees of freedom of Student's t (None: normal
    distribution).
    """

    images: int
    worse: float
    better: float
    drop: float
    low: float
    high: float
    looks: int = 1
    clusters: int | None = None
    effect: float = 1.0
    df: float | None = None

    def verdict(self, limit: float) -> Verdict:
        """Whether the drop is at most `limit`, with 95 % confidence.

        accepted: it is; refused: it exceeds it, with the same confidence; else inconclusive.
        """
        if self.high <= limit:
            return "accepted"
        return "refused" if self.low > limit else "inconclusive"

    def settled_by(self, limit: float) -> tuple[int, int | None] | None:
        """(images, clusters) that would settle it with probability POWER; None if too many.

        Too many: more than MOST_TIMES the present ones. Clusters: None where the images have no
        groups. Assumes that the observed shares of changed images are the true ones.

        New images will show other shares: bounds that just reach the limit at the observed ones
        would settle it only half of the time. So the bounds must clear the limit by as much as
        chance moves the drop, at POWER.
        """
        shares = self.worse / max(1, self.images), self.better / max(1, self.images)
        here = Design(
            images=self.images,
            clusters=self.clusters,
            effect=self.effect,
            df=math.inf if self.df is None else self.df,
        )

        chance = 0.0  # where no answer changed, none is expected to
        if self.worse or self.better:
            chance = float(stats.norm.ppf(POWER) / stats.norm.ppf(1 - ERROR_RATE / self.looks))

        def settled(factor: float) -> bool:
            low, high = difference_bounds(*shares, here.times(factor), 1 - ERROR_RATE / self.looks)
            return (
                high + chance * (high - self.drop) <= limit
                or low - chance * (self.drop - low) > limit
            )

        if self.images == 0 or (self.clusters or 2) < 2 or not settled(MOST_TIMES):
            return None

        few = 0.0
        many = MOST_TIMES

        for _ in range(40):
            middle = (few + many) / 2
            few, many = (few, middle) if settled(middle) else (middle, many)

        enough = here.times(many)
        return enough.images, enough.clusters

    @property
    def ground(self) -> str:
        """Number of images and groups that the bounds rest on, as text."""
        return ground(self.images, self.clusters)


def paired(
    reference: Array, candidate: Array, groups: Sequence[str] | None = None, looks: int = 1
) -> Paired:
    """Compare two boolean arrays (N,): whether each image was classified correctly.

    Both in the same order. groups: one name per image, "" for an image on its own. Arrays (N, R) are
    answers of R trainings with other folds; the means over them are compared, which vary less.
    """
    worse = (reference & ~candidate).astype(np.float64)
    better = (~reference & candidate).astype(np.float64)
    if worse.ndim == 2:
        worse, better = worse.mean(1), better.mean(1)

    images = len(reference)
    design = difference_design(worse, better, groups)
    shares = float(worse.sum()) / max(1, images), float(better.sum()) / max(1, images)
    low, high = difference_bounds(*shares, design, 1 - ERROR_RATE / looks)

    return Paired(
        images=images,
        worse=_plain(worse.sum()),
        better=_plain(better.sum()),
        drop=shares[0] - shares[1],
        low=low,
        high=high,
        looks=looks,
        clusters=design.clusters,
        effect=design.effect,
        df=None if math.isinf(design.df) else design.df,
    )


def _plain(count: float) -> float:
    """A whole number as int, as JSON and people like it."""
    return int(count) if count == int(count) else float(count)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant in the decision table, on val.

    ratio: latency relative to fp32, median of interleaved runs; ratio_high: upper end of its 95 %
    interval. p50_ms, p95_ms: one thread, one photograph. in_8_bits: number of heavy operators that
    run in int8 (0 for the other precisions), out of `heavy`; kept: those left in float. verdict:
    "reference" for fp32. reason: for the verdict, as text.
    """

    name: str
    precision: Precision
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


def judge_variant(
    comparison: Paired, limit: float, ratio_high: float | None
) -> tuple[Verdict, str]:
    """Verdict on a candidate, and its reason.

    ratio_high: upper bound of its latency relative to fp32; None: not measured.
    """
    verdict = comparison.verdict(limit)
    points = f"{comparison.drop * 100:+.2f} points [{comparison.low * 100:+.2f}, {comparison.high * 100:+.2f}]"

    if ratio_high is not None and ratio_high >= 1:
        return (
            "refused",
            f"not faster than fp32: ratio up to {ratio_high:.2f}; accuracy drop {points}",
        )

    if verdict == "inconclusive":
        reach = f"they settle a limit of {comparison.high * 100:.2f}, not of {limit * 100:.2f}"
        return (
            verdict,
            f"accuracy drop {points} on {comparison.ground}: {reach}; {what_would_settle(comparison, limit)}",
        )

    if verdict == "refused":
        return (
            verdict,
            f"accuracy drop {points} on {comparison.ground}, limit {limit * 100:.2f}",
        )

    if ratio_high is None:
        return (
            "unproven on target",
            f"accuracy drop {points}; its latency on the target is unknown. Try --latency FILE",
        )

    return "accepted", f"accuracy drop {points}; latency at most {ratio_high:.2f} of fp32's"


def what_would_settle(comparison: Paired, limit: float, question: str = "it") -> str:
    """How many images an inconclusive comparison needs, in words. question: what they would settle."""
    enough = comparison.settled_by(limit)
    if enough is None:
        return f"more images of this kind would not settle {question}"
    images, clusters = enough
    if clusters is None:
        return f"about {images} images would settle {question}"
    return f"about {clusters} groups ({images} images) would settle {question}"
