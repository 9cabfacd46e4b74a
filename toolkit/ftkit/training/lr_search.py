"""Learning-rate search for lr = "auto": train one head per rate on cached features, keep the best.

peak = best_rate(stage, backbone, loader, batches, total, held, task)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit.recipe import Stage
from ftkit.tasks.losses import Batch
from ftkit.tasks.task import Task
from ftkit.training.loader import Loader
from ftkit.training.optimizer import rate
from ftkit.training.validate import Held

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def best_rate(
    stage: Stage,
    backbone: Backbone,
    loader: Loader,
    batches: Iterable[tuple[np.ndarray, torch.Generator]],
    total: int,
    held: Held,
    task: Task,
) -> float:
    """Return the rate whose head has the lowest val loss (the task's) after the stage's `total` steps.

    All heads train side by side on the stage's batches. The loss rather than accuracy: accuracies often
    tie on a small val split, and the loss separates rates sooner.
    """
    head = backbone.model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() creates only these
    weights = [head.weight.detach().flatten(1).clone().requires_grad_() for _ in RATES]
    biases = [head.bias.detach().clone().requires_grad_() for _ in RATES]  # type: ignore[union-attr]
    optimizer = _optimizer(stage, weights, biases)

    # (n, features) -> (rates, n, classes), as one matrix product
    def logits_of(embedding: torch.Tensor) -> torch.Tensor:
        flat = F.linear(embedding, torch.cat(weights), torch.cat(biases))
        return flat.view(len(embedding), len(RATES), -1).transpose(0, 1)

    for step, (positions, generator) in enumerate(batches):
        # Every rank trains the heads of all rates, on whole batches
        batch = loader.prepare(loader.fetch(positions, generator, slice(None)))
        for group, peak in zip(optimizer.param_groups, RATES * 2, strict=True):
            group["lr"] = rate(step, total, stage, peak)

        logits = logits_of(features(loader.net, head, batch.inputs)[0])
        plain = Batch(inputs=batch.inputs, targets=batch.targets)
        losses = [task.loss(each, plain, stage, None).mean() for each in logits]

        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # each head receives the gradient of its own loss only
        optimizer.step()

    with torch.no_grad():
        starts = range(0, len(held.labels), 256)
        parts = [
            held.read(np.arange(start, min(start + 256, len(held.labels)))) for start in starts
        ]
        embeddings = torch.cat([features(loader.eval_net, head, inputs)[0] for inputs in parts])
        scores = [task.mean_loss(logits, held.labels) for logits in logits_of(embeddings)]

    finite = [score if np.isfinite(score) else np.inf for score in scores]
    return RATES[int(np.argmin(finite))]


def _optimizer(
    stage: Stage, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.optim.Optimizer:
    """The stage's optimizer over all heads, one group per parameter: weights, then biases."""
    groups = [{"params": [value], "weight_decay": stage.weight_decay} for value in weights]
    groups += [{"params": [value], "weight_decay": 0.0} for value in biases]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)

    if stage.optimizer == "adam":
        return torch.optim.Adam(groups, lr=1.0)
    return torch.optim.AdamW(groups, lr=1.0)
