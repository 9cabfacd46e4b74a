"""Parity tells an equal file from one that is not, and names the layer."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ftkit.backbones import build
from ftkit_export.convert import Core, export_core, write
from ftkit_export.graph import image_form
from ftkit_export.parity import Parity, Reference, compare
from ftkit_export.preprocess import Preprocess
from ftkit_export.session import Session

PREPROCESS = Preprocess(size=64, resize=70)
TEMPERATURE = 1.3
PHOTOGRAPHS = [np.random.default_rng(i).integers(0, 256, (80 + i, 90, 3), np.uint8) // 2 + 40 for i in range(10)]


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, Core]:
    model = build("efficientnet_lite0", 4).model
    return model, export_core(model, PREPROCESS.size)


def _compare(
    model: torch.nn.Module, core: Core, folder: Path, spoil: Callable[[onnx.ModelProto], None] | None = None,
    preprocess: Preprocess = PREPROCESS, temperature: float = TEMPERATURE,
) -> Parity:  # fmt: skip
    proto = copy.deepcopy(core.model)
    if spoil:
        spoil(proto)
    write(proto, folder / "core.onnx", {})
    write(image_form(proto, preprocess, temperature), folder / "model.onnx", {})
    canvases = np.stack([PREPROCESS.canvas(image) for image in PHOTOGRAPHS])
    return compare(Reference(model), folder / "core.onnx", folder / "model.onnx", canvases, PHOTOGRAPHS, PREPROCESS,
                   TEMPERATURE, core.layers)  # fmt: skip


def _failed(parity: Parity) -> set[str]:
    return {check.name for check in parity.checks if not check.passed}


def test_an_equal_file_passes_within_the_frameworks_own_error(
    trained: tuple[torch.nn.Module, Core], tmp_path: Path
) -> None:
    parity = _compare(*trained, tmp_path)
    assert parity.passed, parity.worst
    assert not parity.first_divergence


def test_a_model_that_tells_nothing_apart_is_no_false_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits near zero at a temperature of 20: the softmax's own rounding is then all there is to see."""
    model = build("efficientnet_lite0", 4).model.eval()
    with torch.no_grad():
        model.get_submodule("classifier").weight.mul_(1e-3)
    monkeypatch.setitem(globals(), "TEMPERATURE", 20.0)
    parity = _compare(model, export_core(model, PREPROCESS.size), tmp_path, temperature=20.0)
    assert parity.passed, parity.worst


class InPlace(torch.nn.Module):
    """Goes on with what its ReLU6 wrote over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(inplace=True), torch.nn.Linear(4, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.stem(pixels) * 20
        self.act(values)
        return self.head(values.mean((2, 3)))


def test_a_clamp_written_in_place_is_exported_as_one() -> None:
    model, pixels = InPlace().eval(), torch.randn(2, 3, 16, 16)
    found = Session(export_core(model, 16).model.SerializeToString()).run(pixels.numpy())[0]
    np.testing.assert_allclose(found, model(pixels).detach(), atol=1e-4)


def test_one_scaled_convolution_is_named(trained: tuple[torch.nn.Module, Core], tmp_path: Path) -> None:
    model, core = trained
    victim = [node for node in core.model.graph.node if node.op_type == "Conv"][20]

    def spoil(proto: onnx.ModelProto) -> None:
        weight = next(item for item in proto.graph.initializer if item.name == victim.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))

    parity = _compare(model, core, tmp_path, spoil)
    assert "core logits" in _failed(parity)
    assert parity.first_divergence.startswith(core.layers[victim.output[0]] + ":")


def test_batchnorm_left_in_training_mode_fails(trained: tuple[torch.nn.Module, Core], tmp_path: Path) -> None:
    """The reference is put in eval mode, so a file exported with batch statistics differs from it."""
    model, core = trained
    other = copy.deepcopy(model)
    with torch.no_grad():
        other(torch.zeros(1, 3, 64, 64))
        other.train()(torch.rand(8, 3, 64, 64))  # moves the running statistics
    assert "core logits" in _failed(_compare(other.eval(), core, tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        Preprocess(size=64, resize=70, mean=(127.0, 127.0, 127.0)),
        Preprocess(size=64, resize=86),
        Preprocess(size=64, resize=70, fit="squash"),
    ],
    ids=["mean", "crop off by 8", "fit"],
)
def test_wrong_preprocessing_in_the_file_fails_end_to_end_only(
    trained: tuple[torch.nn.Module, Core], tmp_path: Path, wrong: Preprocess
) -> None:
    failed = _failed(_compare(*trained, tmp_path, preprocess=wrong))
    assert "probabilities" in failed
    assert not {name for name in failed if name.startswith("core")}


def test_a_wrong_temperature_fails(trained: tuple[torch.nn.Module, Core], tmp_path: Path) -> None:
    assert _failed(_compare(*trained, tmp_path, temperature=1.0)) == {"probabilities"}


def test_nan_never_passes(trained: tuple[torch.nn.Module, Core], tmp_path: Path) -> None:
    model, core = trained

    def spoil(proto: onnx.ModelProto) -> None:
        bias = next(item for item in proto.graph.initializer if item.name.endswith("classifier.bias"))
        bias.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), bias.name))

    parity = _compare(model, core, tmp_path, spoil)
    assert not parity.passed
    assert np.isnan(parity.worst.value)
