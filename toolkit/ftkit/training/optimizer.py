"""Parts of a training step: learning rate, optimizer groups, gradients, averaged weights.

optimizer = make_optimizer(backbone, stage)
tally = gradients(net, batch, moving, ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftkit.models.backbones import Backbone, blocks
from ftkit.recipe import Stage
from ftkit.tasks.losses import Batch
from ftkit.tasks.task import SINGLE_LABEL, Task
from ftkit.training.precision import Compute
from ftkit.utils.compat import lerp_in_place

State = dict[str, torch.Tensor]


def rate(step: int, total: int, stage: Stage, peak: float) -> float:
    """Learning rate at `step` of `total`: linear warmup to `peak`, then the schedule.

    onecycle is a cosine with a warmup of at least 20 % of the steps.
    """
    warmup = max(stage.warmup, 0.2 if stage.schedule == "onecycle" else 0.0)
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    if stage.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def make_optimizer(backbone: Backbone, stage: Stage, fused: bool = False) -> torch.optim.Optimizer:
    """Create an optimizer over the parameters that require gradients, in named groups.

    Groups are head and blocks, each with and without weight decay; vectors (biases, normalisation)
    take none. Each group's `scale` multiplies the rate: with layer_decay it is decay ** (number of
    blocks between it and the head), as in BEiT (Bao et al. 2021). fused: update all weights in one
    kernel, on CUDA.
    """
    listed = blocks(backbone)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad:
            label, depth = _place(name, backbone, listed)
            decay = stage.weight_decay if parameter.ndim > 1 else 0.0
            label = label if stage.layer_decay < 1 or label == "head" else "blocks"
            key = f"{label}{'' if decay else ' without decay'}"
            fresh = {
                "name": key,
                "params": [],
                "weight_decay": decay,
                "scale": stage.layer_decay**depth,
            }
            groups.setdefault(key, fresh)["params"].append(parameter)

    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            groups.values(), lr=1.0, momentum=0.9, nesterov=True, fused=fused or None
        )

    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(groups.values(), lr=1.0, fused=fused or None)  # the rate is set at every step


def _place(name: str, backbone: Backbone, listed: list[str]) -> tuple[str, int]:
    """A parameter's group, and the number of blocks between it and the head."""
    if name.startswith(backbone.head + "."):
        return "head", 0
    for number, block in enumerate(listed):
        if name.startswith(block + "."):
            return block, len(listed) - number

    top = [child for child, _ in backbone.model.named_children()]
    first = name.split(".")[0]
    after = first in top and top.index(first) >= top.index(listed[-1].split(".")[0])

    return ("after the blocks", 0) if after else ("stem", len(listed) + 1)


def gradients(
    net: nn.Module,
    batch: Batch,
    moving: StepState,
    weights: torch.Tensor | None,
    micro: int,
    share: float = 1.0,
) -> torch.Tensor:
    """Accumulate one batch's gradients, `micro` images at a time.

    Returns (sum of losses, sum of the task's figures, number of images), float64, on the device,
    without waiting for it. share: factor on the mean gradient of the batch's images.
    """
    targets = batch.targets
    stage = moving.stage
    losses = torch.zeros((), device=targets.device)
    hits = torch.zeros((), device=targets.device)

    for start in range(0, len(targets), micro):
        part = batch.part(start, start + micro)
        with moving.autocast():
            logits = net(*part.inputs)
        loss = moving.task.loss(logits.float(), part, stage, weights).sum()
        moving.scaler.scale(loss * share / len(targets)).backward()
        losses += loss.detach()
        hits += moving.task.figures(logits.detach(), part.targets).sum()

    return torch.stack(
        [losses.double(), hits.double(), torch.full_like(hits, len(targets)).double()]
    )


def average(mean: State, current: State, decay: float) -> None:
    """Move `mean` towards `current` by 1 - decay, in place; integer buffers are left unchanged."""
    floating = [name for name, value in current.items() if value.is_floating_point()]
    lerp_in_place(
        [mean[name] for name in floating], [current[name] for name in floating], 1 - decay
    )


