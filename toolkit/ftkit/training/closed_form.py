"""A linear head in closed form: ridge regression on the embedding, its strength chosen out of fold.

    head = fit_head(embedding, labels, default_folds(labels, groups), classes=4)
    (head.logits.argmax(1) == labels).mean()     # out-of-fold accuracy, before any training
    head.weight, head.bias                       # the head's initial weights

Ridge regression onto the classes' indicators is a linear classifier in one solve (Hoerl & Kennard
1970; on indicators it spans what linear discriminant analysis finds, Hastie et al., Elements of
Statistical Learning, 4.3). Its outputs are scores: one scale, fitted to the out-of-fold answers,
makes logits of them. Strength and scale are chosen on all of those answers: two numbers.

Labels that may apply together are fitted alike, each with a scale and a shift of its own (Platt
1999); values are their own scores.

    head = fit_linear(embedding, LabelAim(targets), folds)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from ftkit_export.runtime.arrays import Array, spread_evenly

FOLDS = 5
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 7))  # times the mean square
MOST_IMAGES = 20_000  # more add seconds, and nothing to a head of a few thousand weights
SCALES = (1.0, 200.0)  # of scores that lie between 0 and 1
LEAST_SCALE = 1e-3  # of a label's scores that order nothing


@dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted linear head. weight: (K, features) float32; bias: (K,) float32.

    by_fold: the same for each fold, fitted without its images; logits: (n, K) float32, each image's
    by the head of its fold; nll: their mean loss. strength: of the ridge penalty.
    """

    weight: Array
    bias: Array
    by_fold: tuple[tuple[Array, Array], ...]
    logits: Array
    nll: float
    strength: float


class Aim(ABC):
    """What a linear head is fitted to. columns: (n, K) float64, without NaN; counts: weight of each
    image (n,); rows: to fit on."""

    columns: Array
    counts: Array
    rows: Array

    @abstractmethod
    def read(self, scores: Array) -> tuple[Array, Array, Array]:
        """(scale, shift, losses (n,)): what makes logits of the scores (n, K), and each image's loss
        then. Scale and shift: (K,) or one number."""


class ClassAim(Aim):
    """One class of several. weights: of the classes, (classes,); all alike by default."""

    def __init__(self, labels: Array, classes: int, weights: Array | None = None):
        self.labels = labels
        self.columns = np.eye(classes)[labels]
        self.counts = (
            np.ones(len(labels)) if weights is None else weights.astype(np.float64)[labels]
        )
        self.rows = _chosen(labels)

    def read(self, scores: Array) -> tuple[Array, Array, Array]:
        """As Aim.read: one scale."""
        scale, losses = _scaled(scores, self.labels, self.counts)
        return np.array(scale), np.array(0.0), losses


class LabelAim(Aim):
    """Labels (n, K) of 1 and 0, NaN where one is not known: there the label's share stands, which
    says nothing. weights (K,): of the images that have it."""

    def __init__(self, targets: Array, weights: Array | None = None):
        self.targets = targets.astype(np.float64)
        self.known = ~np.isnan(self.targets)
        share = np.nanmean(self.targets, axis=0)
        self.columns = np.where(self.known, self.targets, share)
        self.counts = np.ones(len(targets))
        self.rows = spread_evenly(np.arange(len(targets)), MOST_IMAGES)
        self._weights = np.ones(targets.shape[1]) if weights is None else weights

    def read(self, scores: Array) -> tuple[Array, Array, Array]:
        """As Aim.read: a scale and a shift for each label."""
        width = scores.shape[1]
        scale, shift = np.ones(width), np.zeros(width)
        losses = np.zeros(scores.shape)
        for place in range(width):
            known = self.known[:, place]
            own = self.targets[known, place]
            counts = np.where(own == 1, self._weights[place], 1.0)
            if len(np.unique(own)) == 2:
                fitted = LogisticRegression(C=1e6).fit(scores[known, place, None], own, counts)
                scale[place] = max(float(fitted.coef_[0, 0]), LEAST_SCALE)
                shift[place] = float(fitted.intercept_[0])
            logits = scale[place] * scores[known, place] + shift[place]
            losses[known, place] = np.logaddexp(0, logits) - own * logits

        mean = losses.sum(1) / np.maximum(self.known.sum(1), 1)
        return scale, shift, mean


class ValueAim(Aim):
    """Standardised values (n, K), NaN where one is not known: there the mean stands."""

    def __init__(self, targets: Array):
        self.known = ~np.isnan(targets)
        self.columns = np.nan_to_num(targets.astype(np.float64))
        self.counts = np.ones(len(targets))
        self.rows = spread_evenly(np.arange(len(targets)), MOST_IMAGES)

    def read(self, scores: Array) -> tuple[Array, Array, Array]:
        """As Aim.read: scores are values."""
        squares = (scores - self.columns) ** 2 * self.known
        losses: Array = squares.sum(1) / np.maximum(self.known.sum(1), 1) / 2
        return np.array(1.0), np.array(0.0), losses


