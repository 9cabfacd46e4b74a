"""Metrics: accuracy with confidence intervals, per-class figures, calibration, abstention, CKA.

metrics = evaluate(probabilities, labels, classes)
temperature = fit_temperature(logits, labels, groups)
threshold, proven = abstain_threshold(probabilities, labels, 0.95, groups)
similarity = cka(embedding, embedding_before)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import (
    confusion_matrix,
    precision_recall_curve,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from ftkit_export.proof.intervals import (
    PROVEN_SHARE,
    SHARE,
    Design,
    clopper_pearson,
    design,
    share_interval,
)
from ftkit_export.runtime.arrays import Array, spread_evenly

# bounds of the temperature
COLDEST = 0.05
HOTTEST = 20.0
# Prior standard deviation of log T around 0: networks fine-tuned with cross-entropy mostly need
# temperatures of 0.6 to 1.6. On a val split without errors the NLL alone asks for 0; a few dozen
# images are no evidence for it.
PRIOR_SPREAD = 0.25
CALIBRATION_FOLDS = 5
# Chance that the precision claimed at the abstain threshold is not reached
PRECISION_ERROR_RATE = 0.05
LOOKED_AT = 200  # thresholds tested from each start
# Coverages at which the search for the threshold starts
SEARCH_STARTS = (
    0.25,
    0.5,
    0.75,
    1.0,
)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of one split. Shares are in 0..1; confusion[i][j] counts class i predicted as j.

    accuracy_low, accuracy_high: 95 % interval; clusters: groups of images that it is based on, None
    where images have no groups and count as independent. recall (with its 95 % interval) and
    precision are per class; recall is None for a class without images, precision for one that was
    never predicted. balanced_accuracy and macro_f1 are means over the classes that have images.
    top5: None for five classes or fewer.
    """

    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    macro_f1: float
    top5: float | None
    nll: float
    ece: float
    classes: tuple[str, ...]
    recall: tuple[float | None, ...]
    recall_low: tuple[float | None, ...]
    recall_high: tuple[float | None, ...]
    precision: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    clusters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """Coverage and precision when answers below the threshold are withheld.

    precision: share of the given answers that are correct; coverage: share of images answered.
    threshold None: the wanted precision was not reached on val at any threshold. proven: val shows
    with 95 % confidence that it is reached; else it was only observed there.
    """

    wanted: float
    threshold: float | None
    precision: float | None
    coverage: float
    proven: bool = False


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A misclassified image.

    row: its row in the canvases; probability: of the wrong answer.
    """

    row: int
    label: int
    said: int
    probability: float


def reliability(
    probabilities: Array, labels: Array, bins: int = 15
) -> tuple[tuple[int, float, float], ...]:
    """Reliability bins: (images, mean top probability, accuracy) of each bin that has images.

    The bins divide the top probability into equal widths.
    """
    top = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    number = np.minimum((top * bins).astype(int), bins - 1)

    return tuple(
        (int((number == b).sum()), float(top[number == b].mean()), float(right[number == b].mean()))
        for b in range(bins)
        if (number == b).any()
    )


def ece(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: mean gap between probability and accuracy over the bins.

    Weighted by the images of each bin (Guo et al. 2017).
    """
    bins_found = reliability(probabilities, labels, bins)
    return sum(images * abs(right - top) for images, top, right in bins_found) / len(labels)


def evaluate(
    probabilities: Array, labels: Array, classes: Sequence[str], groups: Sequence[str] | None = None
) -> Metrics:
    """Compute the metrics of one split.

    probabilities (N, classes), labels (N,) int, groups N names ("" for an image without a group).
    """
    predicted = probabilities.argmax(1)
    every = np.arange(len(classes))
    confusion = confusion_matrix(labels, predicted, labels=every)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0.0
    )
    there = support > 0
    right = int(confusion.trace())
    low, high, clusters = share_interval(predicted == labels, groups)
    bounds = _recall_bounds(predicted, labels, len(classes), groups)
    chosen = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-12)

    return Metrics(
        images=len(labels),
        accuracy=right / len(labels),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(recall[there].mean()),
        macro_f1=float(f1[there].mean()),
        top5=float(top_k_accuracy_score(labels, probabilities, k=5, labels=every))
        if len(classes) > 5
        else None,
        nll=float(-np.log(chosen).mean()),
        ece=ece(probabilities, labels),
        classes=tuple(classes),
        recall=_where(recall, there),
        recall_low=_where(bounds[0], there),
        recall_high=_where(bounds[1], there),
        precision=_where(precision, confusion.sum(0) > 0),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        clusters=clusters,
    )


def worst_class(metrics: Metrics) -> int | None:
    """The class with the lowest recall; None if no class has images."""
    known = [label for label, recall in enumerate(metrics.recall) if recall is not None]
    return min(known, key=lambda label: metrics.recall[label] or 0.0, default=None)


def _recall_bounds(
    answers: Array, labels: Array, classes: int, groups: Sequence[str] | None
) -> Array:
    """95 % interval of each class's recall, (2, classes); 0 and 1 for a class without images."""
    names = None if groups is None else np.array(groups)
    bounds = np.empty((2, classes))

    for label in range(classes):
        own = labels == label
        low, high, _ = share_interval(
            answers[own] == label, None if names is None else list(names[own])
        )
        bounds[:, label] = low, high

    return bounds


def _where(values: Array, known: Array) -> tuple[float | None, ...]:
    return tuple(float(value) if sure else None for value, sure in zip(values, known, strict=True))


def abstain_threshold(
    probabilities: Array, labels: Array, precision: float, groups: Sequence[str] | None = None
) -> tuple[float | None, bool]:
    """The lowest probability above which answers reach `precision`: precision_threshold of the most
    probable class."""
    return precision_threshold(
        probabilities.max(1), probabilities.argmax(1) == labels, precision, groups
    )


