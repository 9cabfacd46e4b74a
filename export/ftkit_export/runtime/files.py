"""Write files and folders atomically: beside their place, then renamed to it.

write_atomically(path, content)
with replacing(path) as beside: write(beside)
folder = folder_beside(out); ...; folder.rename(out)
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftkit_export.runtime.errors import FtkitError


def finite(value: Any) -> Any:
    """Plain data with None for numbers that JSON does not have: what was not measured or is not defined."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block it is fsynced and replaces `path`.

    A reader sees the old file or the new one. After an error the old file stays.
    """
    # unique among concurrent writers
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether it says that a disk, or a user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises FtkitError, naming the file, when it cannot be written (disk full); the old file stays.
    """
    try:
        with replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise FtkitError(
            f"{path}: expected to write {len(content) / 1e6:.1f} MB, found {error.strerror}. Free some disk; a run "
            "then goes on with --resume"
        ) from None


def folder_beside(out: Path) -> Path:
    """Create a hidden folder beside `out`, to be renamed to it once complete.

    Such folders that killed processes of this machine left behind are removed.
    """
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    for path in out.parent.glob(f".{glob.escape(out.name)}.{host}-*"):
        left = re.fullmatch(r"(\d+)\.\w+", path.name.rpartition(f".{host}-")[2])
        if left and not _lives(int(left[1])):
            shutil.rmtree(path, ignore_errors=True)

    return Path(tempfile.mkdtemp(prefix=f".{out.name}.{host}-{os.getpid()}.", dir=out.parent))


def _lives(process: int) -> bool:
    """Whether a process with this ID runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or the system does not say
        return True
    return True


def flush(path: Path) -> None:
    """fsync a file, or a folder's entries.

    So a power cut after the rename leaves no empty files.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on Windows
        return

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
