"""Verify a bundle on any machine, without the training framework: hashes, then golden vectors.

    result = verify("bundle", provider="cpu")
    result.passed; result.checks

A missing, changed or extra file, or a manifest with a newer schema, raises BundleError naming the
file. A golden vector out of tolerance, or a sealed gate that had failed, fails the verification.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.preprocess import Preprocess, decode, from_frame, to_frame
from ftkit_export.runtime.readout import KEY, Labels, OneClass, Readout, readout_of
from ftkit_export.runtime.session import PROVIDERS, Session

# 4: frame size at which latency is judged; 3: the manifest contains its own digest
MANIFEST_SCHEMA = 4
MANIFEST = "manifest.json"
DIGEST_KEY = '"digest": '
NO_DIGEST = "0" * 64
SIGNATURE = "manifest.sig"  # signs the manifest, so not listed in it
EVIDENCE = "evidence"  # added to a copy by other machines

# Raised where a manifest or golden vectors, with hashes that match, do not fit each other
MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError, zipfile.BadZipFile)

Outcome = Literal["passed", "failed", "inconclusive"]  # of a gate


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """Result of the golden images of one form on one provider; the worst image decides.

    file, value: the worst image, and its max |difference| in units of its tolerance. top1_equal:
    images of which the same is decided: the class, or which labels apply. top1_wrong: images of which
    something else is, although no tie within the tolerance explains it.
    """

    name: str
    file: str
    value: float
    max_abs_error: float
    images: int
    top1_equal: int
    top1_wrong: int

    @property
    def passed(self) -> bool:
        """True when every image is within tolerance and none is top1_wrong; False also for NaN."""
        return bool(self.value <= 1.0) and not self.top1_wrong


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of a verification.

    files: number of hashes compared; failed_gates: sealed gates that had failed, as text;
    placement: where the operators ran, as text, without duplicates (session.Session.placement).
    """

    provider: str
    files: int
    checks: tuple[GoldenCheck, ...]
    failed_gates: tuple[str, ...]
    placement: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True when every golden check passed and no sealed gate had failed."""
        return not self.failed_gates and all(check.passed for check in self.checks)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):  # hashlib.file_digest is not in every device's Python
            digest.update(part)
    return digest.hexdigest()


def with_digest(text: str) -> bytes:
    """Put a JSON object's own digest into it.

    SHA-256 of these very bytes, with zeros in place of the digest.
    """
    data = text.replace("{", "{\n " + DIGEST_KEY + '"' + NO_DIGEST + '",', 1).encode()
    return data.replace(NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def is_whole(data: bytes) -> bool:
    """Whether the digest from `with_digest` matches the bytes."""
    head = ("{\n " + DIGEST_KEY + '"').encode()
    digest = data[len(head) : len(head) + len(NO_DIGEST)]
    blank = head + NO_DIGEST.encode() + data[len(head) + len(NO_DIGEST) :]
    return data.startswith(head) and hashlib.sha256(blank).hexdigest().encode() == digest


def read_manifest(bundle: str | Path) -> dict[str, Any]:
    """Read the manifest of a bundle.

    Raises BundleError if it is missing, altered, of another schema, or lacks gates, variants or
    their files.
    """
    path = Path(bundle) / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{bundle}: expected a bundle, found no {MANIFEST}. Try `ftkit export RUN`"
        )

    data = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(data)
        schema = manifest["schema"]
        files = manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(
            f"{path}: expected a manifest, found unreadable JSON. Export the bundle again"
        ) from None

    if not isinstance(schema, int) or schema != MANIFEST_SCHEMA:
        older = isinstance(schema, int) and schema < MANIFEST_SCHEMA
        cure = "Export the run again" if older else "Try a newer ftkit"
        raise BundleError(f"{path}: expected schema {MANIFEST_SCHEMA}, found {schema}. {cure}")

    if not is_whole(data):
        raise BundleError(
            f"{path}: expected the digest that it carries to be its own, found another. Copy it again"
        )

    named = _variant_files(path, manifest)
    for name in (*files, *named):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BundleError(
                f"{path}: expected names inside the bundle, found {name!r}. Do not trust this bundle"
            )

    return manifest


def _variant_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Files of every variant.

    Raises BundleError for a manifest without gates, variants or their files.
    """
    try:
        named = [pair[form] for pair in manifest["variants"].values() for form in ("file", "core")]
        whole = (
            manifest["variants"][manifest["chosen"]]["file"] == "model.onnx"
            and {"input_format", "preprocess", "limits", "run"} <= set(manifest)
            and set(named) <= set(manifest["files"].keys())
            and all(isinstance(digest, str) for digest in manifest["files"].values())
            and [gate["passed"] for gate in manifest["gates"]] != []
        )
    except (KeyError, TypeError, AttributeError):
        whole = False

    if not whole:
        raise BundleError(
            f"{path}: expected gates, variants and the files they name, found a manifest without. "
            "Export the bundle again"
        )

    return named


