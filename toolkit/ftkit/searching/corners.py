"""Score every corner of the space: a backbone at an input size, at all its depths.

    task = prepared("photos", options, None)
    points, dropped = scored(task)
    near_front(points, 16, judge.near)     # those worth timing

Features and answers are cached: a search that was asked before computes neither.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ftkit.benchmark.ssh import Device
from ftkit.data.canvas import Canvases, build_canvases
from ftkit.data.dataset import Images, read_images
from ftkit.models.backbones import Backbone
from ftkit.models.weights import PACKAGES
from ftkit.options import SearchOptions
from ftkit.overrides import override
from ftkit.recipe import Export, Recipe, load_recipe, resolve
from ftkit.searching.candidates import Candidate, UnfitSizeError, backbone_of, candidates, sizes_of
from ftkit.searching.features import CPU, entry, features
from ftkit.searching.front import Point
from ftkit.searching.judge import Judge, judge_of
from ftkit.searching.score import COARSE, Dropped, score, worth_going_on
from ftkit.tasks.task import Task, task_of
from ftkit.training.closed_form import default_folds
from ftkit.utils import console
from ftkit.utils.distributed import SOLO, Ranks, share_of_cores
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.preprocess import Preprocess, parse_frame
from ftkit_export.runtime.targets import here

FIRST_SHARE = 3  # a third of the groups is looked at first

Corner = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Search:
    """The inputs of a search, read once. remote: where files are timed, if not here; known to the
    first rank. device: where features are computed."""

    options: SearchOptions
    plan: Recipe
    data: Path
    images: Images
    task: Task
    backbones: Mapping[str, Backbone]
    target: str
    remote: Device | None
    device: torch.device = CPU
    ranks: Ranks = SOLO
    decoded: dict[Preprocess, Canvases] = field(default_factory=dict)

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
        """Of a training: its recipe but for what an export does, images and their groups, seed and
        time."""
        trained = {name: value for name, value in resolve(plan).items() if name != "export"}
        asked = json.dumps([trained, self.options.seed, self.options.minutes])
        canvases = self.canvases(*self.corners[0])
        images = f"{canvases.fingerprint}{canvases.images.grouping}"
        return hashlib.sha256(f"{asked}\n{images}".encode()).hexdigest()[:8]

    def canvases(self, backbone: str, size: int) -> Canvases:
        """The images for a corner, decoded once for all backbones with the same preprocessing.
        Collective, the first time."""
        wanted = self.preprocess(backbone, size)
        if wanted not in self.decoded:
            self.decoded[wanted] = build_canvases(self.images, wanted, ranks=self.ranks)
        return self.decoded[wanted]

    @property
    def timed_now(self) -> bool:
        """Whether candidates are timed in this call: here, or on a device that is reached."""
        return self.remote is not None or self.target == here()

    @property
    def max_drop(self) -> float:
        """What may be lost against the best network: by default, what an export may lose."""
        asked = self.options.max_drop
        return self.task.limit(self.plan.export) if asked is None else asked

    def judge(self) -> Judge:
        """Of all training images."""
        return self.judge_of(self.canvases(*self.corners[0]))

    def judge_of(self, canvases: Canvases) -> Judge:
        """Of the training images of some canvases: the same for all."""
        rows = canvases.rows("train")
        task = task_of(canvases.images)  # standardised as in training: without unreadable files
        targets = task.targets(canvases).numpy()[rows]
        return judge_of(task, targets, canvases.groups(rows), len(self.images.names))


def prepared(
    data: Path,
    options: SearchOptions,
    remote: Device | None,
    device: torch.device = CPU,
    ranks: Ranks = SOLO,
) -> Search:
    """Read the images and build the backbones. Raises FtkitError for bad data, options or weights."""
    if options.frame is not None:
        parse_frame(options.frame)
    named = [f"task={options.task}"] if options.task else []
    plan = override(load_recipe(str(options.recipe)), [*named, *options.settings])
    names = list(options.backbones) or [name for name in PACKAGES if _installed(name)]
    if not names:
        raise FtkitError(
            "search: expected a backbone whose weights are here, found none. Try --backbones NAME"
        )
    images = read_images(
        data,
        options.seed,
        options.group_by,
        options.root,
        cut_val=False,
        add=Path(options.add) if options.add else None,
        task=plan.task,
    )
    task = task_of(images)
    task.require(plan)
    if held := len(images.of("val")):
        raise FtkitError(
            f"{data}: expected no val split, whose place folds take in a search, found {held} images of it. Make them "
            "train images"
        )
    backbones = {name: backbone_of(name, plan.weights) for name in names}
    # Of the first rank, which times
    target, own = ranks.first(lambda: [_target(options, remote), here()])
    return Search(
        options=options,
        plan=replace(plan, export=_to_hold(plan.export, options, target, own)),
        data=data,
        images=images,
        task=task,
        backbones=backbones,
        target=target,
        remote=remote,
        device=device,
        ranks=ranks,
    )


def _target(options: SearchOptions, remote: Device | None) -> str:
    """The processor to search for. Raises FtkitError where options contradict each other, or a budget
    asks for times that cannot be had."""
    if remote:
        if options.target not in ("auto", remote.target) or options.latency:
            raise FtkitError(
                f"--on: expected neither --latency nor another --target than its own, {remote.target}, found one. "
                "Leave it out"
            )
        return remote.target
    target = here() if options.target == "auto" else options.target
    if target == here() and options.latency:
        raise FtkitError(
            f"--latency: expected a --target that is not here, found {target}, on which this machine times itself. "
            "Leave it out"
        )
    timed = [name for name in ("p50_ms", "p95_ms", "memory_mb") if getattr(options, name)]
    if target != here() and timed and not options.latency:
        raise FtkitError(
            f"{timed[0]}: expected times measured on {target}, found none. Search without it, time SEARCH/to-time "
            "there, and give --latency"
        )
    return target


def _to_hold(export: Export, options: SearchOptions, target: str, own: str) -> Export:
    """What the pick's export is held to: the budgets, frame and target of the search. own: the target
    that the timing machine is."""
    asked = {
        name: getattr(options, name)
        for name in ("p50_ms", "p95_ms", "size_mb", "memory_mb", "frame")
        if getattr(options, name) is not None
    }
    return replace(export, **asked, target=export.target if target == own else target)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name][0]) is not None


def training_rows(canvases: Canvases) -> tuple[Array, Array, list[str]]:
    """(rows, labels or strata, groups) of the training images, each (n,)."""
    rows = canvases.rows("train")
    return rows, canvases.labels[rows], canvases.groups(rows)


def scored(task: Search) -> tuple[list[Point], list[Dropped]]:
    """Points of every corner (backbone, input size) that is not ruled out early.

    Raises FtkitError where no backbone takes any of the input sizes, or folds cannot be made.
    """
    corners = task.corners
    _share(task, corners, part=True)
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

    judge = task.judge()
    picked = _third(task.canvases(*corners[0]))
    beaten = worth_going_on(first, judge.of(picked))
    # Another machine may round otherwise
    left = task.ranks.first(lambda: [astuple(each) for each in (*unfit, *beaten)])
    dropped = [Dropped(*each) for each in left]
    for each in dropped:
        console.say(f"left: {each.backbone} at {each.size} px: {each.reason}")

    going_on = [
        corner
        for corner in corners
        if corner not in {(each.backbone, each.size) for each in dropped}
    ]
    _share(task, going_on, part=False)
    found: list[Point] = []
    for number, corner in enumerate(going_on, start=1):
        points = _corner(task, corner, f"all images {number}/{len(going_on)}", part=False)
        best = judge.bounded(max(points, key=lambda point: point.score))
        console.say(
            f"{best.candidate.name:<36} {judge.text(best.figure)} "
            f"{console.interval(best.low, best.high)} best of {len(points)}"
        )
        found += points
    return found, dropped


def _share(task: Search, corners: Sequence[Corner], *, part: bool) -> None:
    """With several ranks on a machine, each computes some corners, large and small ones; all then
    find them in the machine's cache."""
    ranks = task.ranks
    if ranks.world == 1:
        return
    for corner in corners:
        task.canvases(*corner)
    dealt = sorted(corners, key=lambda corner: -corner[1])[ranks.local :: ranks.local_world]

    def compute() -> None:
        for number, corner in enumerate(dealt, start=1):
            label = f"this rank's {number}/{len(dealt)}"
            with suppress(UnfitSizeError):  # told when it is read
                _corner(task, corner, label, part=part)

    ranks.together(compute)


