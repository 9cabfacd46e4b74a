"""How good, honestly: accuracy with its interval, per class, confusion, calibration before and after temperature.

metrics = evaluate(probabilities, labels, classes)
temperature = fit_temperature(logits, labels)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Array = np.ndarray[Any, Any]

Z95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Of one split. Shares in 0..1; confusion[i][j] counts class i called j.

    recall and precision are per class: None where the class has no images, or was never the answer.
    """

    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    nll: float
    ece: float
    classes: tuple[str, ...]
    recall: tuple[float | None, ...]
    precision: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (low, high)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / count / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def ece(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017), equal-width bins of the top probability."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    number = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(float(right[number == b].sum()) - float(top[number == b].sum())) for b in range(bins)]
    return sum(gaps) / len(labels)


def evaluate(probabilities: Array, labels: Array, classes: Sequence[str]) -> Metrics:
    """probabilities (N, classes), labels (N,) int -> Metrics."""
    found = probabilities.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, found), 1)
    right = int(confusion.trace())
    low, high = wilson(right, len(labels))
    chosen = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-12)
    return Metrics(
        images=len(labels), accuracy=right / len(labels), accuracy_low=low, accuracy_high=high,
        nll=float(-np.log(chosen).mean()), ece=ece(probabilities, labels), classes=tuple(classes),
        recall=_shares(confusion, 1), precision=_shares(confusion, 0),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )  # fmt: skip


def _shares(confusion: Array, axis: int) -> tuple[float | None, ...]:
    pairs = zip(confusion.diagonal(), confusion.sum(axis), strict=True)
    return tuple(float(right / count) if count else None for right, count in pairs)


def fit_temperature(logits: Array, labels: Array) -> float:
    """The T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), within 0.05 .. 20."""
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
