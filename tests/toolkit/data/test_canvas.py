"""Decoded images on disk: complete or absent, shared by runs, readable in any order."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, file_system, ftkit, settings
from PIL import ImageOps

from ftkit.data import canvas
from ftkit.data.canvas import Undecoded
from ftkit.data.dataset import read_images
from ftkit.utils import cache_folder
from ftkit_export.runtime.errors import FtkitError, UnavailableImageError
from ftkit_export.runtime.preprocess import Preprocess, decode

PREPROCESS = Preprocess(size=64, resize=72)
BUILD = """
import sys
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit_export.runtime.errors import FtkitError, UnavailableImageError
from ftkit_export.runtime.preprocess import Preprocess
canvases = build_canvases(read_images(sys.argv[1]), Preprocess(size=64, resize=72))
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
    # The last shard, with one image, is also decoded by the processes
    monkeypatch.setattr(canvas, "FEWEST", 5)
    canvases = canvas.build_canvases(read_images(photos), PREPROCESS)
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


def test_a_killed_build_leaves_nothing_a_reader_could_take_for_a_shard(
    photos: Path, tmp_path: Path
) -> None:
    process = start(photos, tmp_path)
    while process.poll() is None and not list(tmp_path.glob("canvases/.*/canvases.npy")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    left = list((tmp_path / "canvases").iterdir())
    assert all(path.name.startswith(".") for path in left)
    for path in left:
        os.utime(path, (time.time() - 2 * cache_folder.ABANDONED,) * 2)
    again, first = start(photos, tmp_path), start(photos, tmp_path / "elsewhere")
    assert again.communicate(timeout=120)[0] == first.communicate(timeout=120)[0]
    assert not [path for path in (tmp_path / "canvases").iterdir() if path.name.startswith(".")], (
        "cleared away"
    )


@pytest.mark.usefixtures("every_core")
def test_an_image_that_kills_its_decoder_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes with a decoder that dies at one file, as in a crash of a C library."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(canvas, "FEWEST", 8)
    victim = sorted(photos.rglob("*.png"))[17]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, ftkit_export.runtime.preprocess as p\n"
        "real = p.decode\n"
        f"p.decode = lambda path, white: os._exit(11) if str(path) == {str(victim)!r} else real(path, white)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FtkitError, match="found that its process ended with code 11") as caught:
        canvas.build_canvases(read_images(photos), PREPROCESS)
    assert str(victim) in str(caught.value)
    assert not list((tmp_path / "cache" / "canvases").iterdir()), "nothing half done stays"


def test_a_disk_without_room_is_told_before_anything_is_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FtkitError, match="expected room for canvases, found File too large"):
            canvas.build_canvases(read_images(photos), PREPROCESS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "canvases").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path / "disk", "size=3m") as place:
        yield place


def test_what_the_disk_has_no_room_for_is_decoded_when_it_is_read(
    photos: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the training's bits are those of a roomy disk."""
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    (broken / "mono-ok" / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(canvas, "SHARD", 30)
    metrics = []
    for cache in (small_disk, tmp_path / "roomy"):
        monkeypatch.setenv("FTKIT_CACHE", str(cache))
        run = tmp_path / f"run-{cache.name}"
        asked = settings(*TINY, "stages.0.cache=off", "stages.1.cache=off", "stages.0.epochs=1")
        done = ftkit("train", broken, "--out", run, *asked)
        assert done.exit_code == 0, done.output
        metrics.append(json.loads((run / "run.json").read_text())["metrics"])
        if cache == small_disk:
            assert "no room for the canvases of" in done.stderr
            canvases = canvas.build_canvases(read_images(broken), Preprocess(size=96, resize=96))
            assert 0 < canvases.undecoded < len(canvases.slots)
            ((bad, _),) = canvases.bad
            assert bad.name == "broken.png"
            kinds = [
                isinstance(canvases.shards[shard], Undecoded) for shard in canvases.slots[:, 0]
            ]
            path = canvases.images.images[kinds.index(True)].path
            content = path.read_bytes()
            shutil.copyfile(canvases.images.images[0].path, path)
            with pytest.raises(FtkitError, match="expected the image that was there at first"):
                canvases.array([kinds.index(True)])
            path.write_bytes(content)
    assert metrics[0] == metrics[1]


@pytest.mark.usefixtures("every_core")
@pytest.mark.parametrize("fewest", [8, 10_000], ids=["processes", "in this process"])
def test_an_image_that_memory_ran_out_for_is_no_bad_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    """Regression: it was cached as bad under its content hash, and missing from every later run."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(canvas, "FEWEST", fewest)
    victim = sorted(photos.rglob("*.png"))[17]
    short = (
        "import ftkit_export.runtime.preprocess as p\n"
        f"turned, victim = p.ImageOps.exif_transpose, p.Image.open({str(victim)!r}).tobytes()\n"
        "def short(image):\n"
        "    if image.tobytes() == victim:\n"
        "        raise MemoryError\n"
        "    return turned(image)\n"
        "p.ImageOps.exif_transpose = short\n"
    )
    (tmp_path / "sitecustomize.py").write_text(short)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.setattr(
            "ftkit_export.runtime.preprocess.ImageOps.exif_transpose", ImageOps.exif_transpose
        )
        if fewest > 1000:
            exec(short, {})
        with pytest.raises(FtkitError, match="expected memory to decode it") as caught:
            canvas.build_canvases(read_images(photos), PREPROCESS)
    assert str(victim) in str(caught.value)
    assert not list((tmp_path / "cache" / "canvases").iterdir()), "nothing is remembered"
    assert canvas.build_canvases(read_images(photos), PREPROCESS).bad == ()


def test_a_file_that_is_not_there_is_not_bad_for_good(tmp_path: Path) -> None:
    with pytest.raises(UnavailableImageError, match="No such file"):
        decode(tmp_path / "gone.png")


@pytest.mark.parametrize("file", ["bad.json", "canvases.npy"])
@pytest.mark.parametrize(
    "content", [b"", b'{"3"', b"\x93NUMPY\x01"], ids=["empty", "cut", "header"]
)
def test_a_damaged_shard_counts_as_absent(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes
) -> None:
    """Regression: it caused a traceback in every later run."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    first = canvas.build_canvases(read_images(photos), PREPROCESS)
    right = first.array(np.arange(len(first.slots)))
    (shard,) = (tmp_path / "canvases").iterdir()
    (shard / file).write_bytes(content)
    again = canvas.build_canvases(read_images(photos), PREPROCESS)
    np.testing.assert_array_equal(again.array(np.arange(len(again.slots))), right)
