"""Read a CSV of images: one class, several labels, or numbers for each.

    table = read_table(Path("photos.csv"), folder)          # path,label[,split][,group]
    table.task, table.names, table.rows[0].targets

- single-label: a column `label`.
- multi-label: a column `labels` with names and | between, of which ?name is not known; or a column
  of 0 and 1 for each label, empty where it is not known.
- regression: a column of numbers for each target, with its unit in brackets: `width [mm]`.
"""

from __future__ import annotations

import csv
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ftkit.data.order import natural
from ftkit_export.runtime.errors import FtkitError, choices
from ftkit_export.runtime.readout import TASKS, Task

SPLITS = ("train", "val", "test")
# Common names of the splits, in any case
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
AUTO = "auto"
OTHER_COLUMNS = ("path", "split", "group")
SURPLUS = "\0"  # key of the fields of a row that exceed the header
LINE_ENDS = "\n\r"  # labels.txt has one label per line
BETWEEN = "|"
UNKNOWN = "?"
# Under a label's own name; with a gap in it, pandas writes a column as 1.0 and 0.0
FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "": math.nan}


class Row(NamedTuple):
    """One image. label: its class, "" with targets. split, group: "" for none. targets: of the other
    tasks, in the order of Table.names; NaN where one is not known."""

    path: Path
    label: str
    split: str = ""
    group: str = ""
    targets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """The images of a CSV. names: the labels or the targets, () of single-label data. units: of the
    targets, "" for none. absent: what the images are of a label that no row names: 0 where rows list
    what applies, NaN where each label has a column."""

    rows: list[Row]
    task: Task = "single-label"
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    absent: float = math.nan


@dataclass(frozen=True)
class _Line:
    """A row as text. where: its file and line, for messages. surplus: fields beyond the header."""

    where: str
    fields: Mapping[str, str]
    surplus: Sequence[str] = ()


def read_table(path: Path, folder: Path, task: str = AUTO, *, labelled_only: bool = False) -> Table:
    """Read a CSV whose paths are relative to `folder`.

    task: "auto" goes by the columns. labelled_only: leave out rows that are not labelled yet. Raises
    FtkitError naming the file, and the line where there is one.
    """
    if task not in (AUTO, *TASKS):
        raise FtkitError(f"--task: expected a known one, {choices(task, (AUTO, *TASKS))}")

    columns, lines = _lines(path)
    if "path" not in columns:
        raise _missing_column(path, "path", columns)
    others = [column for column in columns if column and column not in OTHER_COLUMNS]
    found = _task_of(path, columns, others, lines, task)
    listed = next((name for name in ("labels", "label") if name in columns), None)
    if found == "single-label":
        telling = ["label"]
    else:
        telling = [listed] if listed and found == "multi-label" else others
    _require_once(path, columns, telling)
    # An empty list says that no label applies
    if labelled_only and not (found == "multi-label" and listed == "labels"):
        lines = [line for line in lines if any(line.fields.get(name, "") for name in telling)]
    for line in lines:
        _require_width(line, columns)

    places = [_place(folder, line) for line in lines]
    if found == "single-label":
        rows = [
            Row(place, _label(line), split, group)
            for line, (place, split, group) in zip(lines, places, strict=True)
        ]
        return Table(rows=rows)

    if found == "regression":
        absent = math.nan
        names, units = zip(*map(_named_unit, others), strict=True)
        _require_once(path, names, names)
        read = [_numbers(line, others) for line in lines]
    else:
        _require_plain(path, telling)
        parsed = [_listed(line, listed) if listed else _flags(line, others) for line in lines]
        names = in_order(path, {name for labels in parsed for name in labels})
        units = ("",) * len(names)
        absent = 0.0 if listed else math.nan
        read = [tuple(labels.get(name, absent) for name in names) for labels in parsed]

    for line, targets in zip(lines, read, strict=True):
        if all(map(math.isnan, targets)):
            raise FtkitError(
                f"{line.where}: expected at least one known {_thing(found)}, found none. Fill it in, "
                "or remove the row"
            )
    rows = [
        Row(place, "", split, group, targets)
        for (place, split, group), targets in zip(places, read, strict=True)
    ]
    return Table(rows=rows, task=found, names=tuple(names), units=tuple(units), absent=absent)


