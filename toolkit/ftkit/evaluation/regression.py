"""Metrics of regression models, and intervals that hold a stated share of the true values.

    readout = fit_values(logits, targets, task, share=0.9)                 # on val, or out of fold
    metrics = evaluate_values(readout, logits, targets, names, groups)
    metrics.quantities[0].mae, metrics.quantities[0].covered

Logits and targets (n, K) are standardised, targets NaN where one is not known. The intervals are
conformal (Vovk et al. 2005; out of fold: cross-conformal, Vovk 2015): half their width is the
quantile of the held-out errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from ftkit.tasks.task import Regression, bounded
from ftkit.utils import console
from ftkit_export.proof.intervals import share_interval
from ftkit_export.proof.jackknife import jackknife
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.readout import Values

FEWEST = 8  # images that have a correlation


@dataclass(frozen=True, kw_only=True)
class WithBounds:
    """A statistic with its 95 % interval: NaN, and None, where the images do not define it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class QuantityMetrics:
    """Metrics of one quantity, mae and rmse in its unit. r2: share of the variance that is explained;
    rank: Spearman's correlation. covered: share of the true values inside their intervals, which are
    `margin` wide on either side."""

    name: str
    unit: str
    images: int
    mae: WithBounds
    rmse: WithBounds
    r2: WithBounds
    rank: WithBounds
    margin: float
    covered: WithBounds


@dataclass(frozen=True, kw_only=True)
class RegressionMetrics:
    """Metrics of one split. mae, with its 95 % interval: as the task's figure, in the unit or, of several
    quantities, in standard deviations. share: of the true values that intervals are meant to hold.
    clusters: groups, None where images have none."""

    images: int
    clusters: int | None
    mae: float
    mae_low: float | None
    mae_high: float | None
    loss: float
    share: float
    quantities: tuple[QuantityMetrics, ...]


def fit_values(logits: Array, targets: Array, task: Regression, share: float) -> Values:
    """Fit the intervals' half widths to held-out errors. Where these are too few for intervals that hold so
    many of the values, they are to hold as many as can be shown, which is said."""
    fewest = int((~np.isnan(targets)).sum(0).min())
    if share > (most := fewest / (fewest + 1)):
        console.warn(
            f"coverage: {fewest} held-out values show at most {most:.1%}, not {share:.1%}: intervals are to hold that"
        )
        share = most
    margins = [
        spread * _quantile(np.abs(logits[:, k] - targets[:, k]), share)
        for k, spread in enumerate(task.spreads)
    ]
    return Values(
        means=task.means,
        spreads=task.spreads,
        units=task.units,
        margins=tuple(margins),
        share=share,
    )


def _quantile(errors: Array, share: float) -> float:
    """The error that the next one does not exceed with this probability, if it is exchangeable with
    these."""
    known = np.sort(errors[~np.isnan(errors)])
    place = math.ceil((len(known) + 1) * share - 1e-9) - 1
    return float(known[min(place, len(known) - 1)])


def evaluate_values(
    readout: Values,
    logits: Array,
    targets: Array,
    names: Sequence[str],
    groups: Sequence[str],
) -> RegressionMetrics:
    """Metrics of logits (n, K)."""
    task = Regression(means=readout.means, spreads=readout.spreads, units=readout.units)
    figure = task.estimate(logits, targets, groups)
    interval = bounded(figure, 0.0, math.inf)

    return RegressionMetrics(
        images=len(targets),
        clusters=figure.clusters,
        mae=figure.value,
        mae_low=interval.low,
        mae_high=interval.high,
        loss=task.mean_loss(torch.from_numpy(logits), torch.from_numpy(targets)),
        share=readout.share,
        quantities=tuple(
            _quantity(readout, name, k, logits[:, k], targets[:, k], groups)
            for k, name in enumerate(names)
        ),
    )


def _quantity(
    readout: Values, name: str, place: int, logits: Array, targets: Array, groups: Sequence[str]
) -> QuantityMetrics:
    known = np.flatnonzero(~np.isnan(targets))
    spread = readout.spreads[place]
    said = logits[known].astype(np.float64) * spread
    true = targets[known].astype(np.float64) * spread
    named = [groups[int(row)] for row in known]
    margin = readout.margins[place]
    inside = np.abs(said - true) <= margin
    low, high, _ = share_interval(inside, named)

    def judged(
        statistic: Callable[[Array, Array], float], least: float = 0.0, most: float = math.inf
    ) -> WithBounds:
        found = jackknife(lambda rows: statistic(said[rows], true[rows]), len(known), named)
        interval = bounded(found, least, most)
        return WithBounds(value=found.value, low=interval.low, high=interval.high)

    return QuantityMetrics(
        name=name,
        unit=readout.units[place],
        images=len(known),
        mae=judged(lambda a, b: float(np.abs(a - b).mean()) if len(a) else math.nan),
        rmse=judged(lambda a, b: float(np.sqrt(((a - b) ** 2).mean())) if len(a) else math.nan),
        r2=judged(_explained, -math.inf, 1.0),
        rank=judged(_rank, -1.0, 1.0),
        margin=margin,
        covered=WithBounds(
            value=float(inside.mean()) if len(inside) else math.nan, low=low, high=high
        ),
    )


def _explained(said: Array, true: Array) -> float:
    if len(true) < FEWEST:
        return math.nan
    total = float(((true - true.mean()) ** 2).sum())
    return 1 - float(((said - true) ** 2).sum()) / total if total > 0 else math.nan


def _rank(said: Array, true: Array) -> float:
    if len(true) < FEWEST or len(np.unique(said)) < 2 or len(np.unique(true)) < 2:
        return math.nan
    return float(spearmanr(said, true).statistic)
