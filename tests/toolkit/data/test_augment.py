"""Evaluation pixels equal the device's; each augmentation field works, sample by sample."""

import numpy as np
import pytest
import torch

from ftkit.data.augment import augmented, drawn, evaluation, mixed, mixing_of
from ftkit.recipe import Augment
from ftkit_export.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(size=24, resize=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CANVASES = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)


def _augment(**fields: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    draw = drawn(len(CANVASES), generator)
    return augmented(torch.from_numpy(CANVASES), PREPROCESS, Augment(**fields), draw)  # type: ignore[arg-type]


def test_evaluation_gives_the_very_pixels_of_the_pillow_path() -> None:
    preprocess = Preprocess(size=24, resize=32)
    assert np.array_equal(
        evaluation(torch.from_numpy(CANVASES), preprocess).numpy(), preprocess.pixels(CANVASES)
    )


def test_without_scaling_a_view_is_an_untouched_crop_at_many_places() -> None:
    views = _augment().numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    places = set()
    for canvas, view in zip(CANVASES, views, strict=True):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(canvas[top : top + 24, left : left + 24], view)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 20


def test_flips_happen_only_when_allowed_and_to_half_the_samples() -> None:
    plain = _augment()
    flipped = _augment(hflip=True)
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 15 < int(mirrored.sum()) < 49
    upright = _augment(vflip=True)
    assert bool(((upright == plain) | (upright == plain.flip(2))).flatten(1).all(1).any())
    assert not torch.equal(upright, flipped)


def test_four_cached_views_show_all_four_orientations() -> None:
    canvases, augment = torch.from_numpy(CANVASES[:4]), Augment(hflip=True, vflip=True)
    whole = Preprocess(size=32, resize=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    first = evaluation(canvases, whole)
    expected = (first, first.flip(3), first.flip(2), first.flip(2, 3))
    for view in range(4):
        assert torch.equal(
            augmented(canvases, whole, augment, drawn(4, torch.Generator()), view), expected[view]
        )


def test_scale_rotation_and_colour_change_the_samples_and_stay_in_range() -> None:
    plain = _augment()
    for fields in (
        {"scale": 0.5},
        {"rotate": 30.0},
        {"brightness": 0.3},
        {"contrast": 0.3},
        {"saturation": 0.5},
    ):
        changed = _augment(**fields)
        moved = (changed - plain).abs().flatten(1).amax(1)
        assert float((moved > 1).float().mean()) > 0.9, fields  # a draw may be close to no change
        assert len(moved.unique()) > 40, fields  # each sample is drawn separately
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 255


def test_erasing_blanks_a_rectangle_in_its_share_of_samples() -> None:
    plain, erased = _augment(), _augment(erase=0.5)
    blank = (erased == 0) & (plain != 0)
    touched = blank.flatten(1).any(1)
    assert 15 < int(touched.sum()) < 49
    for sample in blank[touched]:
        rows, columns = sample.any(0).any(1), sample.any(0).any(0)
        area = int(rows.sum() * columns.sum())
        assert int(sample.any(0).sum()) > 0.8 * area, "a rectangle, less what was black before"
        assert 0.005 * 576 < area < 0.45 * 576
    assert torch.equal(erased[~touched], plain[~touched])


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_pixels_hold_the_shares_that_are_told(fields: dict[str, float]) -> None:
    # Every pixel of image i is i + 1
    pixels = torch.arange(1.0, 65.0)[:, None, None, None].expand(64, 3, 24, 24).contiguous()
    mixing = mixing_of(64, 24, Augment(**fields), torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert mixing is not None
    partner, share = mixing.partner, mixing.share
    found = mixed(pixels, pixels[partner], mixing)
    half = mixed(pixels[:32], pixels[partner[:32]], mixing.of(slice(0, 32)))
    assert torch.equal(half, found[:32]), "a part of the batch is mixed as in the whole"
    expected = share * pixels[:, 0, 0, 0] + (1 - share) * pixels[partner][:, 0, 0, 0]
    assert torch.allclose(found.mean((1, 2, 3)), expected, atol=1e-3)
    assert sorted(partner.tolist()) == list(range(64))
    assert len(share.unique()) > 15
    flat = found.flatten(1)
    pasted = [
        set(row.unique().tolist()) <= {float(i + 1), float(p + 1)}
        for i, (row, p) in enumerate(zip(flat, partner, strict=True))
    ]
    assert all(pasted) if "mixup" not in fields else not all(pasted)


def test_nothing_is_mixed_unless_the_recipe_says_so() -> None:
    assert mixing_of(4, 8, Augment(hflip=True), torch.Generator()) is None


def test_the_same_generator_state_gives_the_same_views() -> None:
    fields = {"scale": 0.5, "rotate": 10.0, "hflip": True, "contrast": 0.2}
    assert torch.equal(_augment(**fields), _augment(**fields))
