"""Quantization-aware training: fine-tune the exported 8-bit graph in PyTorch, rounding simulated.

    trained = fine_tune(core, quantized, pixels_of, labels, teacher, epochs=2)      # a core form with adapted weights
    int8(trained, ranges, target)                                                    # goes through the same decision

Rounding uses the straight-through estimator (Bengio et al. 2013; Jacob et al. 2018). Activation
scales stay as calibrated; weight scales follow the largest absolute value of each channel. The loss
is half cross-entropy on the labels, half distillation from fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from ftkit.utils import console
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

Values = list[Any]

QAT_BATCH = 16
RATE = 3e-5  # peak, Adam, cosine to zero


def _pads(attributes: dict[str, Any], spatial: int) -> list[int]:
    """ONNX order (begins, ends) -> torch.nn.functional.pad's (last axis first)."""
    pads = attributes.get("pads", [0] * 2 * spatial)
    return [
        side for axis in reversed(range(spatial)) for side in (pads[axis], pads[axis + spatial])
    ]


def _conv(x: Values, a: dict[str, Any]) -> torch.Tensor:
    padded = F.pad(x[0], _pads(a, x[1].ndim - 2))
    spatial = x[1].ndim - 2

    return F.conv2d(
        padded,
        x[1],
        x[2] if len(x) > 2 else None,
        tuple(a.get("strides", [1] * spatial)),
        0,
        tuple(a.get("dilations", [1] * spatial)),
        a.get("group", 1),
    )


def _gemm(x: Values, a: dict[str, Any]) -> Any:
    left = x[0].T if a.get("transA") else x[0]
    right = x[1].T if a.get("transB") else x[1]
    product = a.get("alpha", 1.0) * left @ right
    return product + a.get("beta", 1.0) * x[2] if len(x) > 2 else product


def _mean(x: Values, a: dict[str, Any]) -> Any:
    axes = [int(v) for v in x[1]] if len(x) > 1 and x[1] is not None else a.get("axes")
    return x[0].mean(dim=axes, keepdim=bool(a.get("keepdims", 1)))


def _clip(x: Values, a: dict[str, Any]) -> torch.Tensor:
    low, high = (x[i] if len(x) > i else None for i in (1, 2))
    return torch.clamp(x[0], low, high)


def _reshape(x: Values, a: dict[str, Any]) -> Any:
    wanted = [int(v) for v in x[1]]
    return x[0].reshape([x[0].shape[i] if size == 0 else size for i, size in enumerate(wanted)])


def _max_pool(x: Values, a: dict[str, Any]) -> torch.Tensor:
    padded = F.pad(x[0], _pads(a, 2), value=-torch.inf)
    return F.max_pool2d(
        padded,
        tuple(a["kernel_shape"]),
        tuple(a.get("strides", [1, 1])),
        0,
        tuple(a.get("dilations", [1, 1])),
        bool(a.get("ceil_mode", 0)),
    )


