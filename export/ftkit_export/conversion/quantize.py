"""int8 and fp16 variants of the core form, and the operators most sensitive to int8.

    ranges = calibrate(core, batches, preprocess)              # minimum and maximum of every tensor
    order = rank(core, ranges, target, pixels)                 # (name, SQNR), most sensitive first
    model = int8(core, ranges, target, keep=[name for name, _ in order[:4]])    # four stay in float
    model = int8(core, ranges, target, correct_on=pixels)     # with its biases corrected
    quantized_nodes(model)                                     # how many can run in int8

QDQ format in standard operators, per-channel weights. MinMax calibration: percentile took six times
as long for no gain (measured on lite0). The range of `pixels` is not measured but known, the
normalised range of 0 to 255: where one scale serves all channels, the network's input is then
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
from onnx import helper, numpy_helper, shape_inference

from ftkit_export.conversion.bias_correction import correct_biases, with_biases
from ftkit_export.conversion.compat import convert_to_float16, quantize_qdq, sort_nodes
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import Target

METHODS = ("minmax", "percentile", "entropy")
HEAVY = ("Conv", "Gemm", "MatMul", "ConvTranspose")  # where int8 saves time, and costs accuracy
SHIELDED = ("Conv", "ConvTranspose", "Gemm")  # those that WeightBiasQuantization looks at
ACTIVATIONS = ("Clip", "Relu", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu")
LARGEST_HALF = 65504.0
RANK_IMAGES = 8


def calibrate(
    core: onnx.ModelProto, batches: Iterable[Array], preprocess: Preprocess, method: str = "minmax"
) -> Any:
    """Calibrate: value ranges of every tensor over `batches` of pixels (n, 3, S, S), streamed.

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
    """Calibration data in the form that onnxruntime's calibrators read."""

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
    correct_on: Array | None = None,
) -> onnx.ModelProto:
    """Quantize the core form to int8.

    keep: names of nodes left in float; only: quantize only these; correct_on: pixels (n, 3, S, S) to
    correct the biases on. An activation function is treated like the node before it: if only one of
    them is quantized, ONNX Runtime's optimiser changes the outputs (measured on lite0: SQNR 5 dB
    instead of 13).
    """
    core = core if correct_on is None else with_biases(core)
    with _quiet():
        model = quantize_qdq(
            shape_inference.infer_shapes(core),
            copy.deepcopy(ranges),
            reduce_range=target.reduce_range,
            unsigned_activations=target.activations == "uint8",
            only=_with_activation(core, only),
            keep=_with_activation(core, keep),
        )

    _shield(model)
    del model.graph.value_info[:]

    for part in (*model.graph.node, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]

    model.producer_name = core.producer_name
    model.producer_version = ""
    model.ir_version = core.ir_version

    return model if correct_on is None else correct_biases(core, model, correct_on)


def _shield(model: onnx.ModelProto) -> None:
    """Keep float operators in float, in place.

    Where a float operator stands between 8-bit ones, ONNX Runtime's WeightBiasQuantization
    quantizes its weights as well, with one scale for all channels (on lite0: 9 dB instead of 25).
    It does so only directly behind a DequantizeLinear. So a Clip to the range of the 8-bit values,
    which changes nothing and which no optimiser removes, goes between them.
    """
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {value: node for node in model.graph.node for value in node.output}
    shields: dict[str, str] = {}

    for node in list(model.graph.node):
        maker = makers.get(node.input[0]) if node.op_type in SHIELDED else None
        if maker is None or maker.op_type != "DequantizeLinear" or node.input[1] not in constants:
            continue

        value = node.input[0]
        if value not in shields:
            shields[value] = f"{value}/shield"
            scale = constants[maker.input[1]]
            zero = constants[maker.input[2]]
            limits = np.iinfo(zero.dtype)
            bounds = []
            for side, level in (("low", limits.min), ("high", limits.max)):
                bound = np.array((level - float(zero)) * scale, np.float32)
                bounds.append(f"{shields[value]}/{side}")
                model.graph.initializer.append(numpy_helper.from_array(bound, bounds[-1]))

            place = list(model.graph.node).index(maker)
            clip = helper.make_node("Clip", [value, *bounds], [shields[value]], name=shields[value])
            model.graph.node.insert(place + 1, clip)
        node.input[0] = shields[value]


def _with_activation(core: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """The nodes named, and the activation functions that consume their outputs."""
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
    """Count heavy operators whose inputs are all from DequantizeLinear: they can run in int8."""
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
    """Rank heavy operators by sensitivity to int8: (name, SQNR in dB), lowest SQNR first.

    SQNR of the logits with only that node quantized. pixels: (n, 3, S, S).
    """
    expected = Session(core.SerializeToString()).run(pixels)[0]
    ranked = []
    for name in heavy_nodes(core):
        logits = Session(int8(core, ranges, target, only=[name]).SerializeToString()).run(pixels)[0]
        ranked.append((name, sqnr(expected, logits)))
    return sorted(ranked, key=lambda item: item[1])


def sqnr(expected: Array, actual: Array) -> float:
    """Signal-to-quantization-noise ratio in dB; inf if equal, -inf if any value is not finite."""
    noise = float(((actual.astype(np.float64) - expected) ** 2).sum())
    if not np.isfinite(noise):
        return -np.inf
    signal = float((expected.astype(np.float64) ** 2).sum())
    return float(10 * np.log10(signal / noise)) if noise else np.inf


def half(core: onnx.ModelProto, ranges: Any) -> tuple[onnx.ModelProto, list[str]]:
    """The core form in float16, with float32 inputs and outputs, and the nodes kept in float32.

    Kept: operators whose weights or calibrated values exceed half of float16's largest, and (not
    listed) those that onnxruntime's converter blocks.
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
    """Remove the float16 round trip that the converter leaves between float32 operators."""
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
    """Silence onnxruntime's quantizer, which logs through the root logger.

    It also suggests a step that would split HardSwish.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
