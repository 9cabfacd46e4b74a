"""Golden vectors: real and synthetic images, with each variant's expected outputs and tolerances.

    BUNDLE/golden/NN.png          lossless RGB images
    BUNDLE/golden/expected.npz    logits, answers (as "probabilities") and embedding on Pillow's pixels, float64
    BUNDLE/golden/golden.json     each image's group, and the tolerances of its outputs per variant
    BUNDLE/golden/raw/            some of them as flat files for C and C++ (see index.txt)
    BUNDLE/test_data_set_0/*.pb   the first image as ONNX tensors, for onnxruntime_perf_test

fp32 is compared with the framework in float64. int8 and fp16 are compared with their own outputs on
the machine that accepted them: their distance from float64 is judged by the accuracy decision, and
instruction sets differ by a rounding step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image

from ftkit_export.conversion.graph import pixel_model
from ftkit_export.proof.parity import (
    RELATIVE,
    Reference,
    edge_images,
    moved_by_resampling,
    resampled,
    rounding_limit,
    tolerance,
)
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.runtime.readout import Readout
from ftkit_export.runtime.session import Session

PHOTOGRAPHS = 16
PRECISIONS = ("tf32", "fp16")  # to which a provider may round fp32's values
# Int8, fp16: of the largest logit, and of a probability: several rounding steps
ROUNDING_STEPS = 0.05
RAW = {"photographs": 4, "noise": 0, "extremes": 4}  # per group, for C and C++: small images


def write_golden(
    bundle: Path,
    reference: Reference,
    photographs: Sequence[Array],
    preprocess: Preprocess,
    readout: Readout,
    files: Mapping[str, tuple[Path, Path]],
    input_format: str = "rgb",
) -> None:
    """Write golden/ and test_data_set_0/ into `bundle`.

    photographs: held-out images (H, W, 3) uint8, of which the first 16 are used; if empty, only
    synthetic images remain. files: variant -> (image form, core form). fp32's expected outputs are
    the framework's, on Pillow's pixels. The tolerance of its answers, in the readout's units, includes
    twice the effect of another resizer's rounding (parity.resampled), capped at parity's bound for it.
    """
    folder = bundle / "golden"
    folder.mkdir()
    groups = {"photographs": list(photographs[:PHOTOGRAPHS]), **edge_images(preprocess.size)}
    groups = {group: images for group, images in groups.items() if images}
    sessions = {
        name: (Session(image), Session(core))
        for name, (image, core) in files.items()
        if name != "fp32"
    }
    resizer = Session(pixel_model(preprocess, input_format).SerializeToString())
    entries: list[dict[str, Any]] = []
    expected: dict[str, list[Array]] = {"logits": [], "probabilities": [], "embedding": []}

    for group, images in groups.items():
        frames = [to_frame(item, input_format) for item in images]
        canvases = np.stack([preprocess.canvas(from_frame(item, input_format)) for item in frames])
        pixels = preprocess.pixels(canvases)
        logits, embedding = reference.answers(pixels, torch.float64)
        expected["logits"].append(logits)
        expected["embedding"].append(embedding)
        expected["probabilities"].append(readout.answers(logits))

        resized = np.concatenate([resizer.run(item[None])[1] for item in frames])
        rounded = resampled(resized, canvases, preprocess)
        slack = min(moved_by_resampling(reference, readout, pixels, rounded))
        allowed = {"fp32": _fp32_tolerance(reference, pixels, logits, readout, slack)}

        for name, (image_session, core_session) in sessions.items():
            own = _run_each(core_session, pixels)
            expected.setdefault(f"{name}/logits", []).append(own)
            expected.setdefault(f"{name}/probabilities", []).append(
                _run_each(image_session, frames)
            )
            limit = ROUNDING_STEPS * float(np.abs(own).max())
            allowed[name] = {"any": {"logits": limit, "probabilities": ROUNDING_STEPS}}

        for item in images:
            name = f"{len(entries):02d}.png"
            Image.fromarray(item).save(folder / name)
            entries.append({"file": name, "group": group, "tolerance": allowed})

    arrays = {key: np.concatenate(parts) for key, parts in expected.items()}
    np.savez(folder / "expected.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
    (folder / "golden.json").write_text(json.dumps({"images": entries}, indent=1) + "\n")


def _fp32_tolerance(
    reference: Reference, pixels: Array, logits: Array, readout: Readout, slack: float
) -> dict[str, dict[str, float]]:
    """Provider or precision -> tolerances of its outputs against float64 `logits` (n, K).

    slack: change of an answer by another resizer's rounding.
    """
    logits32 = reference.logits(pixels, torch.float32)
    limits = {name: tolerance(logits32, logits, name)[0] for name in RELATIVE}
    largest = float(np.abs(logits).max())
    limits |= {
        name: rounding_limit(reference.rounding(pixels, name), largest) for name in PRECISIONS
    }
    return {
        name: {
            "logits": limit,
            "probabilities": readout.answer_limit(limit) + 2 * slack,
        }
        for name, limit in limits.items()
    }


def _run_each(session: Session, inputs: Iterable[Array]) -> Array:
    """The first output for each input, run one by one: (n, classes) float64."""
    return np.concatenate([session.run(item[None])[0] for item in inputs]).astype(np.float64)


def write_flat(
    bundle: Path, chosen: str, preprocess: Preprocess, readout: Readout, input_format: str
) -> None:
    """Write golden/raw/ and test_data_set_0/ from golden/, for the variant that became model.onnx.

    golden/raw/index.txt: a line `images classes size channels tolerance_of_logits`, then one line
    per image: file, rows, columns, tolerance of its probabilities. NN.raw: the frame's bytes.
    pixels.f32 (images, 3, size, size), logits.f32 and probabilities.f32 (images, classes):
    little-endian float32; the logits are those of the fp32 core form.
    """
    folder = bundle / "golden"
    raw = bundle / "golden" / "raw"
    entries = json.loads((folder / "golden.json").read_text())["images"]

    with np.load(folder / "expected.npz", allow_pickle=False) as stored:
        logits = stored["logits"]
        probabilities = stored["probabilities" if chosen == "fp32" else f"{chosen}/probabilities"]

    groups = [entry["group"] for entry in entries]
    picks = [i for i, group in enumerate(groups) if i - groups.index(group) < RAW[group]]
    raw.mkdir()

    frames = []
    lines = []
    for row in picks:
        frame = to_frame(np.asarray(Image.open(folder / entries[row]["file"])), input_format)
        frames.append(frame)
        allowed = entries[row]["tolerance"][chosen]
        limit = allowed.get("cpu", allowed.get("any"))["probabilities"]
        (raw / f"{row:02d}.raw").write_bytes(frame.tobytes())
        lines.append(f"{row:02d}.raw {frame.shape[0]} {frame.shape[1]} {limit:.6g}")

    pixels = preprocess.pixels(
        np.stack([preprocess.canvas(from_frame(frame, input_format)) for frame in frames])
    )
    limit = max(entries[row]["tolerance"]["fp32"]["cpu"]["logits"] for row in picks)
    head = f"{len(picks)} {logits.shape[1]} {preprocess.size} {frames[0].shape[2]} {limit:.6g}"
    (raw / "index.txt").write_text("\n".join([head, *lines]) + "\n")

    for name, array in (
        ("pixels", pixels),
        ("logits", logits[picks]),
        ("probabilities", probabilities[picks]),
    ):
        (raw / f"{name}.f32").write_bytes(array.astype("<f4").tobytes())

    (answers,) = zip(*Session(bundle / "model.onnx").run(frames[0][None]), strict=True)
    _write_test_data(bundle / "test_data_set_0", frames[0], readout.output, *answers)


def _write_test_data(
    folder: Path, frame: Array, output: str, answers: Array, embedding: Array
) -> None:
    folder.mkdir()
    tensors = {
        "input_0.pb": (frame[None], "image"),
        "output_0.pb": (answers[None].astype(np.float32), output),
        "output_1.pb": (embedding[None].astype(np.float32), "embedding"),
    }
    for file, (array, name) in tensors.items():
        tensor: onnx.TensorProto = numpy_helper.from_array(array, name)
        (folder / file).write_bytes(tensor.SerializeToString())
