"""A device takes only bundles that are proven on it, and is never without one."""

import fcntl
import functools
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import ftkit

from ftkit_export.bundle import archive, update
from ftkit_export.bundle.seal import write_manifest
from ftkit_export.runtime import latency
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.verify import check_files, read_manifest

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(bundle: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Zip of a copy of the bundle, with another version and model file, signed."""
    root = tmp_path_factory.mktemp("versions")
    numbers = itertools.count()

    @functools.cache
    def made(version: int, change: Callable[[Path], None] | None = None, sign: bool = True) -> Path:
        folder = root / f"bundle-{next(numbers)}"
        large = shutil.ignore_patterns("handoff", "ort", "c")  # half of it, which no update runs
        shutil.copytree(bundle, folder, ignore=large)
        model = onnx.load(folder / "model.onnx")
        model.metadata_props.add(key="note", value=str(version))
        onnx.save(model, folder / "model.onnx")
        if change:
            change(folder)
        told = read_manifest(bundle)
        kept = {name: told[name] for name in told if name not in ("schema", "files", "digest")}
        (folder / "manifest.sig").unlink(missing_ok=True)
        write_manifest(folder, {**kept, "version": version})
        if sign:
            archive.sign(folder, keys[0])
        archive.pack(folder, root / f"{folder.name}.zip")
        return root / f"{folder.name}.zip"

    return made


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes instead of six: the test of the race itself is elsewhere."""
    monkeypatch.setattr(latency, "PROCESSES", 2)


@pytest.fixture(scope="module")
def installed(
    make: Make, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Version 1, installed."""
    device = tmp_path_factory.mktemp("installed") / "device"
    update.update(make(1), device, key=keys[1])
    return device


@pytest.fixture
def device(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that runs version 1, as a relative path through a link."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    monkeypatch.chdir(tmp_path)
    device = Path("link") / "device"
    shutil.copytree(installed, device, symlinks=True)
    return device


def _version(device: Path) -> int:
    running = update.current(device)
    assert running
    manifest = read_manifest(running)
    check_files(running, manifest["files"])
    return int(manifest["version"])


def test_a_newer_bundle_is_switched_to_and_back(
    device: Path, make: Make, keys: tuple[Path, Path]
) -> None:
    done = update.update(make(2), device, key=keys[1], slower=0.5)
    assert _version(device) == done.version == 2
    assert done.ratio
    assert done.ratio[1] < 1.5
    on_probation = update.probation(device)
    assert on_probation
    update.answered(device, done.folder.name, on_probation["of"] - 1)
    update.answered(device, "1-another", on_probation["of"])
    assert update.probation(device)
    update.answered(device, done.folder.name, on_probation["of"])
    assert update.probation(device) is None
    update.update(make(3), device, key=keys[1], slower=0.5)
    assert len(list((device / "versions").iterdir())) == 2, "the last good one stays, no more"

    assert update.rollback(device).name.startswith("2-")
    assert _version(device) == 2
    update.update(make(3), device, key=keys[1], slower=0.5)
    three = update.current(device)
    update.update(make(4), device, key=keys[1], slower=0.5)  # while version 3 is on probation
    with (device / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        assert update.rollback(device, bad=True, of=three).name.startswith("4-"), "3 failed, not 4"
    assert update.rollback(device, bad=True).name.startswith("2-"), "the last proven one"
    with pytest.raises(FtkitError, match="go back to"):
        update.rollback(device)
    update.update(make(3), device, key=keys[1], slower=0.5)
    assert _version(device) == 3


def test_whatever_is_wrong_with_a_bundle_the_old_one_runs_on(
    device: Path, make: Make, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    altered = tmp_path / "altered.zip"
    with zipfile.ZipFile(make(2)) as good, zipfile.ZipFile(altered, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, b"other\n" if name.endswith("labels.txt") else good.read(name))
    escaping = tmp_path / "escaping.zip"
    shutil.copyfile(make(2), escaping)
    with zipfile.ZipFile(escaping, "a") as bad:
        bad.writestr("../outside.txt", "x")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(make(2).read_bytes()[:100_000])

    def break_model(folder: Path) -> None:
        shutil.copyfile(folder / "golden" / "01.png", folder / "golden" / "00.png")

    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k"], check=True
    )
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k", "-pubout", "-out", other], check=True)

    linked = tmp_path / "linked"
    shutil.copytree(update.current(device), linked)
    (linked / "labels.txt").unlink()
    (linked / "labels.txt").symlink_to(tmp_path / "outside.txt")

    refused = {
        "the link": (linked, keys[1], {}),
        "sha256": (altered, keys[1], {}),
        "inside it": (escaping, keys[1], {}),
        "zipped bundle": (cut, keys[1], {}),
        "a signature, found none": (make(2, sign=False), keys[1], {}),
        "a signature by other.pem": (make(2), other, {}),
        "self-check": (make(2, break_model), keys[1], {}),
        "of the running bundle's time": (make(2), keys[1], {"slower": -0.9}),
        "allow-downgrade": (make(0), keys[1], {}),
    }
    for why, (source, key, more) in refused.items():
        with pytest.raises(FtkitError, match=why):
            update.update(source, device, key=key, **more)
        assert _version(device) == 1
        assert len(list((device / "versions").iterdir())) == 1, "nothing is left behind"

    update.update(make(0), device, key=keys[1], allow_downgrade=True, slower=0.5)
    assert _version(device) == 0


def test_a_damaged_bundle_is_replaced_and_not_gone_back_to(
    device: Path, make: Make, keys: tuple[Path, Path]
) -> None:
    (device / "current" / "model.onnx").write_bytes(b"")
    update.update(make(1), device, key=keys[1])
    assert _version(device) == 1
    with pytest.raises(FtkitError, match="go back to"):
        update.rollback(device)


@pytest.mark.parametrize("at", ["current", "previous"])
def test_a_disk_that_fills_up_between_two_steps_leaves_a_bundle_to_go_back_to(
    device: Path, make: Make, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    two = update.update(make(2), device, key=keys[1], slower=0.5)
    update.answered(device, two.folder.name, 10**6)
    update.update(make(3), device, key=keys[1], slower=0.5)  # on probation; 2 is proven
    point = update._point

    def full(link: Path, folder: Path) -> None:
        if link.name == at:
            raise OSError(28, "No space left on device")
        point(link, folder)

    with monkeypatch.context() as patch:
        patch.setattr(update, "_point", full)
        with pytest.raises(FtkitError, match="No space left"):
            update.update(make(4), device, key=keys[1], slower=0.5)
    running = _version(device)
    assert running == (3 if at == "current" else 4)
    assert update.probation(device), "it has still to show what it had to"
    assert update.rollback(device, bad=True).name.startswith("2-")
    assert _version(device) == 2


def test_a_file_beside_a_bundles_own_does_not_let_an_older_one_in(
    device: Path, make: Make, keys: tuple[Path, Path]
) -> None:
    update.update(make(2), device, key=keys[1], slower=0.5)
    stray = device / "current" / "device" / "__pycache__" / "classify.pyc"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    with pytest.raises(FtkitError, match="allow-downgrade"):
        update.update(make(1), device, key=keys[1])
    (device / "previous" / "model.onnx").write_bytes(b"")
    with pytest.raises(FtkitError, match="a whole bundle to go back to"):
        update.rollback(device)


def test_a_manifest_that_was_damaged_is_not_what_is_installed_again(
    device: Path, make: Make, keys: tuple[Path, Path]
) -> None:
    (device / "current" / "manifest.json").write_text("{")
    update.update(make(1), device, key=keys[1])
    assert _version(device) == 1


def test_a_delta_holds_what_differs_and_installs_where_the_old_one_runs(
    device: Path,
    make: Make,
    keys: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = (device / "current").resolve()
    with monkeypatch.context() as there:
        there.chdir(shutil.copytree(running, tmp_path / "a bundle"))
        named = ftkit("delta", running, ".", "--key", keys[1])
    assert (named.exit_code, (tmp_path / "a bundle.delta.zip").is_file()) == (0, True), named.output
    old, new, small = make(1), make(2), tmp_path / "small.zip"
    done = ftkit("delta", old, new, "--out", small)
    assert done.exit_code == 0, done.output
    assert small.stat().st_size < 0.5 * new.stat().st_size
    with pytest.raises(FtkitError, match="missing"):
        update.update(small, tmp_path / "elsewhere", key=keys[1])
    update.update(small, device, key=keys[1], slower=0.5)
    assert _version(device) == 2


def test_openssl_checks_signatures_where_cryptography_is_missing(
    make: Make, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(archive.util, "find_spec", lambda _: None)
    with archive.opened(make(2), keys[1]) as folder:
        archive.check_signature(folder, keys[1])
        (folder / "manifest.sig").write_bytes(bytes(64))
        with pytest.raises(FtkitError, match="found another"):
            archive.check_signature(folder, keys[1])
        with pytest.raises(FtkitError, match="Ed25519 public key"):
            archive.check_signature(folder, keys[0])


KILLED = """
import sys
from pathlib import Path
from ftkit_export.bundle import update
update._self_check = lambda *_: None
update._require_as_fast = lambda *_: None
print("begun", flush=True)
update.update(Path(sys.argv[1]), Path(sys.argv[2]), key=Path(sys.argv[3]))
"""


def test_a_kill_at_any_moment_leaves_the_old_bundle_or_the_new(
    device: Path, make: Make, keys: tuple[Path, Path]
) -> None:
    """The long checks are left out, so that kills hit the moments that write."""
    zips = {1: make(1), 2: make(2)}
    command = [sys.executable, "-c", KILLED]
    begun = time.perf_counter()
    subprocess.run([*command, zips[2], device, keys[1]], check=True, capture_output=True)
    lasts = time.perf_counter() - begun
    update.update(zips[1], device, key=keys[1], allow_downgrade=True, slower=0.5)
    draw = random.Random(0)
    for _ in range(6):
        with subprocess.Popen(
            [*command, zips[2], device, keys[1]], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout
            child.stdout.readline()
            time.sleep(draw.random() * lasts * 0.5)
            child.kill()
        assert _version(device) in (1, 2)
    update.update(zips[2], device, key=keys[1], slower=0.5)
    assert _version(device) == 2
    assert all(not path.name.startswith(".") for path in (device / "versions").iterdir())


def _runner(device: Path, *arguments: object) -> subprocess.Popen[str]:
    update_py = device / "current" / "device" / "update.py"
    command = [sys.executable, update_py, "--run", "--into", device, "--", *arguments]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_new_bundle_that_fails_its_first_frames_is_rolled_back(
    device: Path, make: Make, keys: tuple[Path, Path], tmp_path: Path, photos: Path
) -> None:
    def fail_later(folder: Path) -> None:
        """Its classifier passes the self-check, and ends when it is to watch."""
        path = folder / "device" / "classify.py"
        text = path.read_text()
        path.write_text(
            text.replace("def _classified(", "import os\n\n\ndef _classified(", 1).replace(
                "    if not raw:\n", "    os._exit(3)\n    if not raw:\n", 1
            )
        )

    incoming = tmp_path / "incoming"
    incoming.mkdir()
    pictures = sorted(photos.glob("*/*.png"))
    failing = make(2, fail_later)
    update.update(failing, device, key=keys[1], slower=0.5)
    assert _version(device) == 2
    assert update.probation(device)
    with _runner(device, "--watch", incoming) as running:
        shutil.copyfile(pictures[0], incoming / "0.png")
        assert running.stderr
        assert "failed after 0 images (exit code 3); now 1-" in running.stderr.readline()
        shutil.copyfile(pictures[1], incoming / "1.png")
        assert running.stdout
        assert "1.png" in running.stdout.readline()
        with pytest.raises(FtkitError, match="was rolled back"):
            update.update(failing, device, key=keys[1])

        update.update(make(3), device, key=keys[1], slower=0.5)  # the runner takes it up
        deadline = time.monotonic() + 60
        while (update.probation(device) or {"frames": 0})["frames"] == 0:
            assert time.monotonic() < deadline
            shutil.copyfile(pictures[2], incoming / f"{time.monotonic_ns()}.png")
            time.sleep(1)
        running.terminate()
        running.communicate(timeout=60)
    assert running.returncode == 0
    assert _version(device) == 3
    told = json.loads((device / "probation.json").read_text())
    assert told["version"].startswith("3-")
