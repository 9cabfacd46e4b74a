"""Collected pictures as a browser shows them.

content, kind = for_browser(Path("collected/doubtful/1.ppm"))
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import decode

SHOWN = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
}


def for_browser(path: Path) -> tuple[bytes, str]:
    """The content of an image file and its media type; of one that no browser shows (the C++ runner's
    PPM and PGM, TIFF), a PNG of it. Raises OSError, or ImageError for a file that cannot be decoded."""
    if kind := SHOWN.get(path.suffix.lower()):
        return path.read_bytes(), kind
    content = io.BytesIO()
    Image.fromarray(decode(path)).save(content, "PNG", compress_level=1)
    return content.getvalue(), "image/png"


def picture_source(path: Path) -> str:
    """What an <img> takes: the file itself, or the PNG of one that no browser shows."""
    if path.suffix.lower() in SHOWN:
        return path.as_uri()
    try:
        content, kind = for_browser(path)
    except (OSError, FtkitError):  # gone since, or damaged
        return path.as_uri()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