OPERATORS: dict[str, Callable[[Values, dict[str, Any]], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda x, a: x[0] @ x[1],
    "Add": lambda x, a: x[0] + x[1],
    "Sub": lambda x, a: x[0] - x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Div": lambda x, a: x[0] / x[1],
    "Clip": _clip,
    "Relu": lambda x, a: F.relu(x[0]),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "HardSigmoid": lambda x, a: torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda x, a: F.hardswish(x[0]),
    "ReduceMean": _mean,
    "GlobalAveragePool": lambda x, a: x[0].mean((2, 3), keepdim=True),
    "MaxPool": _max_pool,
    "Reshape": _reshape,
    "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
    "Squeeze": lambda x, a: x[0].squeeze(tuple(int(v) for v in x[1])),
    "Transpose": lambda x, a: x[0].permute(a["perm"]),
    "Concat": lambda x, a: torch.cat(x, a["axis"]),
    "Softmax": lambda x, a: x[0].softmax(a.get("axis", -1)),
    "Identity": lambda x, a: x[0],
}


class Simulated(nn.Module):
    """The quantized graph as a module with its float weights as parameters.

    Maps pixels (n, 3, S, S) to logits (n, classes). core: the float form that `quantized` was made
    from. Raises FtkitError for an unsupported operator.
    """

    def __init__(self, core: onnx.ModelProto, quantized: onnx.ModelProto):
        super().__init__()
        self.nodes = [
            (node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
            for node in quantized.graph.node
        ]
        self.input = quantized.graph.input[0].name
        self.output = quantized.graph.output[0].name
        self.constants = {
            item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
            for item in quantized.graph.initializer
        }
        floats = {item.name: numpy_helper.to_array(item) for item in core.graph.initializer}
        unknown = (
            {node.op_type for node, _ in self.nodes}
            - set(OPERATORS)
            - {"QuantizeLinear", "DequantizeLinear"}
        )

        unknown |= {
            node.op_type for node, a in self.nodes if a.get("auto_pad", b"NOTSET") != b"NOTSET"
        }
        if unknown:
            raise FtkitError(
                f"export.qat_epochs: expected operators it can train through, found {', '.join(unknown)}. "
                "Try --set export.qat_epochs=0"
            )

        self.sources = {
            node.output[0]: _origin(node.input[0], floats)
            for node, _ in self.nodes
            if node.op_type == "DequantizeLinear" and node.input[0] in self.constants
        }
        kept = {
            name
            for node, _ in self.nodes
            for name in node.input
            if name in floats and floats[name].ndim > 1
        }

        self.names = sorted({*self.sources.values(), *kept})
        self.weights = nn.ParameterList(
            torch.from_numpy(floats[name].copy()) for name in self.names
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        floats = dict(zip(self.names, self.weights, strict=True))
        values: dict[str, Any] = {"": None, **self.constants, **floats, self.input: pixels}

        for node, attributes in self.nodes:
            inputs: list[Any] = [values.get(name) for name in node.input]
            if node.op_type == "QuantizeLinear":
                # Rounding is simulated at DequantizeLinear
                values[node.output[0]] = (
                    inputs[0],
                    inputs[1],
                    inputs[2],
                )
            elif node.output[0] in self.sources:
                weight = floats[self.sources[node.output[0]]]
                # 127, or 64 with reduce_range
                levels = int(self.constants[node.input[0]].abs().max())
                values[node.output[0]] = weight
                if weight.ndim > 1:  # biases are int32: precise enough unrounded
                    values[node.output[0]] = _rounded_weight(
                        weight, attributes.get("axis", 0), levels
                    )
            elif node.op_type == "DequantizeLinear":
                value, scale, zero = inputs[0]
                low, high = (0, 255) if zero.dtype == torch.uint8 else (-128, 127)
                values[node.output[0]] = torch.fake_quantize_per_tensor_affine(
                    value, float(scale), int(zero), low, high
                )
            else:
                values[node.output[0]] = OPERATORS[node.op_type](inputs, attributes)

        logits: torch.Tensor = values[self.output]
        return logits


def _origin(name: str, floats: dict[str, Array]) -> str:
    """Name of the float constant that onnxruntime quantized, from the quantized one's name."""
    origin = name.removesuffix("_quantized")
    if origin not in floats:
        raise FtkitError(
            f"export.qat_epochs: expected the float values of {name}, found none. Leave it at 0"
        )
    return origin


def _rounded_weight(weight: torch.Tensor, axis: int, levels: int) -> torch.Tensor:
    others = [dim for dim in range(weight.ndim) if dim != axis]
    scale = (weight.detach().abs().amax(others) / levels).clamp_min(1e-12)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -levels, levels)


def fine_tune(
    core: onnx.ModelProto,
    quantized: onnx.ModelProto,
    pixels_of: Callable[[Array], Array],
    labels: Array,
    teacher: Array,
    *,
    epochs: int,
    rate: float = RATE,
) -> onnx.ModelProto:
    """The core form with its weights fine-tuned for 8 bits.

    pixels_of(rows) -> (n, 3, S, S) float32 for rows of 0 .. N - 1; labels (N,); teacher (N,
    classes): logits of fp32. Reproducible on one machine.
    """
    model = Simulated(core, quantized)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * -(-len(labels) // QAT_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    with console.bar("quantization-aware stage") as progress:
        done = 0
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(len(labels))
            total = 0.0
            for start in range(0, len(order), QAT_BATCH):
                rows = order[start : start + QAT_BATCH]
                logits = model(torch.from_numpy(pixels_of(rows)))
                soft = F.kl_div(
                    logits.log_softmax(1),
                    torch.from_numpy(teacher[rows]).softmax(1),
                    reduction="batchmean",
                )
                loss = (
                    0.5 * F.cross_entropy(logits, torch.from_numpy(labels[rows]).long())
                    + 0.5 * soft
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total = total + float(loss.detach()) * len(rows)
                done = done + 1
                progress(done, steps)

            console.say(
                f"quantization-aware stage  {epoch + 1}/{epochs}  loss {total / len(order):.3f}"
            )

    trained = copy.deepcopy(core)
    by_name = dict(zip(model.names, model.weights, strict=True))

    for item in trained.graph.initializer:
        if item.name in by_name:
            item.CopyFrom(numpy_helper.from_array(by_name[item.name].detach().numpy(), item.name))

    return trained
