"""One image on its way through a bundle: shapes, parameters, where each part was trained, times.

print(trace_image(Path("bundle"), "photo.jpg"))
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.utils import Extractor

from ftkit.utils import console
from ftkit_export.conversion.graph import pixel_model
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.predict import (
    AnyModel,
    MultiLabelPrediction,
    Prediction,
    RegressionPrediction,
    load_model,
)
from ftkit_export.runtime.preprocess import to_frame
from ftkit_export.runtime.readout import NEVER, Labels, OneClass, Values
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.verify import read_manifest

TIMED_RUNS = 15
SHOWN = 3  # classes or labels at the end


def trace_image(folder: Path, image: str | Path | bytes) -> str:
    """The steps of a bundle for one image, as lines of text.

    Times are medians on one thread: of the parts in float32, and of the file that ships. A part
    that cannot be cut out of the graph has none. Raises ImageError for a bad file.
    """
    manifest = read_manifest(folder)
    model = load_model(folder)
    picture = model.decode(image)
    frame = to_frame(picture, model.input_format)
    preprocess = model.preprocess
    pixels = preprocess.pixels(preprocess.canvas(picture)[None])
    resizer = Session(pixel_model(preprocess, model.input_format).SerializeToString(), threads=1)

    rows = [("step", "output", "parameters", "trained in", "ms")]
    rows.append(("image", _shape(picture), "", "", _ms(lambda: model.decode(image))))
    rows.append(("preprocess", _shape(pixels[0]), "", "", _ms(lambda: resizer.run(frame[None]))))
    times = _times(folder / manifest["variants"]["fp32"]["core"], manifest["pipeline"], pixels)
    for part, ms in zip(manifest["pipeline"], times, strict=True):
        first, last = part["blocks"][0], part["blocks"][-1]
        blocks = first if first == last else f"{first} to {last}"
        stages = ", ".join(part["stages"]) or "pretrained"
        shape = str(tuple(part["shape"]))
        rows.append((f"{part['name']}: {blocks}", shape, f"{part['parameters']:,}", stages, ms))

    answer = model(picture)
    shipped = Session(folder / "model.onnx", threads=1)
    whole = _ms(lambda: shipped.run(frame[None]))

    return "\n".join(
        [
            console.table(rows),
            _read(model, answer),
            f"model.onnx ({manifest['chosen']}), from frame to {model.readout.output}: {whole} ms",
            answer.text,
        ]
    )


def _read(model: AnyModel, answer: Prediction | MultiLabelPrediction | RegressionPrediction) -> str:
    """How the logits become the answer."""
    readout = model.readout
    if isinstance(answer, RegressionPrediction):
        assert isinstance(readout, Values)
        scales = zip(model.labels, readout.means, readout.spreads, strict=True)
        return "scaled: " + ", ".join(
            f"{name} = {mean:.4g} + {spread:.4g} x logit" for name, mean, spread in scales
        )
    best = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:SHOWN]
    if isinstance(answer, Prediction):
        assert isinstance(readout, OneClass)
        named = ", ".join(f"{label} {value:.3f}" for label, value in best)
        return f"softmax at temperature {readout.temperature:.2f}: {named}"
    assert isinstance(readout, Labels)
    thresholds = dict(zip(model.labels, readout.thresholds, strict=True))
    return "sigmoid (applies from): " + ", ".join(
        f"{label} {value:.3f} ({'never' if thresholds[label] == NEVER else f'{thresholds[label]:.3f}'})"
        for label, value in best
    )


def _shape(array: Array) -> str:
    return str(tuple(array.shape))


def _ms(work: Callable[[], object]) -> str:
    """Median milliseconds of a call, after one that warms up."""
    work()
    times = []
    for _ in range(TIMED_RUNS):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return f"{statistics.median(times):.2f}"


def _times(core: Path, parts: list[Mapping[str, Any]], pixels: Array) -> list[str]:
    """Milliseconds of each part, each run from what the part before it gives."""
    model = onnx.load(core)
    extractor = Extractor(onnx.shape_inference.infer_shapes(model))
    name = model.graph.input[0].name
    given = pixels
    times = []

    for number, part in enumerate(parts):
        end = "logits" if number == len(parts) - 1 else part["value"]
        if end is None or not isinstance(given, np.ndarray):
            times.append("")
            continue
        try:
            cut = extractor.extract_model([name], [end])
            session = Session(cut.SerializeToString(), threads=1)
            value = given
            times.append(_ms(lambda session=session, value=value: session.run(value)))  # type: ignore[misc]
            given = session.run(value)[0]
        except Exception:
            # What skips over the cut, or a shape that is not known, has no time of its own.
            times += [""] * (len(parts) - number)
            break
        name = end

    return times
