"""Hand-off to other compilers (TensorRT, OpenVINO, Hailo, RKNN), and judgement of their outputs.

BUNDLE/handoff/core.onnx          the fp32 core form with a fixed batch of 1: pixels (1, 3, S, S) -> logits, embedding
BUNDLE/handoff/calibration/*.npy  preprocessed training images, float32 (1, 3, S, S)
BUNDLE/handoff/inputs.npy         preprocessed val images, float32 (n, 3, S, S), to be run
BUNDLE/handoff/expected.npz       fp32 logits, labels and groups

    judged = judge_outputs(bundle, "outputs.npz")      # `logits` (n, classes), in the order of inputs.npy
    judged.verdict                                     # accepted, refused, inconclusive
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.proof.decision import Paired, Verdict, paired
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import BundleError, FtkitError

IMAGES = 256  # val images at most: 0.6 MB each at 224 pixels


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Another compiler's outputs compared with fp32's, on val.

    paired: accuracy comparison; cosine: lowest cosine similarity of the logits; top1_changed:
    number of images.
    """

    paired: Paired
    accuracy: float
    accuracy_fp32: float
    cosine: float
    top1_changed: int
    verdict: Verdict


def write_handoff(
    folder: Path,
    static_core: Any,
    calibration: Array,
    inputs: Array,
    logits: Array,
    labels: Array,
    groups: Sequence[str],
) -> None:
    """Write the hand-off folder.

    calibration (m, 3, S, S), inputs (n, 3, S, S) float32; logits (n, classes) of fp32; labels (n,);
    groups: n names, stored as numbers, "" as -1.
    """
    import onnx

    (folder / "calibration").mkdir(parents=True)
    onnx.save(static_core, folder / "core.onnx")

    for number, item in enumerate(calibration):
        np.save(folder / "calibration" / f"{number:03d}.npy", item[None])

    np.save(folder / "inputs.npy", inputs)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(filter(None, groups)))}
    np.savez(
        folder / "expected.npz",
        logits=logits,
        labels=labels,
        groups=np.array([numbers.get(name, -1) for name in groups], np.int64),
    )


def judge_outputs(bundle: Path, outputs: Path, limit: float) -> Judged:
    """Judge another compiler's outputs, an .npz file with `logits`.

    limit: accepted accuracy drop. Raises BundleError for a bundle without hand-off, FtkitError for
    outputs that do not match it.
    """
    path = bundle / "handoff" / "expected.npz"
    if not path.is_file():
        raise BundleError(
            f"{path}: expected a hand-off in this bundle, found none. Try `ftkit export RUN --handoff`"
        )

    with np.load(path, allow_pickle=False) as stored:
        expected = stored["logits"].astype(np.float64)
        labels = stored["labels"]
        groups = ["" if number < 0 else str(number) for number in stored["groups"]]

    try:
        with np.load(outputs, allow_pickle=False) as stored:
            logits = np.asarray(stored["logits"], np.float64).reshape(len(stored["logits"]), -1)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error, zipfile.BadZipFile):
        raise FtkitError(
            f"{outputs}: expected an .npz with an array `logits`, found none. Try numpy.savez"
        ) from None

    if logits.shape != expected.shape:
        raise FtkitError(
            f"{outputs}: expected logits of shape {expected.shape}, in the order of handoff/inputs.npy, "
            f"found {logits.shape}. Run every input"
        )

    right = expected.argmax(1) == labels
    answered = logits.argmax(1) == labels
    compared = paired(right, answered & np.isfinite(logits).all(1), groups)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(logits, axis=1)

    return Judged(
        paired=compared,
        accuracy=float(answered.mean()),
        accuracy_fp32=float(right.mean()),
        cosine=float(((expected * logits).sum(1) / np.maximum(lengths, 1e-30)).min()),
        top1_changed=int((expected.argmax(1) != logits.argmax(1)).sum()),
        verdict=compared.verdict(limit),
    )
