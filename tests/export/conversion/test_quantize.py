"""int8 and fp16 variants: settings are honoured, files load on every target, ranking is right."""

import copy
import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import bare
from onnx import helper, numpy_helper, shape_inference
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from ftkit.training.run import open_run
from ftkit_export.conversion.bias_correction import correct_biases, with_biases
from ftkit_export.conversion.compat import quantize_qdq
from ftkit_export.conversion.convert import write
from ftkit_export.conversion.graph import image_form, pixel_model
from ftkit_export.conversion.quantize import (
    calibrate,
    half,
    heavy_nodes,
    int8,
    quantized_nodes,
    rank,
    sqnr,
)
from ftkit_export.proof.parity import Reference, agreement
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess, decode
from ftkit_export.runtime.readout import OneClass
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import TARGETS, here, unshippable

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class Trained:
    core: onnx.ModelProto
    preprocess: Preprocess
    pixels: Array
    logits: Array
    ranges: Any
    reference: Reference


@pytest.fixture(scope="module")
def trained(bundle: Path, run: Path, photos: Path) -> Trained:
    core = onnx.load(bundle / "variants" / "fp32-core.onnx")
    preprocess = Preprocess(**json.loads((bundle / "manifest.json").read_text())["preprocess"])
    images = [decode(path) for path in sorted(photos.rglob("*.png"))[::4]]
    pixels = preprocess.pixels(np.stack([preprocess.canvas(image) for image in images]))
    logits = Session(core.SerializeToString()).run(pixels)[0]
    ranges = calibrate(core, iter(np.split(pixels, 3)), preprocess)
    return Trained(
        core, preprocess, pixels, logits, ranges, Reference(open_run(run).backbone().model)
    )


def _run(model: onnx.ModelProto, pixels: Array) -> Array:
    found: Array = Session(model.SerializeToString()).run(pixels)[0]
    return found


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def test_8_bits_are_delivered_one_scale_a_channel_and_still_agree(trained: Trained) -> None:
    model = int8(trained.core, trained.ranges, TARGETS[here()])
    assert quantized_nodes(model) == len(heavy_nodes(trained.core)) == 50
    assert quantized_nodes(trained.core) == 0
    assert model.ByteSize() < 0.32 * trained.core.ByteSize()
    constants = _constants(model)
    weights = [
        n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and constants.get(n.input[0]) is not None
    ]
    convolution = [constants[n.input[1]] for n in weights if constants[n.input[0]].ndim == 4]
    assert len(convolution) == 49
    assert all(scale.ndim == 1 and len(scale) > 1 for scale in convolution)
    assert sqnr(trained.logits, _run(model, trained.pixels)) > 3


def test_the_networks_input_is_exact_where_one_scale_serves_all_channels(trained: Trained) -> None:
    model, constants = int8(trained.core, trained.ranges, TARGETS["x86-vnni"]), None
    constants = _constants(model)
    node = next(
        n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "pixels"
    )
    scale, zero = float(constants[node.input[1]]), int(constants[node.input[2]])
    levels = (
        np.arange(256, dtype=np.float32) - trained.preprocess.mean[0]
    ) / trained.preprocess.std[0]
    again = (np.clip(np.round(levels / scale) + zero, 0, 255) - zero) * scale
    assert np.abs(again - levels).max() < 1e-6


def test_types_follow_the_target(trained: Trained) -> None:
    for name, kind, widest in (
        ("arm64", np.int8, 127),
        ("x86", np.uint8, 64),
        ("x86-vnni", np.uint8, 127),
    ):
        constants = _constants(int8(trained.core, trained.ranges, TARGETS[name]))
        assert (
            max(
                np.abs(w.astype(int)).max()
                for w in constants.values()
                if w.dtype == np.int8 and w.ndim == 4
            )
            == widest
        )
        zeros = {
            w.dtype.type
            for key, w in constants.items()
            if key.endswith("zero_point") and w.ndim == 0
        }
        assert kind in zeros
        assert (kind is np.uint8) == (np.uint8 in zeros)


