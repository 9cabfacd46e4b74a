"""lr = "auto": heads trained side by side, one a rate, in one pass over cached features; the best
names it.

peak = best_rate(stage, backbone, loader, batches, total, val_labels)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit.recipe import Stage
from ftkit.training.loader import Loader
from ftkit.training.optimizer import rate

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def best_rate(
    stage: Stage,
    backbone: Backbone,
    loader: Loader,
    batches: Iterable[tuple[np.ndarray, torch.Generator]],
    total: int,
    val_labels: torch.Tensor,
) -> float:
    """The rate whose head ends with the lowest NLL on val, all trained for the stage's `total`
    steps on its batches.

    Ties in accuracy are common on a small val split; the NLL separates rates sooner.
    """
    head = backbone.model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() makes no other
    weights = [head.weight.detach().flatten(1).clone().requires_grad_() for _ in RATES]
    biases = [head.bias.detach().clone().requires_grad_() for _ in RATES]  # type: ignore[union-attr]
    optimizer = _optimizer(stage, weights, biases)

    # (n, features) -> (rates, n, classes), one product for all
    def logits_of(embedding: torch.Tensor) -> torch.Tensor:
        flat = F.linear(embedding, torch.cat(weights), torch.cat(biases))
        return flat.view(len(embedding), len(RATES), -1).transpose(0, 1)

    for step, (positions, generator) in enumerate(batches):
        # Every rank fits the whole fan
        batch = loader.prepare(loader.fetch(positions, generator, slice(None)))
        for group, peak in zip(optimizer.param_groups, RATES * 2, strict=True):
            group["lr"] = rate(step, total, stage, peak)

        logits = logits_of(features(loader.net, head, batch.inputs)[0])
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            batch.targets.repeat(len(RATES)),
            label_smoothing=stage.label_smoothing,
            reduction="none",
        ).view(len(RATES), -1)

        optimizer.zero_grad()
        losses.mean(1).sum().backward()  # each head's gradient is its own loss's
        optimizer.step()

    with torch.no_grad():
        starts = range(0, len(val_labels), 256)
        parts = [
            loader.val(np.arange(start, min(start + 256, len(val_labels)))) for start in starts
        ]
        embeddings = torch.cat([features(loader.eval_net, head, inputs)[0] for inputs in parts])
        scores = [float(F.cross_entropy(logits, val_labels)) for logits in logits_of(embeddings)]

    finite = [score if np.isfinite(score) else np.inf for score in scores]
    return RATES[int(np.argmin(finite))]


def _optimizer(
    stage: Stage, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.optim.Optimizer:
    """The stage's optimizer over all heads, a parameter group each: weights first, then biases."""
    groups = [{"params": [value], "weight_decay": stage.weight_decay} for value in weights]
    groups += [{"params": [value], "weight_decay": 0.0} for value in biases]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)

    if stage.optimizer == "adam":
        return torch.optim.Adam(groups, lr=1.0)
    return torch.optim.AdamW(groups, lr=1.0)
