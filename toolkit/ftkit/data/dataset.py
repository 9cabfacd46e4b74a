"""Read a data set: its images, classes and splits.

    images = read_images("photos")   # photos/CLASS/*.jpg, photos/{train,val,test}/CLASS/*, or a CSV
    images.classes, images.of("train")

A CSV has the columns path,label[,split][,group], or those of another task (table.py); its paths are
relative to the CSV. A missing val or test split is cut from train: stratified by class, or by all
labels (stratify.py), and seeded, with groups and identical files kept in one split.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ftkit.data.order import natural
from ftkit.data.strata import strata_of
from ftkit.data.stratify import divide
from ftkit.data.table import (
    AUTO,
    BETWEEN,
    SPLIT_NAMES,
    UNKNOWN,
    Row,
    Table,
    in_order,
    read_table,
)
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError, choices
from ftkit_export.runtime.groups import group_names
from ftkit_export.runtime.preprocess import SUFFIXES
from ftkit_export.runtime.readout import Task
from ftkit_export.runtime.verify import MANIFEST

VAL_SHARE = 0.1
TEST_SHARE = 0.15
# By which a run's folder, or a bundle, is known
OUTPUTS = {"run": ("run.json", "model.safetensors"), "bundle": (MANIFEST, "model.onnx")}
FEWEST_OF_A_LABEL = 2


@dataclass(frozen=True, kw_only=True)
class Image:
    """One labelled file. label: index into Images.classes.

    group: images of one group must stay in one split. targets: of multi-label data and regression,
    in the order of Images.names; NaN where one is not known.
    """

    path: Path
    label: int
    split: str
    group: str = ""
    targets: tuple[float, ...] = ()

    @property
    def said(self) -> object:
        """What is said of the image, to compare with what is said of another."""
        return tuple(map(repr, self.targets)) or self.label


@dataclass(frozen=True, kw_only=True)
class Images:
    """A labelled data set.

    classes: in natural order (2 before 10); of the other tasks, strata (strata.py). made: the splits
    that ftkit created. target_names: the labels of multi-label data, or the quantities of regression,
    whose units are "" where they have none.
    """

    root: Path
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    made: tuple[str, ...] = ()
    task: Task = "single-label"
    target_names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What a model of these images puts out: classes, labels or quantities."""
        return self.target_names if self.task != "single-label" else self.classes

    @property
    def grouping(self) -> str:
        """Tells one grouping of the images from another; "" without groups."""
        named = [image.group for image in self.images]
        return hashlib.sha256("\0".join(named).encode()).hexdigest()[:16] if any(named) else ""

    def of(self, split: str) -> tuple[Image, ...]:
        """The images of one split, ordered by path."""
        return tuple(image for image in self.images if image.split == split)

    def unjudged(self, split: str) -> tuple[str, ...]:
        """Classes (labels, quantities) without an image in a split, which does not evaluate them."""
        if self.task != "single-label":
            own = np.array([image.targets for image in self.of(split)])
            judged = own == 1 if self.task == "multi-label" else ~np.isnan(own)
            return tuple(
                name
                for name, any_there in zip(self.target_names, judged.any(0), strict=True)
                if not any_there
            )
        there = {image.label for image in self.of(split)}
        return tuple(name for label, name in enumerate(self.classes) if label not in there)

    def without(self, bad: set[Path]) -> Images:
        """The data set without these files."""
        return replace(self, images=tuple(image for image in self.images if image.path not in bad))


def read_images(
    data: str | Path,
    seed: int = 0,
    group_by: str = "",
    root: str | Path | None = None,
    *,
    cut_val: bool = True,
    add: str | Path | None = None,
    task: str = AUTO,
) -> Images:
    """Read a class folder, a split folder or a CSV.

    group_by: a regular expression; its first capture group (or the whole match) in a file's path
    below `data` names the image's group. root: the folder that a CSV's paths are relative to, by
    default its own. cut_val: whether to make a val split where none is given. add: a CSV of further
    images, such as `ftkit review` writes; they are train unless it says otherwise, and the splits
    of the others stay as they are without them. task: as in read_table. Raises FtkitError naming
    what is missing and what to try.
    """
    root, table = _table(Path(data), Path(root) if root else None, group_by, task)
    read = _of_classes(root, table) if table.task == "single-label" else _of_targets(root, table)
    split = _with_splits(read, seed, cut_val)
    if add is not None:
        split = _with_more(split, Path(add))
    require_trained(split)
    return split


