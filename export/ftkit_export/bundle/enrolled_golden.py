"""Golden vectors of a bundle that knows one more class: computed from the old ones, not from the new files.

    photographs, changed = extend_golden(bundle, folder, manifest, new, added)

What is expected of fp32 are the framework's outputs of the export, the class added in float64; int8 and
fp16 are judged against their own, as at export, after these have been compared with the old file's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.enroll import NewClass, joined
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.onnx_edit import tensor
from ftkit_export.runtime.out_of_distribution import unit_length
from ftkit_export.runtime.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.runtime.readout import softmax
from ftkit_export.runtime.session import Session

ROUNDING = 2e-6  # of a probability, in float32
RESIZED = 0.05  # of a probability: most that another resizer may move it, as at export
SAME = 1e-4  # between the new file's answer and the old file's with the class added in float64
AS_EXPORTED = "as_exported"  # in golden.json: an image's tolerance before anything was enrolled


def extend_golden(
    bundle: Path,
    folder: Path,
    manifest: dict[str, Any],
    new: NewClass,
    added: Sequence[Array],
) -> tuple[int, int]:
    """Compute the golden vectors anew, and add images (H, W, 3) uint8 of the new class.

    Returns how many golden photographs of old classes there are, and how many of them are answered
    otherwise. Raises BundleError where a new file does not answer as the old one, with the class added
    in float64.
    """
    place = folder / "golden"
    entries = json.loads((place / "golden.json").read_text())["images"]
    for entry in entries:
        if f"golden/{entry['file']}" not in manifest["files"]:
            raise ValueError(f"the golden image {entry['file']!r}")
    with np.load(place / "expected.npz", allow_pickle=False) as stored:
        expected = {name: stored[name].astype(np.float64) for name in stored.files}

    old = len(entries)
    photographs = [row for row, entry in enumerate(entries) if entry["group"] == "photographs"]
    for image in added:
        name = f"{len(entries):02d}.png"
        Image.fromarray(image).save(place / name)
        entries.append({"file": name, "group": "enrolled"})

    temperature = float(manifest["temperature"])
    written = _with_new(expected, new, temperature)
    resizers = np.zeros(old)
    for name, forms in manifest["variants"].items():
        before = _answers(bundle, place, manifest, forms, entries)
        after = _answers(folder, place, manifest, forms, entries)
        wanted = _require_same(name, before, after, new, temperature)
        if name == "fp32":
            by_core = softmax(wanted.logits / temperature)
            resizers = np.abs(by_core - wanted.probabilities).max(1)[:old]
            written["logits"] = np.vstack([written["logits"], wanted.logits[old:]])
            own = wanted.probabilities[old:]
            written["probabilities"] = np.vstack([written["probabilities"], own])
            written["embedding"] = np.vstack([expected["embedding"], before.by_core[old:]])
        else:  # judged against its own outputs, as when it was exported
            written[f"{name}/logits"] = after.logits
            written[f"{name}/probabilities"] = after.probabilities

    _widen(entries[:old], expected, new, temperature, resizers)
    for entry in entries[old:]:
        entry["tolerance"] = entries[photographs[0] if photographs else 0]["tolerance"]
    np.savez(place / "expected.npz", **written)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
    (place / "golden.json").write_text(json.dumps({"images": entries}, indent=1) + "\n")
    _extend_flat(folder, manifest, written, entries)

    answered = written["probabilities"].argmax(1)
    known = expected["probabilities"].argmax(1)
    return len(photographs), sum(int(answered[row] != known[row]) for row in photographs)


def _logits_with(logits: Array, log_odds: Array, temperature: float) -> Array:
    """(n, old classes) and (n,) -> (n, old classes + 1), in float64."""
    largest = logits.max(1)
    total = np.log(np.exp((logits - largest[:, None]) / temperature).sum(1))
    return np.hstack([logits, (largest + temperature * (total + log_odds))[:, None]])


def _with_new(expected: dict[str, Array], new: NewClass, temperature: float) -> dict[str, Array]:
    """The framework's logits and probabilities (n, old classes), with the new class in float64."""
    log_odds = new.log_odds_of(expected["embedding"])
    return {
        "logits": _logits_with(expected["logits"], log_odds, temperature),
        "probabilities": joined(expected["probabilities"], log_odds),
    }