def in_order(where: Path, labels: Iterable[str]) -> tuple[str, ...]:
    """Names of classes or labels in their order. Raises FtkitError for two that are the same name to
    people: macOS writes an accent as a character of its own, other systems do not."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        twin = seen.setdefault(unicodedata.normalize("NFC", label), label)
        if twin != label:
            raise FtkitError(
                f"{where}: expected class names that differ, found {label!a} and {twin!a}, which look alike. "
                "Rename one as the other"
            )
    return tuple(sorted(seen.values(), key=natural))


def _thing(task: Task) -> str:
    return "value" if task == "regression" else "label"


def _lines(path: Path) -> tuple[list[str], list[_Line]]:
    """The columns, and the rows as text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey=SURPLUS)
            columns = [_on_one_line(column) for column in reader.fieldnames or ()]
            table = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FtkitError(
            f"{path}: expected a CSV in UTF-8, found {error}. Try path,label[,split][,group]"
        ) from None

    return columns, [_line(f"{path} line {number}", line) for number, line in table]


def _require_once(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise FtkitError where one of the names is the name of two columns."""
    counts = Counter(columns)
    twice = [name for name in names if counts[name] > 1]
    if twice:
        raise FtkitError(
            f"{path}: expected columns of different names, found {twice[0]!r} twice. Rename one"
        )


def _require_plain(path: Path, columns: Sequence[str]) -> None:
    """Raise FtkitError for a label's name that a list of labels could not hold."""
    wrong = [name for name in columns if BETWEEN in name or name.startswith(UNKNOWN)]
    if wrong:
        raise FtkitError(
            f"{path}: expected label names without {BETWEEN} and no {UNKNOWN} in front, found {wrong[0]!r}. Rename it"
        )


def _require_width(line: _Line, columns: Sequence[str]) -> None:
    # Some spreadsheets write trailing commas
    if any(text.strip() for text in line.surplus):
        raise FtkitError(
            f"{line.where}: expected {len(columns)} fields ({', '.join(columns)}), found "
            f"{len(columns) + len(line.surplus)}. "
            'Quote a field that has a comma in it: "food, drink"'
        )


def _on_one_line(column: str) -> str:
    """A header as a name: spreadsheets break long ones."""
    return " ".join(column.split())


def _line(where: str, line: Mapping[str, Any]) -> _Line:
    fields = {
        _on_one_line(str(column)): (text or "").strip()
        for column, text in line.items()
        if column != SURPLUS
    }
    return _Line(where, fields, line.get(SURPLUS, []))


def _task_of(
    path: Path, columns: Sequence[str], others: Sequence[str], lines: Sequence[_Line], task: str
) -> Task:
    """The task that was asked for, or that the columns tell."""
    if task == "single-label" or (task == AUTO and "label" in columns):
        if "label" not in columns:
            raise _missing_column(path, "label", columns)
        listed = [line for line in lines if "|" in line.fields.get("label", "")]
        if task == AUTO and listed:
            raise FtkitError(
                f"{listed[0].where}: expected one class, found {listed[0].fields['label']!r}, which may be several "
                "labels. Try --task multi-label, or --task single-label"
            )
        return "single-label"

    values = {line.fields.get(name, "") for line in lines for name in others}
    flags = bool(others) and values <= FLAGS.keys() and values != {""}
    several = flags and len(others) > 1  # one column of 0 and 1 may be two classes, too
    if task == "multi-label" or (task == AUTO and ("labels" in columns or several)):
        if not (flags or {"labels", "label"} & set(columns)):
            raise FtkitError(
                f"{path}: expected a column 'labels' with names and | between, or a column of 0 and 1 for each "
                f"label, found {', '.join(others) or 'no such column'}. Try path,labels"
            )
        return "multi-label"

    if task == "regression":
        if not others:
            raise FtkitError(
                f"{path}: expected a column of numbers, found {', '.join(columns)}. Try path,value"
            )
        return "regression"

    if others and all(_is_number(value) for value in values if value) and values != {""}:
        raise FtkitError(
            f"{path}: expected a column 'label' or 'labels', found numbers under {', '.join(others)}. "
            "Try --task regression"
        )
    raise _missing_column(path, "label", columns)


def _missing_column(path: Path, column: str, columns: Sequence[str]) -> FtkitError:
    return FtkitError(
        f"{path}: expected a column {column!r}, found {', '.join(columns) or 'none'}. Try path,label"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _place(folder: Path, line: _Line) -> tuple[Path, str, str]:
    """Image, split and group of a row."""
    text = line.fields["path"]
    image = _image_file(folder, text)
    if image is None:
        raise FtkitError(
            f"{line.where}: expected an image at {folder / text}, found none. "
            "Check the path column, or name the folder with --root"
        )

    split = line.fields.get("split", "")
    split = SPLIT_NAMES.get(split.lower(), split)
    if split and split not in SPLITS:
        raise FtkitError(
            f"{line.where}: expected split train, val or test, found {split!r}. Correct it"
        )
    return image, split, line.fields.get("group", "")


def _image_file(folder: Path, text: str) -> Path | None:
    """The image that a CSV in `folder` names; Windows backslashes are accepted."""
    candidates = (folder / text, folder / text.replace("\\", "/")) if text else ()
    return next((path for path in candidates if path.is_file()), None)


def _label(line: _Line) -> str:
    label = line.fields["label"]
    if not label:
        raise FtkitError(f"{line.where}: expected a label, found none. Fill in the label column")
    return _one_line(line, label)


def _one_line(line: _Line, label: str) -> str:
    if any(character in label for character in LINE_ENDS):
        raise FtkitError(f"{line.where}: expected a label on one line, found {label!r}. Correct it")
    return label


def _listed(line: _Line, column: str) -> dict[str, float]:
    """Label -> 1, or NaN for one that is not known: from "a|b|?c"."""
    labels: dict[str, float] = {}
    for part in line.fields[column].split(BETWEEN):
        name = part.strip()
        known = not name.startswith(UNKNOWN)
        name = _one_line(line, name.removeprefix(UNKNOWN).strip())
        if name:
            labels[name] = 1.0 if known else math.nan
    return labels


def _flags(line: _Line, columns: Sequence[str]) -> dict[str, float]:
    """Label -> 1, 0, or NaN where it is not known: from a column each."""
    labels = {}
    for name in columns:
        text = line.fields[name]
        if text not in FLAGS:
            raise FtkitError(
                f"{line.where}: expected 0, 1 or nothing under {name!r}, found {text!r}. Correct it"
            )
        labels[name] = FLAGS[text]
    return labels


def _named_unit(column: str) -> tuple[str, str]:
    """Name and unit of a target: "width [mm]" -> width, mm."""
    name, bracket, unit = column.partition("[")
    if not bracket or not unit.endswith("]"):
        return column, ""
    return name.strip(), unit[:-1].strip()


def _numbers(line: _Line, columns: Sequence[str]) -> tuple[float, ...]:
    """The targets of a row; NaN for an empty field."""
    numbers = []
    for name in columns:
        text = line.fields[name]
        if text and not (_is_number(text) and math.isfinite(float(text))):
            raise FtkitError(
                f"{line.where}: expected a number under {name!r}, found {text!r}. Correct it, or leave it "
                "empty where it is not known"
            )
        numbers.append(float(text) if text else math.nan)
    return tuple(numbers)
