"""Untrusted ONNX files are inspected before loading: no external data, no unknown operators."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.onnxfile import inspect
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.session import Session


def _model(*, domain: str = "", **where: str) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    if where:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in where.items():
            weight.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    imports = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y], [weight]), opset_imports=imports, ir_version=8
    )


def test_a_plain_model_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model().SerializeToString())
    found = inspect(path)
    assert (found.ir, found.opset, found.nodes) == (8, 18, {"Add": 1})


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "weights.bin"])
def test_external_data_is_refused_wherever_it_points(tmp_path: Path, location: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model(location=location).SerializeToString())
    for opened in (inspect, Session):
        with pytest.raises(
            BundleError, match=f"weights inside the file, found them outside at '{location}'"
        ):
            opened(path)


def test_external_data_within_a_subgraph_and_an_attribute_is_found(tmp_path: Path) -> None:
    outside = _model(location="../x").graph.initializer[0]
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=outside)],
        "inner",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])],
    )
    node = helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("b", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    with pytest.raises(BundleError, match="found them outside"):
        inspect(path)


def test_external_data_of_a_sparse_constant_is_found(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(
        values=_model(location="/etc/passwd").graph.initializer[0], dims=[8]
    )
    node = helper.make_node("Constant", [], ["y"], sparse_value=sparse)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8])]
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    with pytest.raises(BundleError, match="found them outside at '/etc/passwd'"):
        inspect(path)


def test_a_tag_that_other_readers_would_cut_short_is_refused(tmp_path: Path) -> None:
    raw = _model(location="../x").SerializeToString()
    assert raw.count(b"\x6a") >= 1  # field 13, bytes
    inner = _model(location="../x").graph.initializer[0].SerializeToString()
    disguised = inner.replace(b"\x6a", b"\xea\x80\x80\x80\x10", 1)
    path = tmp_path / "m.onnx"
    path.write_bytes(
        b"\x08\x08\x3a"
        + bytes([len(disguised) + 2])
        + b"\x2a"
        + bytes([len(disguised)])
        + disguised
    )
    with pytest.raises(BundleError, match="expected an ONNX model, found other bytes"):
        inspect(path)


def test_an_unknown_domain_and_functions_of_its_own_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model(domain="evil.ops").SerializeToString())
    with pytest.raises(
        BundleError, match=r"expected standard operators, found the domain 'evil\.ops'"
    ):
        inspect(path)
    model = _model()
    model.functions.add(name="f", domain="")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="functions of the file's own"):
        inspect(path)


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04zip", b"\xff" * 64, b"\x08"])
def test_other_bytes_are_no_model(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(junk)
    with pytest.raises(BundleError, match="expected an ONNX model, found other bytes"):
        inspect(path)


def test_a_model_cut_short_is_no_model(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.onnx", _model().SerializeToString()
    for end in range(1, len(whole) - 20):
        path.write_bytes(whole[:end])
        with pytest.raises(BundleError):
            inspect(path)


def test_an_engine_that_opens_files_of_its_own_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    """The domain com.microsoft is standard, but its EPContext opens another file or an engine."""
    node = helper.make_node(
        "EPContext",
        ["x"],
        ["y"],
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context="../../engine.bin",
        source="TensorrtExecutionProvider",
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=imports, ir_version=8
    )
    path = tmp_path / "engine.onnx"
    path.write_bytes(model.SerializeToString())
    for use in (inspect, Session):
        with pytest.raises(BundleError, match="found EPContext, which opens an engine or a file"):
            use(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", "no JSON"),
        ("labels", "[1, 2]"),
        ("labels", '["a"]'),
        ("preprocess", "[]"),
        ("preprocess", '{"size": "big"}'),
        ("temperature", "warm"),
        ("temperature", "-1"),
        ("input_format", "yuv"),
        ("out_of_domain", "{}"),
        ("out_of_domain", '{"means": {"base64": "!"}}'),
        ("abstain_threshold", ""),
    ],
)
def test_damaged_metadata_is_one_sentence(
    bundle: Path, tmp_path: Path, key: str, value: str
) -> None:
    model = onnx.load(bundle / "model.onnx")
    next(item for item in model.metadata_props if item.key == key).value = value
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        BundleError, match=r"model\.onnx: expected the metadata that ftkit writes, found it damaged"
    ):
        Classifier(tmp_path / "model.onnx")


def test_metadata_that_is_no_text_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    name = json.loads((bundle / "manifest.json").read_text())["labels"][0].encode()
    (tmp_path / "model.onnx").write_bytes(data.replace(name, b"\xff" * len(name)))
    with pytest.raises(BundleError, match="expected metadata in UTF-8"):
        Classifier(tmp_path / "model.onnx")
