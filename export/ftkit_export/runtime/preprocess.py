"""Preprocess: the single definition of preprocessing, from image file to normalised tensor.

    image = decode("cell.jpg")               # (H, W, 3) uint8 RGB
    canvas = preprocess.canvas(image)        # (R, R, 3) uint8, what training stores
    pixels = preprocess.pixels(canvas[None]) # (1, 3, S, S) float32, input of the core form

`graph.py` implements the same as ONNX operators. This file is copied into every bundle, so it needs
only numpy and Pillow.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ftkit_export.runtime.errors import FtkitError, ImageError, UnavailableImageError, choices

FITS = ("crop", "squash", "pad")
WHITE = 65535
MAX_PIXELS = "FTKIT_MAX_PIXELS"  # environment variable: largest image; default: Pillow's
TWELVE_BITS = 4095
# largest side and area, in pixels, of a frame resized for measurement
LONGEST = 20_000
MOST_PIXELS = 200_000_000
INPUT_FORMATS = ("rgb", "bgr", "grey", "nv12")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the network's input.

    size: S, side of the network's input in pixels. resize: R, side of the canvas; R >= S. mean,
    std: per channel, in grey levels (0..255): pixel = (level - mean) / std. fit: "crop" keeps the
    centre square, "squash" resizes the whole image, "pad" letterboxes with black. white: value of
    white in 16-bit images (4095 for a 12-bit camera); None: 65535, and images that use only the
    lowest 12 bits are refused (`decode`). Raises FtkitError for an invalid field.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    fit: str = "crop"
    white: int | None = None

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) for value in (self.size, self.resize, self.white or 1))
        if not (whole and _three_numbers(self.mean) and _three_numbers(self.std)):
            raise FtkitError(
                "preprocess: expected whole numbers for size, resize and white, three numbers for mean and std, "
                f"found {vars(self)}. Try `ftkit recipes lite0`"
            )
        if self.fit not in FITS:
            raise FtkitError(f"preprocess.fit: expected a known value, {choices(self.fit, FITS)}")
        if not 8 <= self.size <= self.resize <= 4096:
            raise FtkitError(
                f"preprocess: expected 8 <= size <= resize <= 4096, found size {self.size}, resize {self.resize}. "
                "Try setting both, e.g. --set preprocess.size=224 --set preprocess.resize=256"
            )
        if not all(0 < value < np.inf for value in self.std):
            raise FtkitError(
                f"preprocess.std: expected three positive numbers, found {self.std}. Try 58.4,57.1,57.4"
            )
        if self.white is not None and not 0 < self.white <= WHITE:
            raise FtkitError(
                f"preprocess.white: expected 1 to {WHITE}, found {self.white}. Try 4095 for 12 bits"
            )
        if not np.isfinite(self.mean).all():
            raise FtkitError(
                f"preprocess.mean: expected three numbers, found {self.mean}. Try 123.7,116.3,103.5"
            )

    def at(self, size: int) -> Preprocess:
        """The same preprocessing for another input size; the canvas scales with it."""
        return replace(self, size=size, resize=max(size, round(self.resize * size / self.size)))

    def decode(self, source: str | Path | bytes) -> np.ndarray[Any, Any]:
        """Decode an image file (path or bytes) -> (H, W, 3) uint8 RGB, with this `white`."""
        return decode(source, self.white)

    def canvas(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 of any size -> (R, R, 3) uint8: `fit`, then antialiased bilinear resize.

        The square is cropped before resizing, so an 8000x2 image costs milliseconds, not gigabytes.
        """
        height, width = image.shape[:2]
        side = self.resize

        if self.fit == "crop":
            square = min(height, width)
            top = (height - square) // 2
            left = (width - square) // 2
            image = image[top : top + square, left : left + square]

        if self.fit != "pad":
            return _resize(image, side, side)

        longest = max(height, width)
        # Integer arithmetic, so that the graph rounds the same way.
        inner_h, inner_w = (
            max(1, (2 * n * side + longest) // (2 * longest)) for n in (height, width)
        )
        out = np.zeros((side, side, 3), np.uint8)
        top = (side - inner_h) // 2
        left = (side - inner_w) // 2
        out[top : top + inner_h, left : left + inner_w] = _resize(image, inner_h, inner_w)

        return out

    def pixels(self, canvases: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(N, R, R, 3) uint8 canvases -> (N, 3, S, S) float32: centre crop, then normalisation.

        pixel = (level - mean) / std.
        """
        start = (self.resize - self.size) // 2
        crop = canvases[:, start : start + self.size, start : start + self.size].astype(np.float32)
        scaled = (crop - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _three_numbers(values: object) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == 3
        and all(isinstance(v, int | float) for v in values)
    )


def _resize(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.asarray(resized)


def parse_frame(text: str) -> tuple[int, int]:
    """ "640x480" -> (640, 480): width, height in pixels. Raises FtkitError for anything else."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower().replace(" ", ""))
    width, height = (int(number) for number in match.groups()) if match else (0, 0)
    if not (0 < width <= LONGEST and 0 < height <= LONGEST and width * height <= MOST_PIXELS):
        raise FtkitError(
            f"frame {text}: expected WIDTHxHEIGHT, each 1 to {LONGEST} and {MOST_PIXELS // 1_000_000} megapixels at "
            "most, found another. Try 640x480"
        )
    return width, height


def scaled(image: np.ndarray[Any, Any], frame: str) -> np.ndarray[Any, Any]:
    """Resize an image (H, W, 3) uint8 to `frame` ("640x480") for a measurement; "": unchanged."""
    if not frame:
        return image
    width, height = parse_frame(frame)
    return _resize(image, height, width)


# BT.601, limited range, as in NV12 from cameras:
# R, G, B = LUMA (Y - 16) + CHROMA times (U - 128, V - 128).
LUMA = 255 / 219
CHROMA = ((0.0, 1.596027), (-0.391762, -0.812968), (2.017232, 0.0))


def to_frame(image: np.ndarray[Any, Any], input_format: str) -> np.ndarray[Any, Any]:
    """Convert (H, W, 3) uint8 RGB to the uint8 frame that a camera of that format delivers.

    rgb, bgr: (H, W, 3). grey: (H, W, 1). nv12: (H * 3 / 2, W, 1), the luma plane, then rows of
    interleaved U and V; H and W are made even by repeating the last row and column.
    """
    if input_format == "bgr":
        return np.ascontiguousarray(image[..., ::-1])
    if input_format == "grey":
        return np.asarray(Image.fromarray(image).convert("L"))[..., None]
    if input_format != "nv12":
        return image

    even = np.pad(
        image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge"
    ).astype(np.float64)
    luma, blue, red = (even @ weights for weights in np.linalg.inv(_nv12_matrix()))
    halved = [
        plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean((1, 3)) + 128
        for plane in (blue, red)
    ]
    chroma = np.stack(halved, -1).reshape(len(halved[0]), -1)
    frame = np.concatenate([luma + 16, chroma]).round().clip(0, 255).astype(np.uint8)

    return frame[..., None]


def from_frame(frame: np.ndarray[Any, Any], input_format: str) -> np.ndarray[Any, Any]:
    """Convert a uint8 frame back to (H, W, 3) uint8 RGB, as the device sees it."""
    if input_format == "bgr":
        return np.ascontiguousarray(frame[..., ::-1])
    if input_format == "grey":
        return np.repeat(frame, 3, -1)
    if input_format != "nv12":
        return frame

    height = frame.shape[0] * 2 // 3
    width = frame.shape[1]
    luma = frame[:height, :, 0].astype(np.float32) - 16
    chroma = frame[height:, :, 0].astype(np.float32).reshape(height // 2, width // 2, 2) - 128
    whole = np.concatenate([luma[..., None], chroma.repeat(2, 0).repeat(2, 1)], -1)
    rgb = whole @ _nv12_matrix().astype(np.float32).T
    rounded: np.ndarray[Any, Any] = rgb.round().clip(0, 255).astype(np.uint8)

    return rounded


def _nv12_matrix() -> np.ndarray[Any, Any]:
    return np.array([[LUMA, *row] for row in CHROMA])


def decode(source: str | Path | bytes, white: int | None = None) -> np.ndarray[Any, Any]:
    """Decode an image file (path or bytes) -> (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    8-bit grey, palettes, CMYK and 1 bit are converted as by Pillow. Transparency is composited over
    white, as viewers do. 16-bit grey: level = 255 value / `white`, rounded; without `white` it is
    65535, and an image that uses only the lowest 12 bits is refused: it may be from a 12-bit
    camera, or a dark scene, and only the user knows. 32-bit integers: likewise, within 0 .. 65535.
    Floats: 0 .. 1. Values out of range are refused. No image is scaled by its own minimum and
    maximum: its grey levels would then depend on the rest of its content. 16-bit colour keeps its
    high byte (Pillow reads no more).

    Raises ImageError naming the file and the reason (truncated, empty, not an image, implausibly
    large, of unknown depth), UnavailableImageError where it cannot be read now.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise UnavailableImageError(
            f"{name}: expected a readable image file, found {error.strerror}. Check the path"
        ) from None

    if not data:
        raise ImageError(f"{name}: expected an image, found an empty file. Remove or replace it")
    if limit := most_pixels():
        Image.MAX_IMAGE_PIXELS = limit

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image), white))
    except _UnknownDepthError as error:
        raise ImageError(f"{name}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        sizes = [f"{int(number) / 1e6:.0f}" for number in re.findall(r"(\d+) pixels", str(error))]
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ImageError(
            f"{name}: expected an image of at most {most:.0f} megapixels, found one of "
            f"{sizes[0] if sizes else 'more'}. If it is no mistake, try --max-pixels N or {MAX_PIXELS}=N"
        ) from None
    except Exception as error:  # Pillow raises whatever its decoders raise: OSError, SyntaxError, struct.error, ...
        # Codecs report it by message
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise UnavailableImageError(
                f"{name}: expected memory to decode it, found too little. Close other programs, or try smaller images"
            ) from None

        reason = (
            "no known image format"
            if "cannot identify" in str(error)
            else str(error).split("\n")[0]
        )
        raise ImageError(
            f"{name}: expected an image, found {reason}. Remove or replace it"
        ) from None


def most_pixels() -> int | None:
    """Image size limit from the environment; None for Pillow's. Raises FtkitError for no number."""
    text = os.environ.get(MAX_PIXELS)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise FtkitError(
            f"{MAX_PIXELS}: expected a number of pixels, found {text!r}. Try {MAX_PIXELS}=200000000"
        )

    return int(text)


@contextmanager
def allowing(pixels: str | None) -> Iterator[None]:
    """Within the block, decode images of up to `pixels`, here and in processes started meanwhile.

    Changes nothing when it is None, or the environment already sets a limit.
    """
    if not pixels or os.environ.get(MAX_PIXELS):
        yield
        return

    before = Image.MAX_IMAGE_PIXELS
    os.environ[MAX_PIXELS] = pixels

    try:
        yield
    finally:
        del os.environ[MAX_PIXELS]
        Image.MAX_IMAGE_PIXELS = before


class _UnknownDepthError(Exception):
    """The meaning of the image's values is unknown."""


def _to_rgb(image: Image.Image, white: int | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray(_from_integers(np.asarray(image).astype(np.int64), white)).convert(
            "RGB"
        )
    if image.mode == "F":
        return Image.fromarray(_from_floats(np.asarray(image).astype(np.float64))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(values: np.ndarray[Any, Any], white: int | None) -> np.ndarray[Any, Any]:
    low = int(values.min(initial=0))
    high = int(values.max(initial=0))
    if low < 0 or high > (white or WHITE):
        raise _UnknownDepthError(
            f"expected integers of 0 to {white or WHITE}, found {low} to {high}. Convert it to 8 bits"
        )
    if white is None and 0 < high <= TWELVE_BITS:
        raise _UnknownDepthError(
            f"expected 16-bit values that use their range, found none above {high}: 12 bits, or a dark scene. "
            f"Try --set preprocess.white={TWELVE_BITS} (or {WHITE}), or convert it to 8 bits"
        )

    levels: np.ndarray[Any, Any] = (
        np.rint(values * (255 / (white or WHITE))).clip(0, 255).astype(np.uint8)
    )
    return levels


def _from_floats(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > 1:
        whole = (
            f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
            if np.isfinite(values).any()
            else "no numbers"
        )
        raise _UnknownDepthError(
            f"expected floating-point values of 0 to 1, found {whole}. Convert it to 8 bits"
        )

    levels: np.ndarray[Any, Any] = np.rint(values * 255).astype(np.uint8)
    return levels
