"""The data audit: problems are named, fixed in a copy, and stop a training run."""

import csv
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ftkit
from PIL import Image

from ftkit.data.audit import near_duplicates
from ftkit.data.dataset import read_images
from ftkit_export.runtime.errors import FtkitError

BROKEN = {
    "leaks": [
        {"images": ["test/a/copy.png", "train/a/1.png"], "exact": True},
        {"images": ["test/a/again.jpg", "train/a/2.png"], "exact": False},
    ],
    "conflicts": [{"images": ["train/a/3.png", "train/b/twin.png"], "exact": True}],
    "flat": ["train/a/flat.png"],
    "tiny": ["train/a/tiny.jpg"],
}


@pytest.fixture(scope="module")
def broken(elpv: list[tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split folders with one example of each fault."""
    root = tmp_path_factory.mktemp("broken data") / "cells"
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                # Far apart in the data set, so the images are unrelated
                place = list(BROKEN).index("leaks") + 40 * len(list(root.rglob("*.png")))
                shutil.copyfile(elpv[place % len(elpv)][0], root / split / label / f"{number}.png")
    train, test = root / "train" / "a", root / "test" / "a"
    shutil.copyfile(train / "1.png", test / "copy.png")
    Image.open(train / "2.png").save(test / "again.jpg", quality=60)
    shutil.copyfile(train / "3.png", root / "train" / "b" / "twin.png")
    shutil.copyfile(train / "4.png", train / "same.png")
    (train / "cut.png").write_bytes((train / "5.png").read_bytes()[:2000])
    Image.new("RGB", (300, 300), "grey").save(train / "flat.png")
    Image.open(train / "6.png").resize((40, 40)).crop((0, 0, 40, 30)).convert("CMYK").save(
        train / "tiny.jpg"
    )
    return root


def test_every_fault_is_named_and_a_clean_copy_has_none(broken: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in broken.rglob("*.*")}
    told = ftkit(
        "data",
        broken,
        "--json",
        tmp_path / "a.json",
        "--sheets",
        tmp_path / "s",
        "--fix",
        tmp_path / "clean",
    )
    assert told.exit_code == 1, told.output
    assert "train/a/cut.png: expected an image, found image file is truncated" in told.stdout
    assert max(map(len, told.stdout.split("sheet:")[0].splitlines())) <= 120
    found = json.loads((tmp_path / "a.json").read_text())
    for kind, expected in BROKEN.items():
        assert found[kind] == expected, kind
    assert {"images": ["train/a/4.png", "train/a/same.png"], "exact": True} in found["alike"]
    assert found["formats"]["JPEG (CMYK)"] == 1
    sheet = Image.open(tmp_path / "s" / "duplicates.jpg")
    assert np.asarray(sheet)[32:160, 4:132].std() > 5, "the first picture is there"
    assert {path: path.read_bytes() for path in broken.rglob("*.*")} == before
    with (tmp_path / "clean" / "images.csv").open() as table:
        kept = [row["path"] for row in csv.DictReader(table)]
    gone = {
        "train/a/1.png",
        "train/a/2.png",
        "train/a/3.png",
        "train/b/twin.png",
        "train/a/same.png",
        "train/a/cut.png",
    }
    assert {path.relative_to(broken).as_posix() for path in before} - set(kept) == gone
    assert ftkit("data", tmp_path / "clean" / "images.csv").exit_code == 0
    again = ftkit("data", broken, "--fix", broken / "clean")
    assert (again.exit_code, "expected a place outside" in again.stderr) == (2, True)


def test_train_stops_on_leakage(broken: Path, tmp_path: Path) -> None:
    stopped = ftkit("train", broken, "--out", tmp_path / "run")
    assert stopped.exit_code == 2
    assert (
        "expected train, val and test to share no image, found 1 that they share (e.g. test/a/copy.png"
        in stopped.stderr
    )
    assert "--allow-leakage" in stopped.stderr


def _sides(images: Iterator[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key, split in images:
        found.setdefault(key, set()).add(split)
    return found


def test_identical_files_and_groups_stay_on_one_side_of_a_split_made_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        for copy in range(2):  # each under two file names
            path = tmp_path / f"class{number % 2}" / f"object{number // 4}_{number}{'ab'[copy]}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
    images = read_images(tmp_path).images
    assert {split for image in images for split in [image.split]} == {"train", "val", "test"}
    assert all(len(s) == 1 for s in _sides((i.path.stem[:-1], i.split) for i in images).values())
    by_object = read_images(tmp_path, group_by=r"(object\d+)_").images
    assert all(
        len(s) == 1
        for s in _sides((i.path.stem.split("_")[0], i.split) for i in by_object).values()
    )
    assert not all(
        len(s) == 1 for s in _sides((i.path.stem.split("_")[0], i.split) for i in images).values()
    )
    for wrong, found in (
        ("(", "expected a regular expression"),
        ("nowhere", "expected it to match paths such as class0/"),
    ):
        with pytest.raises(FtkitError, match=found.replace("(", r"\(")):
            read_images(tmp_path, group_by=wrong)


def test_images_that_show_nothing_are_told_and_not_compared(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (1, 1), (number, 0, 0)).save(path)
    told = ftkit("data", tmp_path)
    assert (
        told.exit_code,
        "20 of one flat colour" in told.stdout,
        told.stdout.endswith("ok\n"),
    ) == (0, True, True)


def test_hundreds_of_pictures_of_one_thing_are_one_set(elpv: list[tuple[Path, str]]) -> None:
    cells = np.stack(
        [np.asarray(Image.open(path).resize((32, 32)), np.float32) for path, _ in elpv[:400:10]]
    )
    noise = np.random.default_rng(0).normal(0, 0.2, (500, 32, 32)).astype(np.float32)
    thumbs = np.concatenate([cells, cells[:1] * 1.1 + noise])
    (found,) = near_duplicates(thumbs, np.arange(len(thumbs)))
    assert found.rows == (0, *range(len(cells), len(thumbs)))


def test_what_is_cleaned_is_clean_where_ftkit_makes_a_part_of_the_splits(
    broken: Path, tmp_path: Path
) -> None:
    """train and test are given, val is not.

    Near duplicates of test images are removed from train; those within train become one group.
    """
    shutil.copytree(broken, tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val")
    again = Image.open(tmp_path / "d" / "train" / "b" / "7.png")
    for number in range(2):
        again.save(tmp_path / "d" / "train" / "b" / f"again{number}.jpg", quality=50 + 20 * number)
    assert ftkit("data", tmp_path / "d", "--fix", tmp_path / "images.csv").exit_code == 1
    assert ftkit("data", tmp_path / "images.csv").exit_code == 0
    with (tmp_path / "images.csv").open() as table:
        rows = {row["path"].removeprefix("d/"): row for row in csv.DictReader(table)}
    assert rows["test/a/again.jpg"]["split"] == "test"
    assert "train/a/2.png" not in rows
    alike = [rows[f"train/b/{name}"] for name in ("7.png", "again0.jpg", "again1.jpg")]
    assert {(row["split"], row["group"]) for row in alike} == {("", alike[0]["group"])}
    assert alike[0]["group"]


def test_a_near_duplicate_of_a_file_with_copies_is_told_of_all(
    elpv: list[tuple[Path, str]], tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        for number, label in enumerate("ab"):
            (tmp_path / split / label).mkdir(parents=True)
            shutil.copyfile(
                elpv[300 * number + len(split) * 50][0], tmp_path / split / label / "own.png"
            )
            shutil.copyfile(
                elpv[300 * number + len(split) * 50 + 200][0], tmp_path / split / label / "more.png"
            )
    first = tmp_path / "train" / "a" / "own.png"
    shutil.copyfile(first, tmp_path / "test" / "a" / "copy.png")
    Image.open(first).save(tmp_path / "train" / "a" / "near.jpg", quality=60)
    ftkit("data", tmp_path, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())["leaks"]
    names = ["test/a/copy.png", "train/a/near.jpg", "train/a/own.png"]
    assert {"images": names, "exact": False} in found
    inside = ftkit("data", tmp_path, "--sheets", tmp_path / "sheets")
    assert (inside.exit_code, "expected a place outside" in inside.stderr) == (2, True)


def test_a_picture_between_two_is_alike_to_both() -> None:
    """The outer two are not similar, but the last is a near duplicate of the middle one."""
    rng = np.random.default_rng(0)
    picture, change = rng.standard_normal((2, 32, 32)).astype(np.float32)
    change *= 0.11
    found = near_duplicates(
        100 + 30 * np.stack([picture, picture + change, picture + 2 * change]), np.arange(3)
    )
    assert {frozenset(item.rows) for item in found} == {frozenset({0, 1}), frozenset({1, 2})}


def _patterns(folder: Path, names: list[str], shape: tuple[int, int] = (48, 48)) -> None:
    """Unrelated images."""
    rng = np.random.default_rng(zlib.crc32(" ".join(names).encode()))
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize(shape[::-1], Image.Resampling.BICUBIC).save(folder / name)


def test_classes_that_test_and_val_cannot_judge_are_told(tmp_path: Path) -> None:
    _patterns(tmp_path / "d" / "many", [f"{number}.png" for number in range(30)])
    _patterns(tmp_path / "d" / "single", ["one.png"])
    told = ftkit("data", tmp_path / "d", "--json", tmp_path / "a.json")
    assert told.exit_code == 0
    assert "single" in told.stdout.partition("* made by ftkit")[2]
    assert json.loads((tmp_path / "a.json").read_text())["unjudged"] == {
        "val": ["single"],
        "test": ["single"],
    }


def test_train_stops_on_what_data_calls_a_conflict(tmp_path: Path) -> None:
    for label in "ab":
        _patterns(tmp_path / "d" / label, [f"{label}{number}.png" for number in range(12)])
    shutil.copyfile(tmp_path / "d" / "a" / "a3.png", tmp_path / "d" / "b" / "twin.png")
    assert ftkit("data", tmp_path / "d").stdout.splitlines()[-1].startswith("NOT ok")
    stopped = ftkit("train", tmp_path / "d", "--out", tmp_path / "run")
    assert (
        stopped.exit_code,
        "found 1 under several (e.g. a/a3.png, b/twin.png)" in stopped.stderr,
    ) == (2, True)


def test_near_duplicates_end_in_a_word_on_fix_which_takes_out_what_contradicts(
    tmp_path: Path,
) -> None:
    """Of near duplicates labelled a, a, b the third is removed; of a, b both are."""
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for label in "ab":
            _patterns(
                tmp_path / "d" / split / label,
                [f"{split}{label}{number}.png" for number in range(count)],
            )
    train = tmp_path / "d" / "train"
    shapes = np.random.default_rng(9).integers(0, 256, (2, 6, 6, 3), np.uint8)
    for number, names in enumerate((("a/x.png", "a/x.jpg", "b/x.jpg"), ("a/y.png", "b/y.jpg"))):
        picture = Image.fromarray(shapes[number]).resize((48, 48), Image.Resampling.BICUBIC)
        for quality, name in zip((70, 80, 90), names, strict=False):
            picture.save(train / name, **({"quality": quality} if name.endswith("jpg") else {}))
    told = ftkit("data", tmp_path / "d", "--fix", tmp_path / "clean.csv")
    assert told.exit_code == 0
    assert "--fix" in ftkit("data", tmp_path / "d").stdout.splitlines()[-1]
    left = (tmp_path / "clean.csv").read_text()
    assert [name in left for name in ("a/x.png", "a/x.jpg", "b/x.jpg", "a/y.png", "b/y.jpg")] == [
        True,
        True,
        *[False] * 3,
    ]
    assert ftkit("data", tmp_path / "clean.csv").stdout.endswith("\nok\n")


def test_a_chain_of_near_duplicates_is_no_group(tmp_path: Path) -> None:
    """Each picture resembles the next, but the ends differ; --fix used to make one group of all."""
    rng = np.random.default_rng(1)
    start, end = rng.normal(0, 40, (2, 8, 8))
    for number, share in enumerate(np.linspace(0, np.pi / 2, 30)):
        shape = np.cos(share) * start + np.sin(share) * end + 128
        picture = Image.fromarray(shape.clip(0, 255).astype(np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        (tmp_path / "d" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "d" / "a" / f"{number:02}.png")
    _patterns(tmp_path / "d" / "b", [f"b{number}.png" for number in range(30)])
    out = ("--fix", tmp_path / "clean.csv", "--json", tmp_path / "a.json")
    assert ftkit("data", tmp_path / "d", *out).exit_code == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["near_groups"]) > 2
    with (tmp_path / "clean.csv").open() as table:
        groups = {Path(row["path"]).stem: row["group"] for row in csv.DictReader(table)}
    chain = tmp_path / "d" / "a"
    shapes = {path.stem: np.asarray(Image.open(path), float) for path in chain.iterdir()}
    assert len({group for group in groups.values() if group}) == len(found["near_groups"])
    for one, first in shapes.items():
        for other, second in shapes.items():
            if groups[one] and groups[one] == groups[other]:
                assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.95, (one, other)


def test_data_says_what_a_crop_leaves_and_what_it_emptied(tmp_path: Path) -> None:
    for label in "ab":
        _patterns(
            tmp_path / label, [f"{label}{number}.png" for number in range(8)], shape=(40, 160)
        )
    wide = np.full((40, 160, 3), 255, np.uint8)
    wide[:, :30] = np.random.default_rng(0).integers(0, 255, (40, 30, 3))
    Image.fromarray(wide).save(tmp_path / "a" / "edge.png")
    told = ftkit("data", tmp_path, "--json", tmp_path / "a.json")
    assert "--set preprocess.fit=pad" in told.stdout
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["crop_keeps"], found["emptied"]) == ([0.25, 17], ["a/edge.png"])