def _of_classes(root: Path, table: Table) -> Images:
    classes = in_order(root, {row.label for row in table.rows})
    if len(classes) < 2:
        raise FtkitError(
            f"{root}: expected at least two classes, found one ({classes[0]}). Try a folder for each class, "
            "e.g. ok/ and defect/"
        )

    index = {label: number for number, label in enumerate(classes)}
    images = [
        Image(path=row.path, label=index[row.label], split=row.split, group=row.group)
        for row in table.rows
    ]
    return Images(root=root, classes=classes, images=_ordered(images))


def _of_targets(root: Path, table: Table) -> Images:
    targets = np.array([row.targets for row in table.rows])
    _require_evidence(root, table.task, table.names, targets)
    strata, classes = strata_of(table.task, targets, table.names, [row.group for row in table.rows])
    images = [
        Image(
            path=row.path, label=int(label), split=row.split, group=row.group, targets=row.targets
        )
        for row, label in zip(table.rows, strata, strict=True)
    ]
    return Images(
        root=root,
        classes=classes,
        images=_ordered(images),
        task=table.task,
        target_names=table.names,
        units=table.units,
    )


def _require_evidence(
    root: Path,
    task: Task,
    names: Sequence[str],
    targets: Array,
    of: str = "images",
    fewest: int = FEWEST_OF_A_LABEL,
) -> None:
    """Raise FtkitError for a label or a quantity that nothing can be learned of. of: these images."""
    for name, column in zip(names, targets.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known):
            raise FtkitError(
                f"{root}: expected {of} with known values of {name!r}, found none. Fill them in, or remove the column"
            )
        if task == "regression":
            if known.min() == known.max():
                raise FtkitError(
                    f"{root}: expected {of} of different {name!r}, found {known[0]:g} for each. Add some, or remove "
                    "the column"
                )
            continue
        counts = (int((known == 1).sum()), int((known == 0).sum()))
        for count, word in zip(counts, ("with", "without"), strict=True):
            if count < fewest:
                raise FtkitError(
                    f"{root}: expected at least {fewest} {of} {word} the label {name!r}, found {count}. Add some, or "
                    "leave the label out"
                )


def require_trained(images: Images) -> None:
    """Raise FtkitError unless the train split teaches each label or quantity, each quantity is known of
    some image of every split, and some image of every split has a label."""
    if images.task == "single-label":
        return
    own = np.array([image.targets for image in images.of("train")])
    where = (images.root, images.task, images.target_names)
    _require_evidence(*where, own, "training images", 1)
    for split in ("val", "test"):
        missing = images.unjudged(split) if images.of(split) else ()
        if images.task == "regression" and missing:
            raise FtkitError(
                f"{images.root}: expected {split} images with known values of {missing[0]!r}, found none. Fill "
                "some in, or remove the column"
            )
        if images.task == "multi-label" and len(missing) == len(images.target_names):
            raise FtkitError(
                f"{images.root}: expected {split} images that have a label, found none in {len(images.of(split))}. "
                "Move some there, or leave the splits to ftkit"
            )


def _ordered(images: Iterable[Image]) -> tuple[Image, ...]:
    return tuple(sorted(images, key=lambda image: natural(image.path.as_posix())))


def _with_more(images: Images, path: Path) -> Images:
    """The data set with the labelled rows of a CSV; a class may be new."""
    if not path.is_file():
        raise FtkitError(
            f"--add {path}: expected a CSV of further images, found none. Check the path"
        )
    table = read_table(path, path.parent, images.task, labelled_only=True)
    _require_utf8(table.rows)
    if not table.rows:
        raise FtkitError(
            f"--add {path}: expected labelled images, found none. Fill in the label column"
        )

    known = {_absolute(image.path) for image in images.images}
    for row in table.rows:
        if _absolute(row.path) in known:
            raise FtkitError(
                f"--add {path}: expected further images, found {row.path.name}, which the data has. Remove that row"
            )

    if images.task != "single-label":
        return _with_more_targets(images, path, table)

    classes = in_order(path, {*images.classes, *(row.label for row in table.rows)})
    index = {label: number for number, label in enumerate(classes)}
    more = [
        Image(path=row.path, label=index[row.label], split=row.split or "train", group=row.group)
        for row in table.rows
    ]
    items = [
        *(replace(image, label=index[images.classes[image.label]]) for image in images.images),
        *more,
    ]
    return replace(images, classes=classes, images=_ordered(items))


