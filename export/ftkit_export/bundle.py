"""Write a bundle: a folder that carries the model, its evidence, and what proves both on a device.

    folder = begin(out)                    # beside `out`: BUNDLE appears at the end, whole, or not at all
    ...                                    # evidence, then report
    seal(folder, out, manifest, gates)     # the manifest comes last

A bundle whose gate failed goes to BUNDLE.failed, never to BUNDLE.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftkit_export.errors import FtkitError
from ftkit_export.verify import MANIFEST, SCHEMA, sha256

# What the Python runner needs of this package: these files import numpy, Pillow and ONNX Runtime only.
RUNNER_FILES = ("__init__.py", "errors.py", "preprocess.py", "session.py", "foreign.py", "predict.py", "verify.py",
                "onnxfile.py", "latency.py")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One judged quantity: passed when value <= limit."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return bool(self.value <= self.limit)

    def as_dict(self) -> dict[str, Any]:
        """Fields and verdict, for the manifest."""
        return {**asdict(self), "passed": self.passed}


def begin(out: Path) -> Path:
    """A fresh folder beside `out` to build in. Raises FtkitError when `out` holds anything or cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FtkitError(f"{out}: expected a new folder, found one there already. Try another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise FtkitError(f"{out}: expected a place to write to, found {error.strerror}. Try another --out") from None


def add_runner(folder: Path) -> None:
    """Copy the Python runner into device/: classify.py and the part of this package that it imports."""
    here = Path(__file__).parent
    package = folder / "device" / "ftkit_export"
    package.mkdir(parents=True)
    for name in RUNNER_FILES:
        shutil.copyfile(here / name, package / name)
    shutil.copyfile(here / "device" / "classify.py", folder / "device" / "classify.py")


def machine() -> dict[str, object]:
    """What the evidence was measured on: processor, cores, system, Python, ONNX Runtime."""
    import onnxruntime

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def seal(folder: Path, out: Path, manifest: Mapping[str, object], gates: Sequence[Gate]) -> Path:
    """Write the manifest with every file's hash, and move the folder to `out`, or to `out`.failed when a gate failed.

    Returns where it went. An older `out`.failed is replaced.
    """
    passed = all(gate.passed for gate in gates)
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}
    whole = {
        "schema": SCHEMA,
        "verdict": "passed" if passed else "failed",
        **manifest,
        "gates": [gate.as_dict() for gate in gates],
        "files": dict(sorted(files.items())),
    }
    path = folder / MANIFEST
    with path.open("w") as file:
        file.write(json.dumps(whole, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    final = out if passed else out.with_name(out.name + ".failed")
    if final.exists() and not passed:
        shutil.rmtree(final)
    folder.chmod(0o755)  # mkdtemp made it private
    folder.rename(final)
    return final
