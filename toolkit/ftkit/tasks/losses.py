"""A training batch, and the losses of each task: per image, in float32.

loss = class_loss(logits, batch, stage, weights)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ftkit.models.inference import Tensors
from ftkit.recipe import Stage
from ftkit_export.runtime.arrays import Array

# Distillation temperature: 2.5 to 4 worked best for small students (Hinton et al. 2015, section 3).
SOFTENING = 3.0
TAUGHT = 0.5  # share of the distillation term in the loss
COLDEST, HOTTEST = 0.05, 20.0  # temperatures tried


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch. inputs: what the net takes, each (n, ...). targets: labels (n,).

    teacher: the teacher's logits for the same views (n, K), if any. With mixup or cutmix:
    others, the partners' labels (n,); share, the weight of each image's own label (n,).
    """

    inputs: Tensors
    targets: torch.Tensor
    teacher: torch.Tensor | None = None
    others: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """The images from start to stop."""

        def cut(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[start:stop]

        return Batch(
            inputs=tuple(value[start:stop] for value in self.inputs),
            targets=self.targets[start:stop],
            teacher=cut(self.teacher),
            others=cut(self.others),
            share=cut(self.share),
        )


def class_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Class weights (classes,) float32, inverse to the class counts of labels (N,).

    Their mean over the images is 1.
    """
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return len(labels) / (classes * counts)


def class_loss(
    logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
) -> torch.Tensor:
    """Loss per image (n,), float32, from logits (n, classes)."""
    smoothing = stage.label_smoothing

    def hard(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits, labels, weight=weights, label_smoothing=smoothing, reduction="none"
        )

    loss = hard(batch.targets)
    if batch.share is not None and batch.others is not None:
        loss = batch.share * loss + (1 - batch.share) * hard(batch.others)

    if batch.teacher is not None:
        soft = F.log_softmax(logits / SOFTENING, 1), F.log_softmax(batch.teacher / SOFTENING, 1)
        taught = F.kl_div(*soft, log_target=True, reduction="none").sum(1) * SOFTENING**2
        loss = (1 - TAUGHT) * loss + TAUGHT * taught

    return loss


def label_loss(
    logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
) -> torch.Tensor:
    """Mean binary cross-entropy of each image's known labels (n,), from logits (n, labels).

    weights (labels,): of the images that have a label. Their odds are taken off the answers again, so
    that a probability remains one of the data as they are. A teacher says its probability of every
    label, also of those that are not known.
    """
    shifted = logits if weights is None else logits + weights.log()

    def hard(targets: torch.Tensor) -> torch.Tensor:
        known = ~targets.isnan()
        smooth = targets.nan_to_num() * (1 - stage.label_smoothing) + stage.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(
            shifted, smooth, pos_weight=weights, reduction="none"
        )
        return _mean_of(losses, known)

    loss = _mixed(hard, batch)
    if batch.teacher is None:
        return loss
    soft = batch.teacher.sigmoid()
    taught = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)
    return (1 - TAUGHT) * loss + TAUGHT * taught


def value_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean Huber loss of each image's known values (n,), which are standardised (Huber 1964): squared
    up to one standard deviation, linear beyond. A teacher says every value."""

    def hard(targets: torch.Tensor) -> torch.Tensor:
        losses = F.huber_loss(logits, targets.nan_to_num(), reduction="none")
        return _mean_of(losses, ~targets.isnan())

    loss = _mixed(hard, batch)
    if batch.teacher is None:
        return loss
    taught = F.huber_loss(logits, batch.teacher, reduction="none").mean(1)
    return (1 - TAUGHT) * loss + TAUGHT * taught


def _mixed(hard: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
    loss = hard(batch.targets)
    if batch.share is not None and batch.others is not None:
        loss = batch.share * loss + (1 - batch.share) * hard(batch.others)
    return loss


def _mean_of(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean of the known values of each row; 0 where none is."""
    return (values * known).sum(1) / known.sum(1).clamp(min=1)


def label_weights(targets: torch.Tensor) -> torch.Tensor:
    """Weight of the images that have each label (labels,) float32: as many times as those that have
    it not are more."""
    with_label = (targets == 1).sum(0).clamp(min=1)
    without = (targets == 0).sum(0).clamp(min=1)
    return (without / with_label).float()


def least_nll(logits: Array, labels: Array) -> float:
    """Mean NLL of logits (n, classes) at the temperature that fits these very images best.

    A model that is only too sure of itself is not the worse for it: its temperature is fitted later.
    """

    def loss(log_t: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / math.exp(log_t), axis=1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    bounds = math.log(COLDEST), math.log(HOTTEST)
    return float(minimize_scalar(loss, bounds=bounds, method="bounded").fun)