def _with_more_targets(images: Images, path: Path, table: Table) -> Images:
    """The same for labels and quantities: what the data do not name is not known of their images."""
    units = dict(zip(table.names, table.units, strict=True))
    for name, unit in zip(images.target_names, images.units, strict=True):
        if units.get(name, unit) != unit:
            raise FtkitError(
                f"--add {path}: expected {name!r} in {unit or 'no unit'} as in the data, found it in "
                f"{units[name] or 'no unit'}. Convert it"
            )
    new = [name for name in table.names if name not in images.target_names]
    if new and images.task == "regression":
        raise FtkitError(
            f"--add {path}: expected the quantities {', '.join(images.target_names)}, found {new[0]!r}. Check "
            "the header"
        )

    names = in_order(path, {*images.target_names, *new}) if new else images.target_names

    def placed(
        own: Sequence[str], targets: Sequence[float], absent: float = np.nan
    ) -> tuple[float, ...]:
        known = dict(zip(own, targets, strict=True))
        return tuple(known.get(name, absent) for name in names)

    items = [
        *(
            replace(image, targets=placed(images.target_names, image.targets))
            for image in images.images
        ),
        *(
            Image(
                path=row.path,
                label=0,
                split=row.split or "train",
                group=row.group,
                targets=placed(table.names, row.targets, table.absent),
            )
            for row in table.rows
        ),
    ]
    strata, classes = strata_of(
        images.task,
        np.array([image.targets for image in items]),
        names,
        [image.group for image in items],
    )
    labelled = [
        replace(image, label=int(label)) for image, label in zip(items, strata, strict=True)
    ]
    return replace(
        images,
        classes=classes,
        images=_ordered(labelled),
        target_names=names,
        units=tuple(units.get(name, "") for name in names) if new else images.units,
    )


class Labelled(NamedTuple):
    """An image to evaluate: its class ("" with targets) and its group ("" for none). targets: of the
    other tasks, in the order asked for; NaN where one is not known."""

    path: Path
    label: str
    group: str
    targets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model answers: its task, and the names and units of its labels or quantities."""

    task: Task = "single-label"
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()


def labelled(
    data: str | Path,
    group_by: str = "",
    root: str | Path | None = None,
    asked: Asked | None = None,
) -> list[Labelled]:
    """Images for evaluation only: the test split if one is given, else all of them.

    group_by, root: as in read_images. asked: of other tasks, the labels or quantities to judge; what the
    data does not name is not known. Raises FtkitError as read_images, but accepts a single image.
    """
    asked = asked or Asked()
    root, table = _table(Path(data), Path(root) if root else None, group_by, asked.task)
    rows = table.rows
    chosen = [row for row in rows if row.split == "test"] or [row for row in rows if not row.split]
    if not chosen:
        raise FtkitError(
            f"{root}: expected a test split, found train and val only. Try a folder of held-out images"
        )

    places = _places(Path(data), table, asked)
    images = [
        Labelled(
            row.path,
            row.label,
            row.group,
            tuple(table.absent if place is None else row.targets[place] for place in places),
        )
        for row in chosen
    ]
    return sorted(images, key=lambda image: natural(image.path.as_posix()))


def _places(data: Path, table: Table, asked: Asked) -> list[int | None]:
    """Where the table has each label or quantity that is asked for. Raises FtkitError for others, and for
    other units."""
    if asked.task == "single-label":
        return []
    known = dict(zip(asked.names, asked.units, strict=True))
    for name, unit in zip(table.names, table.units, strict=True):
        if name not in known:
            raise FtkitError(
                f"{data}: expected what the model answers, {choices(name, asked.names)}"
            )
        if unit != known[name]:
            raise FtkitError(
                f"{data}: expected {name!r} in {known[name] or 'no unit'} as the model answers it, found it in "
                f"{unit or 'no unit'}. Convert it"
            )
    return [table.names.index(name) if name in table.names else None for name in asked.names]


def as_csv(rows: Iterable[tuple[Image, str]], images: Images) -> bytes:
    """The data set as a CSV for `read_images`; rows: an image of `images` and its path in the CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["label"] if images.task == "single-label" else ["labels"]
    if images.task == "regression":
        columns = [
            f"{name} [{unit}]" if unit else name
            for name, unit in zip(images.target_names, images.units, strict=True)
        ]
    writer.writerow(("path", *columns, "split", "group"))
    writer.writerows(
        (path, *_told(image, images), image.split, image.group) for image, path in rows
    )
    return text.getvalue().encode()


def _told(image: Image, images: Images) -> list[str]:
    """What a CSV says of an image."""
    if images.task == "single-label":
        return [images.classes[image.label]]
    if images.task == "regression":
        return ["" if np.isnan(value) else repr(float(value)) for value in image.targets]
    named = zip(images.target_names, image.targets, strict=True)
    listed = [UNKNOWN * bool(np.isnan(value)) + name for name, value in named if value != 0]
    return [BETWEEN.join(listed)]


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

    return as_csv(zip(images.images, names, strict=True), images)