def _widen(
    entries: Sequence[dict[str, Any]],
    expected: dict[str, Array],
    new: NewClass,
    temperature: float,
    resizers: Array,
) -> None:
    """Widen the tolerances of the export by what the new class adds to an image's rounding.

    The new logit is a sum of many terms, taken to be as wrong, relative to the largest value, as the
    old logits may be. resizers (n,): what another resizer moves a probability by, in the old files
    with the class added in float64; twice that is allowed, as at export. A further class widens no
    more than it needs itself.
    """
    terms = unit_length(expected["embedding"])[:, None] * new.weights  # (n, old classes, D)
    sums = temperature * np.sqrt((terms**2).sum(2)).max(1)
    largest = np.abs(expected["logits"]).max(1)
    for row, entry in enumerate(entries):
        exported = entry.setdefault(AS_EXPORTED, copy.deepcopy(entry["tolerance"]))
        for variant, limits in entry["tolerance"].items():
            for provider, limit in limits.items():
                own = exported[variant][provider]
                logits = own["logits"] * max(1.0, float(sums[row] / largest[row]))
                probabilities = own["probabilities"] + ROUNDING
                probabilities += (logits - own["logits"]) / temperature
                if variant == "fp32":
                    probabilities += 2 * min(float(resizers[row]), RESIZED)
                limit["logits"] = max(limit["logits"], logits)
                limit["probabilities"] = max(limit["probabilities"], probabilities)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """A variant's outputs for images, (n, ...) float64: of the core form on Pillow's pixels, with its
    embedding, and of the image form, with its own."""

    logits: Array
    by_core: Array
    probabilities: Array
    by_image: Array


def _answers(
    bundle: Path,
    place: Path,
    manifest: dict[str, Any],
    forms: dict[str, str],
    entries: Sequence[dict[str, Any]],
) -> _Answers:
    """What the variant of `bundle` answers to the golden images in the folder `place`."""
    preprocess = Preprocess(**manifest["preprocess"])
    image_form = Session(bundle / forms["file"])
    core = Session(bundle / forms["core"])
    rows: list[tuple[Array, ...]] = []
    for entry in entries:
        with Image.open(place / entry["file"]) as image:
            frame = to_frame(np.asarray(image.convert("RGB")), manifest["input_format"])
        canvas = preprocess.canvas(from_frame(frame, manifest["input_format"]))
        pixels = preprocess.pixels(canvas[None])
        rows.append(
            (
                *(each[0] for each in core.run(pixels)),
                *(each[0] for each in image_form.run(frame[None])),
            )
        )
    logits, by_core, probabilities, by_image = (
        np.stack([row[part] for row in rows]).astype(np.float64) for part in range(4)
    )
    return _Answers(logits=logits, by_core=by_core, probabilities=probabilities, by_image=by_image)


def _require_same(
    name: str, before: _Answers, after: _Answers, new: NewClass, temperature: float
) -> _Answers:
    """The old file's answers with the class added in float64.

    Raises BundleError where the new file does not give them.
    """
    wanted = _Answers(
        logits=_logits_with(before.logits, new.log_odds_of(before.by_core), temperature),
        by_core=before.by_core,
        probabilities=joined(before.probabilities, new.log_odds_of(before.by_image)),
        by_image=before.by_image,
    )
    size = max(1.0, float(np.abs(wanted.logits).max()))
    apart = max(
        float(np.abs(after.probabilities - wanted.probabilities).max()),
        float(np.abs(after.logits - wanted.logits).max()) / size,
    )
    if not apart <= SAME:
        raise BundleError(
            f"{name}: expected the old answers with the class added, found a file {apart:.2g} away from them. "
            "Do not use it, and report this"
        )
    return wanted


def _extend_flat(
    folder: Path,
    manifest: dict[str, Any],
    expected: dict[str, Array],
    entries: Sequence[dict[str, Any]],
) -> None:
    """Rewrite the vectors for C and C++, and those for onnxruntime_perf_test."""
    raw = folder / "golden" / "raw"
    chosen = manifest["chosen"]
    head, *lines = (raw / "index.txt").read_text().splitlines()
    picks = [int(line.split(".")[0]) for line in lines]
    images, classes, size, channels, _ = head.split()
    tolerances = [entries[row]["tolerance"] for row in picks]
    most = max(limits["fp32"]["cpu"]["logits"] for limits in tolerances)
    listed = [f"{images} {int(classes) + 1} {size} {channels} {most:.6g}"]
    for line, limits in zip(lines, tolerances, strict=True):
        allowed = limits[chosen].get("cpu", limits[chosen].get("any"))["probabilities"]
        listed.append(f"{line.rsplit(' ', 1)[0]} {allowed:.6g}")
    (raw / "index.txt").write_text("\n".join(listed) + "\n")
    own = "probabilities" if chosen == "fp32" else f"{chosen}/probabilities"
    (raw / "logits.f32").write_bytes(expected["logits"][picks].astype("<f4").tobytes())
    (raw / "probabilities.f32").write_bytes(expected[own][picks].astype("<f4").tobytes())

    path = folder / "golden" / entries[picks[0]]["file"]
    with Image.open(path) as image:
        frame = to_frame(np.asarray(image.convert("RGB")), manifest["input_format"])
    values = Session(folder / "model.onnx").run(frame[None])
    for number, (name, value) in enumerate(
        zip(("probabilities", "embedding"), values, strict=True)
    ):
        content = tensor(name, value.astype(np.float32))
        (folder / "test_data_set_0" / f"output_{number}.pb").write_bytes(content)
