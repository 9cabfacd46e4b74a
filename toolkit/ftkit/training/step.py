"""How a stage's net runs each step: fastest way, all ranks, smaller parts when out of memory.

net, together = run_as(loader, stage, compute, ranks, images, example, steps)
with together: tally, net, micro = fresh_gradients(net, loader.net, batch, moving, weights, micro)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ftkit.recipe import Stage
from ftkit.tasks.losses import Batch
from ftkit.training.loader import Fetched, Loader
from ftkit.training.optimizer import StepState, gradients
from ftkit.training.precision import Compute, fastest, release, ways
from ftkit.utils import console
from ftkit.utils.distributed import GlobalBatchNorm, Ranks
from ftkit_export.runtime.errors import FtkitError


def run_as(
    loader: Loader,
    stage: Stage,
    compute: Compute,
    ranks: Ranks,
    images: int,
    example: Callable[[], Fetched],
    steps: int,
) -> tuple[nn.Module, AbstractContextManager[Any]]:
    """Wrap the stage's net for training; returns it with the context to run it in.

    The fastest way here or, with several ranks, with gradients averaged over them. images: in a
    step. example: reads one step's batch. steps: still to come. Raises FtkitError if a rank would
    get no image.
    """
    device = compute.device
    if images < ranks.world:
        raise FtkitError(
            f"stage {stage.train}: batch_size: expected an image for each of {ranks.world} ranks, found "
            f"{images} in a step. Try a larger one, or fewer ranks"
        )

    if ranks.world > 1:
        with warnings.catch_warnings():
            # Torch 2.11 does not have the new name of broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            net = DistributedDataParallel(
                loader.net,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        return net, GlobalBatchNorm(ranks.world) if stage.batchnorm else nullcontext()

    if device.type == "cpu" or steps < 1:
        return loader.net, nullcontext()

    inputs = loader.prepare(example()).inputs
    fast, said = fastest(loader.net, inputs, ways(loader.net, inputs, compute), compute, steps)
    if said:
        console.say(f"{stage.train}: {said}")

    return fast, nullcontext()


def fresh_gradients(
    net: nn.Module,
    plain: nn.Module,
    batch: Batch,
    moving: StepState,
    weights: torch.Tensor | None,
    micro: int,
    share: float = 1.0,
) -> tuple[torch.Tensor, nn.Module, int]:
    """Compute one batch's gradients from zero; out of memory, accumulate them over halves.

    Returns the tally, and the net and micro-batch size that fitted. plain: the net without what makes
    it faster; a captured graph takes only whole batches, so halves use that.
    """
    while True:
        moving.optimizer.zero_grad()
        try:
            return gradients(net, batch, moving, weights, micro, share), net, micro
        except torch.OutOfMemoryError:
            if isinstance(net, DistributedDataParallel):
                raise FtkitError(
                    f"stage {moving.stage.train}: expected memory for {len(batch.targets)} images on each GPU, found "
                    "too little. Try a smaller batch_size, or more GPUs"
                ) from None
            if micro == 1:
                raise FtkitError(
                    f"stage {moving.stage.train}: expected memory for one image at a time, found too little on the "
                    "GPU. Try a smaller preprocess.size, or --device cpu"
                ) from None

            release(net)
            net = plain
            micro = (min(micro, len(batch.targets)) + 1) // 2
            torch.cuda.empty_cache()
            console.say(
                f"{moving.stage.train}: out of GPU memory; from here in steps of {micro} images that add up"
            )
