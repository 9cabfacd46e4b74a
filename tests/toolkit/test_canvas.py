"""Canvases on disk: whole or not there, shared by runs, read in any order."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ftkit import canvas
from ftkit.intake import read
from ftkit_export.preprocess import Preprocess, decode

PREPROCESS = Preprocess(size=64, resize=72)
BUILD = """
import sys
from ftkit.canvas import build
from ftkit.intake import read
from ftkit_export.preprocess import Preprocess
canvases = build(read(sys.argv[1]), Preprocess(size=64, resize=72))
print(int(canvases.array(range(len(canvases.slots))).astype("int64").sum()))
"""


def start(photos: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FTKIT_CACHE": str(cache)}
    command = [sys.executable, "-c", BUILD, str(photos)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_rows_come_in_the_order_asked_for_from_many_shards(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(canvas, "SHARD", 7)
    canvases = canvas.build(read(photos), PREPROCESS)
    assert len(canvases.shards) == 18
    rows = np.random.default_rng(0).permutation(len(canvases.slots))[:40]
    expected = [PREPROCESS.canvas(decode(canvases.images.images[row].path)) for row in rows]
    assert np.array_equal(canvases.array(rows), np.stack(expected))


def test_two_runs_at_once_end_with_one_whole_copy(photos: Path, tmp_path: Path) -> None:
    both = [start(photos, tmp_path) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in both}
    assert len(sums) == 1
    assert [process.returncode for process in both] == [0, 0]
    (shard,) = (tmp_path / "canvases").iterdir()
    assert {path.name for path in shard.iterdir()} == {"canvases.npy", "bad.json"}


def test_a_killed_build_leaves_nothing_a_reader_could_take_for_a_shard(photos: Path, tmp_path: Path) -> None:
    process = start(photos, tmp_path)
    while process.poll() is None and not list(tmp_path.glob("canvases/.*/canvases.npy")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    left = list((tmp_path / "canvases").iterdir())
    assert all(path.name.startswith(".") for path in left)
    for path in left:
        os.utime(path, (time.time() - 2 * canvas.ABANDONED,) * 2)
    again, first = start(photos, tmp_path), start(photos, tmp_path / "elsewhere")
    assert again.communicate(timeout=120)[0] == first.communicate(timeout=120)[0]
    assert not [path for path in (tmp_path / "canvases").iterdir() if path.name.startswith(".")], "cleared away"
