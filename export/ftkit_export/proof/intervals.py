"""Confidence intervals of shares and paired differences, for independent or grouped images.

    low, high, clusters = share_interval(right, groups)            # accuracy, two-sided 95 %
    found = difference_design(worse, better, groups)
    low, high = difference_bounds(worse.mean(), better.mean(), found, level)     # paired drop, each one-sided

Images of one group (a module, a patient, a camera) are not independent. Their cluster-robust
variance gives the design effect: the factor by which it exceeds the variance of as many independent
images. The intervals are those of independent images at the effective number of images, with
Student's t in place of the normal quantile.

- Variance: CR2 of Bell and McCaffrey (Survey Methodology 28, 2002), which allows for unequal
  groups. A handful of errors says little about how they cluster, and none says nothing; so
  PRIOR_EVENTS further errors are added, spread over the groups with the intraclass correlation of
  a Prior.
- Degrees of freedom: Bell and McCaffrey's at the intraclass correlation that the design effect
  implies (Imbens and Kolesar, Review of Economics and Statistics 98, 2016), and at most twice the
  number of groups that contribute to the variance, less one: where few groups differ from the rest,
  the t interval alone is too short.
- Shares: Wilson's score interval (1927).
- Paired differences: Clopper and Pearson's limits of the two shares of changed images, combined by
  the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008) with
  their covariance. Tango's score method wrongly accepts up to 6.8 % and refuses up to 8.7 % where
  5 % are nominal: few images change.

`python bench/coverage.py` simulates their coverage and its limits: where one group in ten fails
almost entirely, and few groups were seen, no interval from those groups can reflect it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from ftkit_export.runtime.arrays import Array

PRIOR_EVENTS = 3.0


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Assumption about clustering, for when few images were misclassified, or changed.

    correlation: assumed intraclass correlation. least_effect: lower limit of the design effect. By
    chance, groups can look more alike than independent images (an effect below 1); a share's
    interval may be shorter for it, a bound that decides a verdict may not.
    """

    correlation: float
    least_effect: float


SHARE = Prior(correlation=0.1, least_effect=0.5)  # measured on the demo's modules: 0.13
PROVEN_SHARE = Prior(correlation=0.1, least_effect=1.0)
# Images that change in int8; measured on the demo: 0 to 0.02
DIFFERENCE = Prior(correlation=0.05, least_effect=1.0)


@dataclass(frozen=True, kw_only=True)
class Design:
    """How much information grouped images carry.

    images: their number. clusters: number of groups, None where images have none and count as
    independent. effect: the design effect. df: degrees of freedom of Student's t.
    """

    images: int
    clusters: int | None = None
    effect: float = 1.0
    df: float = math.inf

    def quantile(self, probability: float) -> float:
        """Quantile of Student's t at the design's degrees of freedom (infinite: normal)."""
        return (
            float(stats.t.ppf(probability, self.df))
            if self.df < math.inf
            else float(stats.norm.ppf(probability))
        )

    def times(self, factor: float) -> Design:
        """The design with `factor` times as many images and groups of the same kind."""
        clusters = self.clusters and round(self.clusters * factor)
        return Design(
            images=round(self.images * factor),
            clusters=clusters,
            effect=self.effect,
            df=self.df * factor,
        )


def ground(images: int, clusters: int | None) -> str:
    """Number of images and groups behind an interval, as text.

    "375 images in 7 groups", or "375 images, as if independent".
    """
    return (
        f"{images} images, as if independent"
        if clusters is None
        else f"{images} images in {clusters} groups"
    )


def has_groups(groups: Sequence[str] | None) -> bool:
    """Whether any image has a group."""
    return groups is not None and any(groups)


def design(values: Array, groups: Sequence[str] | None, prior: Prior) -> Design:
    """Design of the mean of `values` (N,), which are 0 and 1, or -1, 0 and 1.

    groups: one name per image; "" is an image on its own; None, or no name at all: N independent
    images.
    """
    images = len(values)
    if not has_groups(groups):
        return Design(images=images)

    assert groups is not None
    names = np.array([name or f"\0{number}" for number, name in enumerate(groups)])
    _, membership = np.unique(names, return_inverse=True)
    sizes = np.bincount(membership).astype(np.float64)  # (G,)
    if len(sizes) < 2:
        return Design(images=images, clusters=1, effect=math.inf, df=0.0)

    shares = sizes / images
    residuals = np.bincount(membership, values.astype(np.float64)) - sizes * values.mean()
    mean_size = float((sizes**2).sum()) / images
    prior_effect = 1 + (mean_size - 1) * prior.correlation
    squares = residuals**2 + PRIOR_EVENTS * prior_effect * shares
    independent = float(values.var()) * images + PRIOR_EVENTS
    effect = max(prior.least_effect, float((squares / (1 - shares)).sum()) / independent)

    correlation = min(1.0, max(0.0, (effect - 1) / max(mean_size - 1, 1e-9)))
    df = _degrees_of_freedom(shares, sizes * (1 + (sizes - 1) * correlation))
    contributing = float(squares.sum()) ** 2 / float((squares**2).sum())

    return Design(
        images=images,
        clusters=len(sizes),
        effect=effect,
        df=min(df, max(1.0, 2 * contributing - 1)),
    )


