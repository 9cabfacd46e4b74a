"""Take each image that appears in a folder, once, also over restarts.

for path in watch(Path("incoming")): ...
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import is_full, replacing
from ftkit_export.runtime.preprocess import SUFFIXES

LEDGER = ".taken"  # in the folder watched
POLL_SECONDS = 0.5
MOST_GONE = 1000  # lines of files that are gone, before the ledger is written without them


def watch(folder: Path, waits: Callable[[], object] | None = None) -> Iterator[Path]:
    """Yield each image file of `folder`, also those there already, once it no longer grows.

    A file is noted as taken before it is yielded, so that one that stops the process is not taken
    again after a restart, unless the disk is full. A file of the same name with another size or time
    is another file. waits: called between two looks; by default it sleeps, for ever in turn. Raises
    FtkitError when the folder cannot be read or written.
    """
    waits = waits or (lambda: time.sleep(POLL_SECONDS))
    try:
        ledger = _Ledger(folder)
        before: dict[str, str] = {}
        while True:
            there = dict(_images(folder))
            ledger.forget_others(there)
            now = {name: stamp for name, stamp in there.items() if ledger.taken.get(name) != stamp}
            for name, stamp in sorted(now.items()):
                if before.get(name) == stamp:  # complete
                    ledger.note(name, stamp)
                    yield folder / name
            before = now
            if waits() is False:
                return
    except OSError as error:
        raise FtkitError(
            f"{folder}: expected a folder to watch, and to note in what was taken, found: "
            f"{error.strerror or error}. Check the path"
        ) from None


class _Ledger:
    """What was taken, also before a restart: a line a file.

    On a full disk it is known to this process alone, and one line on standard error says so.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._full = False
        self._lines = 0
        self.taken = _read(folder)
        try:
            self._rewrite()  # without files that are gone
        except OSError as error:
            self._is_full(error)

    def forget_others(self, there: dict[str, str]) -> None:
        """Forget files that are not there any more."""
        self.taken = {name: stamp for name, stamp in self.taken.items() if name in there}

    def note(self, name: str, stamp: str) -> None:
        """Note a file as taken, on the disk before it is acted upon."""
        self.taken[name] = stamp
        try:
            if self._full:
                self._rewrite()
                self._full = False
                return
            if self._lines > 2 * len(self.taken) + MOST_GONE:
                self._rewrite()
                return
            self._lines += 1
            with (self._folder / LEDGER).open(
                "a", encoding="utf-8", errors="surrogateescape"
            ) as file:
                file.write(f"{stamp} {name}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._is_full(error)

    def _rewrite(self) -> None:
        with replacing(self._folder / LEDGER) as beside:
            text = "".join(f"{stamp} {name}\n" for name, stamp in self.taken.items())
            beside.write_text(text, "utf-8", errors="surrogateescape")
        self._lines = len(self.taken)

    def _is_full(self, error: OSError) -> None:
        """Go on without the disk. Raises any other error."""
        if not is_full(error):
            raise error
        if not self._full:
            with contextlib.suppress(OSError):
                print(
                    f"{self._folder}: what is taken cannot be noted ({error.strerror}); a restart takes it again",
                    file=sys.stderr,
                )
        self._full = True


def _images(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of the images there, each with its size and time."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or "\n" in name or "\r" in name:  # the ledger has a line a name
                continue
            if Path(name).suffix.lower() not in SUFFIXES:
                continue
            with contextlib.suppress(OSError):  # gone since, or a link to itself
                found = entry.stat()
                if entry.is_file():
                    yield name, f"{found.st_size}-{found.st_mtime_ns}"


def _read(folder: Path) -> dict[str, str]:
    """What was taken before, of the files that are still there."""
    path = folder / LEDGER
    there = dict(_images(folder))
    taken = {}
    if path.is_file():
        for line in path.read_text("utf-8", errors="surrogateescape").split("\n"):
            stamp, _, name = line.partition(" ")
            if name in there:
                taken[name] = stamp
    return taken
