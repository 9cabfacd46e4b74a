"""How good, honestly: accuracy with its interval, per class, confusion, calibration before and after temperature.

metrics = evaluate(probabilities, labels, classes)
temperature = fit_temperature(logits, labels)
threshold = abstain_threshold(probabilities, labels, precision=0.95)
similarity = cka(embedding, embedding_before)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import (
    confusion_matrix,
    precision_recall_curve,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)  # fmt: skip

Array = np.ndarray[Any, Any]

Z95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Of one split. Shares in 0..1; confusion[i][j] counts class i called j.

    recall and precision are per class: None where the class has no images, or was never the answer. balanced_accuracy
    and macro_f1 are means over the classes that have images. top5: None below six classes.
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
    precision: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """Answers below the threshold are withheld. precision: share right of the rest; coverage: share of images answered.

    threshold None: the precision wanted was not reached on val at any threshold.
    """

    wanted: float
    threshold: float | None
    precision: float | None
    coverage: float


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image the model is wrong about. row: its number in the canvases; probability: of the wrong answer."""

    row: int
    label: int
    said: int
    probability: float


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (low, high)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / count / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def reliability(probabilities: Array, labels: Array, bins: int = 15) -> tuple[tuple[int, float, float], ...]:
    """Equal-width bins of the top probability that hold images: (images, mean probability, share right) each."""
    top, right = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    number = np.minimum((top * bins).astype(int), bins - 1)
    return tuple(
        (int((number == b).sum()), float(top[number == b].mean()), float(right[number == b].mean()))
        for b in range(bins)
        if (number == b).any()
    )


def ece(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): how far the bins' mean probability is from their share right."""
    found = reliability(probabilities, labels, bins)
    return sum(images * abs(right - top) for images, top, right in found) / len(labels)


def evaluate(probabilities: Array, labels: Array, classes: Sequence[str]) -> Metrics:
    """probabilities (N, classes), labels (N,) int -> Metrics."""
    found, every = probabilities.argmax(1), np.arange(len(classes))
    confusion = confusion_matrix(labels, found, labels=every)
    precision, recall, f1, support = precision_recall_fscore_support(labels, found, labels=every, zero_division=0.0)
    there, right = support > 0, int(confusion.trace())
    low, high = wilson(right, len(labels))
    chosen = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-12)
    return Metrics(
        images=len(labels), accuracy=right / len(labels), accuracy_low=low, accuracy_high=high,
        balanced_accuracy=float(recall[there].mean()), macro_f1=float(f1[there].mean()),
        top5=float(top_k_accuracy_score(labels, probabilities, k=5, labels=every)) if len(classes) > 5 else None,
        nll=float(-np.log(chosen).mean()), ece=ece(probabilities, labels), classes=tuple(classes),
        recall=_where(recall, there), precision=_where(precision, confusion.sum(0) > 0),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )  # fmt: skip


def _where(values: Array, known: Array) -> tuple[float | None, ...]:
    return tuple(float(value) if sure else None for value, sure in zip(values, known, strict=True))


def abstain_threshold(probabilities: Array, labels: Array, precision: float) -> float | None:
    """The lowest top probability above which at least `precision` of the answers are right; None when there is none."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    if not right.any():
        return None
    found, _, thresholds = precision_recall_curve(right, top)
    good = np.flatnonzero(found[:-1] >= precision)
    return float(thresholds[good[0]]) if len(good) else None


def abstention(probabilities: Array, labels: Array, wanted: float, threshold: float | None) -> Abstention:
    """What a threshold chosen elsewhere comes to on these images."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    answered = top >= threshold if threshold is not None else np.zeros(len(top), bool)
    return Abstention(
        wanted=wanted, threshold=threshold, coverage=float(answered.mean()),
        precision=float(right[answered].mean()) if answered.any() else None,
    )  # fmt: skip


def worst_mistakes(probabilities: Array, labels: Array, rows: Array, count: int = 12) -> tuple[Mistake, ...]:
    """The wrong answers given with the greatest confidence, worst first."""
    said, top = probabilities.argmax(1), probabilities.max(1)
    wrong = sorted(np.flatnonzero(said != labels), key=lambda i: -top[i])[:count]
    return tuple(
        Mistake(row=int(rows[i]), label=int(labels[i]), said=int(said[i]), probability=float(top[i])) for i in wrong
    )


def cka(one: Array, other: Array) -> float:
    """Linear centred kernel alignment of two embeddings (N, D1), (N, D2) of the same images, 0..1: 1 when one is a
    rotation and scaling of the other (Kornblith et al. 2019)."""
    x, y = (value.astype(np.float64) - value.mean(0, dtype=np.float64) for value in (one, other))
    if len(x) < x.shape[1]:
        x, y = x @ x.T, y @ y.T  # Gram matrices of the images: the same numbers, from the smaller side
        return float((x * y).sum() / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-300))
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)), 1e-300))


def fit_temperature(logits: Array, labels: Array) -> float:
    """The T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), within 0.05 .. 20."""
    import torch  # here: `ftkit eval` needs the rest of this file on machines without it
    import torch.nn.functional as F

    values, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(values / log_t.exp(), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp().clamp(0.05, 20))
