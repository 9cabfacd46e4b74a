"""Feature cache: a sufficient dtype, equality with a live pass, and its disk budget."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ftkit.data.augment import evaluation
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.data.prefetch import Source
from ftkit.models.backbones import build
from ftkit.recipe import Augment, Recipe, Stage
from ftkit.training import feature_cache
from ftkit.training.feature_cache import Activations, Views, _tolerance, attributes, check, fill
from ftkit.training.stage_loaders import StageLoaders
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(size=32, resize=40)


class Scaled(nn.Module):
    """Means of the image quarters, multiplied by a scale."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.scale * nn.functional.adaptive_avg_pool2d(pixels, 2),)


@pytest.fixture
def views(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Views:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    canvases = build_canvases(read_images(photos), PREPROCESS)
    return Views(
        canvases=canvases,
        preprocess=PREPROCESS,
        augment=Augment(scale=0.5),
        count=3,
        seed=0,
        source=Source(canvases.array, len(canvases.slots), 1, torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, "float16"), (1e5, "float32"), (1e-6, "float32")]
)
def test_values_are_kept_in_a_dtype_that_holds_them(views: Views, scale: float, dtype: str) -> None:
    net = Scaled(scale)
    begun = time.perf_counter()
    kept = fill(net, str(scale), ["means"], views)
    spent, again = time.perf_counter() - begun, fill(net, str(scale), ["means"], views)
    assert isinstance(kept, Activations)
    assert isinstance(again, Activations)
    assert 0 < again.pass_s * len(views) < spent
    assert (kept.found, again.found, kept.pass_s) == (False, True, again.pass_s)
    assert (kept.arrays["means"].dtype.name, kept.kind) == (dtype, f"{dtype} by onnxruntime")
    assert check(net, ["means"], kept, views) == ""
    rows = views.canvases.rows("val")
    expected = net(evaluation(torch.from_numpy(views.canvases.array(rows)), PREPROCESS))[0].numpy()
    found = kept.arrays["means"][kept.val_items(np.arange(len(rows)))].astype(np.float32)
    assert (
        np.abs(found - expected).max()
        <= feature_cache.KEPT_TOLERANCE[dtype] * np.abs(expected).max()
    )


def test_an_image_beyond_the_samples_range_brings_the_wider_dtype(views: Views) -> None:
    class Spiky(Scaled):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
            (values,) = super().forward(pixels)
            darkest = pixels.mean((1, 2, 3))[:, None, None, None] < self.scale
            return (torch.where(darkest, values * 1e7, values),)

    rows = views.canvases.rows("train")
    means = [
        float(view.mean())
        for start in range(0, len(rows), 8)
        for view in views.pixels(rows, 1, start)
    ]
    first = [float(view.mean()) for view in views.pixels(rows, 0, 0)]
    limit = (
        sorted(means)[0] + min(m for m in [*sorted(means)[1:], *first] if m > sorted(means)[0])
    ) / 2
    net = Spiky(limit)  # one view of one image outside the sample is far larger than the rest
    kept = fill(net, "spiky", ["means"], views)
    assert isinstance(kept, Activations)
    assert kept.arrays["means"].dtype == np.float32
    assert np.isfinite(kept.arrays["means"]).all()


def test_views_differ_and_are_the_same_again(views: Views) -> None:
    rows = views.canvases.rows("train")
    first = views.pixels(rows, 1, 0)
    assert torch.equal(first, views.pixels(rows, 1, 0))
    assert not torch.equal(first, views.pixels(rows, 2, 0))
    assert torch.equal(
        views.pixels(rows, 0, 0),
        evaluation(torch.from_numpy(views.canvases.array(rows[:8])), PREPROCESS),
    )


def _loaders(views: Views) -> StageLoaders:
    recipe = Recipe(name="x", backbone="resnet18", stages=(Stage(),))
    torch.manual_seed(0)
    backbone = build("resnet18", 4, "none")
    return StageLoaders(backbone, recipe, views.canvases, PREPROCESS, 0, torch.device("cpu"))


