"""Audit a data set before training: bad files, leakage, contradictory labels.

    found = audit(images, canvases)       # everything, from canvases that training will reuse
    found.passed, found.leaks, found.conflicts
    require_apart(canvases)               # the quick part: raises FtkitError on leakage

Identical files have the same sha256. Near duplicates (recompressed, rescaled, brightened; not
cropped, not mirrored) have perceptual hashes at most 8 of 64 bits apart, and thumbnails that
correlate to at least 0.99 after subtracting the set's mean thumbnail.

Measured (bench/audit.py) on 2,223 solar cells, which all look alike: the hash alone gives 3,376
pairs, with the correlation 14 sets remain. Of 150 images, JPEG copies at quality 40 and copies at
half the resolution are found for 150, 15 % brighter ones for 140, cropped ones for none.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.fft import dctn

from ftkit.data.audit_targets import LabelAudit, ValueAudit, audit_targets
from ftkit.data.canvas import Canvases
from ftkit.data.dataset import Images, below, clusters
from ftkit.data.table import SPLITS
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess, decode
from ftkit_export.runtime.session import cores

THUMB = 32  # pixels a side
BITS_APART = 8
CORRELATION = 0.99
# Without subtracting the mean: where one picture makes up most of the set, only noise remains after
# subtraction. No two solar cells reach this.
SURE = 0.999
# Two images that are each a near duplicate of a third may be twice as far apart (as angles) as a
# pair; no two images in a group may be further apart. In units of 1 - CORRELATION, where twice the
# angle is four times the distance.
GROUP_APART = 4.0
MOST_GROUPED = 5000  # largest connected set for which a table of all pairs is made
FLAT = 1.0  # standard deviation in grey levels below which an image counts as blank
BLOCK = 256
PAIRS_AT_ONCE = 4096
# short side, as a share of the canvas side; number of pixels
TINY = 0.5
HUGE = 40_000_000
# training images in a class; ratio of the largest to the smallest class
FEW = 20
UNEVEN = 10.0
TOTALS = (
    "bad",
    "alike",
    "leaks",
    "conflicts",
    "shared_groups",
    "tiny",
    "huge",
    "flat",
    "emptied",
    "sizes",
)
LARGE_FRAME = 0.95  # share of images that are no larger
LITTLE_KEPT = 0.5  # share of an image's area kept by the crop
HINTS = (
    r"^(?:.*/)?([^/]*?[A-Za-z0-9])[-_ ]+[A-Za-z]*[0-9]+\.[^./]+$",
    r"^(?:.*/)?([^/_-]+)[-_][^/]*$",
)


@dataclass(frozen=True, kw_only=True)
class Alike:
    """A set of duplicates. rows: row numbers of canvases.images; exact: the files are identical."""

    rows: tuple[int, ...]
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Findings of an audit.

    - made: the splits that ftkit created.
    - counts: images by class and split.
    - formats, sizes: "JPEG" and "640 x 480" -> count, most frequent first.
    - alike: sets of identical files and of near duplicates.
    - leaks, conflicts: those of them in several splits, or with several labels.
    - shared_groups: groups in several splits.
    - tiny, huge, flat: rows.
    - imbalance: ratio of the largest to the smallest class in train.
    - few: classes with under 20 training images.
    - hint: a --group-by expression if file names suggest groups.
    - near_groups: near duplicates as groups (rows) that belong in one split; complete linkage, so
      no group is a chain whose ends differ.
    - unjudged: split -> classes without an image in it.
    - crop_keeps: share of an image's area in its centre square: (median over the images, number of
      images under half).
    - emptied: rows that are flat only because the recipe's crop removed their content.
    - frame: "640x480", the size that 95 % of the images do not exceed, by area.
    - targets: what is known of the labels or quantities of other tasks; None of single-label data.
    """

    images: int
    classes: tuple[str, ...]
    made: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    bad: tuple[tuple[str, str], ...]
    formats: dict[str, int]
    sizes: dict[str, int]
    alike: tuple[Alike, ...]
    leaks: tuple[Alike, ...]
    conflicts: tuple[Alike, ...]
    shared_groups: tuple[str, ...]
    tiny: tuple[int, ...]
    huge: tuple[int, ...]
    flat: tuple[int, ...]
    imbalance: float
    few: tuple[str, ...]
    hint: str
    near_groups: tuple[tuple[int, ...], ...]
    unjudged: dict[str, tuple[str, ...]]
    crop_keeps: tuple[float, int]
    emptied: tuple[int, ...]
    frame: str
    targets: LabelAudit | ValueAudit | None = None

    @property
    def passed(self) -> bool:
        """No identical files in two splits or with two labels, and no group in two splits.

        Near duplicates only produce a warning.
        """
        return not (
            self.shared_groups or any(item.exact for item in (*self.leaks, *self.conflicts))
        )


