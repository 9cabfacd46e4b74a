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
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ftkit_export.proof.intervals import Design, difference_bounds, difference_design, ground
from ftkit_export.proof.jackknife import jackknife
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.targets import Precision

Verdict = Literal["accepted", "refused", "inconclusive", "unproven on target"]

ERROR_RATE = 0.05  # probability of accepting, or refusing, wrongly
POWER = 0.8  # probability that the stated number of images settles a question
MOST_TIMES = 1000.0  # largest multiple of the present images that is suggested


@dataclass(frozen=True, kw_only=True)
class Comparison(ABC):
    """A candidate compared with the reference on the same images, by the metric of the task.

    drop: what the candidate loses, with its bounds low and high: a fraction; looks: number of
    comparisons that the bounds hold for jointly. clusters: number of groups, None where images have
    none and count as independent. df: degrees of freedom of Student's t (None: normal distribution).
    name: of the drop; unit: what a hundredth of it is called.
    """

    images: int
    drop: float
    low: float
    high: float
    looks: int = 1
    clusters: int | None = None
    df: float | None = None
    name: str = "accuracy drop"
    unit: str = "points"

    @property
    def text(self) -> str:
        """The drop with its bounds."""
        low, drop, high = (f"{100 * value:+.2f}" for value in (self.low, self.drop, self.high))
        return f"{drop} {self.unit} [{low}, {high}]"

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
        groups. Assumes that what was observed is the truth. New images will show something else:
        bounds that just reach the limit at what was observed would settle it only half of the time.
        So the bounds must clear the limit by as much as chance moves the drop, at POWER.
        """
        if self.images == 0 or (self.clusters or 2) < 2 or not self._settles(limit, MOST_TIMES):
            return None

        few = 0.0
        many = MOST_TIMES

        for _ in range(40):
            middle = (few + many) / 2
            few, many = (few, middle) if self._settles(limit, middle) else (middle, many)

        clusters = self.clusters and round(self.clusters * many)
        return round(self.images * many), clusters

    @abstractmethod
    def _settles(self, limit: float, factor: float) -> bool:
        """Whether `factor` times as many images and groups would settle it, with probability POWER."""

    @property
    def ground(self) -> str:
        """Number of images and groups that the bounds rest on, as text."""
        return ground(self.images, self.clusters)


@dataclass(frozen=True, kw_only=True)
class Paired(Comparison):
    """Accuracies compared. worse: images that were right before and are wrong now; better: the other
    way (means, where the answers were repeated). effect: the design effect."""

    worse: float
    better: float
    effect: float = 1.0

    def _settles(self, limit: float, factor: float) -> bool:
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

        low, high = difference_bounds(*shares, here.times(factor), 1 - ERROR_RATE / self.looks)
        return (
            high + chance * (high - self.drop) <= limit or low - chance * (self.drop - low) > limit
        )


@dataclass(frozen=True, kw_only=True)
class Difference(Comparison):
    """Any other metric compared. error: standard error of the drop, by the jackknife."""

    error: float

    def _settles(self, limit: float, factor: float) -> bool:
        error = self.error / math.sqrt(factor)
        df = max(1.0, (self.df or math.inf) * factor)
        level = 1 - ERROR_RATE / self.looks
        reach = float(stats.t.ppf(level, df) + stats.norm.ppf(POWER)) * error
        return self.drop + reach <= limit or self.drop - reach > limit


def difference(
    drop: Callable[[Array], float],
    images: int,
    groups: Sequence[str] | None = None,
    looks: int = 1,
    *,
    name: str,
    unit: str = "points",
    least: float | None = None,
    most: float = 1.0,
) -> Difference:
    """Compare by a metric that is no mean of right answers.

    drop: rows (n,) of the images -> what the candidate loses on them. groups: as in `paired`. least:
    the error is at least what one image in all would make, by default its share of them: where no
    answer changed, that is no proof that none will. most: the bounds lie within -most and most.
    """
    found = jackknife(drop, images, groups, 1 / max(1, images) if least is None else least)
    low, high = (min(max(bound, -most), most) for bound in found.bounds(1 - ERROR_RATE / looks))
    return Difference(
        images=images,
        drop=found.value if math.isfinite(found.value) else 0.0,
        low=low,
        high=high,
        looks=looks,
        clusters=found.clusters,
        df=found.df,
        name=name,
        unit=unit,
        error=min(found.error, most),
    )


def lost(
    images: int, looks: int = 1, *, name: str, unit: str = "points", most: float = 1.0
) -> Difference:
    """The comparison of answers with some that are no numbers: everything is lost, surely. most: as in
    `difference`."""
    return Difference(
        images=images,
        drop=most,
        low=most,
        high=most,
        looks=looks,
        clusters=None,
        df=None,
        name=name,
        unit=unit,
        error=0.0,
    )


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
    paired: Comparison | None = None
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
    comparison: Comparison, limit: float, ratio_high: float | None
) -> tuple[Verdict, str]:
    """Verdict on a candidate, and its reason.

    ratio_high: upper bound of its latency relative to fp32; None: not measured.
    """
    verdict = comparison.verdict(limit)
    points = f"{comparison.name} {comparison.text}"

    if ratio_high is not None and ratio_high >= 1:
        return (
            "refused",
            f"not faster than fp32: ratio up to {ratio_high:.2f}; {points}",
        )

    if verdict == "inconclusive":
        reach = f"they settle a limit of {comparison.high * 100:.2f}, not of {limit * 100:.2f}"
        return (
            verdict,
            f"{points} on {comparison.ground}: {reach}; {what_would_settle(comparison, limit)}",
        )

    if verdict == "refused":
        return (
            verdict,
            f"{points} on {comparison.ground}, limit {limit * 100:.2f}",
        )

    if ratio_high is None:
        return (
            "unproven on target",
            f"{points}; its latency on the target is unknown. Try --latency FILE",
        )

    return "accepted", f"{points}; latency at most {ratio_high:.2f} of fp32's"


def what_would_settle(comparison: Comparison, limit: float, question: str = "it") -> str:
    """How many images an inconclusive comparison needs, in words. question: what they would settle."""
    enough = comparison.settled_by(limit)
    if enough is None:
        return f"more images of this kind would not settle {question}"
    images, clusters = enough
    if clusters is None:
        return f"about {images} images would settle {question}"
    return f"about {clusters} groups ({images} images) would settle {question}"
