"""Present an audit as text and contact sheets, and write a cleaned copy of the data.

print(audit_text(found, canvases))
write_sheets(Path("sheets"), found, canvases)
cleaned = clean(found, canvases)
write_clean(Path("clean"), cleaned.images, images, progress)     # or Path("clean.csv")
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ftkit.data.audit import FEW, UNEVEN, Alike, Audit
from ftkit.data.canvas import Canvases
from ftkit.data.dataset import Image, Images, as_csv, below
from ftkit.data.table import SPLITS
from ftkit.utils import console
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import folder_beside, write_atomically

MOSTLY_KEPT = 0.7  # area of the median image that the crop keeps; below this, the crop is mentioned
NAMED = 5  # files named per finding; --json names all
SHEET = 48
TILE = 128
COLUMNS = 8
PAIRS = 24  # rows of the sheet of duplicates


def audit_text(result: Audit, canvases: Canvases) -> str:
    """The audit as text, with what must be fixed last."""
    splits = [split for split in SPLITS if split in next(iter(result.counts.values()))]
    first = "class" if result.targets is None else "stratum"
    rows = [(first, *(f"{split}{'*' if split in result.made else ''}" for split in splits))]
    rows += [
        (name, *(str(each[split]) for split in splits)) for name, each in result.counts.items()
    ]
    kinds = f"{len(result.classes)} classes" if result.targets is None else str(result.targets)
    lines = [f"{result.images} images of {kinds}", "", console.table(rows)]

    if result.made:
        lines.append(
            "* made by ftkit: stratified, seeded; groups and identical files kept on one side"
        )

    lines += [
        "",
        f"formats  {_most(result.formats)}",
        f"sizes    {_most(result.sizes)}",
        *_told_targets(result),
        *_fit(result),
    ]
    if result.targets is None and list(result.classes) != sorted(result.classes):
        lines.append("         in natural order; a plain sort would number them otherwise")
    return "\n".join([*lines, "", *_remarks(result, canvases)])


def _told_targets(result: Audit) -> list[str]:
    """The classes with their numbers; or what is known of each label or quantity."""
    if result.targets is not None:
        return ["", *result.targets.lines()]
    return [
        "labels   " + ", ".join(f"{number} {name}" for number, name in enumerate(result.classes))
    ]


def _most(counts: dict[str, int]) -> str:
    shown = [f"{count} {name}" for name, count in list(counts.items())[:4]]
    return ", ".join(shown) + (f", {len(counts) - 4} more" if len(counts) > 4 else "")


def _remarks(result: Audit, canvases: Canvases) -> list[str]:
    """Findings that may matter, followed by those that must be fixed."""
    images = canvases.images
    names = [below(images.root, image.path) for image in images.images]
    full = [f"{name} ({image.split})" for name, image in zip(names, images.images, strict=True)]

    def those(rows: Sequence[int]) -> list[str]:
        return [full[row] for row in rows]

    def sets(items: Iterable[Alike], exact: bool) -> list[str]:
        return [_as_set(those(item.rows)) for item in items if item.exact is exact]

    across = {(item.rows, item.exact) for item in (*result.leaks, *result.conflicts)}
    inside = [item for item in result.alike if (item.rows, item.exact) not in across]
    flat = [row for row in result.flat if row not in result.emptied]
    kind = "classes" if images.task == "single-label" else "labels"
    half_side = f"smaller than half of the {canvases.shards[0].shape[1]} pixels trained on:"

    return [
        *_listed(
            "unreadable, left out in training:", [f"{path}: {why}" for path, why in result.bad]
        ),
        *_listed("identical within a split:", sets(inside, True)),
        *_listed("nearly identical within a split:", sets(inside, False)),
        *_listed(half_side, those(result.tiny)),
        *_listed("over 40 megapixels:", those(result.huge)),
        *_listed("of one flat colour:", those(flat)),
        *_listed(f"{kind} with under {FEW} training images:", list(result.few)),
        *_listed("left blank by this recipe's crop:", those(result.emptied)),
        *(
            line
            for split, classes in result.unjudged.items()
            for line in _listed(
                f"classes without a {split} image, which {split} does not evaluate:", classes
            )
        ),
        *_advice(result, kind),
        *_listed("nearly identical on several sides of the split:", sets(result.leaks, False)),
        *_listed("nearly identical under several labels:", sets(result.conflicts, False)),
        *_listed("LEAKS, identical on several sides of the split:", sets(result.leaks, True)),
        *_listed("LEAKS, groups on several sides of the split:", list(result.shared_groups)),
        *_listed("CONFLICTS, identical under several labels:", sets(result.conflicts, True)),
        _conclusion(result),
    ]


def _listed(title: str, items: Sequence[str]) -> list[str]:
    """The number of items and the first few of them; nothing if there are none."""
    if not items:
        return []

    lines = [f"{len(items)} {title}", *(f"  {item}" for item in items[:NAMED])]
    if len(items) > NAMED:
        lines.append(f"  ... and {len(items) - NAMED} more: --json FILE names all")
    return lines


def _as_set(names: Sequence[str]) -> str:
    more = f" = {len(names) - 4} more" if len(names) > 4 else ""
    return " = ".join(names[:4]) + more


def _advice(result: Audit, kind: str) -> list[str]:
    """Suggested settings."""
    lines = []
    if result.imbalance > UNEVEN:
        lines.append(
            f"{kind} are uneven, {result.imbalance:.0f} to 1: try --set stages.0.balance=loss"
        )
    if result.hint:
        lines.append(
            f"names suggest groups (one object, one day): if so, try --group-by '{result.hint}'"
        )
    return lines


def _fit(result: Audit) -> list[str]:
    """Lines on how much a centre crop cuts off, if it matters."""
    share, under_half = result.crop_keeps
    if share > MOSTLY_KEPT and not under_half and not result.emptied:
        return []
    return [
        f"fit      crop keeps {share:.0%} of the median image's area, and under half of {under_half} images; "
        "pad keeps all:",
        "         if what matters is near an edge, try --set preprocess.fit=pad",
    ]


def _conclusion(result: Audit) -> str:
    """The last line: whether training may start, and what --fix would still fix."""
    near = [
        f"{sum(not item.exact for item in items)} sets of near duplicates are {where}"
        for items, where in (
            (result.leaks, "on several sides of the split"),
            (result.conflicts, "under several labels"),
        )
        if any(not item.exact for item in items)
    ]
    if not result.passed:
        cure = "fix it by hand" if result.shared_groups else "fix it by hand, or with --fix OUT"
        return f"NOT ok: {cure}"
    if near:
        return f"ok, but {' and '.join(near)}: look at them, or try --fix OUT"
    return "ok"


def write_sheets(folder: Path, result: Audit, canvases: Canvases) -> list[Path]:
    """Write a contact sheet per class and one of the duplicates; returns the JPEGs.

    A class's sheet samples its images evenly; the duplicates' sheet has one row per set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = canvases.images
    labels = canvases.labels

    written = []
    for label, name in enumerate(images.classes):
        rows = np.flatnonzero(labels == label)
        picks = spread_evenly(rows, SHEET)
        path = folder / f"{label}-{_file_name(name)}.jpg"
        _sheet(path, f"{name}: {len(picks)} of {len(rows)}", [list(map(int, picks))], canvases)
        written.append(path)

    leaks, conflicts = ({item.rows for item in some} for some in (result.leaks, result.conflicts))
    serious = sorted(
        result.alike, key=lambda item: (item.rows not in leaks, item.rows not in conflicts)
    )
    if serious:
        path = folder / "duplicates.jpg"
        _sheet(
            path,
            f"alike: {min(len(serious), PAIRS)} of {len(serious)} sets, a line each",
            [list(item.rows[:COLUMNS]) for item in serious[:PAIRS]],
            canvases,
        )
        written.append(path)

    return written


