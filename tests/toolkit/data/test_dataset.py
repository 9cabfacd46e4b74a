"""Class folders, split folders and CSVs; splits without leakage; clear errors for bad input."""

import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ftkit
from PIL import Image

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images, splits_csv
from ftkit.exporting import evidence
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(size=16, resize=16)


def _image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), shade % 256, np.uint8)).save(path)
    return path


def _folder(root: Path, **counts: int) -> Path:
    for label, count in counts.items():
        for number in range(count):
            _image(root / label / f"{number}.png", shade=number)
    return root


def test_classes_and_files_stand_in_natural_order(tmp_path: Path) -> None:
    images = read_images(_folder(tmp_path, class10=5, class2=5, class1=5))
    assert images.classes == ("class1", "class2", "class10")
    firsts = [image.path.name for image in images.images if image.label == 0]
    assert firsts == sorted(firsts, key=lambda name: int(name.split(".")[0]))


def test_names_with_digits_that_are_no_numbers_are_sorted_as_text(tmp_path: Path) -> None:
    assert len(read_images(_folder(tmp_path, **{"①": 5, "10²": 5, "9": 5})).classes) == 3


def test_another_grouping_of_the_same_images_is_told_apart(tmp_path: Path) -> None:
    """A search's finalist and a resumed run go by it."""
    _folder(tmp_path, a=12, b=12)
    found = {read_images(tmp_path, 0, by).grouping for by in ("", "[0-9]+", "[0-9]+[.]png")}
    assert len(found) == 3
    assert "" in found, "as before there were any"


def test_hidden_folders_hold_no_images(tmp_path: Path) -> None:
    """Thumbnails that a file server keeps there would be near copies on the other side of a split."""
    _folder(tmp_path, a=6, b=6)
    _folder(tmp_path / "a" / ".@__thumb", small=6)
    assert len(read_images(tmp_path).images) == 12


def test_a_name_that_no_csv_can_hold_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    _folder(tmp_path, a=6, b=6)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / os.fsdecode(b"M\xfcller.png"))
    for command in (("train", tmp_path, "--out", tmp_path / "run"), ("data", tmp_path)):
        refused = ftkit(*command)
        assert (refused.exit_code, refused.stderr.count("expected a name in UTF-8")) == (2, 1)


@pytest.mark.parametrize(("objects", "each"), [(20, 6), (33, 10), (40, 10)])
def test_values_of_objects_are_split_object_by_object(
    tmp_path: Path, objects: int, each: int
) -> None:
    """Regression: with fewer than 33 objects none made a test split, and with 40 a quarter did."""
    lines = ["path,value,group"]
    for number in range(objects * each):
        _image(tmp_path / f"{number}.png", shade=number)
        lines.append(f"{number}.png,{number // each},object{number // each}")
    table = tmp_path / "data.csv"
    table.write_text("\n".join(lines) + "\n")
    images = read_images(table, task="regression", cut_val=False)
    held = {image.group for image in images.of("test")}
    assert not held & {image.group for image in images.of("train")}
    assert 0.1 <= len(images.of("test")) / len(images.images) <= 0.21
    values = [float(name.removeprefix("object")) for name in held]
    assert min(values) < objects / 2 <= max(values), "from both ends"


def test_splits_made_here_are_stratified_seeded_and_disjoint(tmp_path: Path) -> None:
    _folder(tmp_path, a=40, b=20)
    images = read_images(tmp_path, seed=1)
    assert images.made == ("test", "val")
    for split, share in (("test", 0.15), ("val", 0.1)):
        for label, count in ((0, 40), (1, 20)):
            assert sum(image.label == label for image in images.of(split)) == pytest.approx(
                count * share, abs=1.01
            )
    assert read_images(tmp_path, seed=1) == images
    assert read_images(tmp_path, seed=2) != images
    assert sum(len(images.of(split)) for split in ("train", "val", "test")) == 60


def test_a_split_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        _folder(tmp_path / split, a=count, b=count)
    images = read_images(tmp_path)
    assert images.made == ()
    assert [len(images.of(split)) for split in ("train", "val", "test")] == [8, 4, 6]


