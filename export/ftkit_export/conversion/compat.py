"""ONNX Runtime quantization internals that ftkit uses, each with the version it was read in.

They come without a stability promise: when a new version breaks something, look here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx


def quantize_qdq(
    model: onnx.ModelProto,
    ranges: Any,
    *,
    reduce_range: bool,
    unsigned_activations: bool,
    only: Sequence[str],
    keep: Sequence[str],
) -> onnx.ModelProto:
    """Insert QuantizeLinear and DequantizeLinear: int8 weights per channel, activations per tensor.

    onnxruntime 1.31, quantization/qdq_quantizer.py: quantize_static does the same, but only from a
    file, and calibrates again on every call. only: nodes to quantize, all if empty; keep: nodes to
    leave in float. The quantizer modifies `ranges`.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.registry import QDQRegistry

    from ftkit_export.conversion.per_channel import Quantizer, fold_weights

    quantizer = Quantizer(
        model,
        True,  # per_channel
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8 if unsigned_activations else QuantType.QInt8,
        ranges,
        list(only),
        list(keep),
        list(QDQRegistry),
    )
    quantizer.quantize_model()
    quantized: onnx.ModelProto = quantizer.model.model
    fold_weights(quantized)
    quantizer.model.clean_initializers()
    quantizer.model.topological_sort()
    return quantized


def convert_to_float16(model: onnx.ModelProto, keep: Sequence[str]) -> onnx.ModelProto:
    """Convert to float16, with float32 inputs and outputs. keep: nodes left in float32.

    onnxruntime 1.31, transformers/float16.py. The nodes are left unsorted: call `sort_nodes`.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=True, node_block_list=list(keep), disable_shape_infer=True
    )
    return converted


def sort_nodes(model: onnx.ModelProto) -> None:
    """Sort the nodes topologically, in place.

    onnxruntime 1.31, quantization/onnx_model.py.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    ONNXModel(model).topological_sort()
