"""A pretrained backbone with a new head: any timm or torchvision classification model.

backbone = build("efficientnet_lite0", classes=4)
backbone.model, backbone.head, backbone.preprocess
blocks(backbone)                     # module names of its blocks
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import nn

from ftkit.models import cut as cuts
from ftkit.models.weights import EXTRA_HEADS, PACKAGES, load_weights
from ftkit_export.runtime.errors import FtkitError, choices
from ftkit_export.runtime.preprocess import Preprocess

# Conventional names of the module that holds a backbone's blocks
SEQUENCES = (
    "blocks",
    "stages",
    "layers",
    "features",
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model with a new head.

    head: module name of the last layer. weights: their source, with a hash.
    """

    name: str
    model: nn.Module
    head: str
    preprocess: Preprocess
    weights: str


def build(
    name: str,
    classes: int,
    weights: str = "pretrained",
    *,
    cut: str = "",
    pooling: str = "mean",
) -> Backbone:
    """Build `name` (timm first, then torchvision) with a new head of `classes` outputs.

    weights: "pretrained", "none", or the path of a .safetensors / .pth file of the backbone's
    state. cut, pooling: end behind this block, with a head on its pooled features (models.cut).
    Raises FtkitError for an unknown name, a head that cannot be replaced, and as load_weights.
    """
    model, library = _create(name)
    preprocess = _preprocess(model, name, library)
    head = _head_name(model)
    source = load_weights(model, name, library, head, weights)
    if cut:
        model = cuts.cut(model, cut, pooling, classes, preprocess.size)
        return Backbone(
            name=name, model=model.eval(), head=cuts.HEAD, preprocess=preprocess, weights=source
        )

    old = model.get_submodule(head)
    _replace(model, head, _new_head(old, classes))

    if hasattr(model, "num_classes"):
        model.num_classes = classes  # type: ignore[assignment]  # timm's own bookkeeping

    require_logits(model.eval(), name, preprocess.size, classes)
    return Backbone(name=name, model=model.eval(), head=head, preprocess=preprocess, weights=source)


def _create(name: str) -> tuple[nn.Module, str]:
    if name in PACKAGES:
        return timm.create_model(name, bn_eps=1e-3), "timm"

    if timm.is_model(name):
        model = timm.create_model(name)
        if any(EXTRA_HEADS.search(inner) for inner, _ in model.named_modules()):
            model = _with_option(timm.create_model, name, "distillation", "distilled") or model
        return model, "timm"

    if name in torchvision.models.list_models(module=torchvision.models):
        get = partial(torchvision.models.get_model, weights=None)
        return _with_option(get, name, "aux_logits") or get(name), "torchvision"

    near = timm.list_models(f"*{name.split('_')[0]}*")[:12] or ["efficientnet_lite0", "resnet18"]
    raise FtkitError(f"backbone: expected a timm or torchvision model, {choices(name, near)}")


def _with_option(make: Callable[..., nn.Module], name: str, *options: str) -> nn.Module | None:
    """The model without auxiliary heads, if its constructor accepts one of the options."""
    for option in options:
        try:
            return make(name, **{option: False})
        except TypeError:
            continue
    return None


def _preprocess(model: nn.Module, name: str, library: str) -> Preprocess:
    if name in PACKAGES:
        size = PACKAGES[name][2]
        grey = (127.0, 127.0, 127.0)
        return Preprocess(
            size=size, resize=round(size / 0.875), mean=grey, std=(128.0, 128.0, 128.0)
        )

    if library == "torchvision":
        return Preprocess()

    config = resolve_model_data_config(model)
    size = config["input_size"][-1]
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))

    return Preprocess(size=size, resize=math.floor(size / config["crop_pct"]), mean=mean, std=std)


def _head_name(model: nn.Module) -> str:
    """Module name of the layer that produces the logits.

    The one the library declares, else the last linear layer, else the last convolution.
    """
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    classifier: Any = getattr(model, "get_classifier", None)
    declared = classifier() if classifier else None

    for name, module in modules:
        if module is declared and isinstance(module, nn.Linear | nn.Conv2d):
            return name

    for kind in (nn.Linear, nn.Conv2d):  # SqueezeNet ends in a convolution
        for name, module in reversed(modules):
            if isinstance(module, kind):
                return name

    raise FtkitError("backbone: expected a linear last layer, found none. Try another backbone")


def require_logits(model: nn.Module, name: str, size: int, classes: int) -> None:
    """Raise FtkitError if the model with its new head does not return logits (n, classes) for images of
    `size`: because it has a second head, say, or takes one size only.
    """
    try:
        with torch.inference_mode():
            answer: Any = model(torch.zeros(1, 3, size, size))
        shape = str(tuple(answer.shape))
    except Exception as error:  # a model's forward may raise anything
        shape = str(error).splitlines()[0]

    if shape != f"(1, {classes})":
        raise FtkitError(
            f"backbone {name}: expected logits of shape (1, {classes}) for an image of {size} x {size} pixels, found: "
            f"{shape}. Try another backbone or preprocess.size"
        )


def _new_head(old: nn.Module, classes: int) -> nn.Module:
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias=True)
    if isinstance(old, nn.Conv2d):
        return nn.Conv2d(old.in_channels, classes, kernel_size=1)
    raise FtkitError(
        f"backbone: expected a linear last layer, found {type(old).__name__}. Try another backbone"
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def blocks(backbone: Backbone) -> list[str]:
    """Module names of the backbone's blocks, first to last, as counted by `last:N`."""
    model = backbone.model
    layers = [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]
    if layers:
        return layers
    for name, child in model.named_children():
        if name in SEQUENCES and len(list(child.children())) > 1:
            return [f"{name}.{inner}" for inner, _ in child.named_children()]
    return [name for name, _ in model.named_children() if name != backbone.head.split(".")[0]]


def pooled_blocks(backbone: Backbone, size: int) -> list[str]:
    """The blocks whose output has space to pool over, first to last.

    size: S of the input in pixels. Raises whatever the model raises for it.
    """
    found = []

    def note(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim in cuts.SPATIAL:
            found.append(name)

    observe(backbone, size, [(name, partial(note, name)) for name in blocks(backbone)])
    return found


def observe(
    backbone: Backbone, size: int, seen: Iterable[tuple[str, Callable[[Any], None]]]
) -> None:
    """Run one black image of `size` pixels through the network, in eval mode.

    seen: (name of a module, called with its output as soon as it has run); of one module, in this order.
    """
    hooks = [
        backbone.model.get_submodule(name).register_forward_hook(
            lambda _, __, output, call=call: call(output)
        )
        for name, call in seen
    ]
    try:
        with torch.inference_mode():
            backbone.model.eval()(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()


def features(
    net: nn.Module, head: nn.Module, inputs: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `net`; return its head's input, (n, features) float32, and its output.

    A feature map entering a convolutional head is averaged over space.
    """
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        with torch.no_grad():
            answer = net(*inputs)
    finally:
        handle.remove()

    embedding = seen[0].float()
    return (embedding.mean((2, 3)) if embedding.ndim == 4 else embedding.flatten(1)), answer
