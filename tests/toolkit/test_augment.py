"""Evaluation pixels are the device's pixels; augmentation does what its fields say, sample by sample."""

import numpy as np
import torch

from ftkit.augment import augmented, evaluation
from ftkit.recipe import Augment
from ftkit_export.preprocess import Preprocess

PREPROCESS = Preprocess(size=24, resize=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CANVASES = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)


def _augment(**fields: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return augmented(torch.from_numpy(CANVASES), PREPROCESS, Augment(**fields), generator)  # type: ignore[arg-type]


def test_evaluation_gives_the_very_pixels_of_the_pillow_path() -> None:
    preprocess = Preprocess(size=24, resize=32)
    assert np.array_equal(evaluation(torch.from_numpy(CANVASES), preprocess).numpy(), preprocess.pixels(CANVASES))


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
        assert torch.equal(augmented(canvases, whole, augment, torch.Generator(), view), expected[view])


def test_scale_rotation_and_colour_change_the_samples_and_stay_in_range() -> None:
    plain = _augment()
    for fields in ({"scale": 0.5}, {"rotate": 30.0}, {"brightness": 0.3}, {"contrast": 0.3}):
        changed = _augment(**fields)
        moved = (changed - plain).abs().flatten(1).amax(1)
        assert float((moved > 1).float().mean()) > 0.9, fields  # a draw may fall next to no change
        assert len(moved.unique()) > 40, fields  # each sample has its own draw
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 255


def test_the_same_generator_state_gives_the_same_views() -> None:
    fields = {"scale": 0.5, "rotate": 10.0, "hflip": True, "contrast": 0.2}
    assert torch.equal(_augment(**fields), _augment(**fields))