def check_files(bundle: Path, files: dict[str, str]) -> None:
    """Check that every listed file is there, unchanged, and that there is no other file.

    Raises BundleError naming the first offender.
    """
    present = {
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() or path.is_symlink()
    }
    present -= {MANIFEST, SIGNATURE}

    present = {
        name for name in present if not (name.startswith(f"{EVIDENCE}/") and name.endswith(".json"))
    }
    for name in sorted(set(files) - present):
        raise _missing(bundle / name)
    for name in sorted(present - set(files)):
        raise BundleError(
            f"{bundle / name}: expected only files the manifest lists, found this one. Remove it"
        )

    check_listed(bundle, files)


def check_listed(bundle: Path, files: dict[str, str]) -> None:
    """Check that every listed file is there and unchanged. Raises BundleError naming the first that is
    not."""
    for name, digest in sorted(files.items()):
        if (bundle / name).is_symlink():
            raise BundleError(
                f"{bundle / name}: expected a plain file, found a link. Copy the bundle again"
            )
        if not (bundle / name).exists():
            raise _missing(bundle / name)
        if sha256(bundle / name) != digest:
            raise BundleError(
                f"{bundle / name}: expected sha256 {digest[:12]}…, found another. Copy the bundle again"
            )


def _missing(path: Path) -> BundleError:
    return BundleError(f"{path}: expected this file, found it missing. Copy the bundle again")


def replay_golden(
    bundle: Path, manifest: dict[str, Any], provider: str
) -> tuple[tuple[GoldenCheck, ...], tuple[str, ...]]:
    """Run both forms of every variant on every golden image.

    The image form runs end to end, the core form on Pillow's pixels. Returns the checks, and where
    the operators ran.
    """
    entries = json.loads((bundle / "golden" / "golden.json").read_text())["images"]
    for entry in entries:
        if f"golden/{entry['file']}" not in manifest["files"]:
            raise BundleError(
                f"{bundle}: expected golden images of its own, found {entry['file']!r}. Do not trust it"
            )

    with np.load(bundle / "golden" / "expected.npz", allow_pickle=False) as stored:
        expected = {name: stored[name] for name in stored.files}

    input_format = manifest["input_format"]
    preprocess = Preprocess(**manifest["preprocess"])
    readout = readout_of(manifest[KEY]) if KEY in manifest else OneClass()
    frames = [
        to_frame(decode(bundle / "golden" / entry["file"]), input_format) for entry in entries
    ]
    pixels = [
        preprocess.pixels(preprocess.canvas(from_frame(frame, input_format))[None])
        for frame in frames
    ]

    checks = []
    placements = []
    for variant, files in manifest["variants"].items():
        forms = [
            ("probabilities", files["file"], [frame[None] for frame in frames]),
            ("logits", files["core"], pixels),
        ]
        for form, file, inputs in forms if PROVIDERS[provider].form == "image" else forms[1:]:
            session = Session(bundle / file, provider=provider)
            placements.append(session.placement)
            outputs = [session.run(item)[0][0] for item in inputs]
            key = form if variant == "fp32" else f"{variant}/{form}"
            unit = readout.unit if form == "probabilities" else 1.0
            limits = [_limit(entry["tolerance"][variant], provider)[form] for entry in entries]
            checks.append(
                _compare(
                    f"{variant} {readout.output if form == 'probabilities' else form}",
                    entries,
                    [output / unit for output in outputs],
                    expected[key] / unit,
                    np.array(limits),
                    partial(_decided, readout, form),
                )
            )

    return tuple(checks), tuple(dict.fromkeys(placements))


