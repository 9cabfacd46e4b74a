"""The steps from pixels to logits, as they were trained: what was frozen, what learned, and where.

parts = describe(backbone, [("head", ("classifier",)), ("last:2", ("blocks.5", ...))], size=224)
parts[0].blocks, parts[0].shape, parts[0].parameters, parts[0].stages
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ftkit.models.backbones import Backbone, blocks
from ftkit.models.freezing import under


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive parts of a network that were trained in the same stages.

    name: frozen, trained or head. blocks: names of its modules, first to last. shape: of its output
    for one image. parameters: their number. stages: those that trained it; empty: pretrained.
    """

    name: str
    blocks: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    stages: tuple[str, ...]


def describe(
    backbone: Backbone, trained: Sequence[tuple[str, Sequence[str]]], size: int
) -> list[Part]:
    """The parts of a model, first to last.

    trained: the stages that were kept, each with the names of the modules that it trained. size: of
    the input in pixels.
    """
    model = backbone.model
    names = _sequence(backbone)
    shapes = _shapes(model, names, size)
    alone = [(name, value.numel()) for name, value in model.named_parameters(recurse=False)]
    parts: list[Part] = []

    for name in names:
        parameters = [
            (f"{name}.{inner}", value.numel())
            for inner, value in model.get_submodule(name).named_parameters()
        ]
        if name == names[0]:  # a class token and the like enter with the first
            parameters += alone
        stages = tuple(
            stage
            for stage, modules in trained
            if any(under(modules)(parameter) for parameter, _ in parameters)
        )
        kind = "head" if name == backbone.head else "trained" if stages else "frozen"
        count = sum(number for _, number in parameters)
        last = parts[-1] if parts else None
        if last and last.name == "head":
            break  # what follows has no parameters: an activation, a pooling

        # What has no parameters goes with what stands before it
        if (
            last
            and last.name != "head"
            and (not parameters or (last.name, last.stages) == (kind, stages))
        ):
            parts[-1] = Part(
                name=last.name,
                blocks=(*last.blocks, name),
                shape=shapes[name],
                parameters=last.parameters + count,
                stages=last.stages,
            )
        else:
            parts.append(
                Part(name=kind, blocks=(name,), shape=shapes[name], parameters=count, stages=stages)
            )

    return parts


def _sequence(backbone: Backbone) -> list[str]:
    """Modules in the order of the network: blocks one by one, the head on its own."""
    listed = blocks(backbone)
    holders = {block.rpartition(".")[0] for block in listed if "." in block}
    names: list[str] = []
    for name, child in backbone.model.named_children():
        if name in holders:
            names += [block for block in listed if block.startswith(f"{name}.")]
        elif backbone.head.startswith(f"{name}."):
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(name)

    # Modules inside the head's own sequence may hold it deeper
    return [name for name in names if not backbone.head.startswith(f"{name}.")] + (
        [] if backbone.head in names else [backbone.head]
    )


def _shapes(model: nn.Module, names: Sequence[str], size: int) -> dict[str, tuple[int, ...]]:
    """Shape of each module's last output for one image; empty where it was not called."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())
    hooks = []
    for name in names:

        def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                shapes[name] = tuple(output.shape[1:])

        hooks.append(model.get_submodule(name).register_forward_hook(keep))

    training = model.training
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()

    return shapes
