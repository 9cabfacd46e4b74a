"""Lock on a run folder: one process at a time; released when its process ends, however it ends.

with locked(out):        # FtkitError if another process holds it
    ...

On file systems without locks, folders are not locked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftkit_export.runtime.errors import FtkitError

try:
    import fcntl
except ImportError:  # Windows has no flock: runs are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder.

    Raises FtkitError, naming the process, if another one holds it.
    """
    if fcntl is None:
        yield
        return

    path = folder / LOCK
    descriptor = _taken(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Whether a living process holds the folder's lock."""
    if fcntl is None or not (folder / LOCK).is_file():
        return False
    try:
        os.close(_taken(folder / LOCK))
    except FtkitError:
        return True
    return False


def _taken(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder else "another process"
            raise FtkitError(
                f"{path.parent}: expected a run that nothing else works on, found {who} at it. "
                "Wait for it, or try another --out"
            ) from None
        except OSError:  # a file system without locks: some NFS and Lustre mounts
            return descriptor

        # The last holder may have removed the file between opening and locking it here.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor

        os.close(descriptor)