def audit(
    images: Images,
    canvases: Canvases,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fit: str = "crop",
) -> Audit:
    """Audit a data set.

    images: as read. canvases: made from them with `fit`. progress(done, total) counts images.
    """
    kept = canvases.images.images
    thumbs = _thumbnails(canvases, progress)
    flat = thumbs.std((1, 2)) < FLAT
    alike, near_groups = _alike(canvases, thumbs, flat)

    facts = _headers(canvases)
    squares = np.array([min(width, height) / max(width, height, 1) for _, width, height in facts])
    if fit != "crop":  # other fits keep the whole image
        squares[:] = 1.0

    side = canvases.shards[0].shape[1]
    classes = images.classes
    train = _examples(images)
    flat_rows = [int(row) for row in np.flatnonzero(flat)]

    return Audit(
        images=len(images.images),
        classes=classes,
        made=images.made,
        counts=_counts(images),
        bad=tuple((below(images.root, path), why) for path, why in canvases.bad),
        formats=dict(Counter(kind for kind, _, _ in facts).most_common()),
        sizes=dict(Counter(f"{width} x {height}" for _, width, height in facts).most_common()),
        alike=tuple(alike),
        leaks=_across(alike, [image.split for image in kept]),
        conflicts=conflicts_of(alike, canvases.images),
        shared_groups=_shared_groups(canvases.images),
        tiny=tuple(row for row, (_, w, h) in enumerate(facts) if min(w, h) < TINY * side),
        huge=tuple(row for row, (_, w, h) in enumerate(facts) if w * h > HUGE),
        flat=tuple(flat_rows),
        imbalance=max(train.values()) / max(1, min(train.values())) if train else 1.0,
        few=tuple(name for name, count in train.items() if count < FEW),
        hint=_hint(images) if not any(image.group for image in images.images) else "",
        near_groups=near_groups,
        unjudged={
            split: names
            for split in ("val", "test")
            if images.of(split) and (names := canvases.images.unjudged(split))
        },
        crop_keeps=(float(np.median(squares)), int((squares < LITTLE_KEPT).sum())),
        emptied=tuple(
            row for row in flat_rows if squares[row] < 1 and not _is_flat(kept[row].path)
        ),
        frame=_frame([(width, height) for _, width, height in facts]),
        targets=audit_targets(canvases.images),
    )


def _examples(images: Images) -> dict[str, int]:
    """How many training images there are of each class or label; {} of quantities."""
    train = images.of("train")
    if images.task == "regression":
        return {}
    if images.task == "multi-label":
        has = np.array([image.targets for image in train]) == 1
        return dict(zip(images.target_names, has.sum(0).tolist(), strict=True))
    counts = Counter(image.label for image in train)
    return {name: counts[label] for label, name in enumerate(images.classes) if counts[label]}


def _alike(
    canvases: Canvases, thumbs: Array, flat: Array
) -> tuple[list[Alike], tuple[tuple[int, ...], ...]]:
    """Sets of identical files and of near duplicates, and chain-free groups of the latter."""
    exact = identical(canvases)
    copies = {item.rows[0]: item.rows for item in exact}

    alone = np.ones(len(thumbs), bool)  # compare only one of several identical files
    for item in exact:
        alone[list(item.rows[1:])] = False

    def with_copies(rows: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(copy for row in rows for copy in copies.get(row, (row,))))

    near = near_duplicates(thumbs, np.flatnonzero(alone & ~flat))
    groups = without_chains(near, thumbs)
    return (
        [*exact, *(Alike(rows=with_copies(item.rows), exact=False) for item in near)],
        tuple(with_copies(rows) for rows in groups),
    )


