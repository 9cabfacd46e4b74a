"""Quantization-aware training simulates the exported graph and lowers its own loss."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import ftkit, settings
from onnx import helper

from ftkit.exporting import int8 as ladder
from ftkit.exporting.qat import Simulated, fine_tune
from ftkit_export.conversion.quantize import calibrate, int8, quantized_nodes, sqnr
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess, decode
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import TARGETS


@pytest.mark.parametrize("target", ["x86-vnni", "x86", "arm64"])
def test_training_simulates_the_shipped_graph_and_brings_it_nearer(
    bundle: Path, photos: Path, target: str
) -> None:
    core, preprocess = (
        onnx.load(bundle / "variants" / "fp32-core.onnx"),
        Preprocess(size=96, resize=96, mean=(127,) * 3, std=(128,) * 3),
    )
    images = [preprocess.canvas(decode(path)) for path in sorted(photos.rglob("*.png"))[::2]]
    pixels = preprocess.pixels(np.stack(images))
    teacher = Session(core.SerializeToString()).run(pixels)[0]
    ranges = calibrate(core, iter([pixels[:16], pixels[16:32]]), preprocess)
    quantized = int8(core, ranges, TARGETS[target])
    shipped = Session(quantized.SerializeToString()).run(pixels)[0]
    with torch.inference_mode():
        simulated = Simulated(core, quantized)(torch.from_numpy(pixels)).numpy()
    if target != "x86-vnni":  # kernels may round differently on this machine; the graph is the same
        assert sqnr(teacher, simulated) > 3
    else:
        assert sqnr(shipped, simulated) > sqnr(teacher, shipped) + 6

    trained = fine_tune(
        core, quantized, lambda rows: pixels[rows], teacher.argmax(1), teacher, epochs=3
    )
    again = int8(trained, ranges, TARGETS[target])
    assert quantized_nodes(again) == quantized_nodes(quantized)
    with torch.inference_mode():
        after = Simulated(trained, again)(torch.from_numpy(pixels)).numpy()

    def loss(logits: np.ndarray) -> float:
        """Loss of the stage: half from the labels, half from fp32's outputs."""
        found, wanted = torch.from_numpy(logits), torch.from_numpy(teacher)
        soft = F.kl_div(found.log_softmax(1), wanted.softmax(1), reduction="batchmean")
        return float(0.5 * F.cross_entropy(found, wanted.argmax(1)) + 0.5 * soft)

    assert loss(after) < 0.9 * loss(simulated)


def test_an_operator_that_cannot_be_trained_through_is_named(bundle: Path) -> None:
    core = onnx.load(bundle / "variants" / "fp32-core.onnx")
    odd = onnx.load(bundle / "variants" / "fp32-core.onnx")
    odd.graph.node.append(helper.make_node("Erf", ["logits"], ["erf"]))
    with pytest.raises(FtkitError, match="expected operators it can train through, found Erf"):
        Simulated(core, odd)


def test_the_stage_is_the_last_rung_and_synthetic_vectors_hold_no_photograph(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "RUNGS", (0,))  # the other rungs have their own tests
    asked = settings("export.qat_epochs=1", "export.golden=synthetic")
    out = tmp_path / "bundle"
    result = ftkit("export", run, "--out", out, "--quick", *asked)
    assert result.exit_code == 0, result.output
    assert "quantization-aware stage  1/1  loss" in result.stdout
    assert "int8, trained" in result.stdout
    images = json.loads((out / "golden" / "golden.json").read_text())["images"]
    assert {image["group"] for image in images} == {"noise", "extremes"}
    assert len(list((out / "golden").glob("*.png"))) == len(images) == 11
    assert ftkit("verify", out).exit_code == 0
