"""Decode each image once into a canvas, R x R x 3 uint8, in memory-mapped shards that runs share.

    canvases = build_canvases(images, preprocess)   # decodes only what is not cached yet
    canvases.array(rows)                            # (n, R, R, 3) uint8, by row of canvases.images

A shard's name is the hash of its files' contents and of the canvas part of the preprocess. It is
written to a temporary folder and renamed, so two runs may build the same shard at once and nobody
reads a partial one. Worker processes decode straight into the memory-mapped shard, so no canvas is
pickled. They run this module with `python -m`, so callers need no main guard, and no process with
threads is forked.

Shards that the disk has no room for are decoded whenever they are read: slower, but it goes on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL

from ftkit.data.dataset import Images, require_trained
from ftkit.recipe import restore_preprocess
from ftkit.utils import console
from ftkit.utils.cache_folder import (
    cache_folder,
    clear_abandoned,
    publish,
    put_away,
    reserve,
    unpublished,
)
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError, ImageError, UnavailableImageError
from ftkit_export.runtime.files import is_full
from ftkit_export.runtime.preprocess import Preprocess, most_pixels
from ftkit_export.runtime.session import cores

if TYPE_CHECKING:
    from ftkit.utils.distributed import Ranks


SHARD = 512  # images; at 256 x 256 a shard is 100 MB
FEWEST = 128  # images worth starting worker processes for; starting takes 0.3 s
UNREADABLE = "unreadable"  # in place of a digest
SPARE_BYTES = 500_000_000  # left free on the disk; a tenth of a smaller one
IMAGES_EACH = 32  # images of a shard per worker process, at least


class Undecoded:
    """A shard that the disk has no room for: as an array (count, R, R, 3) uint8 whose images are decoded
    whenever they are read. Raises FtkitError where a file has gone or changed, or memory is short."""

    def __init__(self, paths: Sequence[Path], digests: Sequence[str], preprocess: Preprocess):
        self._paths = paths
        self._digests = digests
        self._preprocess = preprocess
        self.shape = (len(paths), preprocess.resize, preprocess.resize, 3)

    def __getitem__(self, slot: int) -> Array:
        path = self._paths[slot]
        content = b""
        with contextlib.suppress(OSError):
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self._digests[slot]:
            raise FtkitError(
                f"{path}: expected the image that was there at first, found another or none. Put it back, or start anew"
            )
        canvas, reason, _ = _decoded(content, self._preprocess)
        if canvas is None:
            raise FtkitError(f"{path}: {reason}")
        return canvas


@dataclass(frozen=True, kw_only=True)
class Canvases:
    """Decoded images: images.images[i] is row i, stored in shards[slots[i, 0]][slots[i, 1]].

    bad: (file, reason) of unreadable files, which are left out. digests: sha256 of each row's file.
    fingerprint: hash of contents, labels, splits and preprocess.
    """

    images: Images
    shards: tuple[Array | Undecoded, ...]
    slots: Array  # (N, 2) int64
    bad: tuple[tuple[Path, str], ...]
    digests: tuple[str, ...]
    fingerprint: str

    def array(self, rows: Sequence[int] | Array) -> Array:
        """Canvases of these rows (n,) -> (n, R, R, 3) uint8, in that order."""
        places = self.slots[np.asarray(rows)]
        side = self.shards[0].shape[1]
        pixels = np.empty((len(places), side, side, 3), np.uint8)
        to_decode: list[tuple[int, Undecoded, int]] = []
        for number in np.unique(places[:, 0]):
            here = np.flatnonzero(places[:, 0] == number)
            shard = self.shards[number]
            if isinstance(shard, Undecoded):
                to_decode += [(int(place), shard, int(places[place, 1])) for place in here]
            else:
                pixels[here] = shard[places[here, 1]]

        def decode(item: tuple[int, Undecoded, int]) -> None:
            place, shard, slot = item
            pixels[place] = shard[slot]

        if to_decode:
            list(_threads().map(decode, to_decode))
        return pixels

    def rows(self, split: str) -> Array:
        """Row numbers of a split, (n,) int64."""
        return np.array(
            [i for i, image in enumerate(self.images.images) if image.split == split], np.int64
        )

    def groups(self, rows: Array) -> list[str]:
        """The group of each row; "" for an image without one."""
        return [self.images.images[row].group for row in rows]

    @property
    def undecoded(self) -> int:
        """Number of rows that are decoded whenever they are read."""
        kinds = np.array([isinstance(shard, Undecoded) for shard in self.shards])
        return int(kinds[self.slots[:, 0]].sum())

    @property
    def labels(self) -> Array:
        """Label of each row, (N,) int64."""
        return np.array([image.label for image in self.images.images], np.int64)

    @property
    def targets(self) -> Array:
        """Labels (N, K) of 1 and 0, or values, of the other tasks; float64, NaN where one is not known."""
        return np.array([image.targets for image in self.images.images], np.float64)


def build_canvases(
    images: Images,
    preprocess: Preprocess,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> Canvases:
    """Canvases of every readable image; bad files are left out and listed.

    progress(done, total) counts images. Each rank of a machine decodes a share of the shards, and
    opens all of them. Raises FtkitError if a class has no readable training image left, the cache
    folder cannot be written, or machines have different images.
    """
    paths = [image.path for image in images.images]

    shards: list[Array | Undecoded] = []
    slots: list[tuple[int, int]] = []
    bad: list[tuple[Path, str]] = []
    digests: list[str] = []
    for number, (digested, unreadable) in enumerate(_digests(paths, preprocess, progress, ranks)):
        part = paths[number * SHARD : (number + 1) * SHARD]
        array: Array | Undecoded
        shard = _opened(_folder(digested, preprocess), len(part), preprocess.resize)
        if shard is not None:
            array, reasons = shard
        elif unreadable is not None:
            array, reasons = Undecoded(part, digested, preprocess), unreadable
        else:
            raise FtkitError(
                f"{_folder(digested, preprocess)}: expected the canvases just written, found them gone or "
                "damaged. Check the disk, or try FTKIT_CACHE=another folder"
            )

        shards.append(array)

        for slot, path in enumerate(part):
            if slot in reasons:
                bad.append((path, reasons[slot]))
            else:
                slots.append((number, slot))
                digests.append(digested[slot])

    left = images.without({path for path, _ in bad})
    _require_every_class(images, left, bad)
    rows = [
        f"{digest} {image.label} {image.split}{' '.join(map(repr, image.targets))}"
        for digest, image in zip(digests, left.images, strict=True)
    ]
    said = [*images.target_names, *images.units, *images.classes]
    text = "\n".join([_canvas_key(preprocess), *said, *rows])

    canvases = Canvases(
        images=left,
        shards=tuple(shards),
        slots=np.array(slots, np.int64),
        bad=tuple(bad),
        digests=tuple(digests),
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )
    undecoded = max(ranks.gather(canvases.undecoded)) if ranks else canvases.undecoded
    if undecoded:
        console.warn(
            f"{cache_folder()}: no room for the canvases of {undecoded} of {len(rows)} images, which are "
            "decoded whenever they are read: slower. Try `ftkit cache --clear`, or FTKIT_CACHE=another folder"
        )
    return canvases


@cache
def _threads() -> ThreadPoolExecutor:
    """That decode what is not stored."""
    return ThreadPoolExecutor(cores())


def _digests(
    paths: Sequence[Path],
    preprocess: Preprocess,
    progress: Callable[[int, int], None],
    ranks: Ranks | None,
) -> list[tuple[list[str], dict[int, str] | None]]:
    """Decode missing shards into the cache. By shard: the files' hashes, and where it has no room, slot ->
    reason for the bad files."""
    local, among = (ranks.local, ranks.local_world) if ranks else (0, 1)

    def own() -> dict[str, tuple[list[str], dict[int, str] | None]]:
        made = {}
        with ThreadPoolExecutor(share) as pool, _Decoders(preprocess, share) as decoders:
            for start in range(local * SHARD, len(paths), among * SHARD):
                part = paths[start : start + SHARD]
                digests = list(pool.map(_digest, part))
                unreadable = _write(
                    part,
                    digests,
                    preprocess,
                    decoders,
                    partial(_advance, progress, start, len(paths)),
                )
                made[str(start // SHARD)] = (digests, unreadable)

        return made

    share = max(1, cores() // among)
    everywhere = ranks.gather([len(paths), ranks.together(own)]) if ranks else [(len(paths), own())]
    merged: dict[str, list[str]] = {}
    without: dict[str, dict[int, str]] = {}
    same = len({count for count, _ in everywhere}) == 1

    for _, each in everywhere:
        for number, (digests, unreadable) in each.items():
            same = same and merged.setdefault(number, digests) == digests
            if unreadable is not None:
                without[number] = {int(slot): reason for slot, reason in unreadable.items()}

    if not same:
        raise FtkitError(
            f"{paths[0].parent}: expected the same images on every machine, found others. Copy one "
            "machine's folder to the rest"
        )

    numbers = [str(number) for number in range(len(merged))]
    return [(merged[number], without.get(number)) for number in numbers]


def _advance(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _require_every_class(images: Images, left: Images, bad: Sequence[tuple[Path, str]]) -> None:
    require_trained(left)
    single = images.task == "single-label"
    trained = (
        {image.label for image in left.of("train")} if single else set(range(len(images.classes)))
    )
    for label, name in enumerate(images.classes):
        if label not in trained:
            own = {image.path for image in images.images if image.label == label}
            path, reason = next((item for item in bad if item[0] in own), bad[0])
            raise FtkitError(
                f"{images.root}: expected readable training images of class {name!r}, found none "
                f"({len(bad)} bad files, e.g. {path}: {reason}). Try replacing them"
            )

    for split in ("val", "test"):
        if images.of(split) and not left.of(split):
            raise FtkitError(
                f"{images.root}: expected readable {split} images, found none. Try replacing the bad files"
            )


def _canvas_key(preprocess: Preprocess) -> str:
    limit = most_pixels()  # an image too large for one limit may be fine for another
    return f"canvas-2 {preprocess.fit} {preprocess.resize} {preprocess.white}{f' {limit}' if limit else ''}"


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror}"


def _folder(digests: Sequence[str], preprocess: Preprocess) -> Path:
    key = hashlib.sha256(
        "\n".join([_canvas_key(preprocess), PIL.__version__, *digests]).encode()
    ).hexdigest()[:32]
    return cache_folder() / "canvases" / key


def _opened(folder: Path, count: int, side: int) -> tuple[Array, dict[int, str]] | None:
    """Open one shard (count, side, side, 3) uint8, memory-mapped, and slot -> reason for bad files.

    Slots of bad files are black. Returns None if the shard is missing or damaged: truncated by a
    crash, or partly deleted by hand.
    """
    try:
        os.utime(folder)  # mark as used: the cache evicts what was used least recently
        stored = {
            int(slot): str(reason)
            for slot, reason in json.loads((folder / "bad.json").read_text()).items()
        }
        array = np.load(folder / "canvases.npy", mmap_mode="r")
    except Exception:
        # NumPy reads an array's header with Python's own parser, which raises whatever it meets
        return None

    return (
        (array, stored)
        if array.shape == (count, side, side, 3) and array.dtype == np.uint8
        else None
    )


def _write(
    paths: Sequence[Path],
    digests: Sequence[str],
    preprocess: Preprocess,
    decoders: _Decoders,
    progress: Callable[[int], None],
) -> dict[int, str] | None:
    """Write one shard to the cache, unless it is there.

    Where the disk has no room, returns slot -> reason for the bad files, which it takes decoding to find.
    """
    folder = _folder(digests, preprocess)
    side = preprocess.resize
    full = False
    if _opened(folder, len(paths), side) is None:
        put_away(folder)  # treat a damaged shard as absent
        beside = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            clear_abandoned(folder.parent)
            _require_room(folder.parent, len(paths) * side * side * 3)
            beside = unpublished(folder)
            file = beside / "canvases.npy"
            np.lib.format.open_memmap(
                file, mode="w+", dtype=np.uint8, shape=(len(paths), side, side, 3)
            ).flush()
            reserve(file)
            reasons = decoders.decode(file, paths, digests, progress)
            (beside / "bad.json").write_text(json.dumps(reasons))
            publish(beside, folder)
        except OSError as error:
            full = is_full(error)
            if not full:
                raise FtkitError(
                    f"{folder.parent}: expected room for canvases, found {error.strerror}. Try "
                    "FTKIT_CACHE=another folder"
                ) from None
        finally:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)  # no longer there if published

    unreadable = None
    if full:
        unreadable = _reasons(_looked_at(paths, preprocess), paths, digests, progress)
    progress(len(paths))
    return unreadable


def _require_room(folder: Path, size: int) -> None:
    """Raise OSError where so many bytes would fill the disk: states and features need some, too."""
    disk = shutil.disk_usage(folder)
    if disk.free < size + min(SPARE_BYTES, disk.total // 10):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _looked_at(paths: Sequence[Path], preprocess: Preprocess) -> Iterator[tuple[int, str, bool]]:
    """As decode_into, but nothing is kept. One by one: what decoding refuses goes by Python's warnings,
    which threads share."""
    for slot, path in enumerate(paths):
        _, reason, lasting = _decoded(path, preprocess)
        yield slot, reason, lasting


def _reasons(
    answers: Iterable[tuple[int, str, bool]],
    paths: Sequence[Path],
    digests: Sequence[str],
    progress: Callable[[int], None],
) -> dict[int, str]:
    """slot -> reason for the bad files, from what decode_into yields.

    Reasons are cached under the hashes of the files' contents, so they must depend on the contents
    alone. Raises FtkitError naming the image if it failed for another reason (out of memory).
    """
    reasons: dict[int, str] = {}
    for done, (slot, reason, lasting) in enumerate(answers, start=1):
        if reason and not lasting and not digests[slot].startswith(UNREADABLE):
            raise FtkitError(f"{paths[slot]}: {reason}")
        if reason:
            reasons[slot] = reason
        progress(done)
    return reasons


class _Decoders:
    """Worker processes that decode, started when first needed, ended with the `with` block."""

    def __init__(self, preprocess: Preprocess, most: int):
        self._preprocess = preprocess
        self._most = most
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def decode(
        self,
        file: Path,
        paths: Sequence[Path],
        digests: Sequence[str],
        progress: Callable[[int], None],
    ) -> dict[int, str]:
        """Decode `paths` into the shard's file; returns slot -> reason for the bad ones.

        If there are only a few, they are decoded in this process. Raises FtkitError as _reasons, or
        if a worker process died (a decoder crashed).
        """
        return _reasons(self._answers(file, paths), paths, digests, progress)

    def _answers(self, file: Path, paths: Sequence[Path]) -> Iterator[tuple[int, str, bool]]:
        if not self._processes and (len(paths) < FEWEST or self._most < 2):
            yield from decode_into(file, enumerate(paths), self._preprocess)
            return
        while len(self._processes) < min(self._most, max(2, len(paths) // IMAGES_EACH)):
            self._processes.append(_start())

        count = len(self._processes)
        for number, process in enumerate(self._processes):
            items = [(slot, str(paths[slot])) for slot in range(number, len(paths), count)]
            assert process.stdin
            process.stdin.write(
                json.dumps(
                    {"file": str(file), "preprocess": asdict(self._preprocess), "items": items}
                )
            )
            process.stdin.write("\n")
            process.stdin.flush()

        for slot, path in enumerate(paths):
            process = self._processes[slot % count]  # each process answers in order
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise FtkitError(
                    f"{path}: expected to decode it, found that its process ended with code {process.wait()}. "
                    "Try removing that file, or check the free memory"
                )
            reason, lasting = json.loads(line)
            yield slot, reason, lasting


def _start() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ftkit.data.canvas"],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to this process only, which then ends the workers
    )


def decode_into(
    file: Path, items: Iterable[tuple[int, Path]], preprocess: Preprocess
) -> Iterator[tuple[int, str, bool]]:
    """Decode (slot, path) items into the shard's file.

    Yields (slot, "" or the reason for failure, whether the file's content is the cause) for each,
    in order.
    """
    array = np.load(file, mmap_mode="r+")
    for slot, path in items:
        canvas, reason, lasting = _decoded(path, preprocess)
        if canvas is not None:
            array[slot] = canvas
        yield slot, reason, lasting

    array.flush()


def _decoded(source: Path | bytes, preprocess: Preprocess) -> tuple[Array | None, str, bool]:
    """A canvas, or the reason why there is none, and whether the file's content is the cause."""
    try:
        return preprocess.canvas(preprocess.decode(source)), "", True
    except ImageError as error:
        name = "image" if isinstance(source, bytes) else source
        reason = str(error).removeprefix(f"{name}: ")
        return None, reason, not isinstance(error, UnavailableImageError)
    except MemoryError:
        return None, "expected memory for its canvas, found too little. Close other programs", False


def _work() -> None:
    """Main loop of a worker process: one job per input line, one output line per image."""
    for line in sys.stdin:
        job = json.loads(line)
        items = ((slot, Path(path)) for slot, path in job["items"])
        for _, *answer in decode_into(
            Path(job["file"]), items, restore_preprocess(job["preprocess"])
        ):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _work()
