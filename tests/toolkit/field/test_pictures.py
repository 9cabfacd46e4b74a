"""Collected pictures are shown as a browser can show them."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ftkit.report.pictures import for_browser, picture_source


def test_what_the_cpp_runner_keeps_is_shown_as_a_png(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    kept = tmp_path / "1.ppm"
    Image.fromarray(pixels).save(kept)
    content, kind = for_browser(kept)
    assert kind == "image/png"
    assert (np.asarray(Image.open(io.BytesIO(content))) == pixels).all()
    head, _, inside = picture_source(kept).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(inside) == content

    Image.fromarray(pixels).save(tmp_path / "2.png")
    assert for_browser(tmp_path / "2.png") == ((tmp_path / "2.png").read_bytes(), "image/png")
    assert picture_source(tmp_path / "2.png") == (tmp_path / "2.png").as_uri()
    assert picture_source(tmp_path / "gone.ppm") == (tmp_path / "gone.ppm").as_uri()
