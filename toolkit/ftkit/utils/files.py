"""Files that are whole or not there: write_atomically(path, content)."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from ftkit_export.runtime.errors import FtkitError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never a half.

    Raises FtkitError, naming the file, when the disk is full; what was there stays.
    """
    # Two writers share none
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise FtkitError(
            f"{path}: expected to write {len(content) / 1e6:.1f} MB, found {error.strerror}. Free some disk; a run "
            "then goes on with --resume"
        ) from None