def _sheet(path: Path, title: str, sets: Sequence[list[int]], canvases: Canvases) -> None:
    """Draw images in rows of eight, each set on a new row, with names and splits below them."""
    font = PIL.ImageFont.load_default(16)
    small = PIL.ImageFont.load_default(10)
    text = 26
    height = sum(math.ceil(len(rows) / COLUMNS) for rows in sets) * (TILE + text) + 32
    sheet = PIL.Image.new("RGB", (COLUMNS * (TILE + 4) + 4, height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    draw.text((6, 6), title, "black", font)

    top = 32
    for rows in sets:
        for number, row in enumerate(rows):
            x = 4 + number % COLUMNS * (TILE + 4)
            y = top + number // COLUMNS * (TILE + text)
            picture = PIL.Image.fromarray(canvases.array([row])[0]).resize(
                (TILE, TILE), PIL.Image.Resampling.BILINEAR
            )
            sheet.paste(picture, (x, y))
            image = canvases.images.images[row]
            draw.text((x, y + TILE), image.path.name[-22:], "black", small)
            draw.text(
                (x, y + TILE + 11),
                f"{image.split} {canvases.images.classes[image.label]}"[:22],
                "dimgrey",
                small,
            )

        top += math.ceil(len(rows) / COLUMNS) * (TILE + text)

    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=80)
    write_atomically(path, content.getvalue())


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """The images to keep, and what was left out.

    left_out: reason -> number of files. groups: sizes of the groups of near duplicates. parted:
    number of sets of near duplicates spread over several groups.
    """

    images: tuple[Image, ...]
    left_out: dict[str, int]
    groups: tuple[int, ...]
    parted: int

    def __str__(self) -> str:
        left_out = ", ".join(f"{count} {why}" for why, count in self.left_out.items() if count)
        lines = [f"left out: {left_out or 'none'}"]

        if self.groups:
            lines.append(
                f"grouped: {sum(self.groups)} near duplicates in {len(self.groups)} groups, the largest of "
                f"{max(self.groups)}; each stays on one side of a split"
            )
        if self.parted:
            lines.append(
                f"parted: {self.parted} sets of near duplicates lie in several groups; as one group they would be a "
                "chain whose ends are not alike"
            )

        return "\n".join(lines)


def clean(result: Audit, canvases: Canvases) -> Cleaned:
    """Choose the images to train on.

    Unreadable files are removed. Of identical files one is kept, preferring test over val over
    train, so that the evaluation stays the same; of identical files with several labels none is,
    since the right label is unknown. Of near duplicates with several labels, those that disagree
    with the majority of their set are removed, or all if there is no majority.

    Other near duplicates become one group if ftkit can still put them in one split or fold
    (`Audit.near_groups`); if one is in a given split, those in train are removed. Splits that ftkit
    made, and the train split they were cut from, are left open.
    """
    images = canvases.images.images
    gone = {"unreadable": len(result.bad), "identical": 0, "contradicting": 0, "near duplicates": 0}
    free = ("train", *result.made)  # images in other splits stay there
    divided = bool(result.made) or not canvases.images.of("val")  # into splits, or folds
    conflicts = {item.rows for item in result.conflicts}

    left: dict[int, Image] = dict(enumerate(images))

    def leave_out(rows: Iterable[int], reason: str) -> None:
        for row in rows:
            gone[reason] += left.pop(row, None) is not None

    for item in result.alike:
        rows = [row for row in item.rows if row in left]
        rows.sort(key=lambda row: (-SPLITS.index(images[row].split), row))
        if item.rows in conflicts:
            leave_out(_contradicting(rows, images, item.exact), "contradicting")
        elif item.exact:
            if rows:
                left[rows[0]] = _with_all_known(left[rows[0]], [images[row] for row in rows])
            leave_out(rows[1:], "identical")
        elif any(images[row].split not in free for row in rows):
            leave_out([row for row in rows if images[row].split in free], "near duplicates")

    groups = []
    for near in result.near_groups if divided else ():
        rows = [row for row in near if row in left and images[row].split in free]
        if len(rows) > 1:
            _together(left, rows)
            groups.append(len(rows))

    near_left = [
        [row for row in item.rows if row in left] for item in result.alike if not item.exact
    ]
    parted = (
        sum(len({left[row].group or str(row) for row in rows}) > 1 for rows in near_left)
        if divided
        else 0
    )

    open_ = free if divided else ()
    kept = (replace(image, split="") if image.split in open_ else image for image in left.values())

    return Cleaned(images=tuple(kept), left_out=gone, groups=tuple(groups), parted=parted)


def _contradicting(rows: Sequence[int], images: Sequence[Image], exact: bool) -> list[int]:
    """Images of a set with several labels to remove.

    All of them or, for near duplicates with a majority label, those without it; label by label, and
    quantity by quantity, where they have several: one that is not known contradicts nothing.
    """
    if rows and images[rows[0]].targets:
        return _contradicting_targets(rows, np.array([images[row].targets for row in rows]), exact)
    counts = Counter(images[row].said for row in rows)
    most = max(counts, key=lambda said: counts[said], default=None)
    if exact or most is None or counts[most] * 2 <= len(rows):
        return list(rows) if len(counts) > 1 else []
    return [row for row in rows if images[row].said != most]


def _contradicting_targets(rows: Sequence[int], targets: Array, exact: bool) -> list[int]:
    """The same for targets (n, K) of these n rows; NaN where one is not known."""
    wrong = np.zeros(len(rows), bool)
    for column in targets.T:
        known = ~np.isnan(column)
        said, counts = np.unique(column[known], return_counts=True)
        if len(said) < 2:
            continue
        if exact or counts.max() * 2 <= known.sum():
            return list(rows)
        wrong |= known & (column != said[counts.argmax()])
    return [row for row, its in zip(rows, wrong, strict=True) if its]


def _with_all_known(image: Image, alike: Sequence[Image]) -> Image:
    """The image with what is known of the others, which are identical to it."""
    targets = tuple(
        next((value for value in values if not np.isnan(value)), np.nan)
        for values in zip(*(other.targets for other in (image, *alike)), strict=True)
    )
    return replace(image, targets=targets)


def _together(left: dict[int, Image], rows: Sequence[int]) -> None:
    """Merge these images, and all groups they belong to, into one group."""
    groups = {left[row].group for row in rows} - {""}
    name = min(groups, default=f"alike-{min(rows)}")
    others = [row for row, image in left.items() if image.group in groups] if groups else []
    for row in (*rows, *others):
        left[row] = replace(left[row], group=name)


def require_outside(out: Path, images: Images, option: str) -> None:
    """Raise FtkitError if `out` lies in the data folder or, for a CSV, is a folder of its images.

    The data are never modified.
    """
    place = out.resolve()
    root = images.root.resolve()
    if (
        place.is_relative_to(root)
        if root.is_dir()
        else any(image.path.resolve().parent == place for image in images.images)
    ):
        raise FtkitError(
            f"{option} {out}: expected a place outside the data, found one in them. Try ../{out.name}"
        )


def require_new(out: Path, images: Images) -> None:
    """Raise FtkitError if `out` exists, lies in the data, or has no parent folder."""
    require_outside(out, images, "--fix")
    if out.exists():
        raise FtkitError(
            f"--fix {out}: expected a new file or folder, found one there already. Try another name"
        )
    if not out.resolve().parent.is_dir():
        raise FtkitError(
            f"--fix {out}: expected a folder to put it in, found none. Try making {out.parent} first"
        )


def write_clean(
    out: Path, kept: Sequence[Image], images: Images, progress: Callable[[int, int], None]
) -> Path:
    """Write the CSV `out`, or the folder `out` with copies and images.csv; returns the CSV.

    Raises FtkitError as require_new.
    """
    require_new(out, images)
    base = images.root if images.root.is_dir() else images.root.parent

    if out.suffix == ".csv":
        write_atomically(
            out, as_csv(((image, _from(out.parent, image.path)) for image in kept), images)
        )
        return out

    folder = folder_beside(out)
    try:
        placed = []
        for number, image in enumerate(kept, start=1):
            place = folder / image.split / _file_name(images.classes[image.label]) / image.path.name
            while place.exists():
                place = place.with_stem(f"{place.stem}-{number}")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.path, place)
            placed.append((image, _from(folder, place)))
            progress(number, len(kept))

        for licence in base.glob("LICEN[CS]E*"):
            shutil.copyfile(licence, folder / licence.name)

        (folder / "images.csv").write_bytes(as_csv(placed, images))
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    return out / "images.csv"


def _file_name(label: str) -> str:
    """A class label as a valid file name: a CSV's labels may hold anything."""
    return re.sub(r"[^\w .-]+", "_", label).strip(". ") or "_"


def _from(folder: Path, path: Path) -> str:
    """A path relative to `folder`, as a CSV in it has it."""
    return Path(os.path.relpath(path, folder)).as_posix()
