"""Suggestions for mistyped options and settings: by meaning first, then by spelling, and fast."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ftkit
from PIL import Image

from ftkit_export.runtime.errors import FtkitError, ImageError, choices
from ftkit_export.runtime.preprocess import MAX_PIXELS, allowing, decode


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("export x --p95 4", "Try --set export.p95_ms=8"),
        ("bench x --p95 4", "Try --budget p95_ms=8"),
        ("train x --lr 3", "Try --set stages.1.lr=1e-4"),
        ("train x --sed 3", "Try --seed"),
        ("train x --set p95_ms=4", "Try --set export.p95_ms=4"),
        ("train x --set imgsz=160", "Try --set preprocess.size=160"),
        ("train x --set lr=1", "Try --set stages.0.lr=1"),
        ("train x --set preprocess.fit=letterbox", "Try pad"),
        ("export x --set export.p95=4", "Try p95_ms"),
        ("export x --set max_accuracy_drop=4", "Try --set export.max_accuracy_drop=4"),
        ("predict x https://example.org/a.jpg", "Try curl -s URL | ftkit predict BUNDLE -"),
    ],
)
def test_a_wrong_name_is_answered_by_its_meaning(command: str, meant: str) -> None:
    """Regression: --p95 suggested --zip, and fit=letterbox suggested crop."""
    result = ftkit(*command.split())
    assert (result.exit_code, meant in result.stderr) == (2, True), result.stderr


def test_a_name_like_none_gets_the_list_alone() -> None:
    assert choices("qqqq", ("crop", "pad")) == "found 'qqqq'. Try one of: crop, pad"


def test_wrong_settings_are_told_before_torch_is_imported() -> None:
    """Regression: the error took 4 s."""
    script = (
        "import sys; from ftkit.cli.main import main\n"
        "for words in ('train x --set p95_ms=4', 'train x --set preprocess.fit=letterbox', 'export x --set p95=4'):\n"
        "    assert main(words.split(), standalone_mode=False) == 2, words\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_an_image_on_standard_input_is_answered(bundle: Path, photos: Path) -> None:
    image = next(iter((photos / "mono-ok").iterdir()))
    command = [sys.executable, "-m", "ftkit", "predict", bundle, "-"]
    done = subprocess.run(command, input=image.read_bytes(), capture_output=True, check=True)
    assert (
        done.stdout.decode().split()[1:]
        == ftkit("predict", bundle, image).stdout.removeprefix(str(image)).split()
    )


def test_a_very_large_image_is_told_as_that_and_may_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((9_500, 10_000), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(
        ImageError, match=r"at most 89 megapixels, found one of 95\. .*--max-pixels"
    ):
        decode(tmp_path / "wide.png")
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv(MAX_PIXELS, "100000000")
    try:
        assert decode(tmp_path / "wide.png").shape == (9_500, 10_000, 3)
        monkeypatch.setenv(MAX_PIXELS, "1000000")
        with pytest.raises(ImageError, match="at most 1 megapixels, found one of 95"):
            decode(tmp_path / "wide.png")
        monkeypatch.setenv(MAX_PIXELS, "many")
        with pytest.raises(FtkitError, match="FTKIT_MAX_PIXELS: expected a number of pixels"):
            decode(tmp_path / "wide.png")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_the_limit_of_one_run_ends_with_its_export() -> None:
    """In Python, the pixel limit of one run must not apply to the next in the same process."""
    limit = Image.MAX_IMAGE_PIXELS
    with allowing("100000000"):
        decode(_png())
        assert Image.MAX_IMAGE_PIXELS == 100_000_000
    assert limit == Image.MAX_IMAGE_PIXELS
    assert MAX_PIXELS not in os.environ


def _png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    return content.getvalue()
