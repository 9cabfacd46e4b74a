"""Non-public parts of torch and timm that ftkit uses, with the versions they were taken from.

When a new version breaks something, look here first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# timm 1.0.31, timm/models/_features_fx.py: what torch.fx cannot trace, according to timm
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import nn

__all__ = ["BatchNorm", "default_store", "get_notrace_functions", "get_notrace_modules"]

# torch 2.14, torch/nn/modules/batchnorm.py: base class of BatchNorm1d to 3d and SyncBatchNorm
BatchNorm = nn.modules.batchnorm._BatchNorm


def lerp_in_place(
    means: Sequence[torch.Tensor], values: Sequence[torch.Tensor], weight: float
) -> None:
    """Interpolate every tensor of `means` towards its value by `weight`, in one launch.

    torch 2.14: torch.optim.swa_utils uses the same call.
    """
    torch._foreach_lerp_(list(means), list(values), weight)


def default_store() -> Any:
    """The key-value store shared by the ranks of this process group.

    torch 2.14, torch/distributed/distributed_c10d.py.
    """
    return dist.distributed_c10d._get_default_store()


def sync_batch_norm() -> Callable[..., torch.Tensor]:
    """Batch normalisation over all ranks, as the function that nn.SyncBatchNorm calls.

    torch 2.14, torch/nn/modules/_functions.py: (input, weight, bias, running_mean, running_var,
    eps, momentum, process_group, world_size).
    """
    from torch.nn.modules._functions import SyncBatchNorm

    function: Callable[..., torch.Tensor] = SyncBatchNorm.apply
    return function
