"""Correct pixels from every kind of file, and the same pixels from the graph."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftkit_export.conversion.graph import pixel_model
from ftkit_export.proof.parity import edge_images
from ftkit_export.runtime.errors import FtkitError, ImageError, UnavailableImageError
from ftkit_export.runtime.preprocess import (
    FITS,
    INPUT_FORMATS,
    Preprocess,
    decode,
    from_frame,
    to_frame,
)
from ftkit_export.runtime.session import Session

RED_BLUE = np.zeros((20, 30, 3), np.uint8)
RED_BLUE[:, :15, 0], RED_BLUE[:, 15:, 2] = 200, 200


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_rgba_is_laid_over_white() -> None:
    rgba = np.dstack([RED_BLUE, np.full((20, 30), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    found = decode(_saved(Image.fromarray(rgba), "PNG"))
    assert (found[:10] == 255).all()
    assert (found[10:] == RED_BLUE[10:]).all()


def test_palette_image_gets_its_colours() -> None:
    assert (decode(_saved(Image.fromarray(RED_BLUE).quantize(4), "PNG")) == RED_BLUE).all()


def test_palette_image_with_a_transparent_colour_is_laid_over_white() -> None:
    image = Image.fromarray(RED_BLUE).quantize(4)
    index = image.getpixel((0, 0))
    found = decode(_saved(image, "PNG", transparency=index))
    assert (found[:, :15] == 255).all()
    assert (found[:, 15:] == RED_BLUE[:, 15:]).all()


def test_sixteen_bit_grey_is_a_255th_of_its_range() -> None:
    levels = np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)
    found = decode(_saved(Image.fromarray(levels), "PNG"))
    assert (found == np.rint(levels / 257).astype(np.uint8)[..., None]).all()


def test_twelve_bits_in_sixteen_are_refused_until_their_white_is_said() -> None:
    """Regression: pictures of a 12-bit camera kept only 16 grey levels."""
    levels = np.linspace(0, 4095, 4096).astype(np.uint16).reshape(64, 64)
    picture = _saved(Image.fromarray(levels), "PNG")
    with pytest.raises(ImageError, match=r"found none above 4095.*preprocess\.white=4095"):
        decode(picture)
    found = Preprocess(white=4095).decode(picture)
    assert len(np.unique(found)) == 256
    assert (found[-1, -1] == 255).all()
    with pytest.raises(ImageError, match="expected integers of 0 to 4095, found 0 to 60000"):
        Preprocess(white=4095).decode(
            _saved(Image.fromarray(np.array([[0, 60_000]], np.uint16)), "PNG")
        )
    dark = Preprocess(white=65535).decode(picture)
    assert dark.max() == 16
    assert decode(_saved(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")).max() == 0, (
        "black is black at any depth"
    )
    with pytest.raises(FtkitError, match=r"preprocess\.white: expected 1 to 65535"):
        Preprocess(white=0)


def test_integers_are_not_scaled_image_by_image() -> None:
    """Regression: mode I was divided by 257 if a bright speck was present, darkening the rest."""
    plain, speck = np.full((8, 8), 30_000, np.int32), np.full((8, 8), 30_000, np.int32)
    speck[0, 0] = 65_535
    one, other = (decode(_saved(Image.fromarray(values), "TIFF")) for values in (plain, speck))
    assert one[4, 4, 0] == other[4, 4, 0] == round(30_000 / 257)
    for values in (np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ImageError, match="expected integers of 0 to 65535"):
            decode(_saved(Image.fromarray(values), "TIFF"))


def test_floating_point_images_are_0_to_1_or_refused() -> None:
    """Regression: they were decoded as black."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert (decode(_saved(Image.fromarray(ramp), "TIFF"))[..., 0].ravel() == np.arange(256)).all()
    for values in (ramp * 255, ramp - 0.5, np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(ImageError, match="expected floating-point values of 0 to 1"):
            decode(_saved(Image.fromarray(values), "TIFF"))


def test_cmyk_jpeg_becomes_rgb() -> None:
    found = decode(_saved(Image.fromarray(RED_BLUE).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(found[:, :10].mean((0, 1)) - (200, 0, 0)).max() < 12
    assert np.abs(found[:, 20:].mean((0, 1)) - (0, 0, 200)).max() < 12


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # display rotated by 90 degrees clockwise
    found = decode(_saved(Image.fromarray(RED_BLUE), "PNG", exif=exif))
    assert (found == np.rot90(RED_BLUE, -1)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "no known image format"),
        (
            _saved(
                Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)),
                "PNG",
            )[:3000],
            "",
        ),
    ],
    ids=["zero-byte", "text", "truncated"],
)
def test_a_bad_file_is_named_with_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad one.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bad one\.png: expected an image, found ") as caught:
        decode(path)
    assert reason in str(caught.value)


