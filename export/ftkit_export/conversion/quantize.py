"""int8 and fp16 variants of the core form, and which of its operators suffer most from 8 bits.

    ranges = calibrate(core, batches, preprocess)              # smallest and largest value of every tensor
    order = rank(core, ranges, target, pixels)                 # operators, most damage first
    model = int8(core, ranges, target, keep=order[:4])         # the first four stay in float
    quantized_nodes(model)                                     # proof that 8 bits were delivered

QDQ form in standard operators, one scale a channel for weights. MinMax ranges: percentile took six
times as long for no gain (measured on lite0). The range of `pixels` is not measured but known, 0 to
255 through the normalisation: where one scale serves all channels, the network's input is then
exact.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from ftkit_export.conversion.compat import convert_to_float16, quantize_qdq, sort_nodes
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import Target

METHODS = ("minmax", "percentile", "entropy")
HEAVY = ("Conv", "Gemm", "MatMul", "ConvTranspose")  # where 8 bits pay, and cost accuracy
ACTIVATIONS = ("Clip", "Relu", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu")
LARGEST_HALF = 65504.0
RANK_IMAGES = 8


def calibrate(
    core: onnx.ModelProto, batches: Iterable[Array], preprocess: Preprocess, method: str = "minmax"
) -> Any:
    """Ranges of every tensor over `batches` of pixels (n, 3, S, S), one after the other: they are
    streamed.

    Returns onnxruntime's TensorsData. Raises FtkitError for an unknown method.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, create_calibrator

    if method not in METHODS:
        raise FtkitError(
            f"calibration: expected one of {', '.join(METHODS)}, found {method!r}. Try minmax"
        )

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        path = Path(scratch) / "core.onnx"
        onnx.save(core, path)
        calibrator = create_calibrator(
            path,
            None,
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method={
                "minmax": CalibrationMethod.MinMax,
                "percentile": CalibrationMethod.Percentile,
                "entropy": CalibrationMethod.Entropy,
            }[method],
            providers=["CPUExecutionProvider"],
        )

        calibrator.collect_data(_Reader(core.graph.input[0].name, batches))
        ranges = calibrator.compute_data()

    low, high = (
        np.array(
            [(level - m) / s for m, s in zip(preprocess.mean, preprocess.std, strict=True)],
            np.float32,
        )
        for level in (0, 255)
    )

    ranges.data[core.graph.input[0].name] = TensorData(lowest=low.min(), highest=high.max())
    return ranges


class _Reader:
    """Calibration data as onnxruntime's calibrators read it."""

    def __init__(self, name: str, batches: Iterable[Array]):
        self._name = name
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def int8(
    core: onnx.ModelProto,
    ranges: Any,
    target: Target,
    *,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
) -> onnx.ModelProto:
    """The core form with 8-bit operators. keep: names of nodes left in float; only: no others than
    these in 8 bits.

    A node goes with the activation behind it: kept apart, ONNX Runtime's optimiser changes the
    answers (measured on lite0: SQNR 5 dB instead of 13).
    """
    with _quiet():
        model = quantize_qdq(
            shape_inference.infer_shapes(core),
            copy.deepcopy(ranges),
            reduce_range=target.reduce_range,
            unsigned_activations=target.activations == "uint8",
            only=_with_activation(core, only),
            keep=_with_activation(core, keep),
        )

    del model.graph.value_info[:]

    for part in (*model.graph.node, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]

    model.producer_name = core.producer_name
    model.producer_version = ""
    model.ir_version = core.ir_version

    return model


def _with_activation(core: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """The nodes named, and what each hands its values to when that is an activation."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in core.graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)

    nodes = list(names)
    for node in core.graph.node:
        if node.name in names:
            nodes += [
                user.name for user in users.get(node.output[0], []) if user.op_type in ACTIVATIONS
            ]

    return nodes


def quantized_nodes(model: onnx.ModelProto) -> int:
    """Heavy operators whose inputs all come out of DequantizeLinear: those that can run in 8 bits."""
    made = {
        output
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }

    return sum(
        all(name in made for name in node.input[:2])
        for node in model.graph.node
        if node.op_type in HEAVY
    )


def heavy_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions and matrix products, in graph order."""
    return [node.name for node in model.graph.node if node.op_type in HEAVY]


def rank(
    core: onnx.ModelProto, ranges: Any, target: Target, pixels: Array
) -> list[tuple[str, float]]:
    """(name, SQNR of the logits in dB with that node alone in 8 bits), most damage first. pixels:
    (n, 3, S, S)."""
    expected = Session(core.SerializeToString()).run(pixels)[0]
    ranked = []
    for name in heavy_nodes(core):
        logits = Session(int8(core, ranges, target, only=[name]).SerializeToString()).run(pixels)[0]
        ranked.append((name, sqnr(expected, logits)))
    return sorted(ranked, key=lambda item: item[1])


def sqnr(expected: Array, actual: Array) -> float:
    """Signal to quantization noise ratio in dB; infinite when equal, minus infinite where a value
    is no number."""
    noise = float(((actual.astype(np.float64) - expected) ** 2).sum())
    if not np.isfinite(noise):
        return -np.inf
    signal = float((expected.astype(np.float64) ** 2).sum())
    return float(10 * np.log10(signal / noise)) if noise else np.inf


def half(core: onnx.ModelProto, ranges: Any) -> tuple[onnx.ModelProto, list[str]]:
    """The core form in float16, float32 in and out; and the nodes kept in float32.

    Kept: operators whose calibrated values come within a factor 2 of float16's largest, and those
    that onnxruntime's converter blocks. The embedding and the logits leave in float32.
    """
    limit = LARGEST_HALF / 2
    wide = {
        name
        for name, data in ranges.data.items()
        if np.abs(np.concatenate([np.ravel(v) for v in data.range_value])).max() > limit
    }
    weights = {item.name for item in core.graph.initializer if _largest(item) > limit}
    keep = [node.name for node in core.graph.node if (wide | weights) & {*node.input, *node.output}]

    with _quiet():
        model = convert_to_float16(shape_inference.infer_shapes(copy.deepcopy(core)), keep)

    _join_casts(model)
    sort_nodes(model)
    del model.graph.value_info[:]
    model.ir_version = core.ir_version

    return model, keep


def _join_casts(model: onnx.ModelProto) -> None:
    """A value that goes from one kept operator to the next must not pass through float16, as the
    converter has it."""
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    direct = {
        output: casts[node.input[0]].input[0]
        for output, node in casts.items()
        if node.input[0] in casts and node.attribute[0].i == onnx.TensorProto.FLOAT
    }

    for node in model.graph.node:
        for place, value in enumerate(node.input):
            if value in direct:
                node.input[place] = direct[value]

    used = {value for node in model.graph.node for value in node.input} | {
        item.name for item in model.graph.output
    }
    unused = [
        node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in used
    ]
    for node in unused:
        model.graph.node.remove(node)


def _largest(item: onnx.TensorProto) -> float:
    array = numpy_helper.to_array(item)
    return float(np.abs(array).max(initial=0)) if array.dtype == np.float32 else 0.0


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer logs through the root logger, and suggests a step that would split
    HardSwish."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
