"""Take each image that appears in a folder, once, also over restarts.

for path in watch(Path("incoming")): ...
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import SUFFIXES

LEDGER = ".taken"  # in the folder watched
POLL_SECONDS = 0.5


def watch(folder: Path, waits: Callable[[], object] | None = None) -> Iterator[Path]:
    """Yield each image file of `folder`, also those there already, once it no longer grows.

    A file is noted as taken before it is yielded, so that one that stops the process is not taken
    again after a restart. A file of the same name with another size or time is another file. waits:
    called between two looks; by default it sleeps, for ever in turn. Raises FtkitError when the
    folder cannot be read or written.
    """
    waits = waits or (lambda: time.sleep(POLL_SECONDS))
    try:
        taken = _read(folder)
        with (folder / LEDGER).open("a", encoding="utf-8", errors="surrogateescape") as ledger:
            before: dict[str, str] = {}
            while True:
                there = dict(_images(folder))
                taken = {name: stamp for name, stamp in taken.items() if name in there}
                now = {name: stamp for name, stamp in there.items() if taken.get(name) != stamp}
                for name, stamp in sorted(now.items()):
                    if before.get(name) == stamp:  # complete
                        taken[name] = stamp
                        ledger.write(f"{stamp} {name}\n")
                        ledger.flush()
                        os.fsync(ledger.fileno())
                        yield folder / name
                before = now
                if waits() is False:
                    return
    except OSError as error:
        raise FtkitError(
            f"{folder}: expected a folder to watch, and to note in what was taken, found: "
            f"{error.strerror or error}. Check the path"
        ) from None


def _images(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of the images there, each with its size and time."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or "\n" in name:  # the ledger has a line a name
                continue
            if Path(name).suffix.lower() not in SUFFIXES:
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since
                found = entry.stat()
                if entry.is_file():
                    yield name, f"{found.st_size}-{found.st_mtime_ns}"


def _read(folder: Path) -> dict[str, str]:
    """What was taken before; the ledger is rewritten without files that are gone."""
    path = folder / LEDGER
    there = dict(_images(folder))
    taken = {}
    if path.is_file():
        for line in path.read_text("utf-8", errors="surrogateescape").split("\n"):
            stamp, _, name = line.partition(" ")
            if name in there:
                taken[name] = stamp

    beside = folder / f"{LEDGER}.tmp"
    text = "".join(f"{stamp} {name}\n" for name, stamp in taken.items())
    beside.write_text(text, "utf-8", errors="surrogateescape")
    beside.replace(path)
    return taken
