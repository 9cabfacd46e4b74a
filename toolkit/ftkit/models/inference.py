"""Run a model for inference with the fastest available backend.

run, name = runner(net, example)
logits, embedding = run(pixels)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ftkit.models.backbones import Backbone, features
from ftkit_export.conversion.convert import quiet
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.session import Session

Tensors = tuple[torch.Tensor, ...]

PREFIX_BATCH = 8  # images per pass; ONNX Runtime on 2 cores: 188, 180, 162 img/s at 4, 8, 16


class WithEmbedding(nn.Module):
    """pixels (n, 3, S, S) -> logits (n, classes), embedding (n, D)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.model = backbone.model
        self.head = backbone.head

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding, logits = features(self.model, self.model.get_submodule(self.head), (pixels,))
        return logits, embedding


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to channels_last, the fastest layout for convolutions; non-4-D tensors unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def runner(
    net: nn.Module, example: torch.Tensor, threads: int = 0
) -> tuple[Callable[[torch.Tensor], list[Array]], str]:
    """The fastest way to run `net` here, and its name: pixels (n, 3, S, S) -> outputs, float32.

    ONNX Runtime on a CPU (threads: 0 = all cores), if its outputs for `example` match PyTorch's to
    1e-4 of the largest value; PyTorch on other devices, or if the net cannot be exported.
    """

    def eager(pixels: torch.Tensor) -> list[Array]:
        with torch.inference_mode():
            return [value.float().cpu().numpy() for value in as_tuple(net(channels_last(pixels)))]

    if example.device.type != "cpu":
        return eager, "torch"

    try:
        session = Session(_onnx_bytes(net, example), threads=threads)
        pairs = zip(session.run(example.numpy()), eager(example), strict=True)
        if all(np.abs(a - b).max() <= 1e-4 * np.abs(b).max() for a, b in pairs):
            return lambda pixels: session.run(pixels.numpy()), "onnxruntime"
    except Exception:
        # Not every graph can be exported, and exporters may raise anything: fall back to PyTorch
        return eager, "torch"

    return eager, "torch"


def _onnx_bytes(net: nn.Module, example: torch.Tensor) -> bytes:
    """Export with the TorchScript exporter: 0.8 s for lite0, against 10 s for the dynamo one.

    The file is used only within this run.
    """
    buffer = io.BytesIO()
    # Wrapped in a Sequential, since the exporter mistakes a GraphModule's `graph` for its own; in
    # eval mode, since the exporter applies the outer module's mode to every module inside.
    plain = nn.Sequential(net).eval()
    with quiet():
        torch.onnx.export(
            plain,
            (example[:2],),
            buffer,  # type: ignore[arg-type]  # a buffer works; the stub knows paths only
            dynamo=False,
            opset_version=18,
            input_names=["pixels"],
            dynamic_axes={"pixels": {0: "batch"}},
        )

    return buffer.getvalue()
