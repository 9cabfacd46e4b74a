"""The cache folder; entries are written to a temporary folder, then renamed into place.

folder = cache_folder() / "canvases" / key
clear_abandoned(folder.parent)
publish(beside, folder)      # two runs may build the same entry at once; nobody reads a partial one
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ftkit_export.runtime.errors import FtkitError

KINDS = ("canvases", "prefix", "features")
LIMIT_GB = 20
LARGE = 1e9  # bytes above which the cache size is reported
BEGUN = time.time()  # start of this process
ABANDONED = 86_400  # seconds after which a hidden folder counts as left by a killed run


def cache_folder() -> Path:
    """$FTKIT_CACHE, else ftkit's folder in the system's cache folder (Linux: ~/.cache/ftkit)."""
    if os.environ.get("FTKIT_CACHE"):
        return Path(os.environ["FTKIT_CACHE"])
    return platformdirs.user_cache_path("ftkit", appauthor=False)


def reserve(file: Path) -> None:
    """Allocate the disk space of a sparse file, so that a full disk raises OSError here.

    Otherwise it would be a SIGBUS when some page is written later.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def clear_abandoned(folder: Path) -> None:
    """Remove half-written entries that killed runs left in a cache folder."""
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # another run may have published it meanwhile
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cache entry. used_s: seconds since its last use."""

    folder: Path
    kind: str
    size_bytes: int
    used_s: float


def entries() -> list[Entry]:
    """Cache entries, least recently used first."""
    listed = []
    for kind in KINDS:
        for folder in (cache_folder() / kind).glob("[!.]*"):
            with contextlib.suppress(OSError):  # another run may be removing it
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                used = max(0.0, time.time() - folder.stat().st_mtime)
                listed.append(Entry(folder=folder, kind=kind, size_bytes=size, used_s=used))
    return sorted(listed, key=lambda entry: -entry.used_s)


def limit_bytes() -> float:
    """Limit from $FTKIT_CACHE_GB, 20 GB by default. Raises FtkitError if it is no number."""
    text = os.environ.get("FTKIT_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0

    if not limit >= 0:
        raise FtkitError(
            f"FTKIT_CACHE_GB: expected gigabytes, 0 or more, found {text!r}. Try FTKIT_CACHE_GB=20"
        )

    return limit * 1e9


def trim() -> tuple[int, int]:
    """Remove least recently used entries until the cache is within its limit.

    Entries used since this process started stay, since it may have them mapped. Returns (bytes
    left, bytes removed).
    """
    held = entries()
    total = sum(entry.size_bytes for entry in held)

    removed = 0
    for entry in held:
        if total - removed <= limit_bytes() or entry.used_s < time.time() - BEGUN:
            break
        put_away(entry.folder)
        removed += entry.size_bytes

    return total - removed, removed


def put_away(folder: Path) -> None:
    """Remove an entry: invisible at once, and harmless to processes that have it mapped."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # there is none, or another run removed it first
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def unpublished(folder: Path) -> Path:
    """Create a hidden folder beside an entry's, to write it in and then `publish` it."""
    return Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))


def publish(beside: Path, folder: Path) -> None:
    """Rename a finished folder into place; if another run was first, keep its equal copy."""
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        for path in beside.iterdir():
            path.unlink()
        beside.rmdir()