def named(result: Audit, canvases: Canvases, most: int | None = None) -> dict[str, Any]:
    """The audit as JSON data, with images by name. most: names per finding, all by default."""
    names = [below(canvases.images.root, image.path) for image in canvases.images.images]
    told: dict[str, Any] = {**asdict(result), "passed": result.passed}

    for kind in ("alike", "leaks", "conflicts"):
        told[kind] = [
            {"images": [names[row] for row in item["rows"][:most]], "exact": item["exact"]}
            for item in told[kind][:most]
        ]

    for kind in ("tiny", "huge", "flat", "emptied"):
        told[kind] = [names[row] for row in told[kind][:most]]

    told["near_groups"] = [
        [names[row] for row in rows[:most]] for rows in result.near_groups[:most]
    ]
    told["totals"] = {kind: len(getattr(result, kind)) for kind in TOTALS}
    told["bad"], told["shared_groups"] = result.bad[:most], result.shared_groups[:most]
    told["sizes"] = dict(list(result.sizes.items())[:most])

    return told


def require_apart(canvases: Canvases, otherwise: str = "--allow-leakage") -> None:
    """Raise FtkitError unless `Audit.passed` would hold.

    That is, if identical files or a group are in several splits, or identical files have several
    labels. otherwise: the option that does without.
    """
    images = canvases.images
    copies = identical(canvases)
    groups = _shared_groups(images)
    leaks = _across(copies, [image.split for image in images.images])
    conflicts = conflicts_of(copies, images)

    if leaks:
        first = ", ".join(below(images.root, images.images[row].path) for row in leaks[0].rows[:3])
        raise FtkitError(
            f"{images.root}: expected train, val and test to share no image, found {len(leaks)} that they "
            f"share (e.g. {first}). See `ftkit data {shlex.quote(str(images.root))}`; try its --fix OUT, "
            f"or {otherwise}"
        )

    if groups:
        raise FtkitError(
            f"{images.root}: expected each group in one of train, val and test, found {len(groups)} in "
            f"several (e.g. {groups[0]}). Try moving each to one side, or {otherwise}"
        )

    if conflicts:
        first = ", ".join(
            below(images.root, images.images[row].path) for row in conflicts[0].rows[:3]
        )
        raise FtkitError(
            f"{images.root}: expected each image under one label, found {len(conflicts)} under several (e.g. {first}). "
            f"See `ftkit data {shlex.quote(str(images.root))}`; try its --fix OUT, or {otherwise}"
        )


