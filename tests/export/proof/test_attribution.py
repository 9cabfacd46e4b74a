"""Planted slowdowns are blamed by name; equal files are not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ftkit
from onnx import TensorProto, helper, numpy_helper

from ftkit_export.proof.attribution import explain
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition
from ftkit_export.runtime.profiling import read_profile


@pytest.fixture(scope="module")
def core(bundle: Path) -> Path:
    """The fp32 core form of the bundle."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    return bundle / str(manifest["variants"]["fp32"]["core"])


def _convolution(model: onnx.ModelProto, weights: str) -> onnx.NodeProto:
    return next(
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].startswith(weights)
    )


def with_casts(model: onnx.ModelProto, *places: str) -> onnx.ModelProto:
    """Every answer of these convolutions goes through float16 and back."""
    for place in places:
        node = _convolution(model, place)
        value = node.output[0]
        node.output[0] = f"{value}/plain"
        at = list(model.graph.node).index(node) + 1
        there = helper.make_node(
            "Cast", [node.output[0]], [f"{value}/half"], to=TensorProto.FLOAT16
        )
        back = helper.make_node("Cast", [f"{value}/half"], [value], to=TensorProto.FLOAT)
        model.graph.node.insert(at, there)
        model.graph.node.insert(at + 1, back)
    return model


def with_output(model: onnx.ModelProto, place: str) -> onnx.ModelProto:
    """A convolution's answer is an output of its own, so that no activation can be fused into it."""
    value = _convolution(model, place).output[0]
    model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    return model


def test_what_was_planted_is_blamed_first_and_nothing_in_equal_files(
    core: Path, bundle: Path, tmp_path: Path
) -> None:
    image = bundle / "golden" / "00.png"
    baseline = Condition(model=str(core), threads=1)

    def against(change: onnx.ModelProto | None, **other: object) -> list[str]:
        path = tmp_path / "candidate.onnx"
        onnx.save(change or onnx.load(core), path)
        found = explain(Condition(model=str(path), threads=1, **other), baseline, image)  # type: ignore[arg-type]
        assert np.isclose(sum(cause.ms for cause in found.causes), found.ms, atol=0.05)
        return [cause.what for cause in found.blamed]

    assert against(None) == []
    casts = against(with_casts(onnx.load(core), "blocks.1.0.conv_pw", "blocks.1.1.conv_pw"))
    assert casts[0] == "new: 4 Cast in 2 places"
    lost = against(with_output(onnx.load(core), "blocks.1.0.conv_pw"))
    assert lost[0].startswith("fusion lost: Clip apart from"), lost
    assert lost[0].endswith("blocks.1.0.conv_pw")
    assert against(None, optimised=False)[0].startswith("ONNX Runtime's optimiser: on before")


