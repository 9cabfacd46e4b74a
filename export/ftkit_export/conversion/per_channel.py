"""ONNX Runtime's QDQ quantizer, with the per-channel arithmetic of float32 weights on whole arrays.

    model = Quantizer(model, True, reduce_range, ...).quantize_model()   # the arguments of QDQQuantizer
    fold_weights(model)

onnxruntime 1.31, quantization/qdq_quantizer.py, loops over channels in Python; lite0 has 21,000 of
them. Same nodes, same tensors (tests/export/conversion/test_quantize.py), in a fraction of the time
(bench/int8.py quantize).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.base_quantizer import QuantizationParams
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer, QDQQuantTensorType
from onnxruntime.quantization.quant_utils import get_qmin_qmax_for_qType

from ftkit_export.runtime.arrays import Array

ROOM = 1.0001  # the scale of a bias is this much larger than one that just fits into 32 bits


class Quantizer(QDQQuantizer):  # type: ignore[misc]
    """A QDQQuantizer for symmetric int8 weights, without overrides of single tensors.

    quantize_model() leaves weights in float behind a QuantizeLinear: `fold_weights` then quantizes
    them.
    """

    tensors_to_quantize: dict[str, Any]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, {"AddQDQPairToWeight": True})

    def _calc_initializer_quant_params(self) -> dict[str, QuantizationParams]:
        every = self.tensors_to_quantize
        weights = {item.name: item for item in self.model.initializer()}
        channels = {
            name: numpy_helper.to_array(weights[name])
            for name, info in every.items()
            if name in weights
            and info.axis is not None
            and info.tensor_type is QDQQuantTensorType.WEIGHT
        }

        self.tensors_to_quantize = {
            name: info for name, info in every.items() if name not in channels
        }
        found: dict[str, QuantizationParams] = super()._calc_initializer_quant_params()
        self.tensors_to_quantize = every

        low, high = get_qmin_qmax_for_qType(self.weight_qType, self.reduce_range, symmetric=True)
        for name, weight in channels.items():
            axis = every[name].axis % weight.ndim
            scale = _scales(weight, axis, float(high) - float(low))
            found[name] = QuantizationParams(
                zero_point=np.zeros(len(scale), np.int8),
                scale=scale,
                quant_type=self.weight_qType,
                axis=axis,
            )
        return found

    def _adjust_weight_scale_for_int32_bias(
        self,
        input_scale: Array,
        weight_scale: Array,
        weight_name: str,
        bias_tp: onnx.TensorProto,
        is_per_channel: bool,
    ) -> tuple[bool, Array | None]:
        if not is_per_channel or weight_scale.ndim != 1:
            adjusted: tuple[bool, Array | None] = super()._adjust_weight_scale_for_int32_bias(
                input_scale, weight_scale, weight_name, bias_tp, is_per_channel
            )
            return adjusted

        # A depthwise ConvTranspose has more biases than scales
        bias = numpy_helper.to_array(bias_tp)[: len(weight_scale)]
        limits = np.iinfo(np.int32)
        # In float32 up to the division, as there
        doubled = (ROOM * (2.0 * np.abs(bias))).astype(np.float64)
        least = doubled / (float(limits.max) - float(limits.min + 1))
        scale = weight_scale.astype(np.float64)
        found = float(input_scale.item()) * scale
        small = (found < least) & (found > 0)
        weight_scale[small] = (scale[small] * (least[small] / found[small])).astype(np.float32)
        return bool(small.any()), weight_scale


def _scales(weight: Array, axis: int, levels: float) -> Array:
    """Scale of each channel (C,): its largest magnitude is the last of the levels; 1 where it is zero."""
    others = tuple(place for place in range(weight.ndim) if place != axis)
    largest = np.abs(weight).max(others, initial=0)
    scale = 2 * largest.astype(np.float64) / levels
    scale[scale < np.finfo(weight.dtype).tiny] = 1
    rounded: Array = scale.astype(weight.dtype)
    return rounded


def _levels(weight: Array, scale: Array, zero: Array, axis: int | None) -> Array:
    """What QuantizeLinear makes of a weight: its nearest levels, in the type of the zero point."""
    if axis is not None:
        shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    limits = np.iinfo(zero.dtype)
    levels: Array = np.clip(
        np.round(weight.astype(np.float32) / scale) + zero, limits.min, limits.max
    )
    return levels.astype(zero.dtype)


def fold_weights(model: onnx.ModelProto) -> None:
    """Replace each weight and its QuantizeLinear by the 8-bit weight, in place. The float weights are left:
    ONNXModel.clean_initializers removes those that nothing reads."""
    constants = {item.name: item for item in model.graph.initializer}
    folded: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            continue
        weight, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((item.i for item in node.attribute if item.name == "axis"), None)
        levels = _levels(weight, scale, zero, axis)
        folded[node.output[0]] = f"{node.input[0]}_quantized"
        model.graph.initializer.append(numpy_helper.from_array(levels, folded[node.output[0]]))
        model.graph.node.remove(node)

    for node in model.graph.node:
        for place, value in enumerate(node.input):
            node.input[place] = folded.get(value, value)