@pytest.mark.parametrize("place", ["first view", "last view", "val"])
def test_a_cache_that_no_longer_equals_a_live_pass_is_computed_anew(
    views: Views, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the error is; the check used to read only one chunk of the last view."""
    assert "frozen prefix computed once" in _loaders(views).stage(0).how
    (file,) = (feature_cache.cache_folder() / "prefix").glob("*/0.npy")
    array = np.load(file, mmap_mode="r+")
    right = np.array(array)
    train, val = (len(views.canvases.rows(split)) for split in ("train", "val"))
    count = (len(array) - val) // train
    rows = {
        "first view": slice(0, train),
        "last view": slice((count - 1) * train, count * train),
        "val": slice(count * train, None),
    }
    array[rows[place]] *= 1.01
    array.flush()
    del array
    assert "frozen prefix computed once" in _loaders(views).stage(0).how
    assert "differs from a live pass by" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(file), right)
    assert "found in the cache" in _loaders(views).stage(0).how


def test_more_views_are_added_to_those_there_and_fewer_are_found_in_them(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Scaled(1.0)
    whole = fill(net, "whole", ["means"], views)
    computed: list[int] = []
    pixels = Views.pixels

    def watched(self: Views, rows: Array, view: int, start: int) -> torch.Tensor:
        computed.append(view)
        return pixels(self, rows, view, start)

    one = fill(net, "grown", ["means"], replace(views, count=1))
    monkeypatch.setattr(Views, "pixels", watched)
    grown = fill(net, "grown", ["means"], views)
    assert computed.count(0) == 2, "a sample and an example; val's and the first view's are copied"
    np.testing.assert_array_equal(grown.arrays["means"], whole.arrays["means"])
    assert not one.folder.exists()
    two = fill(net, "grown", ["means"], replace(views, count=2))
    assert two.found
    val = np.arange(len(views.canvases.rows("val")))
    for kept in (one, grown, two):
        np.testing.assert_array_equal(
            kept.arrays["means"][kept.val_items(val)], whole.arrays["means"][whole.val_items(val)]
        )


@pytest.mark.parametrize("file", ["told.json", "0.npy"])
@pytest.mark.parametrize(
    "content", [b"", b'{"kind"', b"\x93NUMPY\x01"], ids=["empty", "cut", "header"]
)
def test_a_damaged_entry_counts_as_absent(views: Views, file: str, content: bytes) -> None:
    """Regression: it caused a traceback in every later run."""
    net = Scaled(1.0)
    first = fill(net, "damaged", ["means"], views)
    assert isinstance(first, Activations)
    right = np.array(first.arrays["means"])
    (first.folder / file).write_bytes(content)
    again = fill(net, "damaged", ["means"], views)
    assert isinstance(again, Activations)
    assert not again.found
    np.testing.assert_array_equal(again.arrays["means"], right)


def test_attributes_that_no_weight_and_no_code_tells_of_are_part_of_the_key(views: Views) -> None:
    """Regression: the same weights with another eps, stride or padding reused the cache entry."""

    def net(**changed: object) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU()
        ).eval()
        for name, value in changed.items():
            setattr(next(module for module in made if hasattr(module, name)), name, value)
        return made

    kept = [
        fill(net(**changed), "same", ["values"], views)
        for changed in ({}, {"eps": 1e-3}, {"negative_slope": 0.2}, {})
    ]
    assert [isinstance(item, Activations) and item.found for item in kept] == [
        False,
        False,
        False,
        True,
    ]
    assert attributes(net()) == attributes(net().train())
    assert attributes(net()) != attributes(net(stride=(2, 2)))


def test_room_is_made_from_what_killed_runs_left_and_what_is_unused_longest(
    views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = feature_cache.cache_folder() / "prefix"
    for name, age in ((".left", 2 * 86_400), (".being written", 10), ("old", 500), ("new", 100)):
        folder = prefix / name
        folder.mkdir(parents=True)
        (folder / "0.npy").write_bytes(b"x" * 5000)
        os.utime(folder, (time.time() - age,) * 2)
    free = [10_000]

    def usage(path: Path) -> object:
        gone = 2 - sum((prefix / name).exists() for name in ("old", "new"))
        return type("Usage", (), {"free": free[0] + 5000 * gone})

    monkeypatch.setattr(feature_cache.shutil, "disk_usage", usage)
    assert feature_cache._make_room(prefix, 6000) == ""
    assert {path.name for path in prefix.iterdir()} == {".being written", "new"}
    free[0] = 1000
    assert "its cache would take" in feature_cache._make_room(prefix, 6_000_000)
    assert (prefix / "new").exists(), "what cannot help is not removed"


def test_another_algorithm_of_a_gpu_is_no_stale_cache() -> None:
    """1e-5 is too strict for float32 there: cuDNN may use Winograd for another batch size."""
    assert (
        _tolerance("float32", torch.device("cuda"))
        == 1e-4
        > _tolerance("float32", torch.device("cpu"))
    )
    assert (
        _tolerance("float16", torch.device("cuda"))
        == _tolerance("float16", torch.device("cpu"))
        == 1e-3
    )