def test_the_gate_says_why(core: Path, bundle: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.onnx"
    places = [f"blocks.{group}.0.conv_pw" for group in (1, 2, 3, 4, 5)]
    model = with_casts(onnx.load(core), *places)
    for _ in range(4):
        with_casts(model, *places[:2])
    onnx.save(model, slow)
    image = ("--image", bundle / "golden" / "00.png")
    options = ("--seconds", "60", *image, "--json", tmp_path / "gate.json")
    result = ftkit("bench", slow, "--against", core, *options, "--report", tmp_path / "why.html")
    assert result.exit_code == 1, result.output
    assert "why: +" in result.stdout
    assert "Cast" in result.stdout.partition("why: ")[2]
    assert max(map(len, result.stdout.partition("report: ")[0].splitlines())) <= 80
    told = json.loads((tmp_path / "gate.json").read_text())["why"]
    assert told["causes"][0]["blamed"]
    assert "<svg" in (tmp_path / "why.html").read_text()


def test_a_loops_body_is_not_mistaken_for_other_operators(tmp_path: Path) -> None:
    event = {"cat": "Node", "name": "loop_kernel_time", "dur": 9, "ts": 1}
    told = {"op_name": "Loop", "provider": "CPUExecutionProvider", "node_index": "1"}
    (tmp_path / "profile.json").write_text(json.dumps([{**event, "args": told}]))
    with pytest.raises(FtkitError, match="without control flow, found Loop"):
        read_profile(tmp_path / "profile.json", 1)


def test_a_profile_of_one_file_adds_up(core: Path, bundle: Path, tmp_path: Path) -> None:
    image = ("--image", bundle / "golden" / "00.png")
    page = ("--report", tmp_path / "profile.html")
    result = ftkit("bench", core, "--profile", *image, *page, "--json", tmp_path / "profile.json")
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("report: ")[0]
    assert max(map(len, table.splitlines())) <= 80
    told = json.loads((tmp_path / "profile.json").read_text())["profile"]
    spent = sum(step["ms"] for step in told["steps"])
    assert spent + told["between_ms"] == pytest.approx(told["total_ms"], rel=0.02)
    places = {step["operator"]["place"] for step in told["steps"]}
    assert {"conv_stem", "blocks.3.1.conv_dw", "conv_head"} <= places
    assert "<svg" in (tmp_path / "profile.html").read_text()
    wrong = ftkit("bench", core, "--profile", "--threads", "1,2")
    assert (wrong.exit_code, "expected one provider" in wrong.stderr) == (2, True)
    wrong = ftkit("bench", core, "--against", core, "--profile", "--providers", "cuda")
    assert (wrong.exit_code, "expected the provider cpu" in wrong.stderr) == (2, True)


def _chain(layers: list[tuple[str, int]], size: int = 48) -> onnx.ModelProto:
    """Convolutions of 3 x 3 with these names and numbers of channels, one after the other."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    value, channels = "x", 3
    for name, wide in layers:
        kernel = rng.normal(scale=0.1, size=(wide, channels, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.weight"))
        nodes.append(
            helper.make_node(
                "Conv", [value, f"{name}.weight"], [f"{name}/out"], pads=[1, 1, 1, 1], name=name
            )
        )
        value, channels = f"{name}/out", wide
    return _model(nodes, weights, [1, 3, size, size], value)


def _model(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int], *outputs: str
) -> onnx.ModelProto:
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "chain", [source], results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def _blamed(new: onnx.ModelProto, old: onnx.ModelProto, folder: Path) -> list[str]:
    paths = folder / "new.onnx", folder / "old.onnx"
    for path, model in zip(paths, (new, old), strict=True):
        onnx.save(model, path)
    one, other = (Condition(model=str(path), threads=1) for path in paths)
    found = explain(one, other, processes=6)
    assert np.isclose(sum(cause.ms for cause in found.causes), found.ms, atol=0.05)
    return [cause.what for cause in found.blamed]


def test_layers_are_matched_where_names_are_numbered_anew_or_others(tmp_path: Path) -> None:
    widths = [16, 32, 48, 64, 80]  # ONNX Runtime rounds channels up to as many as a register holds
    old = _chain([(f"features.{n}", wide) for n, wide in enumerate(widths)])
    longer = [16, 112, *widths[1:]]
    new = _chain([(f"features.{n}", wide) for n, wide in enumerate(longer)])
    blamed = _blamed(new, old, tmp_path)
    assert "new: 1 Conv after features.1" in blamed
    assert not any(name in what for what in blamed for name in ("features.4", "features.5"))

    wider = [("a", 16), ("b", 32), ("c", 160), ("d", 64), ("e", 80)]
    blamed = _blamed(_chain(wider), old, tmp_path)
    assert {what.partition(":")[0] for what in blamed} == {"c", "d"}, blamed
    assert "c: Conv, 1x160x48x48 float instead of 1x48x48x48 float" in blamed


def test_what_is_slower_is_told_from_what_is_new_beside_it(tmp_path: Path) -> None:
    def enlarged(mode: str, *, casts: bool) -> onnx.ModelProto:
        model = _chain([("first", 8), ("second", 8)], 96)
        nodes = [helper.make_node("Resize", ["x", "", "", "sizes"], ["large"], mode=mode)]
        if casts:
            nodes += [
                helper.make_node("Cast", ["large"], ["half"], to=TensorProto.FLOAT16),
                helper.make_node("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
            ]
        for place, node in enumerate(nodes):
            model.graph.node.insert(place, node)
        model.graph.node[len(nodes)].input[0] = "back" if casts else "large"
        sizes = np.array([1, 3, 224, 224], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(sizes, "sizes"))
        return model

    blamed = _blamed(enlarged("cubic", casts=True), enlarged("nearest", casts=False), tmp_path)
    assert blamed[0] == "Resize in front of the network"
    assert "new: 2 Cast in front of the network" in blamed


def test_a_fusion_of_several_operators_that_is_lost_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(96, 96)).astype(np.float32), "dense.weight"),
        numpy_helper.from_array(np.float32(np.sqrt(2)), "root"),
        numpy_helper.from_array(np.float32(1), "one"),
        numpy_helper.from_array(np.float32(0.5), "half"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "dense.weight"], ["y"], name="dense"),
        helper.make_node("Div", ["y", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["error"]),
        helper.make_node("Add", ["error", "one"], ["above"]),
        helper.make_node("Mul", ["y", "above"], ["twice"]),
        helper.make_node("Mul", ["twice", "half"], ["z"]),
    ]
    fused = _model(nodes, weights, [512, 96], "z")
    apart = _model(nodes, weights, [512, 96], "z", "error")  # an output, so that it must be there
    (first, *_) = _blamed(apart, fused, tmp_path)
    assert first == "fusion lost: Add and Div and Erf and Mul instead of Gelu in dense"
