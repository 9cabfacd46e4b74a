"""CSVs of several labels and of numbers: what they mean, how they are split, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftkit.data.audit import Alike, audit, conflicts_of
from ftkit.data.audit_targets import LabelAudit, ValueAudit, audit_targets
from ftkit.data.canvas import build_canvases
from ftkit.data.clean import _contradicting_targets, clean
from ftkit.data.dataset import Asked, labelled, read_images, splits_csv
from ftkit.training.folds import make_folds
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess


def _csv(folder: Path, header: str, rows: list[str], name: str = "data.csv") -> Path:
    """A CSV of one picture a row, each of its own shade."""
    lines = [header]
    for number, row in enumerate(rows):
        picture = folder / f"{name}-{number}.png"
        Image.fromarray(np.full((20, 20, 3), number % 256, np.uint8)).save(picture)
        lines.append(f"{picture.name},{row}")
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def _targets(path: Path, **options: str) -> list[tuple[float, ...]]:
    images = read_images(path, cut_val=False, **options)
    return [image.targets for image in images.images]


def test_labels_are_read_from_a_list_or_from_a_column_each(tmp_path: Path) -> None:
    listed = _csv(tmp_path, "path,labels", ["b|a", "", "a", "b", "?a|b", "a|b"] * 2, "list.csv")
    flags = _csv(tmp_path, "path,a,b", ["1,1", "0,0", "1,0", "0,1", ",1", "1,1"] * 2, "flags.csv")
    one, other = (read_images(path, cut_val=False) for path in (listed, flags))
    assert one.task == other.task == "multi-label"
    assert one.names == other.names == ("a", "b")
    assert np.array_equal(_targets(listed), _targets(flags), equal_nan=True)
    assert np.isnan(_targets(listed)).sum() == 2, "of ?a it is not known"


def test_columns_are_read_as_spreadsheets_and_pandas_write_them(tmp_path: Path) -> None:
    flags = _csv(tmp_path, 'path,a,"deep\nscratch"', ["1.0,0.0", "0.0,1.0", ",1.0", "1.0,0.0"] * 4)
    images = read_images(flags, cut_val=False)
    assert (images.task, images.names) == ("multi-label", ("a", "deep scratch"))
    assert np.isnan(_targets(flags)).sum() == 4
    numbers = _csv(tmp_path, 'path,"wall\nthickness [mm]"', list("1234567890"), "numbers.csv")
    assert read_images(numbers, cut_val=False, task="regression").names == ("wall thickness",)


def test_a_list_says_what_does_not_apply_also_of_labels_that_no_row_names(tmp_path: Path) -> None:
    base = _csv(tmp_path, "path,labels", ["a", "b", "a|b", ""] * 6)
    more = _csv(tmp_path, "path,labels", ["", "a", ""], "more.csv")
    images = read_images(base, cut_val=False, add=more)
    added = [each.targets for each in images.images if each.path.name.startswith("more")]
    assert sorted(added) == [(0.0, 0.0), (0.0, 0.0), (1.0, 0.0)]
    asked = Asked(task="multi-label", names=("a", "b"), units=("", ""))
    assert {image.targets for image in labelled(more, asked=asked)} == {(0.0, 0.0), (1.0, 0.0)}


def test_a_cleaned_copy_keeps_all_that_is_known_of_identical_files(tmp_path: Path) -> None:
    rows = ["1,0", "0,1"] * 10
    table = _csv(tmp_path, "path,a,b", rows)
    lines = table.read_text().splitlines()
    for name in ("data.csv-0.png", "twin.png"):
        Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(tmp_path / name)
    lines[1] = "data.csv-0.png,1,"
    table.write_text("\n".join([*lines, "twin.png,,0"]) + "\n")
    images = read_images(table, cut_val=False)
    canvases = build_canvases(images, Preprocess(size=16, resize=16))
    cleaned = clean(audit(images, canvases), canvases)
    (kept,) = [
        image for image in cleaned.images if image.path.name in ("data.csv-0.png", "twin.png")
    ]
    assert kept.targets == (1.0, 0.0)


def test_what_is_not_known_contradicts_nothing() -> None:
    targets = np.array([[1, np.nan], [1, 0], [1, np.nan], [1, 0], [0, 0]], float)
    assert _contradicting_targets(range(5), targets, exact=False) == [4]
    assert _contradicting_targets(range(5), targets, exact=True) == list(range(5))


def test_the_audit_counts_labels_not_strata(tmp_path: Path) -> None:
    table = _csv(tmp_path, "path,labels", ["a|b"] * 15 + ["a"] * 30 + [""] * 30)
    images = read_images(table, cut_val=False)
    told = audit(images, build_canvases(images, Preprocess(size=16, resize=16)))
    assert told.few == ("b",), "a is there in 45 images, though b is rarer in 15 of them"


def test_numbers_are_read_with_their_units_when_asked_for(tmp_path: Path) -> None:
    path = _csv(
        tmp_path, "path,width [mm],age", [f"{n / 2},{n if n % 3 else ''}" for n in range(30)]
    )
    images = read_images(path, cut_val=False, task="regression")
    assert images.names == ("width", "age")
    assert images.units == ("mm", "")
    read = np.array([image.targets for image in images.images])
    assert np.array_equal(read[:, 0], np.arange(30) / 2)
    assert np.isnan(read[:, 1]).sum() == 10
    with pytest.raises(FtkitError, match="--task regression"):
        read_images(path)


@pytest.mark.parametrize(
    ("header", "task"), [("path,labels", "auto"), ("path,a [m],b", "regression")]
)
def test_what_is_written_is_read_again_with_the_same_splits(
    tmp_path: Path, header: str, task: str
) -> None:
    rows = ["x|y", "y", "", "?x|y"] * 12 if task == "auto" else [f"{n / 7},{n}" for n in range(48)]
    first = read_images(_csv(tmp_path, header, rows), seed=3, task=task)
    (tmp_path / "splits.csv").write_bytes(splits_csv(first))
    again = read_images(tmp_path / "splits.csv", task=task)
    assert again.target_names == first.target_names
    assert again.units == first.units
    for a, b in zip(first.images, again.images, strict=True):
        assert (a.path, a.split, a.said) == (b.path, b.split, b.said)


def test_folds_divide_rare_labels_and_large_values_evenly(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    labels = [f"{int(n % 15 == 0)},{int(draw.random() < 0.5)}" for n in range(300)]
    values = [f"{draw.gamma(1.0):.4f}" for _ in range(300)]
    preprocess = Preprocess(size=16, resize=16)
    for path, task in (
        (_csv(tmp_path, "path,rare,common", labels, "labels.csv"), "multi-label"),
        (_csv(tmp_path, "path,value", values, "values.csv"), "regression"),
    ):
        images = read_images(path, cut_val=False, task=task)
        canvases = build_canvases(images, preprocess)
        targets = canvases.targets[canvases.rows("train")][:, 0]
        large = targets >= (1 if task == "multi-label" else np.quantile(targets, 0.9))
        folds = make_folds(canvases, 4, seed=0)
        counts = [int(large[folds.held(fold)].sum()) for fold in range(4)]
        assert max(counts) - min(counts) <= 2, counts


@pytest.mark.parametrize(
    ("header", "rows", "task", "said"),
    [
        ("path,labels", ["a", "b"] + ["b"] * 8, "auto", "2 images with the label 'a'"),
        ("path,labels", ["a|b"] * 10, "auto", "2 images without the label 'a'"),
        ("path,label", ["a|b", "a", "b"] * 4, "auto", "expected one class, found 'a|b'"),
        ("path,a,b", ["1,"] * 5 + ["0,"] * 5, "auto", "with known values of 'b'"),
        ("path,a,b", ["1,2"] * 10, "multi-label", "'labels'"),
        ("path,a,a", ["1,0"] * 10, "auto", "'a' twice"),
        ("path,value", ["3"] * 10, "regression", "of different 'value'"),
        ("path,value", ["3", "nan"] * 5, "regression", "line 3: expected a number"),
        ("path,value", ["3", "3,5"] * 5, "regression", "line 3"),
        ("path,value", ["3", ""] * 5, "regression", "line 3: expected at least one known value"),
        ("path,split", ["train"] * 10, "regression", "a column of numbers"),
        ("path,value", ["3", "4"] * 5, "sorting", "--task"),
        ("path,w [mm],w [px]", ["3,4", "4,5"] * 5, "regression", "'w' twice"),
        ("path,a|b,c", ["0,1", "1,0"] * 5, "auto", "'a|b'"),
        ("path,class", ["0", "1"] * 5, "auto", "--task regression"),
        ("path,value,split", ["3,train", "4,train", ",test"], "regression", "line 4"),
        (
            "path,a,b,split",
            ["3,1,train", "4,2,train", "5,,test"] * 3,
            "regression",
            "test images with known values of 'b'",
        ),
        (
            "path,a,b,split",
            ["1,1,test", "0,0,train", "0,1,train"] * 3,
            "multi-label",
            "1 training images with the label 'a'",
        ),
        (
            "path,a,b,split",
            ["0,0,test", "0,1,train", "1,0,train"] * 4,
            "multi-label",
            "test images that have a label",
        ),
    ],
)
def test_data_that_teaches_nothing_is_refused_in_one_sentence(
    tmp_path: Path, header: str, rows: list[str], task: str, said: str
) -> None:
    path = _csv(tmp_path, header, rows)
    with pytest.raises(FtkitError) as raised:
        read_images(path, cut_val=False, task=task)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_further_images_keep_what_is_not_known_unknown(tmp_path: Path) -> None:
    data = _csv(tmp_path, "path,labels", ["a", "b", "a|b", ""] * 6)
    more = _csv(tmp_path, "path,labels", ["c|a", "c", "", "b"], "more.csv")
    images = read_images(data, cut_val=False, add=more)
    assert images.names == ("a", "b", "c")
    old = [image.targets for image in images.images if image.path.name.startswith("data")]
    assert np.isnan(np.array(old)[:, 2]).all(), "nobody has looked for c in them"

    numbers = _csv(tmp_path, "path,width [mm]", [str(n) for n in range(24)], "mm.csv")
    inches = _csv(tmp_path, "path,width [in]", ["1", "2"], "in.csv")
    with pytest.raises(FtkitError, match="in mm as in the data, found it in in"):
        read_images(numbers, cut_val=False, task="regression", add=inches)


def test_what_review_writes_is_taken_where_it_is_labelled(tmp_path: Path) -> None:
    data = _csv(tmp_path, "path,label", ["ok", "bad"] * 12)
    reviewed = _csv(
        tmp_path, "path,label,suggested,why", [",ok,doubtful", "bad,ok,doubtful"], "review.csv"
    )
    images = read_images(data, cut_val=False, add=reviewed)
    assert [image.path.name for image in images.images if "review" in image.path.name] == [
        "review.csv-1.png"
    ]


def test_columns_that_mean_nothing_may_have_one_name(tmp_path: Path) -> None:
    path = _csv(tmp_path, "path,label,note,note", ["ok,1,2", "bad,3,4"] * 12)
    assert len(read_images(path, cut_val=False).images) == 24


def test_a_label_that_is_nowhere_in_test_is_told(tmp_path: Path) -> None:
    rows = ["a|b,train", "b,train", ",train", "b,test", ",test"] * 6
    images = read_images(_csv(tmp_path, "path,labels,split", rows), cut_val=False)
    assert images.unjudged("test") == ("a",)


def test_values_that_differ_contradict_in_identical_files_only(tmp_path: Path) -> None:
    path = _csv(tmp_path, "path,value", [str(n) for n in range(12)])
    lines = path.read_text().splitlines()
    (tmp_path / "copy.png").write_bytes((tmp_path / "data.csv-3.png").read_bytes())
    path.write_text("\n".join([*lines, "copy.png,99"]) + "\n")
    images = read_images(path, cut_val=False, task="regression")
    canvases = build_canvases(images, Preprocess(size=16, resize=16))
    rows = [n for n, image in enumerate(canvases.images.images) if image.targets[0] in (3, 99)]
    exact, near = (Alike(rows=tuple(rows), exact=exact) for exact in (True, False))
    assert conflicts_of([exact, near], canvases.images) == (exact,)


def test_a_class_folder_is_no_table_of_numbers(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(FtkitError, match="expected a CSV for --task regression"):
        read_images(tmp_path, task="regression")


def test_the_audit_knows_labels_that_never_meet_and_numbers_far_out(tmp_path: Path) -> None:
    labels = ["a|b"] * 20 + ["c"] * 20 + ["a"] * 20
    found = audit_targets(read_images(_csv(tmp_path, "path,labels", labels), cut_val=False))
    assert isinstance(found, LabelAudit)
    assert found.counts["a"] == (40, 20, 0)
    assert found.together == {"a + b": 20}
    assert set(found.never) == {"a + c", "b + c"}

    values = [str(n % 7) for n in range(40)] + ["1000"]
    path = _csv(tmp_path, "path,value", values, "values.csv")
    spread = audit_targets(read_images(path, cut_val=False, task="regression"))
    assert isinstance(spread, ValueAudit)
    assert [Path(name).name for name in spread.quantities["value"].outliers] == [
        "values.csv-40.png"
    ]
