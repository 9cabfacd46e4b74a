"""Which parameters train in a stage: module names for `Stage.train`, and matching modes.

names = trainable(backbone, "last:2")
set_mode(backbone.model, names, batchnorm=False)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from ftkit.models.backbones import Backbone, blocks
from ftkit.utils.compat import BatchNorm
from ftkit_export.runtime.errors import FtkitError


def under(names: Sequence[str]) -> Callable[[str], bool]:
    """Predicate: whether a parameter lies in one of the named modules."""
    return lambda parameter: any(
        parameter == name or parameter.startswith(name + ".") for name in names
    )


def set_mode(model: nn.Module, names: Sequence[str], batchnorm: bool) -> None:
    """Freeze the model (eval mode, no gradients) except the named modules, which train.

    batchnorm: whether their BatchNorm statistics are updated.
    """
    model.eval().requires_grad_(False)
    parameters = dict(model.named_parameters())

    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
            continue
        module = model.get_submodule(name)
        module.train().requires_grad_(True)
        if not batchnorm:
            for inner in module.modules():
                if isinstance(inner, BatchNorm):
                    inner.eval()


def trainable(backbone: Backbone, train: str) -> tuple[str, ...]:
    """Names of the modules (or stand-alone parameters) that train for a stage's `train`.

    Raises FtkitError listing the backbone's blocks unless `train` is head, last:N, first:N, all, or
    a regular expression that matches a module name.
    """
    listed = blocks(backbone)
    top = [name for name, _ in backbone.model.named_children()]
    counted = re.fullmatch(r"(last|first):(\d+)", train)

    if train == "head":
        return (backbone.head,)

    # Such as a ViT's class token
    alone = [name for name, _ in backbone.model.named_parameters(recurse=False)]
    if train == "all":
        return (*top, *alone)

    if counted and 1 <= int(counted[2]) <= len(listed):
        names = (
            _last(listed, top, int(counted[2]))
            if counted[1] == "last"
            else [*alone, *_first(listed, top, int(counted[2]))]
        )
        return _with_head(backbone, names)

    if not counted and (matched := _matching(backbone, train)):
        return matched

    raise FtkitError(
        f"stage.train: expected head, all, last:1 to last:{len(listed)}, first:1 to first:{len(listed)}, or a pattern "
        f"in module names of {backbone.name}, found {train!r}. Its blocks: {', '.join(listed)}"
    )


def _last(listed: list[str], top: list[str], count: int) -> list[str]:
    """The last `count` blocks and everything after them."""
    chosen = listed[-count:]
    return [*chosen, *top[top.index(chosen[-1].split(".")[0]) + 1 :]]


def _first(listed: list[str], top: list[str], count: int) -> list[str]:
    """Everything before the blocks, and the first `count` of them."""
    return [*top[: top.index(listed[0].split(".")[0])], *listed[:count]]


def _with_head(backbone: Backbone, names: list[str]) -> tuple[str, ...]:
    held = any(backbone.head == name or backbone.head.startswith(name + ".") for name in names)
    return tuple(names if held else [*names, backbone.head])


def _matching(backbone: Backbone, pattern: str) -> tuple[str, ...]:
    """The outermost modules and parameters whose names match the pattern."""
    try:
        wanted = re.compile(pattern)
    except re.error:
        return ()

    model = backbone.model
    learning = [name for name, _ in model.named_parameters()]

    names: list[str] = []
    for name in [
        *(name for name, _ in model.named_modules()),
        *(name for name, _ in model.named_parameters()),
    ]:
        inside = any(name.startswith(outer + ".") for outer in names)
        holds = any(parameter == name or parameter.startswith(name + ".") for parameter in learning)
        if name and holds and not inside and wanted.search(name):
            names.append(name)

    return tuple(names)
