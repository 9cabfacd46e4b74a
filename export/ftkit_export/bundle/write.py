"""Write a bundle: a folder that carries the model, its evidence, and what proves both on a device.

    folder = begin(out)                    # beside `out`: BUNDLE appears at the end, whole, or not at all
    ...                                    # evidence, then report
    seal(folder, out, manifest, gates)     # the manifest comes last

A bundle whose gate failed goes to BUNDLE.failed, one with a gate that could not be settled to
BUNDLE.inconclusive; neither ever to BUNDLE.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ftkit_export
from ftkit_export.bundle.archive import sign
from ftkit_export.files import folder_beside
from ftkit_export.proof.regression import Outcome
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.verify import MANIFEST, MANIFEST_SCHEMA, SIGNATURE, sha256, with_digest

WORST_FIRST: tuple[Outcome, ...] = ("failed", "inconclusive")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One judged quantity: passed when value <= limit.

    low, high: of one measured in several processes, the least and the largest value: all must be
    within. value is NaN where nothing was measured. unsettled: why a value beyond the limit is not
    the last word, "" where it is.
    """

    name: str
    value: float
    limit: float
    low: float | None = None
    high: float | None = None
    unsettled: str = ""

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return bool((self.value if self.high is None else self.high) <= self.limit)

    @property
    def verdict(self) -> Outcome:
        """passed, failed or inconclusive."""
        if self.passed:
            return "passed"
        within = self.low is not None and self.low <= self.limit
        return "inconclusive" if within or self.unsettled else "failed"

    def __str__(self) -> str:
        spread = (
            "" if self.low is None or self.high is None else f" [{self.low:.4g} to {self.high:.4g}]"
        )
        return f"{self.name}: {self.value:.4g}{spread}, limit {self.limit:.4g}"

    def as_dict(self) -> dict[str, Any]:
        """Fields and verdict, for the manifest."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}


def overall(verdicts: Iterable[Outcome]) -> Outcome:
    """failed where one gate failed, else inconclusive where one is, else passed."""
    verdicts = set(verdicts)
    return next((verdict for verdict in WORST_FIRST if verdict in verdicts), "passed")


def begin_bundle(out: Path) -> Path:
    """A fresh folder beside `out` to build in. Raises FtkitError when `out` holds anything or
    cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FtkitError(
            f"{out}: expected a new folder, found one there already. Try another --out, or remove it"
        )

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return folder_beside(out)
    except OSError as error:
        raise FtkitError(
            f"{out}: expected a place to write to, found {error.strerror}. Try another --out"
        ) from None


PACKAGE = Path(ftkit_export.__file__).parent


def runtime_files() -> list[str]:
    """What runs on a device, below the package's folder: numpy, Pillow and ONNX Runtime suffice for
    it."""
    return [
        "__init__.py",
        *(f"runtime/{path.name}" for path in sorted((PACKAGE / "runtime").glob("*.py"))),
    ]


def add_runners(folder: Path) -> None:
    """Copy the runners into device/: classify.py with the part of this package that it imports, and
    cpp/."""
    package = folder / "device" / "ftkit_export"
    (package / "runtime").mkdir(parents=True)
    for name in runtime_files():
        shutil.copyfile(PACKAGE / name, package / name)
    shutil.copyfile(PACKAGE / "device" / "classify.py", folder / "device" / "classify.py")
    shutil.copytree(PACKAGE / "device" / "cpp", folder / "device" / "cpp")


def seal(
    folder: Path,
    out: Path,
    manifest: Mapping[str, object],
    gates: Sequence[Gate],
    key: Path | None = None,
) -> Path:
    """Write the manifest with every file's hash, and move the folder to `out`, or to `out`.failed
    or .inconclusive.

    key: an Ed25519 private key that signs the manifest. Returns where it went. An older one of the
    latter is replaced.
    """
    verdict = overall(gate.verdict for gate in gates)
    write_manifest(
        folder, {"verdict": verdict, **manifest, "gates": [gate.as_dict() for gate in gates]}
    )

    if key:
        sign(folder, key)
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)

    final = out
    if verdict != "passed":
        final = out.with_name(f"{out.name}.{verdict}")
        for name in WORST_FIRST:  # an earlier export's
            shutil.rmtree(out.with_name(f"{out.name}.{name}"), ignore_errors=True)

    folder.chmod(0o755)  # mkdtemp made it private
    flush(folder)
    folder.rename(final)
    flush(final.parent)

    return final


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write manifest.json: `manifest`, with the hash of every file that lies in the folder now, and
    its own digest."""
    paths = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    files = {
        name: sha256(path)
        for name, path in sorted(paths.items())
        if name not in (MANIFEST, SIGNATURE)
    }
    text = json.dumps({"schema": MANIFEST_SCHEMA, **manifest, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_bytes(with_digest(text))


def flush(path: Path) -> None:
    """Onto the disk, so that a power cut after the rename leaves no empty files; a folder's own
    entries likewise."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on Windows
        return

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
