"""Measuring on a device over a real ssh server on loopback."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ftkit, settings

from ftkit.benchmark.ssh import Device
from ftkit_export.bundle.seal import write_manifest
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import machine
from ftkit_export.runtime.targets import here
from ftkit_export.runtime.verify import check_files, read_manifest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh")), reason="needs an OpenSSH server and client"
)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """USER@HOST:PYTHON of a test server with its own keys; an `ssh` wrapper on PATH finds both."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True) if os.access("/run", os.W_OK) else None
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -p {port} -i {folder}/user -o StrictHostKeyChecking=no "
        f'-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (folder / "ssh").chmod(0o755)
    server = subprocess.Popen(
        [str(SSHD), "-D", "-e", "-f", folder / "config"], stderr=subprocess.PIPE
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        for _ in range(50):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"{getpass.getuser()}@127.0.0.1:{sys.executable}"
    server.terminate()
    server.communicate()


@needs_sshd
def test_bench_over_ssh_brings_the_devices_figures_back_and_leaves_nothing(
    device: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "device.json"
    monkeypatch.setattr("ftkit.benchmark.ssh.PLACE", str(tmp_path))
    result = ftkit("bench", bundle, "--ssh", device, "--quick", "--threads", "1", "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["machine"] == machine()
    assert found["fingerprint"] and found["rows"][0]["p50_ms"] > 0
    assert list(tmp_path.iterdir()) == [out], "nothing is left there"
    assert ftkit("verify", bundle).exit_code == 0, "the copy was measured, not the sealed bundle"


def _processes_in(folder: Path) -> list[str]:
    """Numbers of the processes that work in a folder, or did before it was removed."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str((process / "cwd").readlink()).startswith(str(folder)):
                found.append(process.name)
    return found


def _bench_in(place: Path, bundle: Path, device: str) -> subprocess.Popen[str]:
    """`ftkit bench --ssh`, whose folder on the device is made in `place`."""
    script = (
        f"import ftkit.benchmark.ssh as s; s.PLACE = {str(place)!r}; "
        "from ftkit.cli.main import main; main()"
    )
    command = [sys.executable, "-c", script, "bench", bundle, "--ssh", device]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@needs_sshd
def test_a_command_that_is_asked_to_end_as_it_makes_the_devices_folder_removes_it(
    device: str, bundle: Path, tmp_path: Path
) -> None:
    process = _bench_in(tmp_path, bundle, device)
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.001)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert list(tmp_path.iterdir()) == []


@needs_sshd
def test_a_command_that_is_asked_to_end_leaves_nothing_on_the_device(
    device: str, bundle: Path, tmp_path: Path
) -> None:
    """As torchrun and schedulers do: SIGTERM, once more while the folder is removed, in a measurement."""
    process = _bench_in(tmp_path, bundle, device)
    running: list[Path] = []
    while process.poll() is None and not running:
        running = [path for path in tmp_path.glob("*/running") if path.read_text()]
        time.sleep(0.01)
    time.sleep(1)  # until it has a child that measures
    for _ in range(2):
        process.terminate()
        time.sleep(0.05)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert list(tmp_path.iterdir()) == []
    ends = time.monotonic() + 5
    while (left := _processes_in(tmp_path)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert left == []


@needs_sshd
def test_a_strangers_bundle_runs_none_of_its_code_on_the_device(
    device: str, bundle: Path, tmp_path: Path
) -> None:
    """The bundle's runner is replaced and the bundle sealed again, so that all hashes match."""
    evil, witness = tmp_path / "evil", tmp_path / "executed"
    shutil.copytree(bundle, evil)
    for path in (evil / "device").rglob("*.py"):
        path.write_text(f"open({str(witness)!r}, 'w')\n")
    (evil / "manifest.sig").unlink()
    sealed = json.loads((evil / "manifest.json").read_text())
    write_manifest(
        evil,
        {key: value for key, value in sealed.items() if key not in ("digest", "schema", "files")},
    )
    check_files(evil, read_manifest(evil)["files"])
    result = ftkit("bench", evil, "--ssh", device, "--quick", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert not witness.exists()

    model = evil / "variants" / "fp32-core.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    result = ftkit("bench", evil, "--ssh", device, "--quick", "--threads", "1")
    assert (result.exit_code, "expected sha256" in result.stderr) == (2, True), (
        "hashes before anything is sent"
    )


@needs_sshd
def test_the_devices_own_latency_chooses_the_variant(
    device: str, run: Path, tmp_path: Path
) -> None:
    result = ftkit(
        "export",
        run,
        "--out",
        tmp_path / "bundle",
        "--quick",
        "--on",
        device,
        *settings("export.variants=fp32", "export.p95_ms=9999"),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["target"] == here()
    assert manifest["evidence"]["decided_on"] == machine()
    assert all(row["p50_ms"] > 0 for row in manifest["evidence"]["decision"])


@needs_sshd
def test_the_answers_of_8_bits_are_the_devices_own(device: str, run: Path, tmp_path: Path) -> None:
    """A device whose 8-bit kernels answer otherwise, here by a sitecustomize that turns their logits around."""
    fake = tmp_path / "python"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'ftkit_export.runtime.timing' in ' '.join(sys.orig_argv) and '\"answers\"' in ' '.join(sys.orig_argv):\n"
        "    import ftkit_export.runtime.session as s\n"
        "    real = s.Session.run\n"
        "    s.Session.run = lambda self, *a: [-real(self, *a)[0], *real(self, *a)[1:]]\n"
    )
    fake.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PWD" exec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    host = device.partition(":")[0]
    result = ftkit("export", run, "--out", tmp_path / "bundle", "--quick", "--on", f"{host}:{fake}")
    assert result.exit_code == 0, result.output
    decision = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["evidence"][
        "decision"
    ]
    fp32, int8 = decision[:2]
    assert fp32["accuracy"] > 0.5
    assert int8["accuracy"] < 0.3, "these answers cannot be this machine's"
    assert int8["verdict"] == "refused"


@needs_sshd
def test_a_device_that_lacks_python_or_does_not_answer_is_one_sentence(device: str) -> None:
    host = device.partition(":")[0]
    for where in (f"{host}:/no/such/python", "nobody@127.0.0.1"):
        with (
            pytest.raises(FtkitError, match=r"expected ssh, tar and a python3 with numpy"),
            Device.reached(where),
        ):
            pass


def test_a_host_that_could_be_an_option_is_refused() -> None:
    for where in ("-oProxyCommand=touch x", "a b", "$(id)", ""):
        with pytest.raises(FtkitError, match="expected USER@HOST"), Device.reached(where):
            pass


@needs_sshd
def test_a_search_times_its_candidates_on_the_device(
    device: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr("ftkit.benchmark.ssh.PLACE", str(there))
    # What is timed here would be found out
    monkeypatch.delattr("ftkit.searching.timing.race")
    monkeypatch.delattr("ftkit.searching.timing.measure_start")
    linked, out = tmp_path / "linked", tmp_path / "search"
    for path in photos.glob("*/*.png"):  # as a data store keeps them; the image itself must be sent
        place = linked / path.relative_to(photos)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(path, place.parent))
    small = ("--sizes", 64, "--backbones", "efficientnet_lite0", "--timed", 2, "--finalists", 0)
    done = ftkit("search", linked, "--on", device, "--out", out, *small)
    assert done.exit_code == 0, done.output
    timed = [
        point
        for point in json.loads((out / "search.json").read_text())["points"]
        if point["p50_ms"]
    ]
    assert {point["precision"] for point in timed} == {"fp32", "int8"}
    assert all(point["peak_rss_bytes"] > 1e7 and point["cold_ms"] > 0 for point in timed)
    assert list(there.iterdir()) == [], "nothing is left there"