def identical(canvases: Canvases) -> list[Alike]:
    """Files with the same content, by sha256."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(canvases.digests):
        rows[digest].append(row)
    return [Alike(rows=tuple(each), exact=True) for each in rows.values() if len(each) > 1]


def near_duplicates(thumbs: Array, rows: Array) -> list[Alike]:
    """Sets of near duplicates among `rows`; each image resembles the first of its set.

    thumbs: (N, 32, 32) float32 grey. An image may be in several sets. Two similar images, neither
    of which is the first of a set, are linked only through that first image.
    """
    if len(rows) < 2:
        return []

    signs = _hashes(thumbs[rows])
    shapes = [_unit(thumbs[rows])]

    # Ignore what all images share (a frame, a busbar); a few images give no meaningful average
    if len(rows) >= THUMB:
        shapes.append(_unit(shapes[0] - shapes[0].mean(0)))

    def same(one: Array, other: Array) -> Array:
        """Pairs (one[i], other[j]) that show the same picture, (n, 2)."""
        near = np.argwhere(signs[one] @ signs[other].T >= 64 - 2 * BITS_APART)
        pairs = []
        for start in range(0, len(near), PAIRS_AT_ONCE):
            a = one[near[start : start + PAIRS_AT_ONCE, 0]]
            b = other[near[start : start + PAIRS_AT_ONCE, 1]]
            sure = np.einsum("ijk,ijk->i", shapes[0][a], shapes[0][b]) >= SURE
            sure |= np.einsum("ijk,ijk->i", shapes[-1][a], shapes[-1][b]) >= CORRELATION
            pairs.append(np.stack([a[sure], b[sure]], 1))

        return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)

    sets: dict[
        int, list[int]
    ] = {}  # by first member: images are compared only with those and within their block
    for start in range(0, len(rows), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(rows)))
        joined = {int(a): int(b) for a, b in same(block, np.array(list(sets), np.int64))[::-1]}
        left = np.array([number for number in block if int(number) not in joined], np.int64)
        for a, b in same(left, left):
            if b < a and int(b) not in joined:
                joined.setdefault(int(a), int(b))
        for number in map(int, block):
            sets.setdefault(joined.get(number, number), []).append(number)

    firsts = np.array(list(sets), np.int64)
    for start in range(0, len(rows), BLOCK):  # later first members, and further matches
        for a, b in same(np.arange(start, min(start + BLOCK, len(rows))), firsts):
            if int(a) not in sets[int(b)]:
                sets[int(b)].append(int(a))

    return [
        Alike(rows=tuple(int(rows[number]) for number in each), exact=False)
        for each in sets.values()
        if len(each) > 1
    ]


def without_chains(near: Sequence[Alike], thumbs: Array) -> list[tuple[int, ...]]:
    """Turn sets of near duplicates into groups, with each image in at most one.

    thumbs: (N, 32, 32) float32 grey, of all rows. Images connected through others form one group if
    its worst pair is at most twice as far apart as near duplicates may be (complete linkage);
    otherwise they are split into several, which separates some similar pairs.
    """
    rows = sorted({row for item in near for row in item.rows})
    at = {row: number for number, row in enumerate(rows)}
    pairs = [(at[item.rows[0]], at[row]) for item in near for row in item.rows[1:]]
    members: dict[int, list[int]] = defaultdict(list)

    for number, first in enumerate(clusters(len(rows), pairs) if rows else []):
        members[first].append(rows[number])

    plain = _unit(thumbs)
    apart = _unit(plain - plain.mean(0)) if len(thumbs) >= THUMB else plain

    groups: list[tuple[int, ...]] = []
    for together in members.values():
        if len(together) > MOST_GROUPED:
            groups += _by_first(near, set(together))
            continue
        own = np.array(together)
        distances = np.minimum(
            _distances(plain[own], 1 - SURE), _distances(apart[own], 1 - CORRELATION)
        )
        labels = fcluster(linkage(distances, method="complete"), GROUP_APART, criterion="distance")
        groups += [tuple(int(row) for row in own[labels == label]) for label in np.unique(labels)]

    return [group for group in groups if len(group) > 1]


def _distances(shapes: Array, unit: float) -> Array:
    """1 - correlation of all pairs, in multiples of `unit`.

    Condensed, in the order of scipy.spatial.distance.pdist.
    """
    flat = shapes.reshape(len(shapes), -1)
    correlation = flat @ flat.T
    upper = np.triu_indices(len(flat), 1)
    return np.asarray(np.clip(1 - correlation[upper], 0, None) / unit, np.float64)


def _by_first(near: Sequence[Alike], rows: set[int]) -> list[tuple[int, ...]]:
    """Group images, if too many for a table of pairs, by the first set that contains them."""
    taken: set[int] = set()
    groups = []
    for item in near:
        group = [row for row in item.rows if row in rows and row not in taken]
        taken.update(group)
        groups.append(tuple(group))
    return groups


def _unit(thumbs: Array) -> Array:
    """Thumbnails with mean 0 and norm 1, so that dot products are correlations."""
    apart = thumbs - thumbs.mean((1, 2), keepdims=True)
    return np.asarray(
        apart / np.maximum(np.linalg.norm(apart, axis=(1, 2), keepdims=True), 1e-6), np.float32
    )


def _hashes(thumbs: Array) -> Array:
    """Perceptual hashes (pHash, Zauner 2010): (N, 32, 32) -> (N, 64) of +1 and -1.

    +1 where a low DCT frequency is above the median.
    """
    low = dctn(thumbs, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbs), -1)
    low[:, 0] = 0
    return np.where(low > np.median(low, 1, keepdims=True), 1, -1).astype(np.float32)


def _thumbnails(canvases: Canvases, progress: Callable[[int, int], None]) -> Array:
    """(N, 32, 32) float32, grey levels."""

    def one(place: Array) -> Array:
        picture = PIL.Image.fromarray(canvases.shards[place[0]][place[1]]).convert("L")
        return np.asarray(picture.resize((THUMB, THUMB), PIL.Image.Resampling.BOX), np.float32)

    thumbs = np.empty((len(canvases.slots), THUMB, THUMB), np.float32)
    with ThreadPoolExecutor(cores()) as pool:
        for row, thumb in enumerate(pool.map(one, canvases.slots)):
            thumbs[row] = thumb
            progress(row + 1, len(thumbs))

    return thumbs


def frame_of(canvases: Canvases) -> str:
    """Size of the images, such as "640x480", that no more than one in twenty exceeds: what latencies are
    measured at."""
    return _frame([(width, height) for _, width, height in _headers(canvases)])


def _headers(canvases: Canvases) -> list[tuple[str, int, int]]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(_header, [image.path for image in canvases.images.images]))


def _header(path: Path) -> tuple[str, int, int]:
    """(format, width, height); the format includes the colour mode unless it is RGB."""
    try:
        with PIL.Image.open(path) as image:
            kind = f"{image.format}{'' if image.mode == 'RGB' else f' ({image.mode})'}"
            return kind, image.width, image.height
    except Exception:  # was readable before; Pillow raises whatever its decoders raise
        return "gone", 0, 0


def _frame(sizes: Sequence[tuple[int, int]]) -> str:
    """The 95th percentile of (width, height) by area, as "640x480"."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    width, height = ordered[math.ceil(LARGE_FRAME * len(ordered)) - 1]
    return f"{width}x{height}"


