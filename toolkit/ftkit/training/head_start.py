"""Start the head from a ridge regression on the frozen features, before any epoch.

    start = start_head(backbone, loader, labels, groups, stage, ranks)
    start.accuracy, start.low, start.high        # out of fold: every image by a head that never saw it

A random head spends its first epochs, at a low learning rate all of them, on finding what one solve
finds in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit.models.inference import Tensors
from ftkit.recipe import Stage
from ftkit.training.closed_form import Head, fit_head
from ftkit.training.loader import Loader
from ftkit.training.optimizer import class_weights
from ftkit.utils.distributed import Ranks
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.arrays import Array

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """Out-of-fold accuracy of the ridge head with its 95 % interval. clusters: groups that the
    interval rests on, None where images have none. strength: of the penalty."""

    images: int
    accuracy: float
    low: float
    high: float
    clusters: int | None
    nll: float
    strength: float


def start_head(
    backbone: Backbone,
    loader: Loader,
    labels: torch.Tensor,
    groups: Sequence[str],
    stage: Stage,
    ranks: Ranks,
) -> HeadStart | None:
    """Set the weights of the model's head; returns what they are worth.

    labels (n,), groups (n,): of the training images. None, and the head stays random, where there
    are too few images or groups to judge it.
    """
    head = backbone.model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() makes no other
    embedding = embed(loader, head, loader.seen, len(labels), ranks)
    classes = head.weight.shape[0]
    weights = class_weights(labels, classes).cpu().numpy() if stage.balance != "none" else None

    fitted = fit_head(embedding, labels.cpu().numpy(), groups, classes, weights)
    if fitted is None or not np.isfinite(fitted.weight).all():
        return None

    # Every rank has fitted it; the first one's holds, to the bit
    values = {"weight": torch.from_numpy(fitted.weight), "bias": torch.from_numpy(fitted.bias)}
    values = ranks.tensors(values)
    assert head.bias is not None  # build() makes no head without
    with torch.no_grad():
        head.weight.copy_(values["weight"].view_as(head.weight))
        head.bias.copy_(values["bias"])

    return _judged(fitted, groups)


def _judged(head: Head, groups: Sequence[str]) -> HeadStart:
    low, high, clusters = share_interval(head.right, [groups[row] for row in head.rows])
    return HeadStart(
        images=len(head.right),
        accuracy=float(head.right.mean()),
        low=low,
        high=high,
        clusters=clusters,
        nll=head.nll,
        strength=head.strength,
    )


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
