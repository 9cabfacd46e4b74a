"""Read a data set: its images, classes and splits.

    images = read_images("photos")   # photos/CLASS/*.jpg, photos/{train,val,test}/CLASS/*, or a CSV
    images.classes, images.of("train")

A CSV has the columns path,label[,split][,group]; its paths are relative to the CSV. A missing val
or test split is cut from train: stratified by class and seeded, with groups and identical files
kept in one split.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.groups import group_names
from ftkit_export.runtime.preprocess import SUFFIXES

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
SURPLUS = "\0"  # key of the fields of a row that exceed the header
LINE_ENDS = "\n\r"  # labels.txt has one label per line
VAL_SHARE = 0.1
TEST_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Image:
    """One labelled file. label: index into Images.classes.

    group: images of one group must stay in one split.
    """

    path: Path
    label: int
    split: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Images:
    """A labelled data set.

    classes: in natural order (2 before 10). made: the splits that ftkit created.
    """

    root: Path
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    made: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Image, ...]:
        """The images of one split, ordered by path."""
        return tuple(image for image in self.images if image.split == split)

    def unjudged(self, split: str) -> tuple[str, ...]:
        """Classes without an image in a split, which therefore does not evaluate them."""
        there = {image.label for image in self.of(split)}
        return tuple(name for label, name in enumerate(self.classes) if label not in there)

    def without(self, bad: set[Path]) -> Images:
        """The data set without these files."""
        return replace(self, images=tuple(image for image in self.images if image.path not in bad))


def natural(text: str) -> list[tuple[int, int, str]]:
    """Natural sort key: class2 before class10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part.lower())
        for part in re.split(r"(\d+)", text)
        if part
    ]


def read_images(
    data: str | Path,
    seed: int = 0,
    group_by: str = "",
    root: str | Path | None = None,
    *,
    cut_val: bool = True,
    add: str | Path | None = None,
) -> Images:
    """Read a class folder, a split folder or a CSV.

    group_by: a regular expression; its first capture group (or the whole match) in a file's path
    below `data` names the image's group. root: the folder that a CSV's paths are relative to, by
    default its own. cut_val: whether to make a val split where none is given. add: a CSV of further
    images, such as `ftkit review` writes; they are train unless it says otherwise, and the splits
    of the others stay as they are without them. Raises FtkitError naming what is missing and what
    to try.
    """
    root, rows = _rows(Path(data), Path(root) if root else None, group_by)
    classes = _classes(root, {label for _, label, _, _ in rows})
    if len(classes) < 2:
        raise FtkitError(
            f"{root}: expected at least two classes, found one ({classes[0]}). Try a folder for each class, "
            "e.g. ok/ and defect/"
        )

    index = {label: number for number, label in enumerate(classes)}
    images = sorted(
        (
            Image(path=path, label=index[label], split=split, group=group)
            for path, label, split, group in rows
        ),
        key=lambda image: natural(image.path.as_posix()),
    )
    read = Images(root=root, classes=classes, images=tuple(images))
    split = _with_splits(read, seed, cut_val)
    return split if add is None else _with_more(split, Path(add))