def _degrees_of_freedom(shares: Array, variances: Array) -> float:
    """Satterthwaite degrees of freedom of the CR2 variance of a mean: trace(M)^2 / trace(M^2).

    M = D (diag(v) - v h' - h v' + sum(v) h h') D, the covariance of the adjusted residual sums of
    groups with shares h and variances v of their sums, where D^2 = diag(w) = 1 / (1 - h). Both
    traces are in closed form: there may be as many groups as images.
    """
    h = shares
    v = variances
    w = 1 / (1 - h)
    total = float(v.sum())
    diagonal = v - 2 * v * h + total * h**2
    vv = float((w * v**2).sum())
    hh = float((w * h**2).sum())
    vh = float((w * v * h).sum())
    rank_two = 2 * vv * hh + total**2 * hh**2 + 2 * vh**2 - 4 * total * vh * hh
    squared = rank_two + float((w**2 * (v**2 + 2 * v * (diagonal - v))).sum())

    return float((w * diagonal).sum()) ** 2 / squared


def wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    """Score interval (low, high) of a share of `count` images (Wilson 1927).

    `count` need not be an integer.
    """
    if count <= 0 or math.isinf(quantile):
        return 0.0, 1.0
    spread = quantile**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = quantile * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(
    right: Array, groups: Sequence[str] | None = None, level: float = 0.95
) -> tuple[float, float, int | None]:
    """Two-sided interval of the share of True in `right` (N,) bool: (low, high, clusters).

    clusters: the number of groups it rests on (None: as if independent).
    """
    images = len(right)
    if images == 0:
        return 0.0, 1.0, None

    share = float(right.mean())
    sample = design(right, groups, SHARE)
    if sample.df <= 0:
        return 0.0, 1.0, sample.clusters

    low, high = wilson(share, images / sample.effect, sample.quantile((1 + level) / 2))
    return low, high, sample.clusters


def difference_design(worse: Array, better: Array, groups: Sequence[str] | None) -> Design:
    """Design of mean(worse - better).

    worse, better: (N,), images that became wrong, and right: 0 and 1, or the shares of repeated
    trainings in which they did. Shares vary less than single answers with the same mean; the effect
    has that factor.
    """
    values = worse.astype(np.float64) - better.astype(np.float64)
    sample = design(values, groups, DIFFERENCE)
    images = max(1, len(values))
    single = float(worse.mean() + better.mean() - values.mean() ** 2) if len(values) else 0.0
    spread = float(values.var()) if len(values) else 0.0
    factor = (spread * images + PRIOR_EVENTS) / (single * images + PRIOR_EVENTS)
    return replace(sample, effect=sample.effect * min(1.0, factor))


def difference_bounds(
    worse: float, better: float, sample: Design, level: float
) -> tuple[float, float]:
    """One-sided bounds of the true share(worse) - share(better), each at confidence `level`.

    worse, better: the observed shares, in 0..1.
    """
    if sample.images == 0 or sample.df <= 0:
        return -1.0, 1.0

    normal = float(stats.norm.ppf(level))
    count = sample.images / sample.effect * (normal / sample.quantile(level)) ** 2
    worse_low, worse_high = clopper_pearson(worse, count, level)
    better_low, better_high = clopper_pearson(better, count, level)
    covariance = 2 * worse * better * normal**2 / count
    below = math.sqrt((worse - worse_low) ** 2 + (better_high - better) ** 2 + covariance)
    above = math.sqrt((worse_high - worse) ** 2 + (better - better_low) ** 2 + covariance)

    return max(-1.0, worse - better - below), min(1.0, worse - better + above)


def clopper_pearson(share: float, count: float, level: float) -> tuple[float, float]:
    """One-sided bounds of a share of `count` independent images, each at confidence `level`.

    `count` need not be an integer: the limits are quantiles of beta distributions (Clopper and
    Pearson 1934).
    """
    hits = share * count
    low = float(stats.beta.ppf(1 - level, hits, count - hits + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(level, hits + 1, count - hits)) if hits < count else 1.0
    return low, high
