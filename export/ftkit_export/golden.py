"""Golden vectors: real images and formula-made ones, with the framework's float64 answers and a tolerance each.

BUNDLE/golden/NN.png          lossless RGB images
BUNDLE/golden/expected.npz    float64: logits (core form, Pillow's pixels); probabilities, embedding (image form)
BUNDLE/golden/golden.json     for each image its group and the tolerance of logits and of probabilities
BUNDLE/test_data_set_0/*.pb   the first image as ONNX tensors, as onnxruntime_perf_test and onnx's own runner read them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from PIL import Image

from ftkit_export.graph import pixel_model
from ftkit_export.parity import RELATIVE, Reference, edge_images, softmax, tolerance
from ftkit_export.preprocess import Preprocess
from ftkit_export.session import Session

Array = np.ndarray[Any, Any]

PHOTOGRAPHS = 16


def write_golden(
    bundle: Path, reference: Reference, photographs: Sequence[Array], preprocess: Preprocess, temperature: float
) -> None:
    """Write golden/ and test_data_set_0/ into `bundle`.

    photographs: held-out images (H, W, 3) uint8; the first 16 are kept. The probabilities' tolerance adds twice what
    the two legitimate resizers (Pillow's and the graph's, at most 1 grey level apart) make of the same image.
    """
    folder = bundle / "golden"
    folder.mkdir()
    pixel_session = Session(pixel_model(preprocess).SerializeToString())
    entries: list[dict[str, object]] = []
    expected: dict[str, list[Array]] = {"logits": [], "probabilities": [], "embedding": []}
    for group, images in {"photographs": list(photographs[:PHOTOGRAPHS]), **edge_images(preprocess.size)}.items():
        pillow = preprocess.pixels(np.stack([preprocess.canvas(item) for item in images]))
        graph = np.concatenate([pixel_session.run(item[None])[1] for item in images])
        logits64 = reference.logits(pillow, torch.float64)
        graph64, embedding = _with_embedding(reference, graph)
        limits = {name: tolerance(reference.logits(pillow, torch.float32), logits64, name)[0] for name in RELATIVE}
        resizers = 2 * np.abs(softmax(logits64 / temperature) - softmax(graph64 / temperature)).max()
        for item in images:
            name = f"{len(entries):02d}.png"
            Image.fromarray(item).save(folder / name, optimize=True)
            allowed = {
                key: {"logits": limit, "probabilities": limit / temperature + float(resizers)}
                for key, limit in limits.items()
            }
            entries.append({"file": name, "group": group, "tolerance": allowed})
        expected["logits"].append(logits64)
        expected["embedding"].append(embedding)
        expected["probabilities"].append(softmax(graph64 / temperature))
    arrays = {key: np.concatenate(parts) for key, parts in expected.items()}
    np.savez(folder / "expected.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
    (folder / "golden.json").write_text(json.dumps({"images": entries}, indent=1) + "\n")
    _write_test_data(bundle / "test_data_set_0", photographs[0], arrays)


def _with_embedding(reference: Reference, pixels: Array) -> tuple[Array, Array]:
    """float64 logits (N, classes), and what enters the last linear layer (N, features)."""
    seen: list[torch.Tensor] = []
    linear = [m for m in reference.float64.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
    hook = linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        logits = reference.logits(pixels, torch.float64)
    finally:
        hook.remove()
    embedding = torch.cat(seen)
    return logits, (embedding.mean((2, 3)) if embedding.ndim == 4 else embedding).numpy()


def _write_test_data(folder: Path, image: Array, expected: dict[str, Array]) -> None:
    folder.mkdir()
    tensors = {
        "input_0.pb": (image[None], "image"),
        "output_0.pb": (expected["probabilities"][:1].astype(np.float32), "probabilities"),
        "output_1.pb": (expected["embedding"][:1].astype(np.float32), "embedding"),
    }
    for file, (array, name) in tensors.items():
        (folder / file).write_bytes(numpy_helper.from_array(array, name).SerializeToString())