def _classes(where: Path, labels: Iterable[str]) -> tuple[str, ...]:
    """The classes in their order. Raises FtkitError for two that are the same name to people: macOS
    writes an accent as a character of its own, other systems do not."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        twin = seen.setdefault(unicodedata.normalize("NFC", label), label)
        if twin != label:
            raise FtkitError(
                f"{where}: expected class names that differ, found {label!a} and {twin!a}, which look alike. "
                "Rename one as the other"
            )
    return tuple(sorted(seen.values(), key=natural))


def _with_more(images: Images, path: Path) -> Images:
    """The data set with the labelled rows of a CSV; a class may be new."""
    if not path.is_file():
        raise FtkitError(
            f"--add {path}: expected a CSV of further images, found none. Check the path"
        )
    rows = _from_csv(path, path.parent, labelled_only=True)
    if not rows:
        raise FtkitError(
            f"--add {path}: expected labelled images, found none. Fill in the label column"
        )

    known = {_absolute(image.path) for image in images.images}
    for place, _, _, _ in rows:
        if _absolute(place) in known:
            raise FtkitError(
                f"--add {path}: expected further images, found {place.name}, which the data has. Remove that row"
            )

    classes = _classes(path, {*images.classes, *(label for _, label, _, _ in rows)})
    index = {label: number for number, label in enumerate(classes)}
    more = [
        Image(path=place, label=index[label], split=split or "train", group=group)
        for place, label, split, group in rows
    ]
    items = [
        *(replace(image, label=index[images.classes[image.label]]) for image in images.images),
        *more,
    ]
    ordered = sorted(items, key=lambda image: natural(image.path.as_posix()))
    return replace(images, classes=classes, images=tuple(ordered))


CsvRow = tuple[Path, str, str, str]  # path, label, split or "", group or ""


class Labelled(NamedTuple):
    """An image to evaluate, with the names of its class and group ("" for none)."""

    path: Path
    label: str
    group: str


def labelled(
    data: str | Path, group_by: str = "", root: str | Path | None = None
) -> list[Labelled]:
    """Images for evaluation only: the test split if one is given, else all of them.

    group_by, root: as in read_images. Raises FtkitError as read_images, but accepts a single image.
    """
    root, rows = _rows(Path(data), Path(root) if root else None, group_by)
    chosen = [row for row in rows if row[2] == "test"] or [row for row in rows if not row[2]]
    if not chosen:
        raise FtkitError(
            f"{root}: expected a test split, found train and val only. Try a folder of held-out images"
        )

    images = [Labelled(path, label, group) for path, label, _, group in chosen]
    return sorted(images, key=lambda image: natural(image.path.as_posix()))


def as_csv(rows: Iterable[tuple[Image, str]], classes: Sequence[str]) -> bytes:
    """The data set as a CSV for `read_images`; rows: an image and its path in the CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split", "group"))
    writer.writerows((path, classes[image.label], image.split, image.group) for image, path in rows)
    return text.getvalue().encode()


def splits_csv(images: Images) -> bytes:
    """Every image with its split, as a CSV for `read_images`.

    Paths are relative to the data folder, the CSV's folder or, if images lie outside it, their
    common parent folder, which is then the `root` of `read_images`. Links are not resolved, and
    images without a common folder are named by `below`, so the file reveals nothing about this
    machine.
    """
    folder = images.root if images.root.is_dir() else images.root.parent
    folder = _absolute(folder)
    paths = [_absolute(image.path) for image in images.images]
    if not all(path.is_relative_to(folder) for path in paths):
        folder = Path(os.path.commonpath([path.parent for path in paths]))

    if folder == Path(folder.anchor):
        names = [below(images.root, path) for path in paths]
    else:
        names = [path.relative_to(folder).as_posix() for path in paths]

    return as_csv(zip(images.images, names, strict=True), images.classes)


