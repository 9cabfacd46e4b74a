"""Measure on the device itself, over plain OpenSSH; nothing is installed or left behind there.

    found = bench_there("pi@camera", Path("bundle"), quick=False)            # as `ftkit bench` there
    with Device.reached("pi@camera") as device:
        device.target, device.race(files, photograph)

The device needs an ssh server, tar, and a python3 with numpy, onnxruntime and Pillow;
USER@HOST:PYTHON names another interpreter there. Keys, ports and jump hosts are ssh's own business
(~/.ssh/config).
"""

from __future__ import annotations

import io
import json
import re
import secrets
import shlex
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ftkit_export
from ftkit.utils.ending import leave, when_asked_to_end
from ftkit_export.bundle.write import runtime_files
from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.latency import Condition, Raced, Start
from ftkit_export.runtime.measure import checked, find

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
PLACE = "${TMPDIR:-/tmp}"  # there
CANVASES = "canvases.npy"
RUNNING = "running"  # holds the number of the process that measures
NEEDED = "numpy, onnxruntime and Pillow"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A temporary folder on another machine, for as long as the block of `reached` runs.

    python: the interpreter there.
    """

    host: str
    folder: str
    python: str
    target: str
    machine: Mapping[str, Any]

    @staticmethod
    @contextmanager
    def reached(where: str) -> Iterator[Device]:
        """Connect to USER@HOST[:PYTHON] and set up a temporary folder there.

        The folder is removed in the end, and what still runs there is ended, also after one Ctrl-C,
        SIGTERM or SIGHUP. Raises FtkitError when the machine cannot be reached, or lacks what is
        needed.
        """
        with when_asked_to_end(leave):
            yield from Device._set_up(*_parse(where))

    @staticmethod
    def _set_up(host: str, python: str) -> Iterator[Device]:
        # Its name is known before it is made, so that it can be removed whenever this ends
        name = f"ftkit-{secrets.token_hex(8)}"
        made, stop = False, ""
        try:
            make = f'cd "{PLACE}" && mkdir -m 700 {name} && cd {name} && pwd'
            said = _ssh(host, f"sh -c {shlex.quote(make)}").decode(errors="replace")
            made = True
            folder = said.strip().rpartition("\n")[2]
            if not re.fullmatch(r"/[\w./-]+", folder):  # it stands in commands
                raise FtkitError(
                    f"{host}: expected a plain path to its temporary folder, found {folder[:80]!r}. "
                    "Check its login scripts and its TMPDIR"
                )

            package = Path(ftkit_export.__file__).parent
            _send(
                host, folder, {f"ftkit_export/{each}": package / each for each in runtime_files()}
            )
            script = (
                "import json, numpy, PIL; from ftkit_export.runtime.latency import machine; "
                "from ftkit_export.runtime.targets import here; print(json.dumps([here(), machine()]))"
            )
            target, machine = _last(
                _ssh(host, f"cd {folder} && {python} -B -c {shlex.quote(script)}")
            )
            yield Device(host=host, folder=folder, python=python, target=target, machine=machine)
        except (KeyboardInterrupt, SystemExit):
            # Without a terminal, a command there goes on when its ssh ends
            made, stop = True, f"kill $(cat {name}/{RUNNING}) 2>/dev/null; "
            raise
        finally:
            if made:
                remove = f'cd "{PLACE}" && {{ {stop}rm -rf {name}; }}'
                # Measurements count even if the connection is lost now
                with when_asked_to_end(signal.SIG_IGN), suppress(FtkitError):
                    _ssh(host, f"sh -c {shlex.quote(remove)}")

    def race(
        self,
        models: Sequence[Path],
        image: Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        frame: str = "",
    ) -> list[Raced]:
        """Run latency.race on the device."""
        names = [f"{number}.onnx" for number in range(len(models))]
        _send(
            self.host,
            self.folder,
            {**dict(zip(names, models, strict=True)), f"image{image.suffix}": image},
        )
        conditions = [
            asdict(Condition(model=name, provider=provider, threads=threads, frame=frame))
            for name in names
        ]
        job = {"what": "race", "conditions": conditions, "image": f"image{image.suffix}"}

        return [
            Raced(**item) for item in self.run("-m", "ftkit_export.runtime.timing", json.dumps(job))
        ]

    def starts(
        self, model: Path, image: Path, *, provider: str = "cpu", frame: str = "", count: int
    ) -> list[Start]:
        """Run latency.begin on the device `count` times, on one thread."""
        _send(self.host, self.folder, {"0.onnx": model, f"image{image.suffix}": image})
        condition = asdict(Condition(model="0.onnx", provider=provider, threads=1, frame=frame))
        job = {
            "what": "begin",
            "conditions": [condition],
            "image": f"image{image.suffix}",
            "steady": True,
        }

        return [
            Start(**self.run("-m", "ftkit_export.runtime.timing", json.dumps(job)))
            for _ in range(count)
        ]

    def over_sizes(
        self, model: Path, image: Path, frames: Sequence[str]
    ) -> list[tuple[str, float, float]]:
        """Run latency.over_sizes on the device, on one thread of the CPU."""
        _send(self.host, self.folder, {"0.onnx": model, f"image{image.suffix}": image})
        conditions = [asdict(Condition(model="0.onnx", threads=1, frame=frame)) for frame in frames]
        job = {"what": "sizes", "conditions": conditions, "image": f"image{image.suffix}"}
        times = self.run("-m", "ftkit_export.runtime.timing", json.dumps(job))
        return [
            (frame, float(p50), float(p95)) for frame, (p50, p95) in zip(frames, times, strict=True)
        ]

    def sustained(self, model: Path, image: Path, condition: Condition, seconds: float) -> Any:
        """Run the model on the device for `seconds`; as runtime.sustained.windows."""
        picture = f"image{image.suffix}"
        _send(self.host, self.folder, {"0.onnx": model, picture: image})
        job = {
            "what": "sustained",
            "conditions": [asdict(replace(condition, model="0.onnx"))],
            "image": picture,
            "seconds": seconds,
        }
        return self.run("-m", "ftkit_export.runtime.timing", json.dumps(job))

    def put_canvases(self, canvases: np.ndarray[Any, Any]) -> None:
        """Send images (n, R, R, 3) uint8 to the device, for `answers`."""
        with tempfile.TemporaryDirectory() as scratch:
            np.save(Path(scratch) / CANVASES, canvases)
            _send(self.host, self.folder, {CANVASES: Path(scratch) / CANVASES})

    def answers(self, core: Path, *, provider: str = "cpu") -> np.ndarray[Any, Any]:
        """Logits (n, classes) of a core form on the device, for the images from `put_canvases`."""
        _send(self.host, self.folder, {"0.onnx": core})
        conditions = [asdict(Condition(model="0.onnx", provider=provider))]
        job = {"what": "answers", "conditions": conditions, "image": CANVASES}
        return np.array(self.run("-m", "ftkit_export.runtime.timing", json.dumps(job)))

    def run(self, *words: str) -> Any:
        """Run Python in the device's folder; return the JSON that it prints last."""
        command = f"echo $$ > {RUNNING} && exec {self.python} -B {shlex.join(words)}"
        return _last(_ssh(self.host, f"cd {self.folder} && sh -c {shlex.quote(command)}"))