def _third(canvases: Canvases) -> Array:
    """Places among the training images that are looked at first: a third of the groups."""
    rows, labels, groups = training_rows(canvases)
    named = np.array([group or f"\0{row}" for group, row in zip(groups, rows, strict=True)])
    picked = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        here_ = np.unique(named[labels == label])
        picked |= np.isin(named, spread_evenly(here_, max(2, len(here_) // FIRST_SHARE)))
    return np.flatnonzero(picked)


def _corner(task: Search, corner: Corner, label: str, *, part: bool) -> list[Point]:
    """Points of one backbone at one input size: on the images of the first look, or on all."""
    name, size = corner
    backbone = task.backbones[name]
    preprocess = task.preprocess(name, size)
    canvases = task.canvases(name, size)
    rows, labels, _ = training_rows(canvases)
    judge = task.judge_of(canvases)
    picked = _third(canvases)
    space = candidates(backbone, size)
    asked = rows
    if part:
        space = [each for each in space if each.pooling == "mean"]
        asked, labels, judge = rows[picked], labels[picked], judge.of(picked)

    # Identical files stay together, as in training
    together = [
        group or canvases.digests[row] for group, row in zip(judge.groups, asked, strict=True)
    ]
    masks = default_folds(labels, together)
    if not masks:
        raise FtkitError(
            f"{task.data}: expected every class in at least two groups, found fewer. Try more images"
        )

    with console.bar(f"{label}: {name} at {size} px") as progress:
        place = entry(backbone, canvases, preprocess, asked, task.device)
        known = place / f"answers-{_digest(judge.targets, masks)}.npz"
        if (points := _answered(known, space, judge)) is not None:
            return points

        def computed(some: Array) -> dict[str, Array]:
            return features(
                backbone,
                canvases,
                preprocess,
                some,
                progress,
                device=task.device,
                threads=share_of_cores(task.ranks),
            )

        values = computed(rows[picked])
        others = np.setdiff1d(np.arange(len(rows)), picked)
        if not part and len(others):
            rest = computed(rows[others])
            order = np.argsort(np.concatenate([picked, others]))
            values = {key: np.concatenate([values[key], rest[key]])[order] for key in values}
        points = score(space, values, masks, judge)

    content = io.BytesIO()
    np.savez_compressed(content, **{point.candidate.name: point.evidence for point in points})  # type: ignore[arg-type]
    with suppress(OSError, FtkitError):  # only a later search would read it
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, content.getvalue())
    return points


def _digest(targets: Array, masks: Sequence[Array]) -> str:
    """Of a question put to features: other targets or folds have other answers."""
    content = repr(COARSE).encode() + b"".join(np.packbits(mask).tobytes() for mask in masks)
    return hashlib.sha256(targets.tobytes() + content).hexdigest()[:16]


def _answered(known: Path, space: Sequence[Candidate], judge: Judge) -> list[Point] | None:
    """Points whose heads an earlier search has fitted; None where it has not."""
    try:
        with np.load(known) as stored:
            known.parent.touch()  # used: the last to be removed
            return [judge.point(candidate, stored[candidate.name]) for candidate in space]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def near_front(points: Sequence[Point], most: int, within: Callable[[float], float]) -> list[Point]:
    """Points to time: those that no candidate with as few multiplications beats by more than
    within(its score); all of them where there are no more than `most`.

    Where more than `most` are near: the smallest, the most accurate, and between them the best for their
    multiplications, evenly over the range.
    """
    ordered = sorted(points, key=lambda point: point.candidate.multiplications)
    if len(ordered) <= most:
        return ordered
    near: list[tuple[float, Point]] = []
    best = -math.inf
    for point in ordered:
        best = max(best, point.score)
        if math.isfinite(best) and point.score >= best - within(best):
            near.append((best - point.score, point))
    if len(near) <= most:
        return [point for _, point in near]

    edges = np.linspace(0, len(near), most + 1).astype(int)
    picked = [
        min(near[low:high], key=lambda item: (item[0], -item[1].score))[1]
        for low, high in pairwise(edges)
    ]
    picked[0] = near[0][1]  # the smallest: where it is too slow, nothing meets the budget
    best_of_all = max(points, key=lambda point: point.score)
    return picked if best_of_all in picked else [*picked[:-1], best_of_all]
