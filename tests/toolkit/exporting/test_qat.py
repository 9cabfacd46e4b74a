"""Quantization-aware training simulates the exported graph and lowers its own loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def test_sensitive_operators_follow_into_float_until_the_accuracy_holds(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: every candidate with fewer than eight operators in float answers one class only."""
    made = ladder._Calibrated.int8

    def wrecked(
        self: object, core: onnx.ModelProto, *part: object, keep: Sequence[str] = ()
    ) -> Any:
        model = made(self, core, *part, keep=keep)  # type: ignore[arg-type]
        if len(keep) < 8:
            head = next(node for node in model.graph.node if "logits" in node.output)
            head.output[0] = "real"
            zeros = helper.make_node("Sub", ["real", "real"], ["logits"], name="wrecked")
            model.graph.node.append(zeros)
        return model

    monkeypatch.setattr(ladder._Calibrated, "int8", wrecked)
    monkeypatch.setattr(ladder, "_first_in_float", lambda *arguments: [])
    asked = settings("export.max_accuracy_drop=0.4")
    done = ftkit("export", run, "--out", tmp_path / "bundle", "--quick", *asked)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["evidence"]["decision"]
    assert [row["name"] for row in rows] == ["fp32", "int8", "int8, 4 float", "int8, 8 float"]
    # Its verdict also needs it to be faster, which at 96 pixels is a matter of the machine's load
    assert [row["accuracy"] > 0.5 for row in rows] == [True, False, False, True]
    assert len(rows[3]["kept"]) == 8
    assert rows[3]["in_8_bits"] == rows[3]["heavy"] - 8


def test_no_more_candidates_are_made_than_the_images_could_accept(bundle: Path) -> None:
    rows = json.loads((bundle / "manifest.json").read_text())["evidence"]["decision"]
    assert rows[1]["verdict"] != "accepted", "a dozen images settle no point"
    assert len(rows) == 2