class StepState:
    """Everything that changes while a stage trains: weights, averaged and best weights, optimizer.

    current: the model's own tensors under the named modules, so they change with it. before: a copy
    from the start of the stage. tally: (sum of losses, sum of the task's figures, number seen) of the
    epoch so far, float64. compute: precision; the default is float32 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        inside: Callable[[str], bool],
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        compute: Compute = Compute(device=torch.device("cpu")),  # noqa: B008  (frozen)
        task: Task = SINGLE_LABEL,
    ):
        self.current = {name: value for name, value in model.state_dict().items() if inside(name)}
        self.before = _clone(self.current)
        self.mean = _clone(self.current) if stage.ema else {}
        self.best: State = {}
        self.optimizer = optimizer
        self.stage = stage
        self.task = task
        self.autocast = compute.autocast
        self.scaler = compute.scaler()
        self.tally = torch.zeros(3, dtype=torch.float64)

    def step(self, number: int, tally: torch.Tensor) -> None:
        """Apply the gradients, update the averaged weights (faster at first), add to the tally."""
        if self.stage.clip:
            self.scaler.unscale_(self.optimizer)
            held = [
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            ]
            nn.utils.clip_grad_norm_(held, self.stage.clip)

        self.scaler.step(self.optimizer)
        self.scaler.update()

        if self.mean:
            average(self.mean, self.current, min(self.stage.ema, (1 + number) / (10 + number)))

        self.tally = self.tally.to(tally.device, non_blocking=True)
        self.tally += tally

    def epoch(self) -> tuple[float, float]:
        """Return (mean loss, mean figure) since the last call, and reset the tally."""
        standing = self.standing()
        self.tally = torch.zeros(3, dtype=torch.float64)
        return standing

    def standing(self) -> tuple[float, float]:
        """Return (mean loss, mean figure) of the epoch so far; NaN before its first step.

        Waits for the device.
        """
        losses, hits, seen = self.tally.tolist()
        return (losses / seen, hits / seen) if seen else (math.nan, math.nan)

    @property
    def result(self) -> State:
        """The weights to evaluate and keep: the averaged ones if there are any."""
        return self.mean or self.current

    def keep_best(self) -> None:
        """Store a copy of `result` as the best epoch's."""
        self.best = _clone(self.result)

    def tensors(self) -> State:
        """The whole state under flat names, to be saved."""
        flat = {
            "tally": self.tally,
            **{
                f"scaler/{key}": torch.tensor(value, dtype=torch.float64)
                for key, value in self.scaler.state_dict().items()
            },
        }
        for role in ("current", "mean", "best"):
            flat |= {f"{role}/{name}": value for name, value in getattr(self, role).items()}

        for index, values in self.optimizer.state_dict()["state"].items():
            flat |= {
                f"optimizer/{index}/{key}": torch.as_tensor(value)
                for key, value in values.items()
                if value is not None
            }

        return flat

    def load(self, flat: State) -> None:
        """Restore what `tensors` returned, each tensor in its original memory layout."""
        if not flat:
            return

        self.tally = flat["tally"]
        kinds = {
            key: value for key, value in self.scaler.state_dict().items() if f"scaler/{key}" in flat
        }
        if kinds:  # empty when the saved run used another precision
            self.scaler.load_state_dict(
                {key: type(kinds[key])(flat[f"scaler/{key}"]) for key in kinds}
            )

        for role in ("current", "mean"):
            for name, value in getattr(self, role).items():
                value.copy_(flat[f"{role}/{name}"])

        named = {
            name.removeprefix("best/"): value
            for name, value in flat.items()
            if name.startswith("best/")
        }
        self.best = {name: _like(value, self.current[name]) for name, value in named.items()}
        parameters = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]

        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in flat.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                states.setdefault(int(index), {})[key] = _like(value, parameters[int(index)])

        self.optimizer.load_state_dict(
            {"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )


def _clone(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _like(saved: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy `saved` into the memory layout of `like`.

    Sums over another layout may differ in the last bit.
    """
    if saved.shape != like.shape:
        return saved
    return torch.empty_like(like, dtype=saved.dtype, requires_grad=False).copy_(saved)
