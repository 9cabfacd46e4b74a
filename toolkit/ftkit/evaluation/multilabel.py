"""Metrics of multi-label models: average precision, thresholds and calibration, label by label.

    readout, proven = fit_labels(logits, targets, groups)                  # on val, or out of fold
    metrics = evaluate_labels(readout, logits, targets, names, groups)
    metrics.macro_ap, metrics.labels[0].f1

targets (n, K): 1 and 0, NaN where a label is not known; such an image says nothing of that label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_curve, precision_recall_fscore_support

from ftkit.evaluation.metrics import (
    COLDEST,
    HOTTEST,
    PRIOR_SPREAD,
    ece,
    precision_threshold,
    reliability,
)
from ftkit.tasks.task import MultiLabel, average_precisions, bounded
from ftkit_export.proof.intervals import share_interval
from ftkit_export.proof.jackknife import jackknife
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.readout import NEVER, Labels, sigmoid

# Where the search for a precision starts, as shares of all images: few may have the label at all
RARE_STARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True, kw_only=True)
class LabelMetrics:
    """Metrics of one label. images: for which it is known; positives: that have it. ap, and f1,
    precision and recall at the threshold, are None where no image has it; precision also where none
    is said to. ap_low, ap_high, recall_low, recall_high: 95 % intervals. ece: calibration error of its
    probability."""

    name: str
    images: int
    positives: int
    ap: float | None
    ap_low: float | None
    ap_high: float | None
    f1: float | None
    precision: float | None
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    ece: float


@dataclass(frozen=True, kw_only=True)
class MultiLabelMetrics:
    """Metrics of one split. macro_ap, with its 95 % interval, and macro_f1: means over the labels that
    some image has. subset_accuracy: share of the images with all labels known that have all of them
    right. loss: mean binary cross-entropy, calibrated. clusters: groups, None where images have none."""

    images: int
    clusters: int | None
    macro_ap: float
    macro_ap_low: float | None
    macro_ap_high: float | None
    macro_f1: float
    subset_accuracy: float | None
    loss: float
    labels: tuple[LabelMetrics, ...]


def fit_labels(
    logits: Array, targets: Array, groups: Sequence[str], precision: float | None = None
) -> tuple[Labels, list[bool]]:
    """Fit each label's temperature and threshold; and whether that is proven to bring the precision.

    precision: None takes the threshold of the highest F1; a share takes the lowest threshold from
    which on so many of the images that are given the label have it, with 95 % confidence where these
    images can show that, and NEVER where none does.
    """
    temperatures = []
    thresholds = []
    held = []
    for place in range(targets.shape[1]):
        known = ~np.isnan(targets[:, place])
        own = targets[known, place]
        temperature = _temperature(logits[known, place], own)
        probabilities = sigmoid(logits[known, place].astype(np.float64) / temperature)
        named = [group for group, there in zip(groups, known, strict=True) if there]
        temperatures.append(temperature)
        threshold, proven = _threshold(probabilities, own, named, precision)
        thresholds.append(threshold)
        held.append(proven)
    return Labels(temperatures=tuple(temperatures), thresholds=tuple(thresholds)), held


def _temperature(logits: Array, own: Array) -> float:
    """As metrics.fit_temperature, with the same prior towards 1: few images move it little."""

    def loss(log_t: float) -> float:
        scaled = logits.astype(np.float64) / math.exp(log_t)
        nll = np.logaddexp(0, scaled) - own * scaled
        return float(nll.sum()) + (log_t / PRIOR_SPREAD) ** 2 / 2

    bounds = math.log(COLDEST), math.log(HOTTEST)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(math.exp(found.x))


def _threshold(
    probabilities: Array, own: Array, groups: Sequence[str], precision: float | None
) -> tuple[float, bool]:
    if not own.any():
        return (0.5 if precision is None else NEVER), False
    if precision is not None:
        threshold, proven = precision_threshold(
            probabilities, own == 1, precision, groups, RARE_STARTS
        )
        return (NEVER if threshold is None else _below(threshold, probabilities)), proven

    precisions, recalls, thresholds = precision_recall_curve(own, probabilities)
    products = 2 * precisions * recalls / np.maximum(precisions + recalls, 1e-12)
    return _below(float(thresholds[int(products[:-1].argmax())]), probabilities), False


def _below(threshold: float, probabilities: Array) -> float:
    """Half-way to the next lower probability: at one itself, rounding would decide."""
    lower = probabilities[probabilities < threshold]
    middle = (threshold + (float(lower.max()) if len(lower) else 0.0)) / 2
    return min(max(middle, 1e-9), 1 - 1e-9)


def evaluate_labels(
    readout: Labels,
    logits: Array,
    targets: Array,
    names: Sequence[str],
    groups: Sequence[str],
) -> MultiLabelMetrics:
    """Metrics of logits (n, K). They are ranked as they are, since probabilities near 1 are equal."""
    calibrated = logits.astype(np.float64) / np.asarray(readout.temperatures)
    probabilities = sigmoid(calibrated)
    said = readout.decisions(logits) == 1
    task = MultiLabel()
    macro = task.estimate(logits, targets, groups)
    interval = bounded(macro, 0.0, 1.0)
    labels = tuple(
        _label(name, logits[:, k], probabilities[:, k], targets[:, k], said[:, k], groups)
        for k, name in enumerate(names)
    )
    whole = ~np.isnan(targets).any(1)
    f1 = [label.f1 for label in labels if label.f1 is not None]

    return MultiLabelMetrics(
        images=len(targets),
        clusters=macro.clusters,
        macro_ap=macro.value,
        macro_ap_low=interval.low,
        macro_ap_high=interval.high,
        macro_f1=float(np.mean(f1)) if f1 else 0.0,
        subset_accuracy=float((said == (targets == 1))[whole].all(1).mean())
        if whole.any()
        else None,
        loss=task.mean_loss(torch.from_numpy(calibrated), torch.from_numpy(targets)),
        labels=labels,
    )


def _label(
    name: str,
    logits: Array,
    probability: Array,
    target: Array,
    said: Array,
    groups: Sequence[str],
) -> LabelMetrics:
    known = np.flatnonzero(~np.isnan(target))
    if not len(known):
        return LabelMetrics(
            name=name,
            images=0,
            positives=0,
            ap=None,
            ap_low=None,
            ap_high=None,
            f1=None,
            precision=None,
            recall=None,
            recall_low=None,
            recall_high=None,
            ece=0.0,
        )
    own = target[known] == 1
    named = [groups[int(row)] for row in known]
    precision, recall, f1, _ = precision_recall_fscore_support(
        own, said[known], average="binary", zero_division=0.0
    )

    ap = low = high = None
    if own.any():
        found = jackknife(
            lambda rows: float(
                average_precisions(logits[known[rows], None], target[known[rows], None])[0]
            ),
            len(known),
            named,
            1 / int(own.sum()),
        )
        interval = bounded(found, 0.0, 1.0)
        ap, low, high = interval.value, interval.low, interval.high

    there = bool(own.any())
    least, most, _ = share_interval(
        said[known][own], [group for group, has in zip(named, own, strict=True) if has]
    )
    both = np.stack([1 - probability[known], probability[known]], axis=1)
    return LabelMetrics(
        name=name,
        images=len(known),
        positives=int(own.sum()),
        ap=ap,
        ap_low=low,
        ap_high=high,
        f1=float(f1) if there else None,
        precision=float(precision) if said[known].any() else None,
        recall=float(recall) if there else None,
        recall_low=least if there else None,
        recall_high=most if there else None,
        ece=ece(both, own.astype(int)),
    )


def reliability_of_labels(
    probabilities: Array, targets: Array
) -> tuple[tuple[int, float, float], ...]:
    """metrics.reliability over all known labels together: of what is more likely, that it applies or
    not."""
    known = ~np.isnan(targets)
    own = probabilities[known]
    both = np.stack([1 - own, own], axis=1)
    return reliability(both, (targets[known] == 1).astype(int))
