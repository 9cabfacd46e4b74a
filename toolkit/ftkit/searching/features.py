"""Pooled features of every depth of a network, from one pass over the images, and cached.

found = features(backbone, canvases, preprocess, rows)
found["blocks.4"]          # (n, 2 C) float32: mean and maximum over space
found[""]                  # (n, features): the whole network's embedding
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from torch import nn

from ftkit.data.canvas import Canvases
from ftkit.models.backbones import Backbone, pooled_blocks
from ftkit.models.cut import Pool, space_axes
from ftkit.models.inference import PREFIX_BATCH, runner
from ftkit.models.weights import fingerprint
from ftkit.utils import console
from ftkit.utils.cache_folder import cache_folder, clear_abandoned, publish, unpublished
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess

WHOLE = ""
CPU = torch.device("cpu")
GPU_BATCH = 128
VERSIONS = (torch.__version__, timm.__version__, onnxruntime.__version__)


class _AllDepths(nn.Module):
    """pixels -> pooled features of every block, and the embedding."""

    def __init__(self, backbone: Backbone, names: Sequence[str], size: int):
        super().__init__()
        self.model = backbone.model.eval()
        self.names = list(names)
        self.seen: dict[str, torch.Tensor] = {}
        head = self.model.get_submodule(backbone.head)
        self.hooks = [head.register_forward_pre_hook(self._embedding)]
        for name in names:
            block = self.model.get_submodule(name)
            self.hooks.append(block.register_forward_hook(self._keeper(name)))
        with torch.inference_mode():
            self.model(torch.zeros(1, 3, size, size))
            self.pools = nn.ModuleList(
                Pool("mean+max", [space_axes(self.seen[name], name)]) for name in names
            )

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
            self.seen[name] = output

        return keep

    def _embedding(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        value = inputs[0]
        self.seen[WHOLE] = value.mean((2, 3)) if value.ndim == 4 else value.flatten(1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.model(pixels)
        pooled = [pool(self.seen[name]) for name, pool in zip(self.names, self.pools, strict=True)]
        return (*pooled, self.seen[WHOLE])


def features(
    backbone: Backbone,
    canvases: Canvases,
    preprocess: Preprocess,
    rows: Array,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    device: torch.device = CPU,
    threads: int = 0,
) -> dict[str, Array]:
    """Features of these rows at every depth, block name -> (n, features) float32.

    preprocess: of the input size wanted. Rows that an earlier search computed are read. threads: on
    a CPU, 0 = all cores.
    """
    names = pooled_blocks(backbone, preprocess.size)
    place = entry(backbone, canvases, preprocess, rows, device)
    if found := _read(place, [*names, WHOLE], len(rows)):
        place.touch()
        return found

    batch = PREFIX_BATCH if device.type == "cpu" else GPU_BATCH

    def pixels(start: int) -> torch.Tensor:
        canvas = canvases.array(rows[start : start + batch])
        return torch.from_numpy(preprocess.pixels(canvas)).to(device)

    net = _AllDepths(backbone, names, preprocess.size).to(device)
    parts: list[list[Array]] = []
    try:
        run, _ = runner(net, pixels(0), threads)
        for start in range(0, len(rows), batch):
            parts.append(run(pixels(start)))
            progress(min(start + batch, len(rows)), len(rows))
    except torch.OutOfMemoryError:
        raise FtkitError(
            f"{backbone.name} at {preprocess.size} px: expected GPU memory for {batch} images, found too little. "
            "Try smaller --sizes, or --device cpu"
        ) from None
    finally:
        for hook in net.hooks:
            hook.remove()
        net.cpu()

    whole = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    made = dict(zip([*names, WHOLE], whole, strict=True))
    try:
        _write(place, made)
    except OSError as error:
        why = error.strerror or error
        console.warn(f"features are not kept, a later search computes them again: {why}")
    return made


def entry(
    backbone: Backbone,
    canvases: Canvases,
    preprocess: Preprocess,
    rows: Array,
    device: torch.device = CPU,
) -> Path:
    """Folder of a cache entry: its key holds the weights, the images, the preprocessing, the versions
    and, if it is no CPU, the kind of device, which rounds in its own way."""
    digest = hashlib.sha256(fingerprint(backbone.model).encode())
    for row in rows:
        digest.update(canvases.digests[row].encode())
    digest.update(repr((backbone.name, asdict(preprocess), VERSIONS)).encode())
    if device.type != "cpu":
        digest.update(device.type.encode())
    return cache_folder() / "features" / digest.hexdigest()[:32]


def _read(place: Path, names: Sequence[str], count: int) -> dict[str, Array] | None:
    try:
        found = {name: np.load(place / f"{name or 'whole'}.npy") for name in names}
    except (OSError, ValueError, EOFError):
        return None
    return found if all(len(value) == count for value in found.values()) else None


def _write(place: Path, made: dict[str, Array]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(place.parent)
    beside = unpublished(place)
    try:
        for name, value in made.items():
            np.save(beside / f"{name or 'whole'}.npy", value)
        publish(beside, place)
    finally:  # what a full disk has of it
        shutil.rmtree(beside, ignore_errors=True)
