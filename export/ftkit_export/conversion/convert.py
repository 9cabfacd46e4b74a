"""Export an nn.Module: the core form and the image form, each as one self-contained ONNX file.

    core = export_core(model, size=224)                                # pixels -> logits, embedding
    write(core.model, path, metadata)                                  # atomic, with metadata
    write(image_form(core.model, preprocess, temperature), path, metadata)

The exporter leaves up to 200 KB of node metadata with absolute local paths in the file. It is
stripped, after reading the layer names from it, by which a parity failure is reported.
"""

from __future__ import annotations

import ast
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import helper, shape_inference

from ftkit_export.conversion.graph import IR_VERSION, OPSET
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.targets import TARGETS, Target

QUIETED = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "ort_format_model.utils")
LINEAR_OPS = ("Gemm", "MatMul", "Conv")


@dataclass(frozen=True)
class Core:
    """The core form, and the framework module that produced each of its values.

    layers: value name -> module path.
    """

    model: onnx.ModelProto
    layers: Mapping[str, str]


def exact_float32() -> None:
    """Disable TF32: compute float32 products in float32 on CUDA.

    torch has two sets of switches. If only the new ones are set, every later read of the legacy
    ones raises, and torch.export reads them; if the legacy ones are set last, they override the new
    ones.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    for part in _precisions():
        part.fp32_precision = "ieee"


def _precisions() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn


@contextmanager
def _same_precision() -> Iterator[None]:
    """Restore torch's precision settings after an export.

    torch.export runs within torch.backends.cudnn.flags, which on exit sets cuDNN's precisions to
    "none".
    """
    before = [part.fp32_precision for part in _precisions()]
    try:
        yield
    finally:
        for part, precision in zip(_precisions(), before, strict=True):
            if part.fp32_precision != precision:
                part.fp32_precision = precision


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters, which log and warn about internals that no user can act on.

    Their changes to torch's precision settings are undone.
    """
    loggers = [logging.getLogger(name) for name in QUIETED]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), _same_precision():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _clamped() -> Iterator[None]:
    """Export ReLU6 as a clamp, which is equivalent, and faster.

    The exporter decomposes hardtanh: for the 33 in lite0 that takes 2.2 of 7.4 s.
    """
    hardtanh = torch.nn.functional.hardtanh

    def clamp(
        input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
    ) -> torch.Tensor:
        return (
            input.copy_(input.clamp(min_val, max_val)) if inplace else input.clamp(min_val, max_val)
        )

    torch.nn.functional.hardtanh = clamp
    try:
        yield
    finally:
        torch.nn.functional.hardtanh = hardtanh


