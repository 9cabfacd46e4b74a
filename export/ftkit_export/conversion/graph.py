"""Preprocess as ONNX operators, and the image form: image in, answers and embedding out.

    model = image_form(core, preprocess, readout)   # core: pixels -> logits, embedding

Resize is applied to the uint8 NHWC tensor, before the cast: only then does ONNX Runtime round as
Pillow does (at most 1 grey level apart on photographs, 2 on noise; casting first leaves borders off
by up to 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ftkit_export.runtime.preprocess import CHROMA, LUMA, Preprocess
from ftkit_export.runtime.readout import Labels, OneClass, Readout, Values

OPSET = 18  # opset 18 with IR 8 loads in ONNX Runtime 1.15 and newer; opset 20 with IR 10 is refused by 1.17
IR_VERSION = 8


class _Graph:
    """Collect nodes and constants under a name prefix, so that composed graphs never clash."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def const(self, value: float | Sequence[Any], dtype: type) -> str:
        name = f"{self.prefix}const_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.array(value, dtype), name)
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self.prefix}{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(
            kind,
            list(inputs),
            [output],
            name=f"{self.prefix}{kind}_{len(self.nodes)}",
            **attributes,
        )

        self.nodes.append(node)
        return output


def _resized(graph: _Graph, image: str, sizes: str) -> str:
    return graph.op(
        "Resize",
        image,
        "",
        "",
        sizes,
        mode="linear",
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
        axes=[1, 2],
    )


def _side(graph: _Graph, image: str, axis: int) -> str:
    return graph.op("Shape", image, start=axis, end=axis + 1)  # (1,) int64


def _square(graph: _Graph, image: str) -> str:
    """Centre square of (N, H, W, 3)."""
    height = _side(graph, image, 1)
    width = _side(graph, image, 2)
    side = graph.op("Min", height, width)
    two = graph.ints(2)
    top = graph.op("Div", graph.op("Sub", height, side), two)
    left = graph.op("Div", graph.op("Sub", width, side), two)
    starts = graph.op("Concat", top, left, axis=0)
    ends = graph.op("Add", starts, side)

    return graph.op("Slice", image, starts, ends, graph.ints(1, 2))


def _letterboxed(graph: _Graph, image: str, resize: int) -> str:
    """Resize the longest side to `resize` and pad with black, rounding as `Preprocess.canvas`."""
    height = _side(graph, image, 1)
    width = _side(graph, image, 2)
    longest = graph.op("Max", height, width)
    sides = graph.op("Concat", height, width, axis=0)
    doubled = graph.op("Mul", sides, graph.ints(2 * resize))
    rounded = graph.op(
        "Div", graph.op("Add", doubled, longest), graph.op("Mul", longest, graph.ints(2))
    )
    inner = graph.op("Max", rounded, graph.ints(1))
    resized = _resized(graph, image, inner)
    free = graph.op("Sub", graph.ints(resize, resize), inner)
    before = graph.op("Div", free, graph.ints(2))
    after = graph.op("Sub", free, before)
    zero = graph.ints(0)
    pads = graph.op("Concat", zero, before, zero, zero, after, zero, axis=0)

    return graph.op("Pad", resized, pads, graph.const(0, np.uint8))


def _rgb(graph: _Graph, frame: str, input_format: str) -> str:
    """Convert a camera frame (preprocess.to_frame) to (N, H, W, 3) uint8 RGB."""
    if input_format == "bgr":
        return graph.op("Gather", frame, graph.ints(2, 1, 0), axis=3)
    if input_format == "grey":
        return graph.op("Concat", frame, frame, frame, axis=3)
    if input_format != "nv12":
        return frame

    rows = _side(graph, frame, 1)
    width = _side(graph, frame, 2)
    third = graph.op("Div", rows, graph.ints(3))
    two = graph.ints(2)
    one = graph.ints(1)
    height = graph.op("Mul", third, two)
    start = graph.ints(0)
    end = graph.ints(2**62)
    axis = graph.ints(1)
    batch = _side(graph, frame, 0)
    half = graph.op("Div", width, two)
    levels = graph.op("Cast", frame, to=TensorProto.FLOAT)
    luma = graph.op(
        "Sub", graph.op("Slice", levels, start, height, axis), graph.const(16, np.float32)
    )
    chroma = graph.op(
        "Sub", graph.op("Slice", levels, height, end, axis), graph.const(128, np.float32)
    )
    pairs = graph.op(
        "Reshape", chroma, graph.op("Concat", batch, third, one, half, one, two, axis=0)
    )
    twice = graph.op("Expand", pairs, graph.op("Concat", batch, third, two, half, two, two, axis=0))
    whole = graph.op("Reshape", twice, graph.op("Concat", batch, height, width, two, axis=0))
    matrix = [[LUMA] * 3, *zip(*CHROMA, strict=True)]  # (3, 3): from Y, U, V to R, G, B
    mixed = graph.op(
        "MatMul", graph.op("Concat", luma, whole, axis=3), graph.const(matrix, np.float32)
    )
    bounded = graph.op(
        "Clip", graph.op("Round", mixed), graph.const(0, np.float32), graph.const(255, np.float32)
    )

    return graph.op("Cast", bounded, to=TensorProto.UINT8)


def preprocess_nodes(
    preprocess: Preprocess,
    image: str,
    pixels: str,
    canvas: str = "",
    input_format: str = "rgb",
    levels: str = "",
) -> _Graph:
    """Nodes from `image`, a frame uint8 (N, H, W, 3), to `pixels` float32 (N, 3, S, S).

    `canvas` names the uint8 crop. levels: instead of `pixels`, give their grey levels, uint8 (N, 3,
    S, S), under this name. preprocess.to_frame gives the shape of frames of another input_format.
    """
    graph = _Graph("preprocess/")
    image = _rgb(graph, image, input_format)
    size = preprocess.size
    resize = preprocess.resize

    if preprocess.fit == "pad":
        fitted = _letterboxed(graph, image, resize)
    else:
        squared = _square(graph, image) if preprocess.fit == "crop" else image
        fitted = _resized(graph, squared, graph.ints(resize, resize))

    start = (resize - size) // 2
    crop = graph.op(
        "Slice",
        fitted,
        graph.ints(start, start),
        graph.ints(start + size, start + size),
        graph.ints(1, 2),
        output=canvas,
    )

    # Transpose before normalising: with channels last, in rows of three values, ONNX Runtime is
    # five times slower (measured).
    if levels:
        graph.op("Transpose", crop, perm=[0, 3, 1, 2], output=levels)
        return graph
    planes = graph.op("Cast", graph.op("Transpose", crop, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    # (3, 1, 1)
    mean, std = ([[[value]] for value in values] for values in (preprocess.mean, preprocess.std))
    graph.op(
        "Div",
        graph.op("Sub", planes, graph.const(mean, np.float32)),
        graph.const(std, np.float32),
        output=pixels,
    )

    return graph


def pixel_model(preprocess: Preprocess, input_format: str = "rgb") -> onnx.ModelProto:
    """The preprocessing alone, to compare the graph's pixels with Pillow's.

    `image` uint8 (N, H, W, 3) -> `levels` uint8 (N, S, S, 3), `pixels` (N, 3, S, S).
    """
    graph = preprocess_nodes(preprocess, "image", "pixels", "levels", input_format)
    size = preprocess.size
    outputs = [
        helper.make_tensor_value_info("levels", TensorProto.UINT8, ["batch", size, size, 3]),
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size]),
    ]

    return _model(
        graph.nodes, [_image_input(input_format)], outputs, list(graph.constants.values())
    )


def tiny_model() -> onnx.ModelProto:
    """One convolution, to test whether a provider runs at all.

    `pixels` float32 (N, 3, 8, 8) -> `sums` (N, 1, 6, 6).
    """
    graph = _Graph("")
    graph.op(
        "Conv", "pixels", graph.const(np.ones((1, 3, 3, 3)).tolist(), np.float32), output="sums"
    )
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])
    sums = helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["batch", 1, 6, 6])
    return _model(graph.nodes, [pixels], [sums], list(graph.constants.values()))


