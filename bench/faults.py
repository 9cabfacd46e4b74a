"""Inject faults into complete exports and report which gate catches each; no false alarms.

ftkit train photos --out RUN && python bench/faults.py RUN            (22 exports, about 14 minutes on 2 cores)
python bench/faults.py RUN --only ...                                 faults of that name; a run may be of any task
python bench/faults.py --backbones                                    (the recipes' backbones, random weights)
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.evaluation.model import Inference
from ftkit.exporting import candidates, export
from ftkit.models.backbones import build
from ftkit.recipe import Export
from ftkit.tasks.task import MultiLabel
from ftkit.training.run import Run, open_run
from ftkit_export.bundle import archive
from ftkit_export.conversion import graph, quantize
from ftkit_export.conversion.convert import Core, Trace
from ftkit_export.runtime import session
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import machine
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import KEY, NAMES, TASKS, OneClass, Readout, Values
from ftkit_export.runtime.verify import verify

Edit = Callable[[onnx.ModelProto], None]
# What a check or a loss is called for other tasks
WORDS = {
    "multi-label": {"accuracy drop": "macro-AP drop"},
    "regression": {
        "accuracy drop": "rise of the mean absolute error",
        "probabilities": "values",
    },
}


@dataclass
class Fault:
    """A fault to inject and what must catch it.

    plant: enters the patches that are active during the export. expected: words the verdict must
    contain. limits: settings of the export. variant: the precision whose row must say so, where no
    gate does. tasks: of the runs that can have it.
    """

    name: str
    plant: Callable[[ExitStack], None]
    expected: tuple[str, ...]
    limits: Export
    variant: str = ""
    tasks: tuple[str, ...] = TASKS


def image_forms(change: Callable[..., onnx.ModelProto]) -> Callable[[ExitStack], None]:
    """Build every image form by `change(real, core, preprocess, readout, input_format)`."""
    real = graph.image_form
    return lambda stack: stack.enter_context(
        patch.object(candidates, "image_form", lambda *args: change(real, *args))
    )


def edited(edit: Edit) -> Callable[[ExitStack], None]:
    """Modify the core form after it has been made."""

    class Edited(Trace):
        def core(self, model: torch.nn.Module) -> Core:
            core = super().core(model)
            edit(core.model)
            return core

    return lambda stack: stack.enter_context(patch.object(export, "Trace", Edited))


def scaled(proto: onnx.ModelProto) -> None:
    node = [node for node in proto.graph.node if node.op_type == "Conv"][20]
    weight = next(item for item in proto.graph.initializer if item.name == node.input[1])
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name)
    )


def training_mode(stack: ExitStack) -> None:
    class Noisy(Trace):
        def __init__(self, model: torch.nn.Module, size: int) -> None:
            super().__init__(model, size)
            self._size = size

        def core(self, model: torch.nn.Module) -> Core:
            noisy = copy.deepcopy(model)
            # Effect of a BatchNorm left in training mode on the statistics of one layer
            for module in noisy.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.1
                    module.train()

            with torch.no_grad():
                noisy(torch.randn(8, 3, self._size, self._size))
            return super().core(noisy.eval())

    stack.enter_context(patch.object(export, "Trace", Noisy))


def wrong_axis(real: Any, *args: Any) -> onnx.ModelProto:
    model = real(*args)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].i = 0
    return model


def nearest(stack: ExitStack) -> None:
    def resized(made: Any, image: str, sizes: str) -> str:
        return made.op(
            "Resize",
            image,
            "",
            "",
            sizes,
            mode="nearest",
            coordinate_transformation_mode="half_pixel",
            axes=[1, 2],
        )

    stack.enter_context(patch.object(graph, "_resized", resized))


def shifted(stack: ExitStack) -> None:
    real = graph._square

    def square(made: Any, image: str) -> str:
        square = real(made, image)
        side = made.op("Shape", square, start=1, end=2)
        start = made.op("Min", made.ints(8), made.op("Sub", side, made.ints(1)))

        return made.op(
            "Slice",
            square,
            made.op("Concat", start, start, axis=0),
            made.ints(2**31, 2**31),
            made.ints(1, 2),
        )

    stack.enter_context(patch.object(graph, "_square", square))


def rotated(stack: ExitStack) -> None:
    real = export.metadata

    def metadata(run: Run) -> dict[str, str]:
        data = real(run)
        key = NAMES if NAMES in data else "labels"
        labels = json.loads(data[key])
        return {**data, key: json.dumps([*labels[1:], labels[0]])}

    stack.enter_context(patch.object(export, "metadata", metadata))


def per_tensor(stack: ExitStack) -> None:
    from onnxruntime.quantization import qdq_quantizer

    real = qdq_quantizer.QDQQuantizer
    stack.enter_context(
        patch.object(
            qdq_quantizer,
            "QDQQuantizer",
            lambda model, per_channel, *rest: real(model, False, *rest),
        )
    )


def noise_calibration(stack: ExitStack) -> None:
    real = candidates.calibrate
    rng = np.random.default_rng(0)

    def calibrate(
        core: onnx.ModelProto, batches: Iterator[Any], preprocess: Preprocess, method: str
    ) -> Any:
        return real(
            core,
            (rng.normal(size=item.shape).astype(np.float32) for item in batches),
            preprocess,
            method,
        )

    stack.enter_context(patch.object(candidates, "calibrate", calibrate))


def overflow(stack: ExitStack) -> None:
    """A layer whose values exceed float16, and a converter that does not check the ranges."""

    def widen(proto: onnx.ModelProto) -> None:
        first = next(node for node in proto.graph.node if node.op_type == "Conv")
        for name, factor in (("up", 3e4), ("down", 1 / 3e4)):
            proto.graph.initializer.append(
                numpy_helper.from_array(np.float32(factor), f"{name}_factor")
            )

        after, value = list(proto.graph.node).index(first) + 1, first.output[0]
        first.output[0] = "before"
        proto.graph.node.insert(
            after, helper.make_node("Mul", ["before", "up_factor"], ["high"], name="up")
        )
        proto.graph.node.insert(
            after + 1, helper.make_node("Clip", ["high", "", ""], ["held"], name="held")
        )
        proto.graph.node.insert(
            after + 2, helper.make_node("Mul", ["held", "down_factor"], [value], name="down")
        )

    edited(widen)(stack)
    stack.enter_context(patch.object(quantize, "LARGEST_HALF", 1e30))


def pixels_everywhere(**changed: Callable[[float], float]) -> Callable[[ExitStack], None]:
    """Use the same wrong mean or std in every graph that computes pixels.

    These are the file's graph and the one that supplies pixels to parity. The effect equals that of
    a provider that computes the normalisation wrongly in every session.
    """
    real = graph.preprocess_nodes

    def nodes(preprocess: Preprocess, *rest: Any, **more: Any) -> Any:
        wrong = {
            name: tuple(map(change, getattr(preprocess, name))) for name, change in changed.items()
        }
        return real(replace(preprocess, **wrong), *rest, **more)

    return lambda stack: stack.enter_context(patch.object(graph, "preprocess_nodes", nodes))


def cpu_as_cuda(stack: ExitStack) -> None:
    real = session.Session._open

    def opened(self: session.Session, *rest: Any) -> Any:
        with patch.object(self, "provider", "cpu"):
            return real(self, *rest)

    stack.enter_context(patch.object(session.Session, "_open", opened))


def logistic_head(run: Run) -> Run:
    """Pretrained backbone with a logistic-regression head: large weights that cancel each other."""
    canvases = build_canvases(read_images(run.data["data"], run.data["seed"]), run.preprocess)
    backbone = build(run.recipe.backbone, len(run.classes))
    rows = canvases.rows("train")
    _, embedding = Inference(backbone, canvases, run.preprocess)(rows, "features")
    scaler = StandardScaler().fit(embedding)
    fitted = LogisticRegression(max_iter=3000).fit(
        scaler.transform(embedding), canvases.labels[rows]
    )
    head = backbone.model.get_submodule(backbone.head)
    assert isinstance(head, torch.nn.Linear)
    weight = fitted.coef_ / scaler.scale_

    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ scaler.mean_))

    rows = canvases.rows("test")
    logits, _ = Inference(backbone, canvases, run.preprocess)(rows, "test")
    data = copy.deepcopy(run.data)
    data["metrics"]["test"]["accuracy"] = float((logits.argmax(1) == canvases.labels[rows]).mean())
    changed = replace(run, data=data)
    object.__setattr__(changed, "backbone", lambda: backbone)

    return changed


def mean_off(
    real: Any, core: onnx.ModelProto, preprocess: Preprocess, *rest: Any
) -> onnx.ModelProto:
    return real(
        core, replace(preprocess, mean=(preprocess.mean[0] - 4, *preprocess.mean[1:])), *rest
    )


def declared_rgb(
    real: Any, core: onnx.ModelProto, preprocess: Preprocess, readout: Readout, _: str
) -> onnx.ModelProto:
    return real(core, preprocess, readout, "bgr")


def channels_swapped(proto: onnx.ModelProto) -> None:
    """Swap the channels at the input of the network."""
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "swapped"))
    for node in proto.graph.node:
        node.input[:] = ["flipped" if name == "pixels" else name for name in node.input]
    proto.graph.node.insert(
        0, helper.make_node("Gather", ["pixels", "swapped"], ["flipped"], axis=1)
    )


def softmax_for_sigmoid(
    real: Any, core: onnx.ModelProto, preprocess: Preprocess, _: Readout, *rest: Any
) -> onnx.ModelProto:
    return real(core, preprocess, OneClass(), *rest)


def half_the_scale(
    real: Any, core: onnx.ModelProto, preprocess: Preprocess, readout: Readout, *rest: Any
) -> onnx.ModelProto:
    assert isinstance(readout, Values)
    halved = replace(readout, spreads=tuple(spread / 2 for spread in readout.spreads))
    return real(core, preprocess, halved, *rest)


def metadata_with(change: Callable[[dict[str, Any]], None]) -> Callable[[ExitStack], None]:
    """Alter the readout in the metadata of every file."""

    def altered(run: Run) -> dict[str, str]:
        data = json.loads(json.dumps(run.readout.as_json()))
        change(data)
        return {KEY: json.dumps(data)}

    return lambda stack: stack.enter_context(patch.object(export, "_readout_metadata", altered))


def unknown_counted(stack: ExitStack) -> None:
    real = MultiLabel.targets
    stack.enter_context(
        patch.object(MultiLabel, "targets", lambda *given: real(*given).nan_to_num())
    )


FP32, INT8, FP16 = Export(variants="fp32"), Export(), Export(target="cuda")
FAULTS = [
    Fault("wrong mean", image_forms(mean_off), ("parity", "probabilities"), FP32),
    *(
        Fault(
            f"{name} in every graph", pixels_everywhere(**{field: change}), ("parity", said), FP32
        )
        for name, field, change, said in (
            ("mean + 1 %", "mean", lambda v: v * 1.01, "share of pixels off"),
            ("mean + 0.3 grey levels", "mean", lambda v: v + 0.3, "pixels between grey levels"),
            ("mean + 1 grey level", "mean", lambda v: v + 1, "mean of a channel"),
            ("mean + 10 grey levels", "mean", lambda v: v + 10, "share of pixels off"),
            ("std x 1.5", "std", lambda v: v * 1.5, "share of pixels off"),
            ("std x 1.002", "std", lambda v: v * 1.002, "pixels between grey levels"),
        )
    ),
    Fault("BGR for RGB", edited(channels_swapped), ("parity", "core logits"), FP32),
    Fault("nearest for antialiased resize", nearest, ("parity", "share of pixels off"), FP32),
    Fault("crop off by 8 pixels", shifted, ("parity", "share of pixels off"), FP32),
    Fault(
        "labels rotated by one",
        rotated,
        ("labels out of order",),
        FP32,
        tasks=("single-label", "multi-label"),  # a single quantity has no order
    ),
    Fault("one convolution x 1.01", edited(scaled), ("parity", "core logits", "layer"), FP32),
    Fault(
        "BatchNorm left in training mode", training_mode, ("parity", "core logits", "layer"), FP32
    ),
    Fault(
        "softmax over the wrong axis",
        image_forms(wrong_axis),
        ("parity", "probabilities"),
        FP32,
        tasks=("single-label",),
    ),
    Fault(
        "a frame declared RGB that is BGR",
        image_forms(declared_rgb),
        ("parity", "probabilities"),
        FP32,
    ),
    Fault("per-tensor int8", per_tensor, ("accuracy drop", "chosen: fp32"), INT8, "int8"),
    Fault(
        "calibration on noise", noise_calibration, ("accuracy drop", "chosen: fp32"), INT8, "int8"
    ),
    Fault("fp16 overflow", overflow, ("refused", "fp16"), FP16, "fp16"),
    Fault(
        "thresholds swapped",
        metadata_with(lambda data: data["thresholds"].reverse()),
        ("misread",),
        FP32,
        tasks=("multi-label",),
    ),
    Fault(
        "softmax for sigmoid",
        image_forms(softmax_for_sigmoid),
        ("parity", "probabilities"),
        FP32,
        tasks=("multi-label",),
    ),
    Fault(
        "a label that is not known, counted",
        unknown_counted,
        ("computed again",),
        FP32,
        tasks=("multi-label",),
    ),
    Fault(
        "half the target's scale",
        image_forms(half_the_scale),
        ("parity", "values"),
        FP32,
        tasks=("regression",),
    ),
    Fault(
        "intervals of another run",
        metadata_with(lambda data: data.update(margins=[m * 0.8 for m in data["margins"]])),
        ("misread",),
        FP32,
        tasks=("regression",),
    ),
]


def verdict(run: Run, fault: Fault, folder: Path) -> str:
    """Result of the export in one line: failed gate and place, or variant and its reason."""
    said = io.StringIO()
    with ExitStack() as stack, redirect_stdout(said):
        fault.plant(stack)
        done = export.export(run, folder, settings=fault.limits, quick=True)
    if fault.variant:
        row = next(row for row in done.rows if row.precision == fault.variant)
        return f"{row.verdict}: {row.reason}; chosen: {done.chosen}"

    failed = [gate for gate in done.gates if not gate.passed]
    place = "".join(
        f"; layer {item.first_divergence}" for item in done.parity if item.first_divergence
    )
    checks = {check.name for item in done.parity for check in item.checks if not check.passed}
    place += f"; also {', '.join(sorted(checks))}" if len(checks) > 1 else ""

    return (
        "; ".join(f"gate {gate.name}: {gate.value:.3g}, limit {gate.limit:.3g}" for gate in failed)
        + place
    )


@contextmanager
def refused() -> Iterator[list[str]]:
    """Collect the message of an FtkitError."""
    said: list[str] = []
    try:
        yield said
    except FtkitError as error:
        said.append(str(error))


def flipped(sealed: Path) -> tuple[int, int]:
    """(number of files in which a flipped byte was detected, number of files)."""
    caught = 0
    files = [path for path in sorted(sealed.rglob("*")) if path.is_file()]
    for path in files:
        original = path.read_bytes()
        spoiled = bytearray(original)
        spoiled[len(spoiled) // 2] ^= 1
        path.write_bytes(spoiled)
        with refused() as said:
            verify(sealed)
            if path.name == "manifest.sig":  # only a check with the key detects this one
                archive.check_signature(sealed, sealed.parent / "pub.pem")
        caught += bool(said)
        path.write_bytes(original)

    return caught, len(files)


def planted(run: Run, only: str) -> tuple[int, int]:
    """Run every fault, or the one named, and print one row each; return (caught, all)."""
    caught = 0
    print("| fault | caught by |\n|---|---|")

    with tempfile.TemporaryDirectory() as scratch:

        def row(name: str, said: str, expected: tuple[str, ...]) -> None:
            nonlocal caught
            good = all(word in said for word in expected)
            caught += good
            print(f"| {name} | {said if good else 'MISSED: ' + said} |", flush=True)

        task = run.task.name
        chosen = [fault for fault in FAULTS if only in fault.name and task in fault.tasks]
        for number, fault in enumerate(chosen):
            expected = tuple(WORDS.get(task, {}).get(word, word) for word in fault.expected)
            row(fault.name, verdict(run, fault, Path(scratch) / str(number)), expected)
        if only:
            return caught, len(chosen)

        if task == "single-label":
            head = Fault(
                "head by logistic regression",
                lambda stack: None,
                ("accuracy drop", "chosen: fp32"),
                INT8,
                "int8",
            )
            chosen.append(head)
            row(head.name, verdict(logistic_head(run), head, Path(scratch) / "head"), head.expected)

        with refused() as said, ExitStack() as stack:
            cpu_as_cuda(stack)
            export.export(
                run,
                Path(scratch) / "cuda",
                settings=Export(variants="fp32"),
                providers=["cuda"],
                quick=True,
            )

        row(
            "CPU session under a CUDA name",
            "".join(said),
            ("provider cuda", "CPUExecutionProvider"),
        )
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
        (Path(scratch) / "key.pem").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        (Path(scratch) / "pub.pem").write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

        with redirect_stdout(io.StringIO()):
            done = export.export(
                run,
                Path(scratch) / "whole",
                quick=True,
                extras=export.Extras(sign=Path(scratch) / "key.pem"),
            )

        named, files = flipped(done.folder)
        row(
            "a byte flipped in each file of the bundle",
            f"{named} of {files} named",
            (f"{files} of {files}",),
        )
        print(
            f"\nwithout a fault: {'passed' if done.passed else 'FALSE ALARM'}, int8 "
            + "; ".join(f"{item.name} {item.verdict}" for item in done.rows[1:])
        )

    return caught, len(chosen) + 2


def main() -> None:
    """Print the table for one run, and how many faults were caught."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--only", default="", help="faults with this in their name")
    options = parser.parse_args()
    caught, of = planted(open_run(options.run), options.only)
    print(f"{caught} of {of} caught; machine {json.dumps(machine())}")


if __name__ == "__main__":
    main()