def _absolute(path: Path) -> Path:
    """Absolute path with links unresolved, so that their targets are not revealed."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.resolve follows them


def _rows(data: Path, root: Path | None, group_by: str) -> tuple[Path, list[CsvRow]]:
    """The folder that image paths are shown relative to (`below`), and the images."""
    if not data.exists():
        raise FtkitError(
            f"{data}: expected a folder of images or a CSV, found nothing there. Check the path"
        )

    if root and not (root.is_dir() and data.is_file()):
        what = f"{data}, which is no CSV" if root.is_dir() else "no such folder"
        raise FtkitError(
            f"--root {root}: expected the folder that a CSV's paths are relative to, found {what}. Try it without"
        )

    rows = _from_csv(data, root or data.parent) if data.is_file() else _from_folder(data)
    if not rows and data.is_file():
        raise FtkitError(
            f"{data}: expected a row an image, found a header only. Try path,label[,split][,group]"
        )
    if not rows:
        raise FtkitError(
            f"{data}: expected images as {data}/CLASS/IMAGE.jpg, found none. Try a folder a class"
        )

    top = root or data
    return top, _grouped(top, rows, group_by) if group_by else rows


def below(root: Path, path: Path) -> str:
    """An image's path for display: relative to the data folder, or to the CSV's.

    For images elsewhere, only the last folder and the name: the rest would reveal this machine's
    layout.
    """
    relative = _relative(root, path)
    return Path(*path.parts[-2:]).as_posix() if ".." in Path(relative).parts else relative


def _relative(root: Path, path: Path) -> str:
    return Path(os.path.relpath(path, root if root.is_dir() else root.parent)).as_posix()


def _grouped(root: Path, rows: Sequence[CsvRow], group_by: str) -> list[CsvRow]:
    names = group_names([_relative(root, path) for path, _, _, _ in rows], group_by)
    return [
        (path, label, split, name or group)
        for (path, label, split, group), name in zip(rows, names, strict=True)
    ]


def _from_folder(root: Path) -> list[CsvRow]:
    top = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    splits = {
        path: SPLIT_NAMES[path.name.lower()] for path in top if path.name.lower() in SPLIT_NAMES
    }

    others = sorted(path.name for path in top if path not in splits)
    # "valid" and "invalid" may be classes of parts
    if "train" not in splits.values() and others:
        splits = {
            path: split
            for path, split in splits.items()
            if path.name.lower() not in ("valid", "validation")
        }

    if not splits:
        return [(path, label, "", "") for path, label in _class_folders(root)]

    if others:
        named = sorted(path.name for path in splits)
        raise FtkitError(
            f"{root}: expected either splits (train, val, test) or classes, found {named[0]!r} beside "
            f"{others[0]!r}. Rename the one, or move the other out of the data folder"
        )

    rows = []
    for folder, split in splits.items():
        for path, label in _class_folders(folder):
            if label.lower() in SPLIT_NAMES:
                raise FtkitError(
                    f"{folder / label}: expected a class, found a folder named like a split. Rename it"
                )
            rows.append((path, label, split, ""))

    return rows


def _class_folders(root: Path) -> list[tuple[Path, str]]:
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [
        (path, folder.name)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]


def _from_csv(path: Path, folder: Path, *, labelled_only: bool = False) -> list[CsvRow]:
    """Read the rows of a CSV whose paths are relative to `folder`.

    labelled_only: leave out rows without a label.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey=SURPLUS)
            columns = [column.strip() for column in reader.fieldnames or ()]
            table = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FtkitError(
            f"{path}: expected a CSV in UTF-8, found {error}. Try path,label[,split][,group]"
        ) from None

    for column in ("path", "label"):
        if column not in columns:
            raise FtkitError(
                f"{path}: expected a column {column!r}, found {', '.join(columns) or 'none'}. Try path,label"
            )

    return [
        _csv_row(folder, f"{path} line {number}", columns, line)
        for number, line in table
        if not labelled_only or _label_of(line)
    ]


def _label_of(line: Mapping[str, Any]) -> str:
    found = next((text for name, text in line.items() if str(name).strip() == "label"), "")
    return (found or "").strip()


def _csv_row(folder: Path, where: str, columns: Sequence[str], line: Mapping[str, Any]) -> CsvRow:
    """Parse one row of a CSV. where: its file and line, for FtkitError."""
    surplus = line.get(SURPLUS, [])
    # Some spreadsheets write trailing commas
    if any(text.strip() for text in surplus):
        raise FtkitError(
            f"{where}: expected {len(columns)} fields ({', '.join(columns)}), found {len(columns) + len(surplus)}. "
            'Quote a field that has a comma in it: "food, drink"'
        )

    fields = {
        str(column).strip(): (text or "").strip()
        for column, text in line.items()
        if column != SURPLUS
    }

    image = _image_file(folder, fields["path"])
    if image is None:
        raise FtkitError(
            f"{where}: expected an image at {folder / fields['path']}, found none. "
            "Check the path column, or name the folder with --root"
        )

    label = fields["label"]
    if not label:
        raise FtkitError(f"{where}: expected a label, found none. Fill in the label column")
    if any(character in label for character in LINE_ENDS):
        raise FtkitError(f"{where}: expected a label on one line, found {label!r}. Correct it")

    split = SPLIT_NAMES.get(fields.get("split", "").lower(), fields.get("split", ""))
    if split and split not in SPLITS:
        raise FtkitError(f"{where}: expected split train, val or test, found {split!r}. Correct it")

    return image, label, split, fields.get("group", "")


