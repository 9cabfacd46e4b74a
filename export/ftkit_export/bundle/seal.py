"""Seal a bundle: judge its gates, write the manifest with every file's hash, move it to its place.

    folder = begin_bundle(out)             # temporary; `out` appears complete, at the end
    ...                                    # evidence, then report
    seal(folder, out, manifest, gates)     # the manifest comes last

A bundle with a failed gate goes to BUNDLE.failed, one with an inconclusive gate to
BUNDLE.inconclusive, never to BUNDLE. Runs on a device too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftkit_export.bundle.archive import sign
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import finite, flush, folder_beside
from ftkit_export.runtime.verify import (
    MANIFEST,
    MANIFEST_SCHEMA,
    SIGNATURE,
    Outcome,
    sha256,
    with_digest,
)

WORST_FIRST: tuple[Outcome, ...] = ("failed", "inconclusive")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One judged quantity: passed when value <= limit.

    low, high: lowest and highest value over several processes; all must be within the limit. value
    is NaN where nothing was measured. unsettled: why a value beyond the limit is inconclusive, ""
    where it has failed.
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
    """failed if any gate failed, else inconclusive if any is, else passed."""
    verdicts = set(verdicts)
    return next((verdict for verdict in WORST_FIRST if verdict in verdicts), "passed")


def begin_bundle(out: Path) -> Path:
    """Create a temporary folder beside `out` to build in.

    Raises FtkitError when `out` is not empty or cannot be created.
    """
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


def seal(
    folder: Path,
    out: Path,
    manifest: Mapping[str, object],
    gates: Sequence[Gate],
    key: Path | None = None,
) -> Path:
    """Write the manifest with every file's hash, and move the folder to its final place.

    That is `out`, or `out`.failed or `out`.inconclusive, which replaces an older one of either
    kind. key: an Ed25519 private key that signs the manifest. Returns the final path.
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
        for name in WORST_FIRST:  # from an earlier export
            shutil.rmtree(out.with_name(f"{out.name}.{name}"), ignore_errors=True)

    folder.chmod(0o755)  # mkdtemp made it private
    flush(folder)
    folder.rename(final)
    flush(final.parent)

    return final


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write manifest.json: `manifest`, the hash of every file now in the folder, its own digest."""
    paths = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    files = {
        name: sha256(path)
        for name, path in sorted(paths.items())
        if name not in (MANIFEST, SIGNATURE)
    }
    told = finite({"schema": MANIFEST_SCHEMA, **manifest, "files": files})
    text = json.dumps(told, indent=1, allow_nan=False) + "\n"
    (folder / MANIFEST).write_bytes(with_digest(text))