def bench_there(
    where: str, bundle: Path, *, provider: str = "cpu", threads: int = 0, quick: bool = False
) -> dict[str, Any]:
    """Measure a bundle on another machine with this ftkit's own code, and return the figures.

    threads: 0 = 1 and all cores. Only the bundle's models and its first golden image are sent,
    after their hashes are checked: a bundle may come from elsewhere, and nothing in it is executed.
    Raises FtkitError with the device's own message, BundleError when `bundle` is not a bundle or
    was altered.
    """
    model = find(bundle)
    if not model.cores:
        raise BundleError(
            f"{bundle}: expected a bundle to measure on another machine, found a single file. "
            "Try a folder that `ftkit export` made"
        )

    there = model.renamed()
    with Device.reached(where) as device:
        _send(
            device.host,
            device.folder,
            dict(zip(map(str, there.paths()), model.paths(), strict=True)),
        )
        job = {"model": there.as_json(), "provider": provider, "threads": threads, "quick": quick}
        return checked(
            device.run("-m", "ftkit_export.runtime.measure", json.dumps(job)),
            f"{where}, {bundle.name}",
        )


def _parse(where: str) -> tuple[str, str]:
    host, _, python = where.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]*", host):
        raise FtkitError(
            f"{where}: expected USER@HOST or USER@HOST:PYTHON, found another form. Try pi@camera.local"
        )
    if not re.fullmatch(r"[\w.~/+-]*", python):
        raise FtkitError(
            f"{where}: expected a path to python3 after the colon, found {python!r}. Try ~/venv/bin/python"
        )

    return host, python or "python3"


def _ssh(host: str, command: str, data: bytes = b"") -> bytes:
    try:
        done = subprocess.run(
            [*SSH, "--", host, command], input=data, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise FtkitError(
            "ssh: expected an OpenSSH client, found none. Try installing openssh-client"
        ) from None

    if done.returncode:
        said = (
            done.stderr.decode(errors="replace").strip().splitlines()
            or ["nothing on standard error"]
        )[-1]
        if said.startswith("error: "):  # an ftkit error message from the device
            raise FtkitError(f"{host}: {said.removeprefix('error: ')}")
        raise FtkitError(
            f"{host}: expected ssh, tar and a python3 with {NEEDED}, found: {said}. "
            f"Try `ssh {host} python3 --version`"
        )

    return done.stdout


def _last(output: bytes) -> Any:
    """Parse the JSON on the last line: a login script may print something before it."""
    last = output.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        return json.loads(last)
    except ValueError:
        raise FtkitError(
            f"ssh: expected JSON from the device, found {last[:80]!r}. Check its login scripts"
        ) from None


def _send(host: str, folder: str, files: Mapping[str, Path]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, dereference=True) as archive:
        for name, path in files.items():
            archive.add(path, arcname=name, recursive=False)
    _ssh(host, f"tar -xzf - -C {folder}", packed.getvalue())
