"""A stage's score on the val split, and the embeddings that tell how far its features have moved.

(accuracy, minus_nll), embedding = validate(backbone, feed, labels, weights, ranks)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit.backbones import Backbone, features
from ftkit.distributed import Ranks
from ftkit.feed import Feed

Array = np.ndarray[Any, Any]
Score = tuple[float, float]  # accuracy, -NLL on val

EVAL_BATCH = 64
DRIFT_IMAGES = 2048  # val images whose embeddings are compared


def detached(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, so that loading a model from its own tensors is harmless."""
    return {name: value.detach().clone() for name, value in values.items()}


@torch.inference_mode()
def validate(
    backbone: Backbone, feed: Feed, labels: torch.Tensor, weights: dict[str, torch.Tensor], ranks: Ranks
) -> tuple[Score, Array]:
    """(accuracy, -NLL) on the val split of these weights, and its first embeddings; the model is left as it was.

    Ranks take turns at its batches and sum what are zeros elsewhere: every rank has every logit, exactly.
    """
    model = backbone.model
    modes = [module.training for module in model.modules()]
    own = {name: value.clone() for name, value in model.state_dict().items() if name in weights}
    model.eval().load_state_dict(detached(weights), strict=False)
    head = model.get_submodule(backbone.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)  # build() makes no other
    whole = torch.zeros(len(labels), head.weight.shape[0], device=labels.device)
    kept = torch.zeros(min(len(labels), DRIFT_IMAGES), head.weight.shape[1], device=labels.device)
    for start in range(0, len(labels), EVAL_BATCH)[ranks.rank :: ranks.world]:
        place = slice(start, min(start + EVAL_BATCH, len(labels)))
        found, answer = features(feed.eval_net, head, feed.val(np.arange(place.start, place.stop)))
        whole[place] = answer.float()
        kept[place] = found[: max(0, len(kept) - start)]
    model.load_state_dict(own, strict=False)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    ranks.sum(whole)
    ranks.sum(kept)
    accuracy = (whole.argmax(1) == labels).float().mean()
    score = ranks.first(lambda: [float(accuracy), -float(F.cross_entropy(whole, labels))])
    return (score[0], score[1]), kept.cpu().numpy()