def _absolute(path: Path) -> Path:
    """Absolute path with links unresolved, so that their targets are not revealed."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.resolve follows them


def _table(data: Path, root: Path | None, group_by: str, task: str) -> tuple[Path, Table]:
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

    if data.is_file():
        table = read_table(data, root or data.parent, task)
    else:
        _require_class_folders(data, task)
        table = Table(rows=_from_folder(data))
    _require_utf8(table.rows)
    if not table.rows and data.is_file():
        raise FtkitError(
            f"{data}: expected a row an image, found a header only. Try path,label[,split][,group]"
        )
    if not table.rows:
        raise FtkitError(
            f"{data}: expected images as {data}/CLASS/IMAGE.jpg, found none. Try a folder a class"
        )

    top = root or data
    return top, replace(table, rows=_grouped(top, table.rows, group_by)) if group_by else table


def _require_utf8(rows: Iterable[Row]) -> None:
    """Raise FtkitError for a file or folder whose name is not in UTF-8, so that no CSV or page can name it."""
    for row in rows:
        try:
            str(row.path).encode()
        except UnicodeEncodeError:
            raise FtkitError(
                f"{str(row.path)!a}: expected a name in UTF-8, found other bytes, of an old archive perhaps. "
                "Rename it"
            ) from None


def _require_class_folders(data: Path, task: str) -> None:
    if task not in (AUTO, "single-label"):
        raise FtkitError(
            f"{data}: expected a CSV for --task {task}, found a folder, whose images have a class each. "
            "Try path,labels or path,value"
        )


def below(root: Path, path: Path) -> str:
    """An image's path for display: relative to the data folder, or to the CSV's.

    For images elsewhere, only the last folder and the name: the rest would reveal this machine's
    layout.
    """
    relative = _relative(root, path)
    return Path(*path.parts[-2:]).as_posix() if ".." in Path(relative).parts else relative


def _relative(root: Path, path: Path) -> str:
    return Path(os.path.relpath(path, root if root.is_dir() else root.parent)).as_posix()


def _grouped(root: Path, rows: Sequence[Row], group_by: str) -> list[Row]:
    names = group_names([_relative(root, row.path) for row in rows], group_by)
    return [row._replace(group=name or row.group) for row, name in zip(rows, names, strict=True)]


def _from_folder(root: Path) -> list[Row]:
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
        return [Row(path, label) for path, label in _class_folders(root)]

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
            rows.append(Row(path, label, split))

    return rows


def _class_folders(root: Path) -> list[tuple[Path, str]]:
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [
        (path, folder.name)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_hidden(path, folder)
    ]
    _require_no_outputs(root, {path.parent for path, _ in found})
    return found


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether the file, or a folder between it and `folder`, is hidden: thumbnails, say."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _require_no_outputs(root: Path, places: Iterable[Path]) -> None:
    """Raise FtkitError where images are those of a run or a bundle that was made in the data folder."""
    inside = {
        folder for place in places for folder in (place, *place.parents) if root in folder.parents
    }
    for folder in sorted(inside):
        for kind, files in OUTPUTS.items():
            if all((folder / name).is_file() for name in files):
                raise FtkitError(
                    f"{folder}: expected images of a class, found a {kind} of ftkit. Move it out of the data folder"
                )


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

    cut = _cut_labels if images.task == "multi-label" else _cut
    for split in made:
        items = cut(items, together, split, {"test": TEST_SHARE, "val": VAL_SHARE}[split], seed)

    result = replace(images, images=tuple(items), made=tuple(made))
    counts = Counter(image.label for image in result.of("train"))

    for label, name in enumerate(images.classes):
        if counts[label] == 0 and images.task == "single-label":
            raise FtkitError(
                f"{images.root}: expected training images of class {name!r}, found none. Try adding some"
            )

    for split in ("val", "test") if cut_val else ("test",):
        if not result.of(split):
            cure = "at least 4 images a class" if images.task == "single-label" else "more images"
            if any(image.group for image in items):
                cure = "more groups, since each stays whole in one split"
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


def _cut_labels(
    items: Sequence[Image], together: Sequence[int], split: str, share: float, seed: int
) -> list[Image]:
    """Move about `share` of train to `split`, label by label. Images that belong together move together."""
    rows = [number for number, image in enumerate(items) if image.split == "train"]
    targets = np.array([items[row].targets for row in rows])
    part = divide(targets, [together[row] for row in rows], (1 - share, share), seed)
    result = list(items)
    for row in np.array(rows)[part == 1]:
        result[row] = replace(items[row], split=split)
    return result