def fit_head(
    embedding: Array,
    labels: Array,
    folds: Sequence[Array],
    classes: int,
    weights: Array | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Head:
    """Fit a head on (N, features) with labels (N,): fit_linear to a ClassAim."""
    return fit_linear(embedding, ClassAim(labels, classes, weights), folds, strengths)


def fit_linear(
    embedding: Array,
    aim: Aim,
    folds: Sequence[Array],
    strengths: Sequence[float] = STRENGTHS,
) -> Head:
    """Fit a head on (N, features), and one for each fold without its images.

    folds: whether each image is held out, (N,) bool per fold; together they hold out every image
    once. strengths: to choose from.
    """
    rows = aim.rows
    features = embedding.astype(np.float64)
    targets = aim.columns
    counts = aim.counts

    solvers = []
    scores = np.zeros((len(strengths), *targets.shape))
    for held in folds:
        kept = rows[~held[rows]]
        solver = _Ridge(features[kept], targets[kept], counts[kept])
        solvers.append(solver)
        for number, strength in enumerate(strengths):
            weight, bias = solver.solve(strength)
            scores[number, held] = features[held] @ weight + bias

    fitted = [aim.read(each) for each in scores]
    best = _strongest([losses for _, _, losses in fitted])
    scale, shift, losses = fitted[best]

    def scaled(solver: _Ridge) -> tuple[Array, Array]:
        weight, bias = solver.solve(strengths[best])
        return (scale * weight).T.astype(np.float32), (scale * bias + shift).astype(np.float32)

    weight, bias = scaled(_Ridge(features[rows], targets[rows], counts[rows]))
    return Head(
        weight=weight,
        bias=bias,
        by_fold=tuple(scaled(solver) for solver in solvers),
        logits=(scale * scores[best] + shift).astype(np.float32),
        nll=float(losses.mean()),
        strength=strengths[best],
    )


def _chosen(labels: Array) -> Array:
    """Rows to fit on: all, or evenly of every class."""
    if len(labels) <= MOST_IMAGES:
        return np.arange(len(labels))

    share = MOST_IMAGES / len(labels)
    parts = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        parts.append(spread_evenly(rows, max(2, int(share * len(rows)))))
    return np.sort(np.concatenate(parts))


def default_folds(labels: Array, groups: Sequence[str]) -> list[Array]:
    """Whether each image is held out, (n,) bool per fold: stratified, groups whole.

    groups: a name per image, "" for one on its own. Empty where there are not two groups, or a
    class has one image.
    """
    _, counts = np.unique(labels, return_counts=True)
    named = [group or f"\0{row}" for row, group in enumerate(groups)]
    number = min(FOLDS, int(counts.min()), len(set(named)))
    if number < 2:
        return []

    alone = len(set(named)) == len(named)
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    splitter = kind(number, shuffle=True, random_state=0)
    of = np.zeros(len(labels), np.int64)
    for fold, (_, held) in enumerate(splitter.split(labels, labels, None if alone else named)):
        of[held] = fold

    masks = [of == fold for fold in np.unique(of)]  # few groups may leave a fold empty
    return masks if len(masks) > 1 else []


class _Ridge:
    """Weighted ridge regression with an intercept, solved for several strengths, in the smaller of
    the two forms."""

    def __init__(self, features: Array, targets: Array, counts: Array):
        total = counts.sum()
        self._mean = counts @ features / total
        self._target_mean = counts @ targets / total
        root = np.sqrt(counts)[:, None]
        self._features = root * (features - self._mean)
        self._targets = root * (targets - self._target_mean)
        self._primal = features.shape[0] >= features.shape[1]
        centred = self._features
        self._gram = centred.T @ centred if self._primal else centred @ centred.T
        self._unit = max(float((centred**2).sum()) / features.shape[1], 1e-12)
        self._goal = centred.T @ self._targets if self._primal else self._targets

    def solve(self, strength: float) -> tuple[Array, Array]:
        """(weight (features, classes), bias (classes,)) at this strength."""
        penalised = self._gram.copy()
        penalised[np.diag_indices_from(penalised)] += strength * self._unit
        factor = cho_factor(penalised, overwrite_a=True, check_finite=False)

        weight = cho_solve(factor, self._goal, check_finite=False)
        if not self._primal:
            weight = self._features.T @ weight
        return weight, self._target_mean - self._mean @ weight


def _strongest(losses: Sequence[Array]) -> int:
    """The largest strength whose mean loss is within a standard error of the smallest: its weights
    are smaller, and stand what later stages do to the features (Breiman et al. 1984)."""
    means = [float(each.mean()) for each in losses]
    best = int(np.argmin(means))
    error = float(losses[best].std()) / math.sqrt(len(losses[best]))
    return max(number for number, mean in enumerate(means) if mean <= means[best] + error)


def _scaled(scores: Array, labels: Array, counts: Array) -> tuple[float, Array]:
    """(scale, losses (n,)): what makes logits of the scores (n, classes), and each image's weighted
    NLL."""
    picked = (np.arange(len(labels)), labels)

    weights = counts / counts.mean()

    def losses(scale: float) -> Array:
        values: Array = -weights * log_softmax(scale * scores, axis=1)[picked]
        return values

    found = minimize_scalar(
        lambda scale: losses(scale).mean(), bounds=SCALES, method="bounded", options={"xatol": 1e-3}
    )
    return float(found.x), losses(found.x)