def _unusual() -> onnx.ModelProto:
    """Transposed convolutions, one of them depthwise, a product and a normalisation; channels of zeros, and
    biases that need a larger scale."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 3, 3, 3)).astype(np.float32)
    kernel[2] = 0
    kernel[4] *= 1e-9
    constants = {
        "kernel": kernel,
        "kernel_bias": np.array([0, 3, 0.5, -2, 9, 0], np.float32),
        "apart": rng.standard_normal((6, 1, 2, 2)).astype(np.float32),
        "apart_bias": rng.standard_normal(6).astype(np.float32),
        "up": rng.standard_normal((6, 2, 2, 2)).astype(np.float32),
        "up_bias": np.array([1, 0], np.float32),
        "matrix": rng.standard_normal((18, 5)).astype(np.float32) * np.float32(1e-3),
        "gain": rng.standard_normal(5).astype(np.float32),
        "offset": rng.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node(
            "Conv", ["pixels", "kernel", "kernel_bias"], ["a"], "conv", strides=[2, 2]
        ),
        helper.make_node("ConvTranspose", ["a", "apart", "apart_bias"], ["b"], "apart", group=6),
        helper.make_node("ConvTranspose", ["b", "up", "up_bias"], ["c"], "up", strides=[2, 2]),
        helper.make_node("MatMul", ["c", "matrix"], ["d"], "product"),
        helper.make_node("LayerNormalization", ["d", "gain", "offset"], ["logits"], "normalised"),
    ]
    made = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("pixels", ["n", 3, 17, 17]), ("logits", ["n", 2, 18, 5]))
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "unusual",
            made[:1],
            made[1:],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_weights_are_quantized_to_the_tensors_that_onnx_runtime_makes(
    trained: Trained, reduce_range: bool, unsigned: bool
) -> None:
    pixels = np.random.default_rng(1).standard_normal((8, 3, 17, 17)).astype(np.float32)
    unusual = _unusual()
    ranges = calibrate(unusual, iter([pixels]), trained.preprocess)
    for core, known, keep in (
        (with_biases(trained.core), trained.ranges, heavy_nodes(trained.core)[:3]),
        (unusual, ranges, []),
    ):
        reference = QDQQuantizer(
            shape_inference.infer_shapes(core),
            True,
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8 if unsigned else QuantType.QInt8,
            copy.deepcopy(known),
            [],
            keep,
            list(QDQRegistry),
            {},
        )
        expected = reference.quantize_model()
        found = quantize_qdq(
            shape_inference.infer_shapes(core),
            copy.deepcopy(known),
            reduce_range=reduce_range,
            unsigned_activations=unsigned,
            only=[],
            keep=keep,
        )

        reference.model.topological_sort()
        assert list(found.graph.node) == list(expected.graph.node)
        mine, theirs = _constants(found), _constants(expected)
        assert mine.keys() == theirs.keys()
        for name, array in theirs.items():
            assert (mine[name].dtype, mine[name].shape) == (array.dtype, array.shape), name
            assert mine[name].tobytes() == array.tobytes(), name


def test_the_operators_ranked_first_are_those_worth_keeping(trained: Trained) -> None:
    target = TARGETS[here()]
    order = rank(trained.core, trained.ranges, target, trained.pixels[:16])
    assert sorted(name for name, _ in order) == sorted(heavy_nodes(trained.core))
    names = [name for name, _ in order]
    worst, least = (
        int8(trained.core, trained.ranges, target, keep=keep) for keep in (names[:12], names[-12:])
    )
    assert quantized_nodes(worst) == quantized_nodes(least) == 38
    found = [sqnr(trained.logits, _run(model, trained.pixels)) for model in (worst, least)]
    assert found[0] > found[1] + 1, found


def test_corrected_biases_give_every_convolution_the_float_ones_mean(trained: Trained) -> None:
    core = with_biases(trained.core)
    plain = int8(core, trained.ranges, TARGETS[here()])
    means = _convolution_means(core, trained.pixels)
    corrected = correct_biases(core, plain, trained.pixels)
    spread = np.concatenate([np.abs(mean) for mean in means.values()]).mean()

    def shift(model: onnx.ModelProto) -> float:
        found = _convolution_means(model, trained.pixels)
        return float(np.concatenate([np.abs(found[n] - means[n]) for n in means]).mean())

    assert shift(plain) > 0.01 * spread
    assert shift(corrected) < 0.1 * shift(plain)

    half_of_them = len(trained.pixels) // 2  # what is judged must not be what it was corrected on
    unseen = trained.pixels[half_of_them:]
    corrected = correct_biases(core, plain, trained.pixels[:half_of_them])
    gained = sqnr(trained.logits[half_of_them:], _run(corrected, unseen)) - sqnr(
        trained.logits[half_of_them:], _run(plain, unseen)
    )
    assert gained > 3, gained
    assert _weights(corrected) == _weights(plain), "only biases may change"


def _convolution_means(model: onnx.ModelProto, pixels: Array) -> dict[str, Array]:
    """Mean output per channel of every convolution, of the graph as written."""
    probed = copy.deepcopy(model)
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    for node in nodes:
        probed.graph.output.append(
            helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        )
    found = Session(probed.SerializeToString(), optimised=False).run(pixels)[2:]
    return {
        node.name: value.mean((0, 2, 3), dtype=np.float64)
        for node, value in zip(nodes, found, strict=True)
    }


def _weights(model: onnx.ModelProto) -> dict[str, bytes]:
    return {
        item.name: item.raw_data
        for item in model.graph.initializer
        if item.data_type == onnx.TensorProto.INT8
    }


def _small(*, activation: str) -> tuple[onnx.ModelProto, Array]:
    """A chain of every operator with a bias, the first without one, and pixels for it."""
    rng = np.random.default_rng(0)

    def normal(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)

    constants = [
        normal("w0", 8, 3, 3, 3),
        normal("w1", 8, 1, 3, 3),
        normal("b1", 8),
        normal("w2", 8, 6, 2, 2),
        normal("b2", 6),
        normal("w3", 6, 5),
        normal("b3", 5),
        numpy_helper.from_array(np.float32(0), "low"),
        numpy_helper.from_array(np.float32(6), "high"),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]
    bounds = ["low", "high"] if activation == "Clip" else []
    nodes = [
        helper.make_node("Conv", ["pixels", "w0"], ["a"], name="plain"),
        helper.make_node(activation, ["a", *bounds], ["b"], name="first"),
        helper.make_node("Conv", ["b", "w1", "b1"], ["c"], name="depthwise", group=8),
        helper.make_node(activation, ["c", *bounds], ["d"], name="second"),
        helper.make_node("ConvTranspose", ["d", "w2", "b2"], ["e"], name="up"),
        helper.make_node("ReduceMean", ["e", "axes"], ["f"], keepdims=0, name="mean"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 5])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model, rng.uniform(-1, 1, (32, 3, 12, 12)).astype(np.float32)


@pytest.mark.parametrize("activation", ["Clip", "Relu"])
@pytest.mark.parametrize("target", ["x86-vnni", "x86", "arm64"])
def test_correction_serves_every_operator_with_a_bias(activation: str, target: str) -> None:
    model, pixels = _small(activation=activation)
    core = with_biases(model)
    preprocess = Preprocess(size=12, resize=12, mean=[127.0] * 3, std=[128.0] * 3)
    ranges = calibrate(core, iter([pixels]), preprocess)
    plain = int8(core, ranges, TARGETS[target])
    corrected = int8(model, ranges, TARGETS[target], correct_on=pixels)
    expected = _run(model, pixels).mean(0)
    off, left = (
        np.abs(_run(form, pixels).mean(0) - expected).mean() for form in (plain, corrected)
    )
    assert left < 0.2 * off, (left, off)


def test_weights_and_biases_may_be_shared() -> None:
    """A module called twice has one weight, and one bias or none: each call gets its own."""
    model, pixels = _small(activation="Relu")
    second = helper.make_node("Conv", ["d", "w1"], ["d2"], name="again", group=8, pads=[1] * 4)
    nodes = list(model.graph.node)
    place = next(at for at, node in enumerate(nodes) if node.name == "up")
    nodes[place].input[0] = "d2"
    for node in nodes:
        if node.name == "depthwise":
            del node.input[2:]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], second, *nodes[place:]])
    onnx.checker.check_model(with_biases(model))
    preprocess = Preprocess(size=12, resize=12, mean=[127.0] * 3, std=[128.0] * 3)
    ranges = calibrate(model, iter([pixels]), preprocess)
    corrected = int8(model, ranges, TARGETS[here()], correct_on=pixels)
    expected = _run(model, pixels).mean(0)
    plain = int8(with_biases(model), ranges, TARGETS[here()])
    off, left = (
        np.abs(_run(form, pixels).mean(0) - expected).mean() for form in (plain, corrected)
    )
    assert left < 0.3 * off, (left, off)


def test_a_float_operator_between_8_bit_ones_stays_in_float() -> None:
    """Regression: ONNX Runtime's optimiser put its weights in 8 bits, one scale for all channels.

    The smallest graph that shows it: an operator with float weights, 8 bits before and behind.
    """
    model, pixels = _small(activation="Clip")
    for item in model.graph.initializer:
        if item.name == "w1":  # one channel is large, and clipped: its scale serves no other
            weights = numpy_helper.to_array(item).copy()
            weights[0] *= 30
            item.CopyFrom(numpy_helper.from_array(weights, "w1"))
    preprocess = Preprocess(size=12, resize=12, mean=[127.0] * 3, std=[128.0] * 3)
    ranges = calibrate(model, iter([pixels]), preprocess)
    kept = int8(model, ranges, TARGETS["x86-vnni"], keep=["depthwise"])
    assert quantized_nodes(kept) == 3
    written = Session(kept.SerializeToString(), optimised=False).run(pixels)[0]
    shielded, exposed = (
        sqnr(written, _run(form, pixels)) for form in (kept, _without_shields(kept))
    )
    assert shielded > exposed + 10, (shielded, exposed)


def _without_shields(model: onnx.ModelProto) -> onnx.ModelProto:
    bare_model = copy.deepcopy(model)
    shields = {n.output[0]: n for n in bare_model.graph.node if n.name.endswith("/shield")}
    assert shields
    for node in bare_model.graph.node:
        for place, value in enumerate(node.input):
            if value in shields:
                node.input[place] = shields[value].input[0]
    for node in shields.values():
        bare_model.graph.node.remove(node)
    return bare_model


def test_what_is_kept_in_float_is_not_changed_by_the_optimiser(trained: Trained) -> None:
    names = heavy_nodes(trained.core)
    for keep in ([names[0]], names[:2], names[:4], [names[10]], [names[1], names[5], names[20]]):
        model = int8(trained.core, trained.ranges, TARGETS[here()], keep=keep)
        written = Session(model.SerializeToString(), optimised=False).run(trained.pixels)[0]
        found = sqnr(trained.logits, _run(model, trained.pixels))
        assert found > sqnr(trained.logits, written) - 1, keep


def test_grey_levels_enter_an_8_bit_network_as_they_are(trained: Trained) -> None:
    core = int8(trained.core, trained.ranges, TARGETS["x86-vnni"])
    form = image_form(core, trained.preprocess, OneClass(temperature=2.0))
    assert not {"Cast", "Mul"} & {node.op_type for node in form.graph.node}
    assert "pixels" not in {value for node in form.graph.node for value in node.input}

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 61, 83, 3), dtype=np.uint8)
    pixels = Session(pixel_model(trained.preprocess).SerializeToString()).run(images)[1]
    logits = _run(core, pixels)
    softened = np.exp(logits / 2 - (logits / 2).max(1, keepdims=True))
    np.testing.assert_allclose(
        _run(form, images), softened / softened.sum(1, keepdims=True), rtol=1e-5
    )

    # Not where a scale or a mean is another for some channel, nor for signed activations
    other = dataclasses.replace(trained.preprocess, mean=[127.0, 127.0, 126.0])
    for preprocess, name in ((other, "x86-vnni"), (trained.preprocess, "arm64")):
        core = int8(trained.core, trained.ranges, TARGETS[name])
        form = image_form(core, preprocess, OneClass(temperature=1.0))
        assert "pixels" in {value for node in form.graph.node for value in node.input}


def test_fp16_agrees_takes_float32_and_keeps_what_overflows(trained: Trained) -> None:
    model, kept = half(trained.core, trained.ranges)
    assert not kept
    assert {
        item.type.tensor_type.elem_type for item in (*model.graph.input, *model.graph.output)
    } == {onnx.TensorProto.FLOAT}
    assert model.ByteSize() < 0.55 * trained.core.ByteSize()
    rounding = trained.reference.rounding(trained.pixels, "fp16")
    checks = agreement(
        trained.logits, _run(model, trained.pixels), rounding, "fp16", "photographs", OneClass()
    )
    assert all(check.passed for check in checks), checks

    # A layer whose values exceed float16 and return: scale up, then down
    wide = copy.deepcopy(trained.core)
    first = next(node for node in wide.graph.node if node.op_type == "Conv")
    for name, factor in (("up", 1e6), ("down", 1e-6)):
        wide.graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"{name}_factor"))
    after, value = list(wide.graph.node).index(first) + 1, first.output[0]
    first.output[0] = "before"
    wide.graph.node.insert(
        after, helper.make_node("Mul", ["before", "up_factor"], ["high"], name="up")
    )
    wide.graph.node.insert(
        after + 1, helper.make_node("Mul", ["high", "down_factor"], [value], name="down")
    )
    ranges = calibrate(wide, iter([trained.pixels[:8]]), trained.preprocess)
    model, kept = half(wide, ranges)
    assert {"up", "down"} <= set(kept)
    checks = agreement(
        trained.logits, _run(model, trained.pixels), rounding, "fp16", "photographs", OneClass()
    )
    assert all(check.passed for check in checks), checks
    narrow = copy.deepcopy(ranges)
    for name in narrow.data:  # as if the ranges had not been checked
        narrow.data[name] = type(narrow.data[name])(lowest=np.float32(-1), highest=np.float32(1))
    blind, _ = half(wide, narrow)
    weights = next(item for item in blind.graph.initializer if item.name == "up_factor")
    assert weights.data_type == onnx.TensorProto.FLOAT, (
        "a weight beyond float16 is seen without calibration"
    )


def test_values_that_are_no_numbers_fail_agreement() -> None:
    expected = np.array([[1.0, 2.0], [3.0, 1.0]])
    found = expected.copy()
    found[1, 0] = np.inf
    failed = {
        check.name
        for check in agreement(expected, found, 1e-4, "fp16", "any", OneClass())
        if not check.passed
    }
    assert "fp16 new NaN or Inf" in failed


def test_a_tie_is_no_disagreement_and_a_clear_answer_that_changes_is() -> None:
    """Regression: one tie among 50 images made the agreement check refuse fp16."""
    expected = np.tile([[3.0, 1.0, 0.0]], (50, 1))
    expected[7] = [2.0, 1.99995, 0.0]
    found = expected + np.array([[-1e-4, 1e-4, 0.0]])
    assert found[7].argmax() != expected[7].argmax()
    assert all(
        check.passed for check in agreement(expected, found, 1e-4, "fp16", "val", OneClass())
    )
    found[9] = [1.0, 3.0, 0.0]
    failed = {
        check.name
        for check in agreement(expected, found, 1e-4, "fp16", "val", OneClass())
        if not check.passed
    }
    assert failed == {"fp16 logits", "fp16 top-1 changed, not in ties"}


def test_every_target_loads_in_its_oldest_onnxruntime(trained: Trained, tmp_path: Path) -> None:
    """Both forms of every variant, in fresh environments with exactly that version."""
    files: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        cores = {"fp32": trained.core}
        if "int8" in target.variants:
            cores["int8"] = int8(trained.core, trained.ranges, target)
        if "fp16" in target.variants:
            cores["fp16"] = half(trained.core, trained.ranges)[0]
        for precision, core in cores.items():
            path = tmp_path / f"{name}-{precision}.onnx"
            write(image_form(core, trained.preprocess, OneClass(temperature=1.0)), path, {})
            assert unshippable(path, target) == ""
            files.setdefault(target.oldest, []).append(str(path))
    code = (
        "import sys, numpy, onnxruntime as ort\n"
        "for file in sys.argv[1:]:\n"
        "    s = ort.InferenceSession(file, providers=['CPUExecutionProvider'])\n"
        "    p, e = s.run(None, {'image': numpy.full((2, 50, 70, 3), 90, numpy.uint8)})\n"
        "    print(ort.__version__, p.shape, numpy.isfinite(p).all())\n"
    )
    for version, paths in files.items():
        python = bare(tmp_path / version, "--no-deps", f"onnxruntime=={version}.*", "numpy<2")
        done = subprocess.run(
            [python, "-c", code, *paths], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("(2, 4) True") == len(paths)
        assert done.stdout.startswith(version)


@pytest.mark.parametrize(
    ("change", "said"), [("opset", "expected opset 18 at most, found 20"), ("ir", "IR 8 at most")]
)
def test_a_file_too_new_for_the_target_is_unshippable(
    trained: Trained, tmp_path: Path, change: str, said: str
) -> None:
    model = copy.deepcopy(trained.core)
    if change == "opset":
        model.opset_import[0].version = 20
    else:
        model.ir_version = 10
    write(model, tmp_path / "new.onnx", {})
    assert said in unshippable(tmp_path / "new.onnx", TARGETS["arm64"])


def test_an_unknown_calibration_is_refused(trained: Trained) -> None:
    with pytest.raises(
        FtkitError, match="expected one of minmax, percentile, entropy, found 'best'"
    ):
        calibrate(trained.core, iter([]), trained.preprocess, "best")
