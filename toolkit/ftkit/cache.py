"""Run a frozen part once per view over the canvases, and keep what comes out of it.

    views = Views(canvases, preprocess, augment, count=4, seed=0, device=...)
    activations = fill(prefix, key, names, views)          # computes, or finds an earlier run's; or says why not
    activations.train(names, views, positions)             # arrays as kept, by train position
    check(prefix, names, activations, views)               # a sample against a live pass; "" when equal

On a CPU the frozen part runs in ONNX Runtime (a whole lite0 run: 143 s, 194 s with eager PyTorch). Values are kept in
memory-mapped files, as float16 where their range allows.
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
from torch import nn

from ftkit.augment import augmented, evaluation
from ftkit.canvas import Canvases, cache_folder, clear_abandoned, publish, reserve
from ftkit.recipe import Augment
from ftkit.state import seeded
from ftkit_export.convert import quiet
from ftkit_export.preprocess import Preprocess
from ftkit_export.session import Session

Array = np.ndarray[Any, Any]
Tensors = tuple[torch.Tensor, ...]

CHUNK = 8  # images a pass; ONNX Runtime on 2 cores: 188, 180, 162 img/s at 4, 8, 16
TOLERANCE = {"float16": 1e-3, "float32": 1e-5}  # kept against live, relative to the largest value
FLOAT16_RANGE = (1e-3, 2e4)  # largest values that float16 keeps with room at both ends
DISK_SHARE = 0.5  # of the free disk that a cache may take


@dataclass(frozen=True, kw_only=True)
class Views:
    """`count` seeded views of each train image, and the evaluation crop of each val image, in a fixed order.

    Row item = view * train images + position; the val images follow. View 0 is the evaluation crop.
    """

    canvases: Canvases
    preprocess: Preprocess
    augment: Augment
    count: int
    seed: int
    device: torch.device

    def jobs(self) -> list[tuple[Array, int]]:
        """(rows, view), in the order of the items."""
        train, val = self.canvases.rows("train"), self.canvases.rows("val")
        return [*((train, view) for view in range(self.count)), (val, 0)]

    def pixels(self, rows: Array, view: int, start: int) -> torch.Tensor:
        """Rows start to start + CHUNK in one view -> (n, 3, S, S) float32. Depends on nothing but its arguments."""
        canvases = torch.from_numpy(self.canvases.array(rows[start : start + CHUNK])).to(self.device)
        if view == 0:
            return evaluation(canvases, self.preprocess)
        generator = torch.Generator().manual_seed(seeded("view", self.seed, view, start))
        return augmented(canvases, self.preprocess, self.augment, generator, view)

    @property
    def key(self) -> str:
        """What the pixels depend on."""
        return json.dumps([self.canvases.fingerprint, repr(self.preprocess), repr(self.augment), self.count, self.seed])


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Kept values by name, each (items, ...): all views of the train images, then the val images.

    kind: dtype and what computed them, e.g. "float16 by onnxruntime". found: an earlier run had computed them.
    """

    arrays: dict[str, Array]
    train_rows: int
    views: int
    kind: str
    found: bool

    def train(self, names: Sequence[str], views: Array, positions: Array) -> list[Array]:
        """Train position i in view v -> one array a name, as kept."""
        return [self.arrays[name][views * self.train_rows + positions] for name in names]

    def val(self, names: Sequence[str], positions: Array) -> list[Array]:
        """Val position -> one array a name, as kept."""
        return [self.arrays[name][self.views * self.train_rows + positions] for name in names]


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The layout convolutions are fastest in; other shapes pass unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def fill(
    prefix: nn.Module, key: str, names: Sequence[str], views: Views,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activations | str:  # fmt: skip
    """Activations of `prefix` (pixels -> tuple of values, called `names`), or the reason why they cannot be cached.

    key: what the prefix computes (code and weights). A value must be a tensor with one entry an image.
    """
    jobs = views.jobs()
    train = len(jobs[0][0])
    with torch.inference_mode():
        sample = _as_tuple(prefix(views.pixels(jobs[0][0], 0, 0)))
    if not all(isinstance(value, torch.Tensor) and value.ndim and len(value) == min(CHUNK, train) for value in sample):
        return "a value that crosses the cut is no tensor with one entry an image"
    text = json.dumps(["prefix-2", key, list(names), views.key, views.device.type])
    folder = cache_folder() / "prefix" / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        found = folder.is_dir()
        if not found and (reason := _write(prefix, sample, views, folder, progress)):
            return reason
        os.utime(folder)
        arrays = {name: np.load(folder / f"{number}.npy", mmap_mode="r") for number, name in enumerate(names)}
        kind = (folder / "kind").read_text()
    except OSError as error:
        return f"its cache could not be kept: {error.strerror}"
    return Activations(arrays=arrays, train_rows=train, views=views.count, kind=kind, found=found)


def _write(prefix: nn.Module, sample: Tensors, views: Views, folder: Path, progress: Callable[[int, int], None]) -> str:
    """Compute into a folder beside and publish it; or the reason why it does not fit. Raises OSError."""
    items = sum(len(rows) for rows, _ in views.jobs())
    folder.parent.mkdir(parents=True, exist_ok=True)
    for dtypes in ([_dtype(value) for value in sample], ["float32"] * len(sample)):
        needed = items * sum(v[0].numel() * np.dtype(d).itemsize for v, d in zip(sample, dtypes, strict=True))
        if reason := _make_room(folder.parent, needed):
            return reason
        beside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            with np.errstate(over="raise"):
                _compute(prefix, sample, dtypes, views, beside, progress)
            publish(beside, folder)
            return ""
        except FloatingPointError:  # an image beyond the sample's range does not fit float16
            continue
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return "its values are too large for float32"


def check(prefix: nn.Module, names: Sequence[str], activations: Activations, views: Views) -> str:
    """Compare the first chunk of the last view with a live pass of `prefix` (pixels -> the values called `names`).

    Returns "" when equal, else what differs and by how much.
    """
    view, (rows, _) = views.count - 1, views.jobs()[0]
    with torch.inference_mode():
        live = _as_tuple(prefix(channels_last(views.pixels(rows, view, 0))))
    for name, value in zip(names, live, strict=True):
        array, start = activations.arrays[name], view * activations.train_rows
        kept = torch.from_numpy(array[start : start + len(value)].astype(np.float32))
        off = float((kept - value.float().cpu()).abs().max() / value.abs().max().clamp(min=1e-12))
        if not off <= TOLERANCE[array.dtype.name]:
            return f"cached {name} differs from a live pass by {off:.1e} of its largest value"
    return ""


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _dtype(sample: torch.Tensor) -> str:
    low, high = FLOAT16_RANGE
    return "float16" if low < float(sample.abs().max()) < high else "float32"


def _make_room(folder: Path, needed: int) -> str:
    """Clear what killed runs left, then the caches unused longest, until `needed` bytes fit; else the reason."""
    clear_abandoned(folder)
    entries = sorted((path.stat().st_mtime, path) for path in folder.glob("[!.]*"))
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in entries}
    free = shutil.disk_usage(folder).free
    if needed > DISK_SHARE * (free + sum(sizes.values())):
        return f"its cache would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free at {folder}"
    for path in sizes:
        if needed <= DISK_SHARE * shutil.disk_usage(folder).free:
            break
        shutil.rmtree(path, ignore_errors=True)  # a run that has it mapped keeps its pages
    return ""


