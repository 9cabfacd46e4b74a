"""Whole-process times of `ftkit --help`, and of `ftkit predict` on one photograph.

pytest bench/test_startup.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from ftkit.models.backbones import build
from ftkit_export.conversion.convert import export_core, write
from ftkit_export.conversion.graph import image_form
from ftkit_export.runtime.readout import OneClass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 in the image form, as in a bundle."""
    backbone = build("efficientnet_lite0", 4)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    core = export_core(backbone.model, 224)
    write(
        image_form(core.model, backbone.preprocess, OneClass(temperature=1.0)),
        path,
        {"labels": '["a", "b", "c", "d"]'},
    )
    return path


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ftkit", *arguments], check=True, capture_output=True)


def test_help(benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(_run, args=("--help",), rounds=15, warmup_rounds=2)


def test_predict_one_photograph(benchmark: BenchmarkFixture, model: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(photo)
    benchmark.pedantic(_run, args=("predict", str(model), str(photo)), rounds=15, warmup_rounds=2)
