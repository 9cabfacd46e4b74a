"""Files and folders that are whole or not there: written beside their place, then renamed to it.

write_atomically(path, content)
with replacing(path) as beside: write(beside)
folder = folder_beside(out); ...; folder.rename(out)
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ftkit_export.runtime.errors import FtkitError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It is flushed to the disk and replaces `path` at the end of
    the block: a reader sees the old file or the new one. After an error what was there stays."""
    # A name that no other writer has
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole. Raises FtkitError, naming the file, when the disk is full; what was there
    stays."""
    try:
        with replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise FtkitError(
            f"{path}: expected to write {len(content) / 1e6:.1f} MB, found {error.strerror}. Free some disk; a run "
            "then goes on with --resume"
        ) from None


def folder_beside(out: Path) -> Path:
    """A hidden folder beside `out`, to be renamed to it once whole. Those that killed processes
    left are removed."""
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    for path in out.parent.glob(f".{glob.escape(out.name)}.{host}-*"):
        left = re.fullmatch(r"(\d+)\.\w+", path.name.rpartition(f".{host}-")[2])
        if left and not _lives(int(left[1])):
            shutil.rmtree(path, ignore_errors=True)

    return Path(tempfile.mkdtemp(prefix=f".{out.name}.{host}-{os.getpid()}.", dir=out.parent))


def _lives(process: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's, or the system does not tell
        return True
    return True