def _is_flat(path: Path) -> bool:
    """Whether the whole image, not only its centre square, is of one colour."""
    try:
        thumb = Preprocess(size=THUMB, resize=THUMB, fit="squash").canvas(decode(path))
    except FtkitError:  # was readable before
        return True
    return bool(thumb.mean(-1).std() < FLAT)


def _counts(images: Images) -> dict[str, dict[str, int]]:
    every = Counter((image.label, image.split) for image in images.images)
    there = [split for split in SPLITS if any(split == other for _, other in every)]
    return {
        name: {split: every[label, split] for split in there}
        for label, name in enumerate(images.classes)
    }


def _across(sets: Iterable[Alike], sides: Sequence[object]) -> tuple[Alike, ...]:
    return tuple(item for item in sets if len({sides[row] for row in item.rows}) > 1)


def conflicts_of(sets: Iterable[Alike], images: Images) -> tuple[Alike, ...]:
    """The sets of which something different is said. What is not known contradicts nothing, and values
    of images that are merely alike may differ."""
    every = images.images
    if images.task == "single-label":
        return _across(sets, [image.label for image in every])
    return tuple(
        item
        for item in sets
        if (item.exact or images.task == "multi-label")
        and any(
            len({value for value in column if not math.isnan(value)}) > 1
            for column in zip(*(every[row].targets for row in item.rows), strict=True)
        )
    )


def _shared_groups(images: Images) -> tuple[str, ...]:
    splits: dict[str, set[str]] = defaultdict(set)
    for image in images.images:
        if image.group:
            splits[image.group].add(image.split)
    return tuple(group for group, sides in splits.items() if len(sides) > 1)


def _hint(images: Images) -> str:
    """A --group-by expression, if names form many groups of several images.

    For example patient07_3.png, cam2-0001.jpg.
    """
    names = [below(images.root, image.path) for image in images.images]
    for pattern in HINTS:
        matches = [re.search(pattern, name) for name in names]
        groups = Counter(match[1] for match in matches if match)
        if (
            len(groups) >= 5
            and groups.total() >= 0.9 * len(names)
            and len(groups) <= 0.5 * len(names)
        ):
            return pattern

    return ""