class Trace:
    """A model's graph, from which the core form of every model of its architecture is made.

        trace = Trace(model, size=224)
        core, other = trace.core(model), trace.core(the_model_of_a_fold)

    Tracing takes 95 % of a conversion's time, and weights do not change it.
    """

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        """Trace a model, in eval mode on the CPU, for images of `size` pixels. Raises FtkitError
        when the exporter fails."""
        # Two images: torch.export treats a batch of one as constant
        example = torch.zeros(2, 3, size, size)
        try:
            with quiet(), _clamped():
                program = torch.onnx.export(
                    model,
                    (example,),
                    dynamo=True,
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                    input_names=["pixels"],
                    output_names=["logits"],
                    dynamic_shapes=({0: "batch"},),
                    optimize=False,  # which folds weights into each other
                )
        except Exception as error:  # the exporter wraps anything a model's forward may raise
            raise FtkitError(_cannot_follow(error)) from error

        assert program is not None  # dynamo=True without a file name always returns the program
        self._program = program
        self._graph = program.model_proto
        self._shapes = _shapes(model)

    def core(self, model: torch.nn.Module) -> Core:
        """The core form with the weights of `model`, whose architecture was traced.

        `pixels` float32 (N, 3, S, S) -> `logits` (N, classes), `embedding` (N, features), float32. The
        embedding is the input of the last linear layer; where the last layer is a convolution
        (SqueezeNet), its input averaged over space. Raises ValueError for another architecture.
        """
        if _shapes(model) != self._shapes:
            raise ValueError("expected a model of the architecture that was traced")

        proto = onnx.ModelProto()
        proto.CopyFrom(self._graph)
        weights = model.state_dict()
        for item in proto.graph.initializer:
            if item.name in weights:
                array = weights[item.name].detach().cpu().numpy()
                item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))

        with quiet():
            self._program.model = onnx_ir.from_proto(proto)
            self._program.optimize()
        proto = self._program.model_proto
        layers = _layer_names(proto)
        _strip(proto)
        _add_embedding(proto)
        proto.ir_version = IR_VERSION

        opset = max(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
        if opset != OPSET:
            raise FtkitError(
                f"export: expected opset {OPSET}, found {opset}. Try `pip install -U torch onnxscript`"
            )

        onnx.checker.check_model(proto, full_check=True)
        return Core(proto, layers)


def export_core(model: torch.nn.Module, size: int) -> Core:
    """The core form of one model, in eval mode on the CPU, as Trace.core describes it.

    size: S in pixels. Raises FtkitError when the exporter fails.
    """
    return Trace(model, size).core(model)


def core_for_timing(net: torch.nn.Module, size: int) -> onnx.ModelProto:
    """A core form by the TorchScript exporter, in a second instead of ten: not one to ship.

    net: returns (logits, embedding). Raises FtkitError when the exporter fails.
    """
    outputs = ["logits", "embedding"]
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.onnx.export(
                net.eval(),
                (torch.zeros(2, 3, size, size),),
                buffer,  # type: ignore[arg-type]  # a buffer works; the stub knows paths only
                dynamo=False,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=outputs,
                dynamic_axes={name: {0: "batch"} for name in ("pixels", *outputs)},
            )
    except Exception as error:  # it wraps anything a model's forward may raise
        raise FtkitError(_cannot_follow(error)) from error

    model = onnx.load_from_string(buffer.getvalue())
    model.ir_version = IR_VERSION
    return shape_inference.infer_shapes(model)


def _cannot_follow(error: Exception) -> str:
    return (
        f"export: expected a model the ONNX exporter can follow, found {type(error).__name__}: "
        f"{str(error).splitlines()[0]}. Try another backbone, e.g. --set backbone=efficientnet_lite0"
    )


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _layer_names(proto: onnx.ModelProto) -> dict[str, str]:
    """Value name -> module path, from the exporter's name scopes.

    A scope is a printed list such as ['', 'blocks.0', 'add'].
    """
    layers = {}
    for node in proto.graph.node:
        scopes = {item.key: item.value for item in node.metadata_props}.get(
            "pkg.torch.onnx.name_scopes", "[]"
        )
        path = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        for output in node.output:
            layers[output] = path[-1] if path else ""

    return layers


def _strip(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]
    del proto.functions[:]
    proto.doc_string = proto.graph.doc_string = ""
    proto.producer_name = "ftkit"
    proto.producer_version = ""
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]

    for part in (
        *proto.graph.node,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
    ):
        part.doc_string = ""
        del part.metadata_props[:]


def _add_embedding(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    makers = {output: node for node in graph.node for output in node.output}
    value = graph.output[0].name
    while value in makers and makers[value].op_type not in LINEAR_OPS:
        value = makers[value].input[0]

    if value not in makers:
        raise FtkitError(
            "export: expected a linear or convolutional last layer, found none. Try another backbone"
        )

    source = makers[value].input[0]
    shapes = {item.name: item for item in shape_inference.infer_shapes(proto).graph.value_info}
    dims = shapes[source].type.tensor_type.shape.dim

    if makers[value].op_type == "Conv":
        axes = helper.make_tensor("embedding_axes", onnx.TensorProto.INT64, [2], [2, 3])
        graph.initializer.append(axes)
        last = helper.make_node(
            "ReduceMean", [source, "embedding_axes"], ["embedding"], name="embedding", keepdims=0
        )
    else:
        last = helper.make_node("Identity", [source], ["embedding"], name="embedding")

    graph.node.append(last)
    features = dims[1].dim_value
    output = helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", features])
    graph.output.append(output)
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    graph.output[0].CopyFrom(
        helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", classes])
    )


def write_ort(model: Path, folder: Path, target: Target) -> None:
    """Write model.ort and required_operators.config, for ONNX Runtime's minimal builds.

    The latter lists the operators that such a build needs. Optimised for the target's processor at
    load time, not here: one file serves every machine of the target.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    folder.mkdir(parents=True)

    with quiet(), redirect_stdout(io.StringIO()):
        convert_onnx_models_to_ort(
            model,
            output_dir=folder,
            optimization_styles=[OptimizationStyle.Runtime],
            target_platform="arm" if target is TARGETS["arm64"] else "amd64",
        )

    for path in folder.iterdir():
        name = "model.ort" if path.suffix == ".ort" else "required_operators.config"
        path.rename(folder / name)

    config = folder / "required_operators.config"
    lines = config.read_text().splitlines(keepends=True)
    # Comments contain local paths
    config.write_text("".join(line for line in lines if not line.startswith("#")))


def write(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Write one self-contained file, including metadata properties, atomically.

    Raises FtkitError when the model is too large for one protobuf file (2 GB).
    """
    del model.metadata_props[:]
    helper.set_model_props(model, dict(sorted(metadata.items())))

    if model.ByteSize() >= 2**31:
        raise FtkitError(
            f"{path}: expected a model below 2 GB, found {model.ByteSize()} bytes. Try a smaller backbone"
        )

    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())

    beside.replace(path)
