"""The cache is listed, cleared, and limited; the least recently used entries go first."""

import os
import time
from pathlib import Path

import pytest
from conftest import ftkit

from ftkit.utils import cache_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four entries of 1 MB, last used 40, 30, 20 and 0 days ago."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    for number, days in enumerate((40, 30, 20, 0)):
        folder = tmp_path / ("canvases" if number % 2 else "prefix") / str(number)
        folder.mkdir(parents=True)
        (folder / "0.npy").write_bytes(bytes(1_000_000))
        when = time.time() - days * 86_400
        os.utime(folder, (when, when))
    return tmp_path


def _left(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*")}


def test_the_longest_unused_goes_until_the_limit_is_kept_and_what_is_in_use_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "BEGUN", time.time() - 60)
    assert cache_folder.trim() == (4_000_000, 0)
    monkeypatch.setenv("FTKIT_CACHE_GB", "0.0025")
    assert cache_folder.trim() == (2_000_000, 2_000_000)
    assert _left(cache) == {"2", "3"}
    monkeypatch.setenv("FTKIT_CACHE_GB", "0")
    cache_folder.trim()
    assert _left(cache) == {"3"}, "this process used it"
    monkeypatch.setenv("FTKIT_CACHE_GB", "much")
    told = ftkit("cache")
    assert (told.exit_code, "FTKIT_CACHE_GB: expected gigabytes" in told.stderr) == (2, True)


def test_the_command_lists_and_clears(cache: Path) -> None:
    listed = ftkit("cache").stdout
    assert listed.splitlines()[1].split()[-5:-3] == ["2", "0.00"]
    assert ftkit("cache", "--unused", "25").stdout.startswith("removed: 0.00 GB in 2 entries")
    assert _left(cache) == {"2", "3"}
    ftkit("cache", "--clear")
    assert _left(cache) == set()


def test_opening_an_entry_marks_it_used(run: Path, photos: Path, tmp_path: Path) -> None:
    """Otherwise an entry needed by every run could be removed first."""
    for entry in cache_folder.entries():
        os.utime(entry.folder, (1, 1))
    assert ftkit("data", photos).exit_code == 0
    assert any(entry.kind == "canvases" and entry.used_s < 3600 for entry in cache_folder.entries())


def test_a_limit_that_is_none_stops_a_training_before_it_begins(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: an invalid limit was reported after the training, instead of its result."""
    monkeypatch.setenv("FTKIT_CACHE_GB", "much")
    told = ftkit("train", photos, "--out", tmp_path / "run")
    assert (told.exit_code, "FTKIT_CACHE_GB: expected" in told.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
