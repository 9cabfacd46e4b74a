"""A run that is killed, interrupted or terminated resumes and ends with identical weights."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import COMMAND, TINY, ftkit, settings, steps_done

from ftkit.training.run import claim
from ftkit.utils.lock import in_use, locked
from ftkit_export.runtime.errors import FtkitError


def begin(photos: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, "train", str(photos), "--out", str(out), *more]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )


def wait_for(process: subprocess.Popen[str], out: Path, place: int) -> None:
    while process.poll() is None and steps_done(out) < place:
        time.sleep(0.005)


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [
        [
            {**json.loads(line), "images_per_s": 0}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    ]
    assert lines[0] == lines[1]
    assert not (other / "state").exists()


def test_killed_three_times_and_once_asked_to_stop(run: Path, photos: Path, tmp_path: Path) -> None:
    """SIGKILL in the head stage, SIGKILL and SIGTERM in the second, SIGINT late; each resumes."""
    out, chosen = tmp_path / "killed run", settings(*TINY)
    for place, number in (
        (4, signal.SIGKILL),
        (1002, signal.SIGKILL),
        (1004, signal.SIGTERM),
        (1006, signal.SIGINT),
    ):
        process = begin(photos, out, *(["--resume"] if out.exists() else chosen))
        wait_for(process, out, place)
        time.sleep(random.Random(place).random() * 0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
        if number != signal.SIGKILL:
            assert f"stopped; go on with: ftkit train '{photos}' --out '{out}' --resume" in errors
        assert f"--out '{out}' --resume`" in ftkit("report", out).stderr, "train anew, it said"
    result = ftkit("train", photos, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert_equal_runs(run, out)
    assert "finished already" in ftkit("train", photos, "--out", out, "--resume").stdout


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted in its second stage."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    process = begin(photos, out, *settings(*TINY))
    wait_for(process, out, 1002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    return out


def test_resume_refuses_another_recipe_seed_or_set_of_images(
    stopped: Path, photos: Path, tmp_path: Path
) -> None:
    fewer = shutil.copytree(photos, tmp_path / "photos")
    next(iter(sorted(fewer.rglob("*.png")))).unlink()
    before = (stopped / "state" / "state.json").read_bytes()
    for data, more, what in (
        (photos, settings(*TINY, "stages.1.lr=1e-5"), "recipe"),
        (photos, [*settings(*TINY), "--seed", "1"], "seed"),
        (fewer, [], "data fingerprint"),
    ):
        result = ftkit("train", data, "--out", stopped, "--resume", *more)
        assert (result.exit_code, f"expected the {what} this run began with" in result.stderr) == (
            2,
            True,
        ), result.stderr
    assert "expected a new folder" in ftkit("train", photos, "--out", stopped).stderr
    assert (stopped / "state" / "state.json").read_bytes() == before


def test_a_csv_is_resumed_with_its_root_and_limit_and_not_with_other_groups(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the command printed at Ctrl-C lacked both; folds of other groups were mixed."""
    table, out = tmp_path / "table.csv", tmp_path / "run"
    paths = [path.relative_to(photos) for path in sorted(photos.glob("*/*.png"))]

    def write(size: int) -> None:
        splits = ("test", "val", "train", "train", "train")
        rows = [
            f"{path},{path.parent},{splits[number // 6 % 5]},g{number // size}"
            for number, path in enumerate(paths)
        ]
        table.write_text("\n".join(["path,label,split,group", *rows]) + "\n")

    write(2)
    told = ("--root", str(photos), "--max-pixels", "400000000")
    process = begin(table, out, *told, *settings(*TINY))
    wait_for(process, out, 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)

    monkeypatch.delenv("FTKIT_MAX_PIXELS", raising=False)
    write(3)
    other = ftkit("train", table, "--out", out, "--resume")
    assert (other.exit_code, "expected the groups this run began with" in other.stderr) == (2, True)
    write(2)
    assert ftkit("train", table, "--out", out, "--resume").exit_code == 0


def test_resume_warns_when_the_bits_may_differ(stopped: Path, photos: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped, tmp_path / "run")
    path = copy / "state" / "state.json"
    state = json.loads(path.read_text())
    state["circumstances"]["threads"] = 77
    path.write_text(json.dumps(state))
    result = ftkit("train", photos, "--out", copy, "--resume")
    assert result.exit_code == 0
    own = torch.get_num_threads()
    assert f"expected threads 77 as before the interruption, found {own}" in result.stderr


def test_resume_begins_a_run_that_is_not_there_and_needs_its_folder(
    photos: Path, tmp_path: Path
) -> None:
    assert (
        "expected the run to go on with, found no --out"
        in ftkit("train", photos, "--resume").stderr
    )
    small = settings(*TINY, "stages.0.epochs=1", "stages.1.epochs=1")
    assert ftkit("train", photos, "--out", tmp_path / "run", "--resume", *small).exit_code == 0


def test_a_disk_that_fills_leaves_the_last_save_and_one_sentence(
    stopped: Path, photos: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))  # the weights take 13 MB
    try:
        result = ftkit("train", photos, "--out", out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2
    assert "to write 13.7 MB, found File too large. Free some disk" in result.stderr
    assert ftkit("train", photos, "--out", out, "--resume").exit_code == 0


def test_two_processes_do_not_work_on_one_run(photos: Path, tmp_path: Path) -> None:
    """Regression: both used the same folder and deleted each other's state.

    The lock is released when its process ends.
    """
    out = tmp_path / "run"
    first = begin(photos, out, *settings(*TINY))
    wait_for(first, out, 2)
    for more, said in (
        (["--resume"], f"found process {first.pid} at it"),
        ([], "another process trains in"),
    ):
        second = ftkit("train", photos, "--out", out, *more, *([] if more else settings(*TINY)))
        assert second.exit_code == 2
        assert said in second.stderr
    first.kill()
    first.communicate()
    assert ftkit("train", photos, "--out", out, "--resume").exit_code == 0
    assert not (out / ".lock").exists()


def test_two_processes_without_a_folder_take_two(photos: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ftkit",
        "train",
        str(photos),
        *settings(*TINY, "stages.0.epochs=1"),
    ]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lite0-1", "lite0-2"]
    typo = [*command, "--set", "stages.0.train=nonsense"]
    assert subprocess.run(typo, cwd=tmp_path, capture_output=True, check=False).returncode == 2
    assert not (tmp_path / "runs" / "lite0-3").exists(), "a typo leaves no folder"


def test_a_file_system_without_locks_is_no_other_process(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ftkit.utils.lock.fcntl.flock", flock)
    with locked(tmp_path):
        assert not in_use(tmp_path)


def test_a_link_to_nowhere_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FtkitError, match="found a broken link"):
        claim(tmp_path / "runs" / "lite0")


def test_runs_that_begin_at_once_get_a_folder_each(tmp_path: Path) -> None:
    """Regression: without --out two runs took one folder, and one reported a full disk."""
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(claim, [tmp_path / "runs" / "lite0"] * 24))
    assert len(folders) == 24
    assert all(folder.is_dir() for folder in folders)
