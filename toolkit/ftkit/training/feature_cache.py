"""Feature cache: run a frozen prefix once per view over the canvases and store its outputs.

    views = Views(canvases=canvases, preprocess=preprocess, augment=augment, count=4, seed=0, ...)
    activations = fill(prefix, key, names, views)  # compute, or reuse an earlier run's entry
    activations.arrays[name][activations.items(views, positions)]
    check(prefix, names, activations, views)       # compare a sample with a live pass; "" if equal

On a CPU the prefix runs in ONNX Runtime (a whole lite0 run: 143 s, against 194 s with eager
PyTorch). Values are stored in memory-mapped files, as float16 where their range allows. An entry
with more views serves those who need fewer; from one with fewer, values are copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from torch import nn

from ftkit.data.augment import augmented, drawn, evaluation
from ftkit.data.canvas import Canvases
from ftkit.data.prefetch import Source
from ftkit.models.inference import PREFIX_BATCH, Tensors, as_tuple, channels_last, runner
from ftkit.recipe import Augment
from ftkit.training.checkpoint import seeded
from ftkit.utils.cache_folder import (
    cache_folder,
    clear_abandoned,
    publish,
    put_away,
    reserve,
    unpublished,
)
from ftkit.utils.distributed import SOLO, Ranks, share_of_cores
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess

GPU_CHUNK = 256
KEPT_TOLERANCE = {
    "float16": 1e-3,
    "float32": 1e-5,
}  # difference between cached and live values, relative to the largest value
# cuDNN may choose another algorithm for another batch (Winograd's differs this much in float32)
GPU_TOLERANCE = 1e-4
FLOAT16_RANGE = (1e-3, 2e4)  # bounds of the largest value for float16, with a margin at each end
DISK_SHARE = 0.5  # of the free disk space that a cache may take
WIDE = "float16 is too narrow"
PLAIN = (bool, int, float, str, tuple, type(None))
UNTOLD = ("training",)  # attributes without effect: the prefix is in eval mode
VERSIONS = [torch.__version__, torchvision.__version__, timm.__version__, onnxruntime.__version__]


class CannotCacheError(Exception):
    """Activations cannot be cached, for the reason given; the stage then runs on live pixels."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """`count` seeded views of each train image and the evaluation crop of each val image.

    Items are in a fixed order: item = view * train images + position, followed by the val images.
    View 0 is the evaluation crop.
    """

    canvases: Canvases
    preprocess: Preprocess
    augment: Augment
    count: int
    seed: int
    source: Source

    @property
    def chunk(self) -> int:
        """Images per pass: the fastest number on a CPU, or enough to fill a GPU."""
        return GPU_CHUNK if self.source.device.type == "cuda" else PREFIX_BATCH

    def jobs(self) -> list[tuple[Array, int]]:
        """(rows, view), in the order of the items."""
        train = self.canvases.rows("train")
        val = self.canvases.rows("val")
        views = [(train, view) for view in range(self.count)]
        return [*views, (val, 0)] if len(val) else views

    def pixels(self, rows: Array, view: int, start: int) -> torch.Tensor:
        """Pixels of rows start to start + chunk in one view, (n, 3, S, S) float32.

        Depends on nothing but its arguments.
        """
        canvases = self.source.take(self.source.fetch(rows[start : start + self.chunk]))
        if view == 0:
            return evaluation(canvases, self.preprocess)
        generator = torch.Generator().manual_seed(seeded("view", self.seed, view, start))
        return augmented(
            canvases, self.preprocess, self.augment, drawn(len(canvases), generator), view
        )

    def chunks(self) -> list[tuple[Array, int, int, int]]:
        """(rows, view, start, first item) of every pass."""
        listed = []
        at = 0
        for rows, view in self.jobs():
            listed += [(rows, view, start, at + start) for start in range(0, len(rows), self.chunk)]
            at += len(rows)
        return listed

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.jobs())

    @property
    def key(self) -> str:
        """Everything the pixels of a view depend on, as text; not their number."""
        return json.dumps(
            [
                self.canvases.fingerprint,
                repr(self.preprocess),
                repr(self.augment),
                self.seed,
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Cached values by name, each (items, ...): all views of the train images, then the val images.

    kind: dtype and backend, e.g. "float16 by onnxruntime". found: whether an earlier run had
    computed them. copied: whether some are from an entry with fewer views, or of this
    machine alone. pass_s: seconds per image in the run that computed them, with all ranks of its machine
    working. folder: the entry.
    """

    arrays: dict[str, Array]
    train_rows: int
    views: int
    kind: str
    found: bool
    copied: bool
    pass_s: float
    folder: Path

    def items(self, views: Array, positions: Array) -> Array:
        """Items of train positions in the given views."""
        numbers: Array = views * self.train_rows + positions
        return numbers

    def val_items(self, positions: Array) -> Array:
        """Items of val positions."""
        return self.items(np.full(len(positions), self.views), positions)


