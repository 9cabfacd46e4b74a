"""Run the frozen prefix once per view over the canvases, and keep what comes out of it.

    activations = fill(prefix, names, canvases, recipe_part..., folder)   # computes, or finds an earlier run's
    activations.train(view, positions)                                     # tuple of tensors, float32

On a CPU the prefix runs in ONNX Runtime (a whole lite0 run: 143 s, 194 s with eager PyTorch). Values are
kept as float16 in memory-mapped files; a sample is compared with a live pass before they are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from ftkit.augment import augmented, evaluation
from ftkit.backbones import fingerprint
from ftkit.canvas import Canvases, cache_folder, publish
from ftkit.recipe import Augment
from ftkit_export.convert import quiet
from ftkit_export.preprocess import Preprocess
from ftkit_export.session import Session

Array = np.ndarray[Any, Any]
Tensors = tuple[torch.Tensor, ...]

CHUNK = 8  # images a pass; ONNX Runtime on 2 cores: 188, 180, 162 img/s at 4, 8, 16
TOLERANCE = 1e-3  # float16 against live, relative to the largest value
DISK_SHARE = 0.5  # of the free disk that a cache may take


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Cached values by node name, each (items, ...) float16: all views of the train rows, then the val rows, view 0."""

    arrays: dict[str, Array]
    train_rows: int
    views: int
    found: bool  # an earlier run had computed them

    def train(self, names: Sequence[str], views: Array, positions: Array) -> Tensors:
        """Train position i in view v -> one tensor a name, float32, channels last where 4-D."""
        return self._tensors(names, views * self.train_rows + positions)

    def val(self, names: Sequence[str], positions: Array) -> Tensors:
        """Val position -> one tensor a name, float32, channels last where 4-D."""
        return self._tensors(names, self.views * self.train_rows + positions)

    def _tensors(self, names: Sequence[str], items: Array) -> Tensors:
        return tuple(channels_last(torch.from_numpy(self.arrays[name][items]).float()) for name in names)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The layout convolutions are fastest in; other shapes pass unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def view_pixels(
    canvases: torch.Tensor, preprocess: Preprocess, augment: Augment, seed: int, view: int, chunk: int
) -> torch.Tensor:
    """Pixels of one chunk in one view; view 0 is the evaluation crop. Depends on nothing but its arguments."""
    if view == 0:
        return evaluation(canvases, preprocess)
    generator = torch.Generator().manual_seed((seed * 1009 + view) * 1_000_003 + chunk)
    return augmented(canvases, preprocess, augment, generator, view)