def _image_file(folder: Path, text: str) -> Path | None:
    """The image that a CSV in `folder` names; Windows backslashes are accepted."""
    candidates = (folder / text, folder / text.replace("\\", "/")) if text else ()
    return next((path for path in candidates if path.is_file()), None)


def _with_splits(images: Images, seed: int, cut_val: bool) -> Images:
    """Create the missing splits.

    Images without a split are train until val and test are cut from it.
    """
    given = {image.split for image in images.images}
    items = [image if image.split else replace(image, split="train") for image in images.images]
    if "train" not in {image.split for image in items}:
        raise FtkitError(
            f"{images.root}: expected a train split, found {', '.join(sorted(given))}. Try adding train/"
        )

    wanted = ("test", "val") if cut_val else ("test",)
    made = [split for split in wanted if split not in given]
    together = _together(items) if made else []

    for split in made:
        items = _cut(items, together, split, {"test": TEST_SHARE, "val": VAL_SHARE}[split], seed)

    result = replace(images, images=tuple(items), made=tuple(made))
    counts = Counter(image.label for image in result.of("train"))

    for label, name in enumerate(images.classes):
        if counts[label] == 0:
            raise FtkitError(
                f"{images.root}: expected training images of class {name!r}, found none. Try adding some"
            )

    for split in ("val", "test") if cut_val else ("test",):
        if not result.of(split):
            grouped = any(image.group for image in items)
            cure = (
                "more groups, since each stays whole in one split"
                if grouped
                else "at least 4 images a class"
            )
            raise FtkitError(
                f"{images.root}: expected enough images for a {split} split, found {len(items)} in all. Try {cure}"
            )

    return result


def clusters(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The first member of each item's cluster (connected component), given `pairs`."""
    ends = np.array(pairs, np.int64).reshape(-1, 2).T
    _, names = connected_components(
        coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(count, count))
    )
    first: dict[int, int] = {}
    return [first.setdefault(int(name), number) for number, name in enumerate(names)]


def _together(items: Sequence[Image]) -> list[int]:
    """For each image, the first one that must share its split: same group, or identical file.

    Only files of equal size are read.
    """
    seen: dict[str, int] = {}
    pairs = []
    sizes = [image.path.stat().st_size for image in items]
    often = Counter(sizes)

    for number, (image, size) in enumerate(zip(items, sizes, strict=True)):
        keys = [f"group {image.group}"] if image.group else []
        if often[size] > 1:
            with suppress(OSError):  # an unreadable file is reported when decoded
                keys.append(hashlib.sha256(image.path.read_bytes()).hexdigest())
        pairs += [(seen.setdefault(key, number), number) for key in keys]

    return clusters(len(items), pairs)


def _cut(
    items: Sequence[Image], together: Sequence[int], split: str, share: float, seed: int
) -> list[Image]:
    """Move about `share` of train to `split`, class by class.

    Images that belong together move together, and every class keeps a training image.
    """
    rng = random.Random(f"{seed}/{split}")
    groups: dict[str, list[int]] = defaultdict(list)

    for number, first in enumerate(together):
        if items[number].split == "train":
            groups[items[first].group or f"\0{first}"].append(number)

    left = Counter(image.label for image in items if image.split == "train")
    wanted = {label: round(count * share) if count > 1 else 0 for label, count in left.items()}

    for label, count in left.items():
        if count >= 4 and wanted[label] == 0:
            wanted[label] = 1

    order = sorted(groups)
    rng.shuffle(order)
    result = list(items)

    for name in order:
        members = Counter(items[number].label for number in groups[name])
        gain = sum(min(count, max(0, wanted[label])) for label, count in members.items())
        if gain * 2 < members.total() or any(
            left[label] <= count for label, count in members.items()
        ):
            continue  # over half of the group is surplus, or a class would lose its last image
        for number in groups[name]:
            result[number] = replace(items[number], split=split)
        wanted = {label: count - members.get(label, 0) for label, count in wanted.items()}
        left.subtract(members)

    return result