def fill(
    prefix: nn.Module,
    key: str,
    names: Sequence[str],
    views: Views,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = SOLO,
) -> Activations:
    """Compute or find the activations of `prefix` (pixels -> tuple of values, named `names`).

    key: identifies what the prefix computes (code and weights). Each value must be a tensor with
    one entry per image. The ranks of a machine compute a share each, into the same files. Raises
    CannotCacheError, on every rank alike.
    """
    rows, _ = views.jobs()[0]
    train = len(rows)

    sample: tuple[Any, ...] = ()
    reason = ""
    try:
        with torch.inference_mode():
            sample = as_tuple(prefix(channels_last(views.pixels(rows, 0, 0))))
    except torch.OutOfMemoryError:
        reason = f"the GPU has too little memory for {views.chunk} images at once"
    if reason := next(filter(None, ranks.gather(reason)), ""):
        raise CannotCacheError(reason)

    if not all(
        isinstance(v, torch.Tensor) and v.ndim and len(v) == min(views.chunk, train) for v in sample
    ):
        raise CannotCacheError("a value at the cut is not a tensor with one entry per image")

    text = json.dumps(
        ["prefix-6", key, attributes(prefix), VERSIONS, list(names), views.key, views.chunk]
    )
    place = _Place(
        folder=cache_folder() / "prefix",
        digest=hashlib.sha256(text.encode()).hexdigest()[:32],
        train=train,
        val=len(views) - views.count * train,
        shapes=[tuple(value.shape[1:]) for value in sample],
    )
    held = ranks.gather(place.serving(views.count) is not None)
    # The first rank of a machine decides for all its ranks
    held = [held[node] for node in ranks.gather(ranks.node)]
    fewer = ranks.gather(place.fewer(views.count))[ranks.node]
    if not held[ranks.rank] and ranks.rank == ranks.node:
        put_away(place.entry(views.count))  # treat a damaged entry as absent
    if not all(held) and (
        reason := _write(prefix, sample, views, place, fewer, progress, ranks, held[ranks.rank])
    ):
        raise CannotCacheError(reason)

    opened = place.serving(views.count)
    reason = "" if opened else "its cache could not be kept: it is gone, or damaged"
    if reason := next(filter(None, ranks.gather(reason)), ""):
        raise CannotCacheError(reason)

    if fewer and not held[ranks.rank] and ranks.rank == ranks.node:
        put_away(place.entry(fewer))  # the new one serves for both

    assert opened is not None  # otherwise there would be a reason
    return Activations(
        arrays=dict(zip(names, opened.arrays, strict=True)),
        train_rows=train,
        views=opened.views,
        found=all(held),
        copied=(bool(fewer) or held[ranks.rank]) and not all(held),
        kind=opened.kind,
        pass_s=opened.pass_s,
        folder=place.entry(opened.views),
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An entry: memory-mapped arrays, number of views, kind, seconds per image."""

    arrays: list[Array]
    views: int
    kind: str
    pass_s: float


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the entries of one prefix are, which differ in their number of views.

    train, val: images. shapes: of each value, for one image.
    """

    folder: Path
    digest: str
    train: int
    val: int
    shapes: Sequence[tuple[int, ...]]

    def entry(self, views: int) -> Path:
        """The folder of the entry with so many views."""
        return self.folder / f"{self.digest}-{views}"

    def open(self, views: int) -> _Opened | None:
        """The entry with exactly so many views, or None."""
        items = views * self.train + self.val
        return _opened(self.entry(views), views, [(items, *shape) for shape in self.shapes])

    def serving(self, views: int) -> _Opened | None:
        """The smallest whole entry with at least so many views, or None."""
        enough = (count for count in self._counts() if count >= views)
        return next(filter(None, map(self.open, enough)), None)

    def fewer(self, views: int) -> int:
        """The number of views of the largest whole entry with fewer views; 0: there is none."""
        smaller = (count for count in reversed(self._counts()) if count < views)
        return next((count for count in smaller if self.open(count)), 0)

    def _counts(self) -> list[int]:
        names = [
            path.name.removeprefix(f"{self.digest}-")
            for path in self.folder.glob(f"{self.digest}-*")
        ]
        return sorted(int(name) for name in names if name.isdecimal())


def _opened(folder: Path, views: int, shapes: Sequence[tuple[int, ...]]) -> _Opened | None:
    """An entry; None if it is missing or damaged."""
    try:
        os.utime(folder)
        told = json.loads((folder / "told.json").read_text())
        kind = str(told["kind"])
        pass_s = float(told["pass_s"])
        arrays = [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(len(shapes))]
    except Exception:
        # NumPy reads an array's header with Python's own parser, which raises whatever it meets
        return None

    whole = all(
        array.shape == shape and array.dtype.name in KEPT_TOLERANCE
        for array, shape in zip(arrays, shapes, strict=True)
    )
    return _Opened(arrays=arrays, views=views, kind=kind, pass_s=pass_s) if whole else None


def discard(activations: Activations, ranks: Ranks = SOLO) -> None:
    """Remove an entry that does not match its key, so that it is computed again."""
    if ranks.rank == ranks.node:
        put_away(activations.folder)
    ranks.gather(None)


def attributes(module: nn.Module) -> list[Any]:
    """Attributes that determine a module's outputs besides weights and code.

    Every attribute of a plain type in every submodule (stride, padding, eps, slope, ...).
    """
    return [
        [
            name,
            type(inner).__qualname__,
            sorted(
                (key, repr(value))
                for key, value in vars(inner).items()
                if key not in UNTOLD and isinstance(value, PLAIN)
            ),
        ]
        for name, inner in module.named_modules()
    ]


def _write(
    prefix: nn.Module,
    sample: Tensors,
    views: Views,
    at: _Place,
    fewer: int,
    progress: Callable[[int, int], None],
    ranks: Ranks,
    held: bool,
) -> str:
    """Compute the values in an unpublished folder and publish it.

    Returns "", or the reason for failure, the same on every rank. fewer: views of an entry whose
    values are copied, or 0. held: this machine has the entry already, and only takes part in the
    collective calls.
    """
    folder = at.entry(views.count)
    for dtypes in ([_dtype(value) for value in sample], ["float32"] * len(sample)):
        place = None
        reason = ""
        if ranks.rank == ranks.node and not held:
            place, reason = _begun(folder, sample, dtypes, len(views))

        begun = ranks.gather([place and str(place), reason])
        if reason := next((why for _, why in begun if why), ""):
            _gone(place)
            return reason

        beside = Path(begun[ranks.node][0] or folder)
        try:
            reason = (
                ""
                if held
                else _computed(
                    prefix, sample, dtypes, views, beside, at.open(fewer), progress, ranks
                )
            )
            reasons = set(ranks.gather(reason))
            if reasons <= {""}:
                reasons = set(ranks.gather(_published(place, folder)))
        finally:
            _gone(place)

        if WIDE not in reasons or reasons - {"", WIDE}:
            return next(filter(None, sorted(reasons - {WIDE})), "")

    return "its values are too large for float32"


def _begun(
    folder: Path, sample: Tensors, dtypes: Sequence[str], items: int
) -> tuple[Path | None, str]:
    """Create an unpublished folder with files of the right size, or return the reason why not."""
    needed = items * sum(
        v[0].numel() * np.dtype(d).itemsize for v, d in zip(sample, dtypes, strict=True)
    )
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if reason := _make_room(folder.parent, needed):
            return None, reason
        beside = unpublished(folder)
        for number, (value, dtype) in enumerate(zip(sample, dtypes, strict=True)):
            file = beside / f"{number}.npy"
            shape = (items, *value.shape[1:])
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
            reserve(file)
    except OSError as error:
        _gone(beside)
        return None, f"its cache could not be kept: {error.strerror}"

    return beside, ""


def _published(beside: Path | None, folder: Path) -> str:
    """Rename the entry into place, on the rank that created it.

    Returns the reason if that fails, else "".
    """
    try:
        if beside:
            publish(beside, folder)
    except OSError as error:
        return f"its cache could not be kept: {error.strerror}"
    return ""


def _gone(beside: Path | None) -> None:
    if beside:
        shutil.rmtree(beside, ignore_errors=True)


def check(prefix: nn.Module, names: Sequence[str], activations: Activations, views: Views) -> str:
    """Compare a sample of the cached activations with a live pass of `prefix`.

    One chunk of every view and one of the val images, each from another position, so that the whole
    set is sampled. Returns "" if equal, else what differs and by how much.
    """
    first = 0
    for number, (rows, view) in enumerate(views.jobs()):
        starts = range(0, len(rows), views.chunk)
        start = starts[number * len(starts) // (views.count + 1)]

        with torch.inference_mode():
            live = as_tuple(prefix(channels_last(views.pixels(rows, view, start))))

        for name, value in zip(names, live, strict=True):
            array = activations.arrays[name]
            at = first + start
            kept = torch.from_numpy(array[at : at + len(value)].astype(np.float32))
            off = float(
                (kept - value.float().cpu()).abs().max() / value.abs().max().clamp(min=1e-12)
            )
            if not off <= _tolerance(array.dtype.name, value.device):
                return f"cached {name} differs from a live pass by {off:.1e} of its largest value"

        first += len(rows)

    return ""


def _tolerance(dtype: str, device: torch.device) -> float:
    return max(KEPT_TOLERANCE[dtype], GPU_TOLERANCE if device.type == "cuda" else 0.0)


def _dtype(sample: torch.Tensor) -> str:
    low, high = FLOAT16_RANGE
    return "float16" if low < float(sample.abs().max()) < high else "float32"


def _make_room(folder: Path, needed: int) -> str:
    """Delete what killed runs left, then the least recently used caches, to fit `needed` bytes.

    Returns the reason if they cannot, else "".
    """
    clear_abandoned(folder)
    entries = sorted((path.stat().st_mtime, path) for path in folder.glob("[!.]*"))
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in entries}
    free = shutil.disk_usage(folder).free
    if needed > DISK_SHARE * (free + sum(sizes.values())):
        return f"its cache would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free at {folder}"

    for path in sizes:
        if needed <= DISK_SHARE * shutil.disk_usage(folder).free:
            break
        shutil.rmtree(path, ignore_errors=True)  # a run that has it mapped can still read it

    return ""


def _computed(
    prefix: nn.Module,
    sample: Tensors,
    dtypes: Sequence[str],
    views: Views,
    folder: Path,
    known: _Opened | None,
    progress: Callable[[int, int], None],
    ranks: Ranks,
) -> str:
    """Compute this rank's share of the passes into the files in `folder`; copy what is known.

    Returns "", or the reason for failure (WIDE: a value does not fit float16).
    """
    if known and [array.dtype.name for array in known.arrays] != list(dtypes):
        known = None
    train = len(views.canvases.rows("train"))
    new = slice(known.views * train, views.count * train) if known else slice(0, len(views))
    left = [chunk for chunk in views.chunks() if new.start <= chunk[-1] < new.stop]
    mine = left[ranks.local :: ranks.local_world]
    run, how = runner(prefix, views.pixels(views.jobs()[0][0], 0, 0), share_of_cores(ranks))

    begun = time.perf_counter()
    try:
        arrays = [
            np.load(folder / f"{number}.npy", mmap_mode="r+") for number in range(len(sample))
        ]
        if known and ranks.rank == ranks.node:
            for array, before in zip(arrays, known.arrays, strict=True):
                array[: new.start] = before[: new.start]
                array[new.stop :] = before[new.start :]

        with np.errstate(over="raise"):
            for done, (rows, view, start, at) in enumerate(mine, start=1):
                for array, value in zip(arrays, run(views.pixels(rows, view, start)), strict=True):
                    array[at : at + len(value)] = value
                computed = min(done * views.chunk * ranks.local_world, new.stop - new.start)
                progress(computed, new.stop - new.start)

        for array in arrays:
            array.flush()

        if ranks.rank == ranks.node:
            told = {
                "kind": f"{'/'.join(sorted(set(dtypes)))} by {how}",
                "pass_s": (time.perf_counter() - begun) / (new.stop - new.start),
            }
            (folder / "told.json").write_text(json.dumps(told))
    except FloatingPointError:  # an image whose values exceed the sample's range
        return WIDE
    except OSError as error:
        return f"its cache could not be kept: {error.strerror}"

    return ""
