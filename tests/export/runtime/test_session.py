"""A session runs on the requested provider or fails; there is no silent fallback."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ftkit.models.backbones import build
from ftkit.utils.distributed import joined
from ftkit_export.conversion.convert import export_core
from ftkit_export.conversion.graph import pixel_model
from ftkit_export.runtime import session
from ftkit_export.runtime.errors import FtkitError, ProviderError
from ftkit_export.runtime.onnxfile import shape_nodes
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session, offered, parse_providers

MODEL = pixel_model(Preprocess(size=8, resize=8)).SerializeToString()


def _cuda_works() -> bool:
    try:
        Session(MODEL, provider="cuda")
    except FtkitError:
        return False
    return True


def test_every_node_runs_on_the_cpu_when_asked() -> None:
    session = Session(MODEL, provider="cpu", threads=1)
    assert {where for where, _, _ in session._assigned()} == {"CPUExecutionProvider"}
    assert session.placement == "every operator on CPUExecutionProvider"
    assert session.run(np.zeros((2, 5, 9, 3), np.uint8))[0].shape == (2, 8, 8, 3)


@pytest.mark.skipif(
    "cuda" not in offered() or _cuda_works(), reason="needs an ONNX Runtime for CUDA and no GPU"
)
def test_cuda_asked_for_and_cpu_got_is_an_error_that_names_the_library() -> None:
    with pytest.raises(
        ProviderError, match=r"expected a session on CUDAExecutionProvider, found CPU.*\.so"
    ):
        Session(MODEL, provider="cuda")


def test_an_absent_provider_is_refused_with_what_there_is() -> None:
    with pytest.raises(ProviderError, match=r"coreml.*found one with.*cpu"):
        Session(MODEL, provider="coreml")


def test_an_unknown_provider_is_answered_with_the_choices() -> None:
    with pytest.raises(ProviderError, match=r"'gpu'\. Try cuda; there are: coreml, cpu, cuda"):
        parse_providers("cpu,gpu")
    assert parse_providers("cpu, cuda,cpu") == ["cpu", "cuda"]


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(FtkitError, match="expected a model ONNX Runtime can load"):
        Session(b"junk")


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    code = (
        "import ftkit_export.runtime.session as s, os, sys;"
        "assert 'onnxruntime' not in sys.modules; s.offered(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("told", "expected"),
    [("250000 100000\n", 2), ("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", 8)],
)
def test_a_containers_quota_bounds_the_threads(
    told: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `docker run --cpus 2` all cores of the machine are visible, to torch as well."""
    monkeypatch.setattr(session, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(session, "processors", lambda: list(range(8)))
    (tmp_path / "cpu.max").write_text(told)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        with joined("cpu"):
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)
    assert Session(MODEL).threads == expected


def _away(model: bytes, kinds: set[str]) -> list[tuple[str, str, str]]:
    """ONNX Runtime's node assignments for a CUDA session with these operators on the CPU."""
    return [
        (
            "CPUExecutionProvider" if node.op_type in kinds else "CUDAExecutionProvider",
            node.name,
            node.op_type,
        )
        for node in onnx.load_from_string(model).graph.node
    ]


@pytest.fixture(scope="module")
def transformer() -> bytes:
    """Core form of a vision transformer, whose dynamic batch adds arithmetic on shapes."""
    backbone = build("vit_tiny_patch16_224", 3, "none")
    model = export_core(backbone.model, 224).model
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node {number}"
    return model.SerializeToString()


def _placed(monkeypatch: pytest.MonkeyPatch, model: bytes, provider: str, kinds: set[str]) -> str:
    opened = Session(model)
    opened.provider = provider
    monkeypatch.setattr(opened, "_assigned", lambda: _away(model, kinds))
    return opened._placed(model)


def test_arithmetic_on_shapes_may_run_on_the_cpu_and_nothing_else(
    transformer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        _placed(monkeypatch, transformer, "cuda", {"Shape"})
        == "every operator on CUDAExecutionProvider"
    )
    with pytest.raises(
        ProviderError, match=r"1 of \d+ operators elsewhere: Conv on CPUExecutionProvider"
    ):
        _placed(monkeypatch, transformer, "cuda", {"Shape", "Conv"})
    with pytest.raises(ProviderError, match="LayerNormalization on CPU"):
        _placed(monkeypatch, transformer, "cuda", {"LayerNormalization"})
    shapes = shape_nodes(transformer)
    kinds = {node.name: node.op_type for node in onnx.load_from_string(transformer).graph.node}
    assert {"Shape", "Concat"} <= {kinds[name] for name in shapes}
    assert not {"Conv", "MatMul", "Gemm", "Add", "Softmax", "Expand"} & {
        kinds[name] for name in shapes
    }


def test_what_another_provider_takes_over_by_design_is_said(
    transformer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _placed(monkeypatch, transformer, "openvino", {"Softmax"})
    assert "12 on CPUExecutionProvider" in found


def test_a_runtime_that_cannot_tell_is_unknown_and_no_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = Session(MODEL)
    opened.provider = "cuda"
    monkeypatch.setattr(opened, "_assigned", list)
    assert opened._placed(MODEL).startswith("unknown")


def test_tensorrt_keeps_its_engines_where_the_other_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are cached, because building one takes minutes.

    ONNX Runtime identifies engines by the graph's names and shapes, not by its weights: two runs of
    one recipe must not share a folder.
    """
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    one, other, again = (session.engine_cache(model) for model in (b"one", b"other", b"one"))
    assert one == again != other
    folder = Path(one["trt_engine_cache_path"])
    assert one["trt_engine_cache_enable"] == "True"
    assert folder.is_dir()
    assert folder.parent == tmp_path / "cache" / "tensorrt"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "file"))
    assert session.engine_cache(b"one") == {}, "no place for them is no error"