def _compute(
    prefix: nn.Module, sample: Tensors, dtypes: Sequence[str], views: Views, folder: Path,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    jobs = views.jobs()
    items = sum(len(rows) for rows, _ in jobs)
    run, how = runner(prefix, views.pixels(jobs[0][0], 0, 0))
    arrays = [
        np.lib.format.open_memmap(folder / f"{number}.npy", mode="w+", dtype=dtype, shape=(items, *value.shape[1:]))
        for number, (value, dtype) in enumerate(zip(sample, dtypes, strict=True))
    ]
    for number in range(len(arrays)):
        reserve(folder / f"{number}.npy")
    at = 0
    for rows, view in jobs:
        for start in range(0, len(rows), CHUNK):
            values = run(views.pixels(rows, view, start))
            for array, value in zip(arrays, values, strict=True):
                array[at : at + len(value)] = value
            at += len(values[0])
            progress(at, items)
    for array in arrays:
        array.flush()
    (folder / "kind").write_text(f"{'/'.join(sorted(set(dtypes)))} by {how}")


def runner(net: nn.Module, example: torch.Tensor) -> tuple[Callable[[torch.Tensor], list[Array]], str]:
    """The fastest way to run `net` here, and its name: pixels (n, 3, S, S) -> its outputs, float32.

    ONNX Runtime on a CPU, where its answer to `example` is the framework's to 1e-4 of the largest value; the framework
    itself elsewhere, or where the net does not export.
    """

    def eager(pixels: torch.Tensor) -> list[Array]:
        with torch.inference_mode():
            return [value.float().cpu().numpy() for value in _as_tuple(net(channels_last(pixels)))]

    if example.device.type != "cpu":
        return eager, "torch"
    try:
        session = Session(_onnx_bytes(net, example))
        pairs = zip(session.run(example.numpy()), eager(example), strict=True)
        if all(np.abs(a - b).max() <= 1e-4 * np.abs(b).max() for a, b in pairs):
            return lambda pixels: session.run(pixels.numpy()), "onnxruntime"
    except Exception:  # not every graph exports, and exporters raise anything: the framework's own pass remains
        return eager, "torch"
    return eager, "torch"


def _onnx_bytes(net: nn.Module, example: torch.Tensor) -> bytes:
    """By the TorchScript exporter: 0.8 s where the dynamo one takes 10 s for lite0. The file never leaves this run."""
    buffer = io.BytesIO()
    # A Sequential, since the exporter takes a GraphModule's `graph` for its own; in eval mode, since it gives the mode
    # that it finds to every module inside.
    plain = nn.Sequential(net).eval()
    with quiet():
        torch.onnx.export(
            plain, (example[:2],), buffer,  # type: ignore[arg-type]  # a buffer works; the stub knows paths only
             dynamo=False, opset_version=18,
            input_names=["pixels"], dynamic_axes={"pixels": {0: "batch"}},
        )  # fmt: skip
    return buffer.getvalue()
