"""Images of several labels are divided so that every label is in every part."""

from pathlib import Path

import numpy as np
from PIL import Image

from ftkit.data.dataset import read_images
from ftkit.data.stratify import divide


def _labels(count: int, seed: int = 0) -> np.ndarray:
    """Eight labels, from rare to common, that tend to come together, (count, 8)."""
    rng = np.random.default_rng(seed)
    common = rng.random((count, 1))
    shares = np.linspace(0.04, 0.6, 8)
    return (rng.random((count, 8)) < shares * (0.5 + common)).astype(float)


def _shares(targets: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """Share of the images that have each label, or are known to lack it, in each part, (parts, 2 K)."""
    has = np.c_[targets == 1, targets == 0]
    return np.stack([has[part == number].sum(0) for number in range(parts)]) / has.sum(0)


def test_every_label_is_divided_as_the_images_are() -> None:
    targets = _labels(400)
    targets[np.random.default_rng(1).random(targets.shape) < 0.3] = np.nan
    part = divide(targets, np.arange(400), (0.7, 0.2, 0.1), seed=0)
    assert np.abs(np.bincount(part) - [280, 80, 40]).max() <= 3
    off = np.abs(_shares(targets, part, 3) - np.array([[0.7], [0.2], [0.1]]))
    random = np.random.default_rng(2).permutation(part)
    off_at_random = np.abs(_shares(targets, random, 3) - np.array([[0.7], [0.2], [0.1]]))
    # Of the rarest label there are about 11 images
    assert off.mean() < off_at_random.mean() / 5, (off.mean(), off_at_random.mean())
    assert (off * np.c_[targets == 1, targets == 0].sum(0)).max() <= 2


def test_any_seed_divides() -> None:
    assert set(divide(_labels(40), np.arange(40), (0.5, 0.5), seed=-1)) == {0, 1}


def test_what_belongs_together_stays_together() -> None:
    targets = _labels(600)
    together = np.random.default_rng(3).integers(0, 60, 600)
    part = divide(targets, together, [0.25] * 4, seed=0)
    assert all(len(set(part[together == unit])) == 1 for unit in range(60))
    whole = np.random.default_rng(4).permutation(np.arange(60) % 4)[together]
    ours, theirs = (np.abs(_shares(targets, by, 4) - 0.25).mean() for by in (part, whole))
    assert ours < 0.6 * theirs, (ours, theirs)


def test_a_csv_of_labels_is_split_label_by_label(tmp_path: Path) -> None:
    targets = _labels(200)
    names = [f"l{column}" for column in range(8)]
    lines = [",".join(["path", *names, "group"])]
    for number, row in enumerate(targets):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
        lines.append(",".join([path.name, *(f"{value:.0f}" for value in row), f"g{number // 2}"]))
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")

    images = read_images(tmp_path / "data.csv")
    split = np.array([("train", "val", "test").index(image.split) for image in images.images])
    counts = _shares(np.array([image.targets for image in images.images]), split, 3) * np.c_[
        targets == 1, targets == 0
    ].sum(0)
    own = np.r_[targets.sum(0), 200 - targets.sum(0)]
    assert np.abs(counts[2] - 0.15 * own).max() <= 2.5, counts[2]
    assert np.abs(counts[1] - 0.1 * 0.85 * own).max() <= 2.5, counts[1]
    assert {image.split for image in images.images if image.group == "g0"} in (
        {"train"},
        {"val"},
        {"test"},
    )
