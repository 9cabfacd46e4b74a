"""Command line: fast help, `doctor`, recipe modules, and the demo's split by module."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import TINY, ftkit, settings

from ftkit.cli.demo import GROUP, GROUPS, write_elpv
from ftkit.cli.main import main
from ftkit.data.dataset import read_images
from ftkit.utils.local_server import listening
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.verify import verify


def test_every_command_explains_itself_within_100_columns() -> None:
    assert len(main.commands) >= 12
    for command in ((), *((name,) for name in main.commands)):
        result = ftkit(*command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("eval", "bundle", "photos", "--max-drop", "0.01"), "--max-drop: expected --against"),
        (("bench", "bundle", "--max-slowdown", "0.02"), "--max-slowdown: expected --against"),
        (("bench", "bundle", "--seconds", "30"), "--seconds: expected --against"),
        (("review", "collected", "--port", "80"), "--port: expected --serve"),
        (("export", "run", "--runtime", "ort.tgz"), "--runtime: expected --web"),
        (("cache", "--clear", "--unused", "30"), "--clear: expected one of"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(words: tuple[str, ...], option: str) -> None:
    """A gate that is never asked would let everything pass."""
    refused = ftkit(*words)
    assert (refused.exit_code, refused.stderr.count(option)) == (2, 1), refused.output


def test_a_packages_recipe_needs_no_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "plug-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[ftkit.recipes]\naaa_plug = plug_recipe\n")
    (tmp_path / "plug_recipe.py").write_text("from ftkit_recipes.lite0 import recipe\n")
    monkeypatch.syspath_prepend(tmp_path)
    listed = ftkit("recipes")
    assert listed.exit_code == 0, listed.output
    assert {"aaa_plug", "lite0"} <= {line.split()[0] for line in listed.stdout.splitlines()}


def test_a_page_that_is_closed_while_it_is_sent_is_no_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = threading.Event()

    class Large(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                for _ in range(200):
                    self.wfile.write(bytes(1_000_000))
            finally:
                done.set()

    with listening(Large, 0) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            client.recv(10)
        assert done.wait(30)
    assert capfd.readouterr().err == ""


def test_doctor_says_which_providers_open_a_session_and_why_not() -> None:
    lines = ftkit("doctor").stdout.splitlines()
    assert "provider cpu       works" in lines
    others = [line for line in lines if line.startswith("provider ") and not line.endswith("works")]
    assert others
    assert all("absent: " in line or "does not open: " in line for line in others)


def test_the_demo_keeps_runs_of_cells_on_one_side_and_groups_them(tmp_path: Path) -> None:
    assert write_elpv(tmp_path, split=True) == 2223
    images = read_images(tmp_path, group_by=GROUPS[1], cut_val=False)
    sides: dict[str, set[str]] = {}
    for image in images.images:
        cell = int(image.path.stem.rpartition("cell")[2])
        assert image.group == f"module{(cell - 1) // GROUP:02d}"
        sides.setdefault(image.group, set()).add(image.split)
    assert all(len(splits) == 1 for splits in sides.values())
    classes = {split: len(list((tmp_path / split).iterdir())) for split in ("train", "test")}
    assert classes == {"train": 4, "test": 4}


def test_a_recipe_module_trains_exports_and_verifies(photos: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ftkit_recipes.gentle",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--quick",
    ]
    changes = (
        "preprocess.size=64",
        "preprocess.resize=64",
        "stages.0.epochs=1",
        "export.variants=fp32",
    )
    done = subprocess.run(
        [*command, *settings(*changes)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "verified"
    assert verify(tmp_path / "run-bundle").passed


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTKIT_DEBUG", "1")
    assert isinstance(ftkit("train", tmp_path / "none").exception, FtkitError)


def test_a_full_disk_is_one_sentence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTKIT_CACHE", "/dev/full")
    result = ftkit("train", photos, "--out", tmp_path / "run", *settings(*TINY))
    assert result.exit_code == 2
    assert "expected room for canvases" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_terminal_shows_the_stage_as_it_goes_and_ctrl_c_saves_it(
    photos: Path, tmp_path: Path
) -> None:
    """The real command on an 80-column terminal; Ctrl-C once the live view shows loss and rate."""
    small = settings("preprocess.size=32", "preprocess.resize=32", "stages.0.epochs=2000")
    command = [
        sys.executable,
        "-m",
        "ftkit",
        "train",
        photos,
        "--out",
        tmp_path / "run",
        "--recipe",
        "gentle",
        *small,
    ]
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(COLUMNS="80", TERM="xterm")
        os.execv(sys.executable, [str(word) for word in command])
    shown, stopped, code, ended = "", False, None, time.monotonic() + 90
    try:
        while time.monotonic() < ended:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                part = os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                break
            shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part)
            if not stopped and re.search(
                r"stage 1 of 1 · loss [\d.]+ · accuracy [\d.]+ · rate 1.0e-04 · \d+ img/s", shown
            ):
                stopped = True
                os.write(terminal, b"\x03")
    finally:
        os.close(terminal)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert stopped, shown[-2000:]
    assert code == 130
    assert re.search(
        r"stage done in \d+:\d\d · \d+:\d\d of frozen passes read, not run", " ".join(shown.split())
    )
    assert f"stopped; go on with: ftkit train '{photos}'" in shown
    assert (tmp_path / "run" / "state").is_dir()


def test_the_shell_completes_commands() -> None:
    asked = {
        **os.environ,
        "_FTKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": "ftkit tr",
        "COMP_CWORD": "1",
    }
    command = [str(Path(sys.executable).with_name("ftkit"))]
    done = subprocess.run(command, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plain,train", "plain,try"]
