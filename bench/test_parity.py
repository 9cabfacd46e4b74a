"""Parity of every recipe's backbone, in units of the framework's own float32 error: no false alarm.

pytest bench/test_parity.py        (the figures are in the table's extra_info: --benchmark-json FILE)
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from elpv_dataset import __file__ as elpv_file
from pytest_benchmark.fixture import BenchmarkFixture

from ftkit.models.backbones import build
from ftkit.models.weights import PACKAGES
from ftkit.recipe import load_recipe, names
from ftkit_export.conversion.convert import export_core, write
from ftkit_export.conversion.graph import image_form
from ftkit_export.proof.parity import Parity, Reference, measure_parity
from ftkit_export.runtime.preprocess import decode
from ftkit_export.runtime.readout import OneClass


@pytest.mark.parametrize("name", sorted({load_recipe(recipe).backbone for recipe in names()}))
def test_parity_on_cpu(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    """Weights are pretrained if a package provides them, and random if they would be downloaded."""
    torch.manual_seed(0)
    backbone = build(name, 4, "pretrained" if name in PACKAGES else "none")
    preprocess = backbone.preprocess
    core = export_core(backbone.model, preprocess.size)
    write(core.model, tmp_path / "core.onnx", {})
    write(
        image_form(core.model, preprocess, OneClass(temperature=1.0)), tmp_path / "model.onnx", {}
    )
    files = sorted((Path(elpv_file).parent / "data" / "images").glob("*.png"))[::11]
    photographs = [decode(path) for path in files]
    canvases = np.stack([preprocess.canvas(image) for image in photographs])
    arguments = (
        Reference(backbone.model),
        tmp_path / "core.onnx",
        tmp_path / "model.onnx",
        canvases,
        photographs[:64],
        preprocess,
        1.0,
        core.layers,
    )

    parity: Parity = benchmark.pedantic(measure_parity, args=arguments, rounds=1)
    for check in parity.checks:
        if check.floor:
            units = check.value / check.floor
            benchmark.extra_info[check.group] = (
                f"{units:.2f} f (max |difference| {check.value:.2e})"
            )
            print(
                f"{name}, {check.group}: {units:.2f} f, f = {check.floor:.2e}, max |difference| {check.value:.2e}"
            )

    worst = parity.worst
    print(
        f"{name}: worst check {worst.name}, {worst.group}, at {worst.value / (worst.limit or 1):.2f} of its limit"
    )
    assert parity.passed, worst