def fill(
    prefix: fx.GraphModule, names: Sequence[str], canvases: Canvases, *, preprocess: Preprocess, augment: Augment,
    views: int, seed: int, device: torch.device, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activations | str:  # fmt: skip
    """Activations of `prefix` (pixels -> tuple of values, called `names`), or the reason why they cannot be cached.

    A value must be a tensor with one entry an image. Keyed by the prefix's code and weights, the views, the canvases.
    """
    train, val = canvases.rows("train"), canvases.rows("val")
    jobs = [(train, view) for view in range(views)] + [(val, 0)]
    items = sum(len(rows) for rows, _ in jobs)

    def pixels(rows: Array, view: int, start: int) -> torch.Tensor:
        batch = torch.from_numpy(canvases.array(rows[start : start + CHUNK])).to(device)
        return view_pixels(batch, preprocess, augment, seed, view, start)

    with torch.inference_mode():
        sample = _as_tuple(prefix(pixels(train, 0, 0)))
    first = min(CHUNK, len(train))
    if not all(isinstance(value, torch.Tensor) and value.ndim and len(value) == first for value in sample):
        return "a value that crosses the cut is no tensor with one entry an image"
    text = json.dumps([
        "prefix-1", prefix.code, fingerprint(prefix), list(names), canvases.fingerprint, views, seed,
        repr(augment), repr(preprocess), device.type,
    ])  # fmt: skip
    folder = cache_folder() / "prefix" / hashlib.sha256(text.encode()).hexdigest()[:32]
    found = folder.is_dir()
    if not found:
        needed = items * sum(value[0].numel() * 2 for value in sample)
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed > DISK_SHARE * free:
            return f"its cache would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free at {folder.parent}"
        beside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            _compute(prefix, names, sample, jobs, pixels, beside, progress)
            publish(beside, folder)
        except OSError as error:
            return f"its cache could not be written: {error.strerror}"
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    os.utime(folder)
    arrays = {name: np.load(folder / f"{number}.npy", mmap_mode="r") for number, name in enumerate(names)}
    view = views - 1
    with torch.inference_mode():
        live = _as_tuple(prefix(pixels(train, view, 0)))
    for name, value in zip(names, live, strict=True):
        start = view * len(train)
        kept = torch.from_numpy(arrays[name][start : start + first].astype(np.float32))
        off = float((kept - value.float().cpu()).abs().max() / value.abs().max().clamp(min=1e-12))
        if not off <= TOLERANCE:
            return f"cached {name} differs from a live pass by {off:.1e} of its largest value"
    return Activations(arrays=arrays, train_rows=len(train), views=views, found=found)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _compute(
    prefix: fx.GraphModule, names: Sequence[str], sample: Tensors, jobs: Sequence[tuple[Array, int]],
    pixels: Callable[[Array, int, int], torch.Tensor], folder: Path, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    items = sum(len(rows) for rows, _ in jobs)
    run = runner(prefix, pixels(jobs[0][0], 0, 0))
    arrays = [
        np.lib.format.open_memmap(
            folder / f"{number}.npy", mode="w+", dtype=np.float16, shape=(items, *sample[number].shape[1:])
        )
        for number in range(len(names))
    ]
    at = 0
    for rows, view in jobs:
        for start in range(0, len(rows), CHUNK):
            values = run(pixels(rows, view, start))
            for array, value in zip(arrays, values, strict=True):
                array[at : at + len(value)] = value
            at += len(values[0])
            progress(at, items)
    for array in arrays:
        array.flush()


def runner(net: torch.nn.Module, example: torch.Tensor) -> Callable[[torch.Tensor], list[Array]]:
    """The fastest way to run `net` here: pixels (n, 3, S, S) -> its outputs, float32.

    ONNX Runtime on a CPU, where its answer to `example` is the framework's to 1e-4 of the largest value; the framework
    itself elsewhere, or where the net does not export.
    """

    def eager(pixels: torch.Tensor) -> list[Array]:
        with torch.inference_mode():
            return [value.float().cpu().numpy() for value in _as_tuple(net(channels_last(pixels)))]

    if example.device.type != "cpu":
        return eager
    try:
        session = Session(_onnx_bytes(net, example))
        pairs = zip(session.run(example.numpy()), eager(example), strict=True)
        if all(np.abs(a - b).max() <= 1e-4 * np.abs(b).max() for a, b in pairs):
            return lambda pixels: session.run(pixels.numpy())
    except Exception:  # not every graph exports, and exporters raise anything: the framework's own pass remains
        return eager
    return eager


def _onnx_bytes(net: torch.nn.Module, example: torch.Tensor) -> bytes:
    """By the TorchScript exporter: 0.8 s where the dynamo one takes 10 s for lite0. The file never leaves this run."""
    buffer = io.BytesIO()
    # A Sequential, since the exporter takes a GraphModule's `graph` for its own; in eval mode, since it gives the mode
    # that it finds to every module inside.
    plain = torch.nn.Sequential(net).eval()
    with quiet():
        torch.onnx.export(
            plain, (example[:2],), buffer,  # type: ignore[arg-type]  # a buffer works; the stub knows paths only
             dynamo=False, opset_version=18,
            input_names=["pixels"], dynamic_axes={"pixels": {0: "batch"}},
        )  # fmt: skip
    return buffer.getvalue()
