"""The cache folder, and how something large appears in it: made beside, whole, then renamed.

folder = cache_folder() / "canvases" / key
clear_abandoned(folder.parent)
publish(beside, folder)      # two runs may make the same one at once, and nobody ever reads a half
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

ABANDONED = 86_400  # seconds after which a hidden folder in the cache is what a killed run left


def cache_folder() -> Path:
    """$FTKIT_CACHE, else $XDG_CACHE_HOME/ftkit, else ~/.cache/ftkit."""
    if os.environ.get("FTKIT_CACHE"):
        return Path(os.environ["FTKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftkit"


def reserve(file: Path) -> None:
    """Claim the disk a sparse file will need: a full disk is then an OSError here, not a SIGBUS at some later page."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def clear_abandoned(folder: Path) -> None:
    """Remove what killed runs left half written in a cache folder."""
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # another run may just have published it
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def put_away(folder: Path) -> None:
    """Remove an entry, at once for whoever looks for it, and without harm to whoever has it mapped."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # there is none, or another run was first
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def publish(beside: Path, folder: Path) -> None:
    """Rename a finished folder into place; if another run was first, its equal copy stays and ours goes."""
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        for path in beside.iterdir():
            path.unlink()
        beside.rmdir()