def _limit(tolerance: dict[str, Any], provider: str) -> dict[str, float]:
    if "any" in tolerance:
        return dict(tolerance["any"])
    precision = PROVIDERS[provider].precision
    return dict(tolerance[precision] if precision else tolerance.get(provider) or tolerance["cuda"])


def _compare(
    name: str,
    entries: list[dict[str, Any]],
    actual: list[Array],
    expected: Array,
    limits: Array,
    decided: Callable[[Array, Array, Array], tuple[Array, Array]],
) -> GoldenCheck:
    errors = np.array([np.abs(a - b).max() for a, b in zip(actual, expected, strict=True)])
    worst = int(np.nan_to_num(errors / limits, nan=np.inf).argmax())
    found = np.stack(actual)
    equal, clear = decided(found, expected, limits)

    return GoldenCheck(
        name=name,
        file=entries[worst]["file"],
        value=float(errors[worst] / limits[worst]),
        max_abs_error=float(errors[worst]),
        images=len(entries),
        top1_equal=int(equal.sum()),
        top1_wrong=int((~equal & clear).sum()),
    )


def _decided(
    readout: Readout, form: str, actual: Array, expected: Array, limits: Array
) -> tuple[Array, Array]:
    """(whether each image's decisions are equal, whether no tie excuses another one), (N,) bool each."""
    if not readout.decided:
        return np.ones(len(actual), bool), np.zeros(len(actual), bool)
    if isinstance(readout, Labels):
        cuts = readout.thresholds if form == "probabilities" else readout.cuts
        apart = np.abs(expected - cuts)
        differ = (actual >= cuts) != (expected >= cuts)
        return ~differ.any(1), (differ & (apart > limits[:, None])).any(1)

    equal = actual.argmax(1) == expected.argmax(1)
    if expected.shape[1] == 1:
        return equal, np.zeros(len(actual), bool)
    best = np.sort(expected, axis=1)
    return equal, best[:, -1] - best[:, -2] > limits


def _measured(gate: dict[str, Any]) -> str:
    """A gate's value, and its range where it has one: the highest value decides."""
    if gate.get("high") is None:
        return str(gate["value"])
    return f"{gate['value']:.4g} [{gate['low']:.4g} to {gate['high']:.4g}]"


def verify(bundle: str | Path, provider: str = "cpu") -> Verification:
    """Verify the hashes, golden vectors and sealed gates of `bundle` on `provider` of this machine.

    Raises BundleError for a file that is missing, changed or extra, ProviderError as Session.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    check_files(folder, manifest["files"])

    try:
        checks, placement = replay_golden(folder, manifest, provider)
    except MALFORMED as error:
        raise BundleError(
            f"{folder}: expected golden vectors that fit its manifest, found others ({error}). "
            "Do not trust this bundle"
        ) from None

    failed = tuple(
        f"{gate['name']}: {_measured(gate)} (limit {gate['limit']})"
        for gate in manifest["gates"]
        if not gate["passed"]
    )

    return Verification(
        provider=provider,
        files=len(manifest["files"]),
        checks=checks,
        failed_gates=failed,
        placement=placement,
    )
