"""Start the head from a ridge regression on the frozen features, before any epoch.

    start = start_head(backbone, loader, labels, groups, stage, ranks, folds, task)
    start.figures.accuracy       # out of fold: every image by a head that never saw it

A random head spends its first epochs, at a low learning rate all of them, on finding what one solve
finds in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit.models.inference import Tensors
from ftkit.recipe import Stage
from ftkit.tasks.task import Task
from ftkit.training.closed_form import (
    STRENGTHS,
    Aim,
    ClassAim,
    Head,
    LabelAim,
    ValueAim,
    fit_linear,
)
from ftkit.training.loader import Loader
from ftkit.utils.distributed import Ranks
from ftkit_export.runtime.arrays import Array

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """Out-of-fold figure of the ridge head (accuracy, or the metric of the task) with its 95 %
    interval. clusters: groups that the interval rests on, None where images have none. strength: of
    the penalty."""

    images: int
    accuracy: float
    low: float | None
    high: float | None
    clusters: int | None
    nll: float
    strength: float


@dataclass(frozen=True, kw_only=True)
class StartedHead:
    """figures: what the head is worth. heads: its weights, those of each fold, and every image's
    logits out of fold. embedding: (n, features) float32."""

    figures: HeadStart
    heads: Head
    embedding: Array


def start_head(
    backbone: Backbone,
    loader: Loader,
    labels: torch.Tensor,
    groups: Sequence[str],
    stage: Stage,
    ranks: Ranks,
    folds: Sequence[Array],
    task: Task,
) -> StartedHead | None:
    """Set the weights of the model's head, and return what they are worth.

    labels (n, ...): targets of the training images; groups (n,). folds: whether each is held out, (n,) bool per
    fold. None, and the head stays random, where there are no folds, or the features are no numbers.
    """
    if not folds:
        return None

    embedding = embed(loader, head_of(backbone), loader.seen, len(labels), ranks)
    fitted = fit_heads(backbone, embedding, labels, stage, ranks, folds, task)
    if fitted is None:
        return None

    weights = as_weights(backbone, fitted.weight, fitted.bias)
    backbone.model.load_state_dict(weights, strict=False)

    figure = task.interval(fitted.logits, labels.cpu().numpy(), groups)
    return StartedHead(
        figures=HeadStart(
            images=len(labels),
            accuracy=figure.value,
            low=figure.low,
            high=figure.high,
            clusters=figure.clusters,
            nll=fitted.nll,
            strength=fitted.strength,
        ),
        heads=fitted,
        embedding=embedding,
    )


def head_of(backbone: Backbone) -> nn.Linear | nn.Conv2d:
    """The model's head."""
    head = backbone.model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() creates only these, with a bias
    return head


def fit_heads(
    backbone: Backbone,
    embedding: Array,
    labels: torch.Tensor,
    stage: Stage,
    ranks: Ranks,
    folds: Sequence[Array],
    task: Task,
    strengths: Sequence[float] = STRENGTHS,
) -> Head | None:
    """A head on all images and one for each fold, the same on every rank; None where the features
    (n, features) are no numbers."""
    if not np.isfinite(embedding).all():
        return None
    width = head_of(backbone).weight.shape[0]
    weights = task.weights(labels, width).cpu().numpy() if stage.balance != "none" else None
    aim = aim_of(task, labels.cpu().numpy(), width, weights)
    fitted = fit_linear(embedding, aim, folds, strengths)
    if not np.isfinite(fitted.weight).all():
        return None

    # Every rank has fitted it; the first one's holds, to the bit
    own = {"weight": fitted.weight, "bias": fitted.bias, "logits": fitted.logits}
    for fold, (weight, bias) in enumerate(fitted.by_fold):
        own |= {f"weight{fold}": weight, f"bias{fold}": bias}
    tensors = ranks.tensors({name: torch.from_numpy(value) for name, value in own.items()})
    shared = {name: value.numpy() for name, value in tensors.items()}

    return replace(
        fitted,
        weight=shared["weight"],
        bias=shared["bias"],
        logits=shared["logits"],
        by_fold=tuple((shared[f"weight{k}"], shared[f"bias{k}"]) for k in range(len(folds))),
    )


def aim_of(task: Task, targets: Array, width: int, weights: Array | None = None) -> Aim:
    """What a linear head is fitted to. targets (n, ...), as the task has them; width: outputs of the head;
    weights (width,): of classes, or of the images that have a label."""
    if task.name == "multi-label":
        return LabelAim(targets, weights)
    return ValueAim(targets) if task.name == "regression" else ClassAim(targets, width, weights)


def as_weights(backbone: Backbone, weight: Array, bias: Array) -> dict[str, torch.Tensor]:
    """A fitted head under the names and in the shapes of the model's."""
    head = head_of(backbone)
    return {
        f"{backbone.head}.weight": torch.from_numpy(weight).view_as(head.weight).clone(),
        f"{backbone.head}.bias": torch.from_numpy(bias).clone(),
    }


@torch.no_grad()
def embed(
    loader: Loader,
    head: nn.Module,
    read: Callable[[Array], Tensors],
    count: int,
    ranks: Ranks,
) -> Array:
    """Inputs of the head, (count, features) float32. read: positions -> inputs of loader.eval_net.

    Ranks take turns at the batches.
    """
    first, _ = features(loader.eval_net, head, read(np.arange(1)))
    whole = torch.zeros(count, first.shape[1], device=first.device)
    for start in range(0, count, BATCH)[ranks.rank :: ranks.world]:
        end = min(start + BATCH, count)
        whole[start:end] = features(loader.eval_net, head, read(np.arange(start, end)))[0]

    return ranks.sum(whole).cpu().numpy()