def image_form(
    core: onnx.ModelProto, preprocess: Preprocess, readout: Readout, input_format: str = "rgb"
) -> onnx.ModelProto:
    """Compose the image form: preprocessing, the core form, and the readout of its logits.

    `image` uint8 (N, H, W, 3) -> the readout's answers, `probabilities` or `values`, float32 (N, K),
    and `embedding`. H and W are free. Frames of another input_format have the shape given
    by preprocess.to_frame, and are converted in the graph. Where the core form's 8-bit pixels are
    the image's grey levels themselves, these are passed on as they are: the same answers, without
    the way to float and back (0.8 of lite0's 4.1 ms).
    """
    quantizer = _takes_levels(core, preprocess)
    before = preprocess_nodes(
        preprocess,
        "image",
        "pixels",
        input_format=input_format,
        levels=quantizer.output[0] if quantizer else "",
    )
    nodes = [node for node in core.graph.node if node != quantizer]
    after = _read(readout)
    logits, embedding = core.graph.output
    width = logits.type.tensor_type.shape.dim[1].dim_value
    outputs = [
        helper.make_tensor_value_info(readout.output, TensorProto.FLOAT, ["batch", width]),
        embedding,
    ]
    constants = [*before.constants.values(), *core.graph.initializer, *after.constants.values()]

    return _model(
        [*before.nodes, *nodes, *after.nodes],
        [_image_input(input_format)],
        outputs,
        constants,
    )


