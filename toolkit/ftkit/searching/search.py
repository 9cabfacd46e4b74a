"""`ftkit search`: which network, at which resolution, how deep, in which precision.

    found = search("photos", SearchOptions(out="search", p95_ms=4.0))
    found.choice.point.name, found.points

Corners of the space that a third of the images rules out are left; the others are scored on all
training images by heads in closed form, out of fold; those near the front are timed as files; the
best are trained in stages, and chosen among. The test split is never read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import textwrap
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ftkit.benchmark.ssh import Device
from ftkit.data.canvas import Canvases, build_canvases
from ftkit.data.dataset import Images, read_images
from ftkit.models.backbones import Backbone
from ftkit.models.weights import PACKAGES
from ftkit.options import SearchOptions, TrainOptions
from ftkit.overrides import override
from ftkit.recipe import Recipe, load_recipe, resolve
from ftkit.report.search_page import write_search
from ftkit.searching.candidates import Candidate, UnfitSizeError, backbone_of, candidates, sizes_of
from ftkit.searching.features import entry, features
from ftkit.searching.front import Choice, Point, non_dominated, pick
from ftkit.searching.score import COARSE, Dropped, as_point, score, worth_going_on
from ftkit.searching.timing import Timing, timed_points
from ftkit.training.closed_form import default_folds
from ftkit.training.run import OUT_OF_FOLD, is_finished
from ftkit.training.train import train
from ftkit.utils import console
from ftkit_export.files import write_atomically
from ftkit_export.proof.decision import Paired
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import machine
from ftkit_export.runtime.preprocess import Preprocess, parse_frame
from ftkit_export.runtime.targets import here

FIRST_SHARE = 3  # a third of the groups is looked at first
CALIBRATION = 16  # images for the ranges of 8-bit candidates, of which only the time is asked
NEAR = 0.02  # accuracy below the front at which a candidate is still timed
FINALIST_FOLDS = 4  # to the last one, so that all are judged on the same images
FOUND = "search.json"
RECIPE = "recipe.json"

Corner = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search. points: timed ones and the others; scored: number of candidates."""

    folder: Path
    points: Sequence[Point]
    dropped: Sequence[Dropped]
    choice: Choice
    scored: int
    seconds: float

    @property
    def front(self) -> list[Point]:
        """The timed points that no other one beats, fastest first; of finalists, if there are any."""
        return non_dominated([point for point in self.points if point.trained] or self.points)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The inputs of a search, read once."""

    options: SearchOptions
    plan: Recipe
    data: Path
    images: Images
    backbones: Mapping[str, Backbone]
    target: str
    device: Device | None

    def preprocess(self, backbone: str, size: int) -> Preprocess:
        """Of a candidate: the recipe's way to fit an image, the backbone's own mean and scale."""
        own = self.backbones[backbone].preprocess
        base = self.plan.preprocess or own
        return replace(base.at(size), mean=own.mean, std=own.std)

    @property
    def corners(self) -> list[Corner]:
        """Backbones with their input sizes."""
        return [
            (name, size)
            for name, backbone in self.backbones.items()
            for size in self.options.sizes or sizes_of(backbone.preprocess.size)
        ]

    def digest(self, plan: Recipe) -> str:
        """Of a training: its recipe, images and seed."""
        asked = json.dumps([resolve(plan), self.options.seed, self.options.minutes])
        images = self.canvases(*self.corners[0]).fingerprint
        return hashlib.sha256(f"{asked}\n{images}".encode()).hexdigest()[:8]

    def canvases(self, backbone: str, size: int) -> Canvases:
        """The images for a corner, decoded once for all backbones with the same preprocessing."""
        return build_canvases(self.images, self.preprocess(backbone, size))


def search(data: str | Path, options: SearchOptions) -> Found:
    """Search for the network that fits; write the folder options.out.

    Raises FtkitError for bad data or options, or where no backbone's weights are here.
    """
    begun = time.perf_counter()
    folder = Path(options.out) if options.out else Path("search")
    with Device.reached(options.on) if options.on else nullcontext() as device:
        task = _prepared(Path(data), options, device)
        corners, dropped = _scored(task)
        points = [point for each in corners.values() for point in each]
        console.say(f"{len(points)} candidates scored; {len(dropped)} corners left early")
        timed = timed_points(near_front(points, options.timed), _timing(task, corners))
        groups = _groups(task)

        choice = pick(timed, _budgets(options), options.max_drop, groups)
        trained = _finalists(task, folder, timed, choice)
        if trained:
            choice = pick(trained, _budgets(options), options.max_drop, groups)

    chosen = choice.point.candidate
    found = Found(
        folder=folder,
        points=[*trained, *timed, *_untimed(points, timed)],
        dropped=dropped,
        choice=choice,
        scored=len(points),
        seconds=time.perf_counter() - begun,
    )
    recipe = chosen.recipe(task.plan, task.preprocess(chosen.backbone, chosen.size))
    _write(found, recipe, task)
    return found


def _prepared(data: Path, options: SearchOptions, device: Device | None) -> _Search:
    if options.frame is not None:
        parse_frame(options.frame)
    plan = override(load_recipe(str(options.recipe)), options.settings)
    names = list(options.backbones) or [name for name in PACKAGES if _installed(name)]
    if not names:
        raise FtkitError(
            "search: expected a backbone whose weights are here, found none. Try --backbones NAME"
        )
    images = read_images(data, options.seed, options.group_by, options.root, cut_val=False)
    if held := len(images.of("val")):
        raise FtkitError(
            f"{data}: expected no val split, whose place folds take in a search, found {held} images of it. Make them "
            "train images"
        )
    backbones = {name: backbone_of(name, plan.weights) for name in names}
    return _Search(
        options=options,
        plan=plan,
        data=data,
        images=images,
        backbones=backbones,
        target=device.target if device else here(),
        device=device,
    )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name][0]) is not None


def _rows(canvases: Canvases) -> tuple[Array, Array, list[str]]:
    rows = canvases.rows("train")
    return rows, canvases.labels[rows], canvases.groups(rows)


def _groups(task: _Search) -> list[str]:
    return _rows(task.canvases(*task.corners[0]))[2]


def _scored(task: _Search) -> tuple[dict[Corner, list[Point]], list[Dropped]]:
    """Points of every corner (backbone, input size) that is not ruled out early."""
    corners = task.corners
    first = {}
    unfit = []
    for number, corner in enumerate(corners, start=1):
        try:
            first[corner] = _corner(task, corner, f"first look {number}/{len(corners)}", part=True)
        except UnfitSizeError as error:
            unfit.append(Dropped(*corner, str(error)))
    if not first:
        raise FtkitError(
            f"{unfit[0].reason}. Try --sizes {task.backbones[unfit[0].backbone].preprocess.size}"
        )

    _, _, groups = _rows(task.canvases(*corners[0]))
    picked = _third(task.canvases(*corners[0]))
    dropped = [*unfit, *worth_going_on(first, [groups[place] for place in picked])]
    for each in dropped:
        console.say(f"left: {each.backbone} at {each.size} px: {each.reason}")

    going_on = [
        corner
        for corner in corners
        if corner not in {(each.backbone, each.size) for each in dropped}
    ]
    scored = {}
    for number, corner in enumerate(going_on, start=1):
        scored[corner] = _corner(task, corner, f"all images {number}/{len(going_on)}", part=False)
        best = max(scored[corner], key=lambda point: point.accuracy)
        console.say(
            f"{best.candidate.name:<36} {best.accuracy:.3f} [{best.low:.3f}, {best.high:.3f}] best of "
            f"{len(scored[corner])}"
        )
    return scored, dropped


def _third(canvases: Canvases) -> Array:
    """Places among the training images that are looked at first: a third of the groups."""
    rows, labels, groups = _rows(canvases)
    named = np.array([group or f"\0{row}" for group, row in zip(groups, rows, strict=True)])
    picked = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        here_ = np.unique(named[labels == label])
        picked |= np.isin(named, spread_evenly(here_, max(2, len(here_) // FIRST_SHARE)))
    return np.flatnonzero(picked)


def _corner(task: _Search, corner: Corner, label: str, *, part: bool) -> list[Point]:
    """Points of one backbone at one input size: on the images of the first look, or on all."""
    name, size = corner
    backbone = task.backbones[name]
    preprocess = task.preprocess(name, size)
    canvases = task.canvases(name, size)
    rows, labels, groups = _rows(canvases)
    picked = _third(canvases)
    space = candidates(backbone, size)
    asked = rows
    if part:
        space = [each for each in space if each.pooling == "mean"]
        asked, labels, groups = rows[picked], labels[picked], [groups[at] for at in picked]

    # Identical files stay together, as in training
    together = [group or canvases.digests[row] for group, row in zip(groups, asked, strict=True)]
    masks = default_folds(labels, together)
    if not masks:
        raise FtkitError(
            f"{task.data}: expected every class in at least two groups, found fewer. Try more images"
        )

    with console.bar(f"{label}: {name} at {size} px") as progress:
        place = entry(backbone, canvases, preprocess, asked)
        known = place / f"answers-{_digest(labels, masks)}.npz"
        if (points := _answered(known, space, groups)) is not None:
            return points

        values = features(backbone, canvases, preprocess, rows[picked], progress)
        others = np.setdiff1d(np.arange(len(rows)), picked)
        if not part and len(others):
            rest = features(backbone, canvases, preprocess, rows[others], progress)
            order = np.argsort(np.concatenate([picked, others]))
            values = {key: np.concatenate([values[key], rest[key]])[order] for key in values}
        points = score(space, values, labels, masks, groups, len(task.images.classes))

    content = io.BytesIO()
    np.savez_compressed(content, **{point.candidate.name: point.right for point in points})  # type: ignore[arg-type]
    known.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(known, content.getvalue())
    return points


def _digest(labels: Array, masks: Sequence[Array]) -> str:
    """Of a question put to features: other labels or folds have other answers."""
    content = repr(COARSE).encode() + b"".join(np.packbits(mask).tobytes() for mask in masks)
    return hashlib.sha256(labels.tobytes() + content).hexdigest()[:16]


def _answered(known: Path, space: Sequence[Candidate], groups: Sequence[str]) -> list[Point] | None:
    """Points whose heads an earlier search has fitted; None where it has not."""
    try:
        with np.load(known) as stored:
            known.parent.touch()  # used: the last to be removed
            return [as_point(candidate, stored[candidate.name], groups) for candidate in space]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def near_front(points: Sequence[Point], most: int) -> list[Point]:
    """Points to time: those that no candidate with as few multiplications beats by more than NEAR.

    Where there are more than `most`: the most accurate for their multiplications, evenly over the
    range.
    """
    ordered = sorted(points, key=lambda point: point.candidate.multiplications)
    near: list[tuple[float, Point]] = []
    best = 0.0
    for point in ordered:
        best = max(best, point.accuracy)
        if point.accuracy >= best - NEAR:
            near.append((best - point.accuracy, point))
    if len(near) <= most:
        return [point for _, point in near]

    edges = np.linspace(0, len(near), most + 1).astype(int)
    picked = [
        min(near[low:high], key=lambda item: (item[0], -item[1].accuracy))[1]
        for low, high in pairwise(edges)
    ]
    best_of_all = max(points, key=lambda point: point.accuracy)
    return picked if best_of_all in picked else [*picked[:-1], best_of_all]


def _timing(task: _Search, corners: Mapping[Corner, object]) -> Timing:
    corner = next(iter(corners))
    sample = task.canvases(*corner)
    rows = spread_evenly(sample.rows("train"), CALIBRATION)
    paths = [sample.images.images[row].path for row in rows]

    def pixels(preprocess: Preprocess) -> Array:
        canvases = np.stack([preprocess.canvas(preprocess.decode(path)) for path in paths])
        return preprocess.pixels(canvases)

    return Timing(
        target=task.target,
        photograph=paths[0],
        frame=task.options.frame or _size_of(paths[0], task.preprocess(*corner)),
        classes=len(task.images.classes),
        weights=task.plan.weights,
        preprocess=task.preprocess,
        pixels=pixels,
        device=task.device,
    )


def _size_of(path: Path, preprocess: Preprocess) -> str:
    """Size of an image file, "640x480"."""
    height, width = preprocess.decode(path).shape[:2]
    return f"{width}x{height}"


def _budgets(options: SearchOptions) -> dict[str, float]:
    limits = {"p50_ms": options.p50_ms, "p95_ms": options.p95_ms, "size_mb": options.size_mb}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _untimed(points: Sequence[Point], timed: Sequence[Point]) -> list[Point]:
    seen = {point.candidate for point in timed}
    return [point for point in points if point.candidate not in seen]


def _finalists(task: _Search, folder: Path, timed: Sequence[Point], choice: Choice) -> list[Point]:
    """The pick, the most accurate, and what may be as good and faster: trained in stages.

    Each in a folder named by its recipe, the images and the seed: another search trains its own.
    """
    wanted: list[Candidate] = []
    for point in (choice.point, choice.best, *(each for each, _ in reversed(choice.open))):
        if point.candidate not in wanted:
            wanted.append(point.candidate)

    points = []
    for number, candidate in enumerate(wanted[: task.options.finalists], start=1):
        preprocess = task.preprocess(candidate.backbone, candidate.size)
        plan = replace(candidate.recipe(task.plan, preprocess), folds=FINALIST_FOLDS)
        run = folder / f"finalist-{task.digest(plan)}"
        console.say(f"\nfinalist {number}: {candidate.name}")
        if not is_finished(run):
            options = TrainOptions(
                seed=task.options.seed,
                group_by=task.options.group_by,
                root=task.options.root,
                minutes=task.options.minutes,
                resume=True,
                quiet=task.options.quiet,
            )
            train(plan, task.data, run, options)
        right = _right_of(task, run)
        low, high, _ = share_interval(right, _groups(task))
        points += [
            replace(
                point,
                right=right,
                accuracy=float(right.mean()),
                low=low,
                high=high,
                trained=True,
                run=run.name,
            )
            for point in timed
            if point.candidate == candidate
        ]
    return points


def _right_of(task: _Search, folder: Path) -> Array:
    """Whether each training image was answered correctly out of fold."""
    labels = task.canvases(*task.corners[0]).labels
    with np.load(folder / OUT_OF_FOLD) as stored:
        rows = stored["rows"]
        right = np.zeros(len(labels), bool)
        right[rows] = stored["logits"].argmax(1) == labels[rows]
        found: Array = right[stored["train_rows"]]
    return found


def _write(found: Found, recipe: Recipe, task: _Search) -> None:
    """search.json, recipe.json and report.html; the recipe trains what was picked."""
    found.folder.mkdir(parents=True, exist_ok=True)
    told = as_json(found, task.options)
    write_atomically(found.folder / RECIPE, json.dumps(resolve(recipe), indent=1).encode())
    write_atomically(found.folder / FOUND, json.dumps(told, indent=1).encode())
    write_search(found.folder / "report.html", told)


def as_json(found: Found, options: SearchOptions) -> dict[str, Any]:
    """The search as plain data: what search.json holds."""
    front = found.front
    choice = found.choice
    return {
        "machine": machine(),
        "seconds": round(found.seconds, 1),
        "scored": found.scored,
        "images": len(choice.point.right),
        "budgets": _budgets(options),
        "max_drop": options.max_drop,
        "points": [
            {**_point(point), "front": point in front, "pick": point is choice.point}
            for point in found.points
        ],
        "pick": {
            **_point(choice.point),
            "best": choice.best.name,
            "against_best": choice.against and asdict(choice.against),
            "missed": dict(choice.missed),
        },
        "open": [
            {**_point(point), "against_best": asdict(compared)} for point, compared in choice.open
        ],
        "dropped": [asdict(each) for each in found.dropped],
    }


def _point(point: Point) -> dict[str, Any]:
    candidate = asdict(point.candidate)
    return {
        "name": point.name,
        **candidate,
        "precision": point.precision,
        "trained": point.trained,
        "run": point.run,
        "accuracy": point.accuracy,
        "low": point.low,
        "high": point.high,
        "p50_ms": point.p50_ms,
        "p95_ms": point.p95_ms,
        "size_bytes": point.size_bytes,
    }


def as_text(found: Found, options: SearchOptions) -> str:
    """The front and the pick, within 80 columns."""
    choice = found.choice
    lines = [("front", "oof", "[95 %]", "p50 ms", "MB")]
    for point in found.front:
        lines.append(
            (
                ("* " if point is choice.point else "  ") + point.name.replace(", trained", " +"),
                f"{point.accuracy:.3f}",
                f"[{point.low:.3f}, {point.high:.3f}]",
                f"{point.p50_ms:.2f}",
                f"{(point.size_bytes or 0) / 1e6:.2f}",
            )
        )
    told = [console.table(lines), *_verdict(choice, options)]
    if any(point.trained for point in found.front):
        told.insert(1, "+ trained in stages; the others: a linear head")
    return "\n".join(told)


def _verdict(choice: Choice, options: SearchOptions) -> list[str]:
    if choice.missed:
        over_by = ", ".join(
            f"{name} by {100 * (factor - 1):.0f} %" for name, factor in choice.missed.items()
        )
        return _wrapped(
            [f"nothing meets the budgets; the nearest, {choice.point.name}, exceeds {over_by}"]
        )

    told = [f"pick: {choice.point.name}"]
    if choice.against:
        told.append(
            f"against the most accurate, {choice.best.name}: a drop of {_points(choice.against)} points"
        )
    for point, compared in choice.open[:3]:
        told.append(
            f"faster, not settled at {100 * options.max_drop:g}: {point.name}, {point.p50_ms:.2f} ms, a drop of "
            f"{_points(compared)}; --max-drop {math.ceil(1000 * compared.high) / 1000:g} accepts it"
        )
    return _wrapped(told)


def _points(compared: Paired) -> str:
    return f"{100 * compared.drop:+.1f} [{100 * compared.low:+.1f}, {100 * compared.high:+.1f}]"


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [textwrap.fill(line, 80, subsequent_indent="  ") for line in lines]
