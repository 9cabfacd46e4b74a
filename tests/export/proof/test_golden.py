"""Golden vectors tell a file that answers otherwise, and hold for the one that was exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ftkit_export.runtime.verify import read_manifest, replay_golden


def test_every_variant_and_provider_form_has_a_tolerance_and_answers_within(bundle: Path) -> None:
    entries = json.loads((bundle / "golden" / "golden.json").read_text())["images"]
    stored = np.load(bundle / "golden" / "expected.npz")
    assert len(entries) == len(stored["logits"]) == len(stored["probabilities"])
    assert {entry["group"] for entry in entries} == {"photographs", "noise", "extremes"}
    assert stored["probabilities"].sum(1) == pytest.approx(1.0)
    for entry in entries:
        assert set(entry["tolerance"]) == set(read_manifest(bundle)["variants"])
        assert {"cpu", "cuda", "tf32", "fp16"} <= set(entry["tolerance"]["fp32"])
        limits = [pair["logits"] for pair in entry["tolerance"]["fp32"].values()]
        assert min(limits) > 0


def test_a_weight_that_moved_by_a_thousandth_is_seen(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    assert all(check.passed for check in replay_golden(folder, manifest, "cpu")[0])

    path = folder / manifest["variants"]["fp32"]["core"]
    model = onnx.load(path)
    head = max(
        (item for item in model.graph.initializer if len(item.dims) == 2),
        key=lambda item: int(np.prod(item.dims)),
    )
    head.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(1.001), head.name)
    )
    onnx.save(model, path)
    checks = replay_golden(folder, manifest, "cpu")[0]
    assert not all(check.passed for check in checks)