def _read(readout: Readout) -> _Graph:
    """Nodes from `logits` to the readout's answers."""
    graph = _Graph("calibration/")
    if isinstance(readout, Values):
        scaled = graph.op("Mul", "logits", graph.const(readout.spreads, np.float32))
        graph.op("Add", scaled, graph.const(readout.means, np.float32), output=readout.output)
    elif isinstance(readout, Labels):
        scaled = graph.op("Div", "logits", graph.const(readout.temperatures, np.float32))
        graph.op("Sigmoid", scaled, output=readout.output)
    else:
        assert isinstance(readout, OneClass)
        scaled = graph.op("Div", "logits", graph.const(readout.temperature, np.float32))
        graph.op("Softmax", scaled, output=readout.output, axis=-1)
    return graph


def _takes_levels(core: onnx.ModelProto, preprocess: Preprocess) -> onnx.NodeProto | None:
    """The quantizer of the pixels whose 8-bit values equal the grey levels; None if there is none.

    With (level - mean) / std for pixels, they are equal at scale 1 / std and zero point mean.
    """
    users = [node for node in core.graph.node if "pixels" in node.input]
    if len(users) != 1 or users[0].op_type != "QuantizeLinear" or len(users[0].input) < 3:
        return None

    constants = {item.name: numpy_helper.to_array(item) for item in core.graph.initializer}
    scale, zero = (constants[name] for name in users[0].input[1:3])
    equal = all(
        zero.dtype == np.uint8 and np.float32(1 / std) == scale and mean == zero
        for mean, std in zip(preprocess.mean, preprocess.std, strict=True)
    )
    return users[0] if equal else None


def _image_input(input_format: str) -> onnx.ValueInfoProto:
    channels = 3 if input_format in ("rgb", "bgr") else 1
    return helper.make_tensor_value_info(
        "image", TensorProto.UINT8, ["batch", "height", "width", channels]
    )


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "ftkit", list(inputs), list(outputs), list(constants))
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ftkit"
    )
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model