def precision_threshold(
    top: Array,
    right: Array,
    precision: float,
    groups: Sequence[str] | None = None,
    starts: Sequence[float] = SEARCH_STARTS,
) -> tuple[float | None, bool]:
    """The lowest threshold of `top` (n,) from which on `right` (n,) reaches `precision`, and whether
    that is proven.

    proven: `precision` is reached with 95 % confidence. Since many thresholds are tested, the
    search goes from few answers to many and stops at the first that fails, from several `starts`
    (shares of all answers), which share the error probability (fixed sequence testing; Angelopoulos
    et al. 2021, Learn then Test). If none is proven: the lowest threshold at which `precision` was
    observed, and False; (None, False) if there is none.
    """
    if not right.any():
        return None, False

    order = np.argsort(-top, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(top[order])), len(top) - 1)

    proven = None
    for start in starts:
        candidates = last_of_ties[last_of_ties >= math.ceil(start * len(top)) - 1]
        for last in spread_evenly(candidates, LOOKED_AT):
            answered = order[: last + 1]
            named = [groups[row] for row in answered] if groups is not None else None
            if (
                _precision_bound(right[answered], named, 1 - PRECISION_ERROR_RATE / len(starts))
                < precision
            ):
                break
            proven = (
                float(top[order[last]]) if proven is None else min(proven, float(top[order[last]]))
            )

    if proven is not None:
        return proven, True

    precisions, _, thresholds = precision_recall_curve(right, top)
    good = np.flatnonzero(precisions[:-1] >= precision)
    return (float(thresholds[good[0]]) if len(good) else None), False


def _precision_bound(right: Array, groups: Sequence[str] | None, level: float) -> float:
    """Lower confidence bound of the precision, at the effective number of images."""
    share = float(right.mean())
    sample = design(right, groups, PROVEN_SHARE)
    if sample.df <= 0:
        return 0.0
    normal = Design(images=0).quantile(level)
    return clopper_pearson(
        share, len(right) / sample.effect * (normal / sample.quantile(level)) ** 2, level
    )[0]


def abstention(
    probabilities: Array,
    labels: Array,
    wanted: float,
    threshold: float | None,
    proven: bool = False,
) -> Abstention:
    """Coverage and precision on these images at a threshold that was chosen on others."""
    top = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    answered = top >= threshold if threshold is not None else np.zeros(len(top), bool)

    return Abstention(
        wanted=wanted,
        threshold=threshold,
        coverage=float(answered.mean()),
        proven=proven,
        precision=float(right[answered].mean()) if answered.any() else None,
    )


def worst_mistakes(
    probabilities: Array, labels: Array, rows: Array, count: int = 12
) -> tuple[Mistake, ...]:
    """The most confident wrong answers, most confident first."""
    said = probabilities.argmax(1)
    top = probabilities.max(1)
    wrong = sorted(np.flatnonzero(said != labels), key=lambda i: -top[i])[:count]

    return tuple(
        Mistake(
            row=int(rows[i]), label=int(labels[i]), said=int(said[i]), probability=float(top[i])
        )
        for i in wrong
    )


def cka(one: Array, other: Array) -> float:
    """Linear centred kernel alignment of two embeddings (N, D1), (N, D2) of the same images, 0..1:
    1 when one is a rotation and scaling of the other (Kornblith et al. 2019)."""
    x, y = (value.astype(np.float64) - value.mean(0, dtype=np.float64) for value in (one, other))
    if len(x) < x.shape[1]:
        # Gram matrices of the images: the same result from smaller matrices
        x = x @ x.T
        y = y @ y.T
        return float((x * y).sum() / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-300))

    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)), 1e-300))


def fit_temperature(logits: Array, labels: Array, groups: Sequence[str] | None = None) -> float:
    """Temperature T for softmax(logits / T) (Guo et al. 2017); 1 without a clear improvement.

    T minimises the NLL with a prior towards 1. It is kept if it lowers the cross-validated NLL (a
    group stays in one fold) by more than one standard error, so that it does no harm where images
    are few; for T below 1 by more than two, because overconfidence costs more than underconfidence.
    """
    if len(labels) == 0:
        return 1.0

    names = [name or f"\0{number}" for number, name in enumerate(groups or [""] * len(labels))]
    _, clusters = np.unique(names, return_inverse=True)
    folds = np.random.default_rng(0).permutation(clusters.max() + 1)[clusters] % CALIBRATION_FOLDS

    before = _nll(logits, labels, 1.0)
    gain = np.zeros(len(labels))

    for fold in np.unique(folds):
        held = folds == fold
        if held.all():
            return 1.0
        gain[held] = before[held] - _nll(
            logits[held], labels[held], _temperature(logits[~held], labels[~held])
        )

    # Gains cluster as errors do, so the design effect of the errors is used.
    effect = design(logits.argmax(1) == labels, groups, SHARE).effect
    error = math.sqrt(float(gain.var()) / len(gain) * effect)
    temperature = _temperature(logits, labels)

    return temperature if gain.mean() > (1 if temperature > 1 else 2) * error else 1.0


def _temperature(logits: Array, labels: Array) -> float:
    def loss(log_t: float) -> float:
        return float(_nll(logits, labels, math.exp(log_t)).sum()) + (log_t / PRIOR_SPREAD) ** 2 / 2

    bounds = math.log(COLDEST), math.log(HOTTEST)
    return math.exp(
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    )


def _nll(logits: Array, labels: Array, temperature: float) -> Array:
    """NLL of each image, (N,)."""
    losses: Array = -log_softmax(logits.astype(np.float64) / temperature, axis=1)[
        np.arange(len(labels)), labels
    ]
    return losses