@pytest.mark.parametrize(
    "names",
    [("Training", "Validation", "Testing"), ("TRAIN", "Val", "test"), ("train", "valid", "Test")],
)
def test_split_folders_are_known_in_any_case_and_by_their_common_names(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Regression: photos/Training and photos/Testing became two classes."""
    for name, count in zip(names, (4, 2, 3), strict=True):
        _folder(tmp_path / name, cat=count, dog=count)
    images = read_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.made == ()
    assert [len(images.of(split)) for split in ("train", "val", "test")] == [8, 4, 6]


def test_splits_of_a_csv_are_known_in_any_case(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for number in range(12):
        _image(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{'ab'[number % 2]},{('Train', 'Testing', 'VAL')[number // 4]}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    assert {image.split for image in read_images(tmp_path / "set.csv").images} == {
        "train",
        "test",
        "val",
    }


def test_valid_and_invalid_parts_are_classes(tmp_path: Path) -> None:
    assert read_images(_folder(tmp_path, valid=8, invalid=8)).classes == ("invalid", "valid")


def test_a_class_named_like_a_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FtkitError, match="found 'Test' beside 'cat'"):
        read_images(_folder(tmp_path / "one", cat=5, dog=5, Test=5))
    for split in ("train", "test"):
        _folder(tmp_path / "two" / split, cat=4, Train=4)
    with pytest.raises(FtkitError, match="found a folder named like a split"):
        read_images(tmp_path / "two")


@pytest.mark.parametrize(
    ("files", "kind"),
    [(("run.json", "model.safetensors"), "run"), (("manifest.json", "model.onnx"), "bundle")],
)
def test_pictures_of_a_run_or_bundle_in_the_data_are_no_class(
    tmp_path: Path, files: tuple[str, str], kind: str
) -> None:
    """Regression: a bundle's golden images were learned as a class named like its folder."""
    data = _folder(tmp_path, cat=5, dog=5)
    made = _image(data / "made" / "lite0" / "golden" / "00.png").parents[1]
    (made / files[0]).write_text("{}")
    assert "made" in read_images(data).classes, "a file of that name alone is nothing special"
    (made / files[1]).touch()
    with pytest.raises(FtkitError, match=f"lite0: expected images of a class, found a {kind}"):
        read_images(data)


def test_a_csv_keeps_groups_on_one_side(tmp_path: Path) -> None:
    lines = ["path,label,group"]
    for number in range(60):
        _image(tmp_path / "x" / f"{number}.png", number)
        lines.append(f"x/{number}.png,{'ab'[number % 2]},module{number // 6}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    images = read_images(tmp_path / "set.csv")
    sides: dict[str, set[str]] = {}
    for image in images.images:
        sides.setdefault(image.group, set()).add(image.split)
    assert len(sides) == 10
    assert all(len(splits) == 1 for splits in sides.values())
    assert {image.split for image in images.images} == {"train", "val", "test"}


def test_bad_files_are_left_out_named_and_counted(tmp_path: Path) -> None:
    _folder(tmp_path, a=12, b=12)
    good = (tmp_path / "a" / "0.png").read_bytes()
    bad = {"cut.png": good[: len(good) // 2], "empty.jpg": b"", "text.png": b"hello"}
    for name, content in bad.items():
        (tmp_path / "a" / name).write_bytes(content)
    canvases = build_canvases(read_images(tmp_path), PREPROCESS)
    assert sorted(path.name for path, _ in canvases.bad) == sorted(bad)
    assert all("expected an image" in reason for _, reason in canvases.bad)
    assert len(canvases.images.images) == 24
    rows = np.arange(24)
    shades = [int(Path(image.path).stem) for image in canvases.images.images]
    assert (canvases.array(rows)[:, 8, 8, 0] == shades).all(), "each row is still its own image"
    again = build_canvases(read_images(tmp_path), PREPROCESS)
    assert (again.fingerprint, again.bad) == (canvases.fingerprint, canvases.bad)


def test_the_fingerprint_follows_a_files_content(tmp_path: Path) -> None:
    _folder(tmp_path, a=8, b=8)
    before = build_canvases(read_images(tmp_path), PREPROCESS).fingerprint
    _image(tmp_path / "a" / "3.png", 77)
    assert build_canvases(read_images(tmp_path), PREPROCESS).fingerprint != before


def test_a_class_without_a_readable_image_is_named(tmp_path: Path) -> None:
    _folder(tmp_path, a=8)
    (tmp_path / "b").mkdir()
    for number in range(8):
        (tmp_path / "b" / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(FtkitError, match=r"training images of class 'b', found none .8 bad files"):
        build_canvases(read_images(tmp_path), PREPROCESS)


def _missing(root: Path) -> Path:
    return root / "nowhere"


def _empty(root: Path) -> Path:
    return root


def _one_class(root: Path) -> Path:
    return _folder(root, only=5)


def _twins(root: Path) -> Path:
    """Two classes of one name: macOS decomposes accents, Linux and Windows do not."""
    names = {"caf\u00e9": 5, "cafe\u0301": 5}
    return _folder(root, **names)


def _one_image(root: Path) -> Path:
    return _folder(root, a=1, b=1)


def _csv(text: str) -> "object":
    def make(root: Path) -> Path:
        _image(root / "a.png")
        (root / "set.csv").write_text(text)
        return root / "set.csv"

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_missing, "found nothing there"),
        (_empty, "found none. Try a folder a class"),
        (_one_class, "expected at least two classes, found one (only)"),
        (_twins, "expected class names that differ, found 'caf\\xe9' and 'cafe\\u0301'"),
        (_one_image, "expected enough images for a test split"),
        (_csv("path,label\na.png,x\ngone.png,y\n"), "set.csv line 3: expected an image at"),
        (_csv("file,label\na.png,x\n"), "expected a column 'path', found file, label"),
        (_csv("path,class\na.png,x\n"), "expected a column 'label', found path, class"),
        (
            _csv("path,label,split\na.png,x,holdout\n"),
            "expected split train, val or test, found 'holdout'",
        ),
        (_csv('path,label\na.png,"x\ny"\n'), "expected a label on one line, found"),
        (_csv("path,label\na.png,\n"), "expected a label, found none"),
        (
            _csv('path,label\na.png,"food, drink"\n\na.png,food, drink\n'),
            "line 4: expected 2 fields (path, label), found 3",
        ),
    ],
    ids=[
        "missing",
        "empty",
        "one class",
        "two classes of one name",
        "one image",
        "csv file",
        "csv path",
        "csv label",
        "csv split",
        "csv label of two lines",
        "csv no label",
        "csv label with a comma",
    ],
)
def test_bad_data_is_told_in_one_sentence_with_exit_2(
    make: object, said: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    root = tmp_path / "data"
    root.mkdir()
    result = ftkit("train", make(root), "--out", out)  # type: ignore[operator]
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_paths_of_a_csv_may_have_backslashes_and_rows_may_end_in_commas(tmp_path: Path) -> None:
    lines = ["path,label"]
    for number in range(12):
        _image(tmp_path / "in" / "here" / f"{number}.png", number)
        lines.append(f"in\\here\\{number}.png,{'ab'[number % 2]},,")
    (tmp_path / "set.csv").write_text("\r\n".join(lines))
    assert {image.path.parent for image in read_images(tmp_path / "set.csv").images} == {
        tmp_path / "in" / "here"
    }


@pytest.mark.parametrize("place", ["data", "."], ids=["below the CSV", "beside its folder too"])
def test_splits_written_are_read_again_from_another_place(tmp_path: Path, place: str) -> None:
    _folder(tmp_path / "data" / "in", a=12, b=12)
    _folder(tmp_path / place / "other", a=3)
    lines = ["path,label,group"]
    for image in sorted((tmp_path).rglob("*.png")):
        lines.append(
            f"{os.path.relpath(image, tmp_path / 'data')},{image.parent.name},{image.stem}"
        )
    (tmp_path / "data" / "set.csv").write_text("\n".join(lines))
    images = read_images(tmp_path / "data" / "set.csv", seed=3)
    (tmp_path / "splits.csv").write_bytes(splits_csv(images))
    again = read_images(tmp_path / "splits.csv", root=tmp_path / place)
    assert again.made == ()
    assert {(i.path.resolve(), i.split, i.group, i.label) for i in again.images} == {
        (i.path.resolve(), i.split, i.group, i.label) for i in images.images
    }
    for root, found in ((tmp_path / "no", "no such folder"), (tmp_path, "which is no CSV")):
        data = tmp_path / ("splits.csv" if "no such" in found else "data")
        with pytest.raises(FtkitError, match=found):
            read_images(data, root=root)


def test_splits_tell_nothing_of_this_machine(tmp_path: Path) -> None:
    """Paths in splits do not depend on the machine.

    A link inside DATA keeps its name there; images with no folder in common keep two parts of their
    paths.
    """
    _folder(tmp_path / "data", a=12, b=11)
    elsewhere = _image(tmp_path / "secret place" / "x.png", 99)
    (tmp_path / "data" / "b" / "linked.png").symlink_to(elsewhere)
    text = splits_csv(read_images(tmp_path / "data")).decode()
    assert "b/linked.png,b" in text
    assert "secret" not in text
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        far = _image(Path(other) / "y" / "far.png", 100)
        lines = ["path,label", f"{far},a"]
        lines += [f"{path},{path.parent.name}" for path in (tmp_path / "data").rglob("*.png")]
        (tmp_path / "data" / "set.csv").write_text("\n".join(lines))
        text = splits_csv(read_images(tmp_path / "data" / "set.csv")).decode()
    assert "y/far.png,a" in text
    assert str(tmp_path.name) not in text


def test_a_class_with_one_image_trains_with_it(tmp_path: Path) -> None:
    images = read_images(_folder(tmp_path, many=20, one=1))
    assert [image.split for image in images.images if image.label == 1] == ["train"]


def test_a_label_with_a_line_separator_keeps_its_place_in_the_exported_file(tmp_path: Path) -> None:
    """U+2028 ends a line for Python's splitlines only, so such labels failed the label gate."""
    labels = ["a\u2028b", "c", "d\x85e"]
    (tmp_path / "labels.txt").write_text(
        "".join(f"{label}\n" for label in labels), encoding="utf-8"
    )
    classifier = type("Classifier", (), {"labels": labels})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "load_model", lambda folder: classifier)
        assert evidence.out_of_order(tmp_path, labels) == 0
        assert evidence.out_of_order(tmp_path, [*labels[1:], labels[0]]) > 0


def test_two_writers_of_one_file_share_no_temporary_name(tmp_path: Path) -> None:
    path, failures = tmp_path / "state.json", []

    def write(content: bytes) -> None:
        try:
            for _ in range(150):
                write_atomically(path, content)
        except FtkitError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(bytes([letter]) * 5000,)) for letter in b"abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    assert len(set(path.read_bytes())) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["state.json"]
