"""Score of a stage on the val split, and embeddings to measure how far its features moved.

result = validate(backbone, loader.eval_net, Held(loader.val, labels), weights, ranks, balanced=False)
result.score > best_score
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit.models.inference import Tensors
from ftkit.tasks.task import SINGLE_LABEL, Task
from ftkit.utils.distributed import Ranks
from ftkit_export.runtime.arrays import Array

# Val score for comparing stages: (accuracy, balanced accuracy or another task's metric, -NLL)
Score = tuple[float, float]

EVAL_BATCH = 64
DRIFT_IMAGES = 2048  # val images whose embeddings are compared


def detached(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, so that a model can safely load its own."""
    return {name: value.detach().clone() for name, value in values.items()}


@dataclass(frozen=True)
class Held:
    """Images that a training does not see and is judged on: the val split, or a fold.

    read: positions (n,) -> inputs of the net that evaluates. labels: targets (N, ...), on the device.
    """

    read: Callable[[Array], Tensors]
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Result on held-out images. accuracy: or the figure of another task. logits: (N, K); embedding:
    (n, D) of the first images."""

    score: Score
    accuracy: float
    logits: Array
    embedding: Array


@torch.inference_mode()
def validate(
    backbone: Backbone,
    net: nn.Module,
    held: Held,
    weights: dict[str, torch.Tensor],
    ranks: Ranks,
    *,
    balanced: bool,
    task: Task = SINGLE_LABEL,
    embeddings: int = DRIFT_IMAGES,
) -> Validation:
    """Evaluate these weights on held-out images; the model is left as it was.

    net: takes the images' inputs, and shares the model's parameters. balanced: score by balanced
    accuracy, the mean recall of the classes, which stages that balance their classes train for at the
    possible expense of plain accuracy. Each rank computes some of the batches and leaves zeros
    elsewhere; their sum gives every rank the exact logits.
    """
    labels = held.labels
    model = backbone.model
    modes = [module.training for module in model.modules()]
    own = {name: value.clone() for name, value in model.state_dict().items() if name in weights}
    model.eval().load_state_dict(detached(weights), strict=False)
    head = model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() creates only these
    whole = torch.zeros(len(labels), head.weight.shape[0], device=labels.device)
    kept = torch.zeros(min(len(labels), embeddings), head.weight.shape[1], device=labels.device)

    for start in range(0, len(labels), EVAL_BATCH)[ranks.rank :: ranks.world]:
        place = slice(start, min(start + EVAL_BATCH, len(labels)))
        embedding, answer = features(net, head, held.read(np.arange(place.start, place.stop)))
        whole[place] = answer.float()
        kept[place] = embedding[: max(0, len(kept) - start)]

    model.load_state_dict(own, strict=False)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode

    ranks.sum(whole)
    ranks.sum(kept)
    told = ranks.first(lambda: list(task.score(whole, labels, balanced=balanced)))

    return Validation(
        score=(told[0], -told[1]),
        accuracy=told[2],
        logits=whole.cpu().numpy(),
        embedding=kept.cpu().numpy(),
    )