def test_an_image_too_large_to_be_honest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="--max-pixels"):
        decode(_saved(Image.fromarray(RED_BLUE), "PNG"))


@pytest.mark.parametrize("fit", FITS)
def test_the_graph_gives_pillows_pixels(fit: str, elpv: list[tuple[Path, str]]) -> None:
    """Within 1 grey level on photographs and 2 on noise, from 1x1 to 8000x2, alone and batched."""
    preprocess = Preprocess(size=96, resize=110, fit=fit)
    session = Session(pixel_model(preprocess).SerializeToString())
    photographs = [decode(path)[: 300 - 40 * (i % 3)] for i, (path, _) in enumerate(elpv[:6])]
    for group, images in {"photographs": photographs, **edge_images(96)}.items():
        for image in images:
            levels, pixels = session.run(np.stack([image, image]))
            canvas = preprocess.canvas(image)
            assert canvas.shape == (110, 110, 3)
            off = np.abs(levels[1].astype(int) - canvas[7:103, 7:103])
            assert off.max() <= (1 if group == "photographs" else 2)
            expected = preprocess.pixels(canvas[None])
            assert np.abs(pixels[1] - expected[0]).max() <= off.max() / min(preprocess.std) + 1e-5


def test_pad_keeps_the_whole_image_and_crop_its_centre() -> None:
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, :5] = 255  # only at the left edge
    sizes = {"size": 40, "resize": 40}
    assert Preprocess(fit="crop", **sizes).canvas(image).max() == 0
    padded = Preprocess(fit="pad", **sizes).canvas(image)
    assert (padded[15:25, :5] == 255).all()
    assert padded[:15].max() == padded[25:].max() == 0


@pytest.mark.parametrize("fields", [{"fit": "stretch"}, {"size": 300}, {"std": (1.0, 0.0, 1.0)}])
def test_a_senseless_preprocess_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(FtkitError, match="preprocess"):
        Preprocess(**fields)


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
def test_the_graph_takes_a_cameras_frames_as_numpy_does(input_format: str) -> None:
    preprocess, rng = Preprocess(size=64, resize=70), np.random.default_rng(0)
    session = Session(pixel_model(preprocess, input_format).SerializeToString())
    for shape in ((90, 120, 3), (33, 41, 3), (1, 1, 3)):
        image = rng.integers(0, 256, shape, np.uint8)
        frame = to_frame(image, input_format)
        levels, _ = session.run(np.stack([frame, frame]))
        expected = preprocess.canvas(from_frame(frame, input_format))[3:67, 3:67]
        assert (np.abs(levels[1].astype(int) - expected) > 2).mean() <= 1e-3


def test_frames_keep_the_picture() -> None:
    """White, greys and pure colours survive the conversion to each format that can hold them."""
    colours = np.array(
        [[255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8
    )
    image = colours.repeat(4, 0).reshape(5, 4, 3).repeat(4, 0)
    assert np.array_equal(from_frame(to_frame(image, "bgr"), "bgr"), image)
    assert np.abs(from_frame(to_frame(image, "nv12"), "nv12").astype(int) - image).max() <= 3
    assert (
        np.abs(from_frame(to_frame(image, "grey"), "grey")[:8].astype(int) - image[:8]).max() == 0
    )
    assert to_frame(image, "nv12").shape == (30, 4, 1)
    red = to_frame(image[8:12], "nv12")[..., 0]  # BT.601: Y 81, U 90, V 240
    assert np.abs(red[0, 0].astype(int) - 81) <= 1
    assert np.abs(red[4, :2].astype(int) - [90, 240]).max() <= 1


def test_a_codec_that_runs_out_of_memory_blames_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reports it as an OSError, which used to be cached as a bad file."""

    def load(self: object) -> None:
        raise OSError("out of memory when reading image file")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UnavailableImageError, match="expected memory to decode it"):
        decode(_saved(Image.fromarray(RED_BLUE), "JPEG"))
