"""`ftkit search`: which network, at which resolution, how deep, in which precision.

    found = search("photos", SearchOptions(out="search", p95_ms=4.0))
    found.choice.point.name, found.points

Corners of the space that a third of the images rules out are left; the others are scored on all
training images by heads in closed form, out of fold; those near the front are timed as files; the
best are trained in stages, and chosen among. The test split is never read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ftkit.benchmark.ssh import Device
from ftkit.data.audit import frame_of, require_apart
from ftkit.options import SearchOptions, TrainOptions
from ftkit.recipe import Recipe
from ftkit.searching.candidates import Candidate
from ftkit.searching.corners import Search, near_front, prepared, scored
from ftkit.searching.front import Point, pick
from ftkit.searching.int8 import int8_answers
from ftkit.searching.judge import Judge
from ftkit.searching.result import Found, budgets_of, write
from ftkit.searching.score import Dropped
from ftkit.searching.timing import Timing, read_times, timed_points
from ftkit.tasks.task import MultiLabel, Regression, Task
from ftkit.training.folds import make_folds
from ftkit.training.run import OUT_OF_FOLD, is_finished, open_run
from ftkit.training.train import train
from ftkit.utils import console
from ftkit.utils.cache_folder import limit_bytes, trim
from ftkit.utils.distributed import Ranks, joined
from ftkit_export.conversion.convert import exact_float32
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import machine
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import Labels, OneClass, Readout, Values
from ftkit_export.runtime.targets import here

CALIBRATION = 16  # images for the ranges of 8-bit candidates, of which only the time is asked
TO_TIME = "to-time"  # in the search's folder: for a device that cannot be reached
FINALIST_FOLDS = 4  # to the last one, so that all are judged on the same images


def search(data: str | Path, options: SearchOptions) -> Found | None:
    """Search for the network that fits; write the folder options.out.

    What is known before the finalists are trained is written, too, unless an earlier search has trained one.
    Under torchrun the ranks share
    the passes over the images and train each finalist together; only the first one returns what was
    found. Raises FtkitError for bad data or options, or where no backbone's weights are here.
    """
    limit_bytes()  # reports an invalid limit before the search, not after
    begun = time.perf_counter()
    folder = Path(options.out) if options.out else Path("search")
    with joined(options.device) as (device, ranks):
        if device.type == "cuda":
            exact_float32()
        with _reached(options, ranks) as remote:
            task = ranks.together(lambda: prepared(Path(data), options, remote, device, ranks))
            _require_trainable(task)
            points, dropped = scored(task)
            console.say(f"{len(points)} candidates scored; {len(dropped)} corners left early")
            known = Standing(task=task, folder=folder, points=points, dropped=dropped, begun=begun)
            wanted = ranks.first(known.time_and_choose)

        _train_finalists(known, wanted)
        trim()
        return known.found


def _require_trainable(task: Search) -> None:
    """Raise FtkitError for images or a recipe that no finalist could be trained on, before the long part."""
    if not task.options.finalists:
        return
    if task.plan.patient:
        raise FtkitError(
            f"recipe {task.plan.name}: expected stages without patience, which needs a val split, found one with it. "
            "Try --finalists 0, or another recipe"
        )
    canvases = task.canvases(*task.corners[0])

    def required() -> None:
        require_apart(canvases, "--finalists 0")
        make_folds(canvases, FINALIST_FOLDS, task.options.seed, "--finalists 0")

    task.ranks.together(required)


def _reached(options: SearchOptions, ranks: Ranks) -> AbstractContextManager[Device | None]:
    """The device that candidates are timed on, if it is not this one; only for the first rank."""
    return Device.reached(options.on) if options.on and ranks.main else nullcontext()


@dataclass(frozen=True, kw_only=True, eq=False)
class Finalist:
    """A candidate that was trained in the folder `run`.

    logits: precision -> (n, K), of the training images out of fold; answered: which of them it was
    trained in time to answer, (n,) bool.
    """

    candidate: Candidate
    run: str
    logits: Mapping[str, Array] = field(repr=False)
    answered: Array = field(repr=False)


@dataclass
class Standing:
    """What is known so far. timing, timed, finalists, found: filled on the first rank only, which times and
    chooses."""

    task: Search
    folder: Path
    points: Sequence[Point]
    dropped: Sequence[Dropped]
    begun: float
    timed: Sequence[Point] = ()
    finalists: list[Finalist] = field(default_factory=list)
    found: Found | None = None
    timing: Timing | None = None

    def time_and_choose(self) -> list[str]:
        """Time what is near the front, and write what that says, unless an earlier search has trained a
        finalist. The names of the finalists, those first: none where nothing meets a budget, which
        training would not change."""
        judge = self.task.judge()
        close = near_front(self.points, self.task.options.timed, judge.near)
        near = [judge.bounded(point) for point in close]
        self.timing = _timing(self.task, self.folder, near)
        self.timed = timed_points(near, self.timing)
        choice = self.choose().choice
        names: list[str] = []
        for point in (choice.point, choice.best, *(each for each, _ in reversed(choice.open))):
            if point.candidate.name not in names:
                names.append(point.candidate.name)
        names = names[: self.task.options.finalists]
        if choice.missed.keys() - {"max_drop"}:
            if names:
                console.say("nothing meets the budgets: no finalist is trained")
            names = []
        known = [name for name in names if is_finished(self.run_of(name))]
        # What those bring is told at once, in place of an earlier search's result
        if not known:
            self.tell()
        return [*known, *(name for name in names if name not in known)]

    def plan_of(self, name: str) -> Recipe:
        """The recipe that trains a candidate as a finalist."""
        task = self.task
        candidate = self.candidate(name)
        preprocess = task.preprocess(candidate.backbone, candidate.size)
        return replace(candidate.recipe(task.plan, preprocess), folds=FINALIST_FOLDS)

    def candidate(self, name: str) -> Candidate:
        """By its name."""
        return next(each.candidate for each in self.points if each.candidate.name == name)

    def run_of(self, name: str) -> Path:
        """The folder that a candidate is trained in: named by its recipe, the images and the seed, so
        that another search trains its own."""
        return self.folder / f"finalist-{self.task.digest(self.plan_of(name))}"

    def tell(self) -> None:
        """Write the choice as it stands now."""
        task = self.task
        self.found = self.choose()
        chosen = self.found.choice.point.candidate
        write(self.found, chosen.recipe(task.plan, task.preprocess(chosen.backbone, chosen.size)))

    def choose(self) -> Found:
        """Choose among the finalists, or before there are any, among all that were timed."""
        task = self.task
        options = task.options
        judge = task.judge()
        trained: list[Point] = []
        if self.finalists:
            judge, trained = self._trained()
        seen = {point.candidate for point in self.timed}
        untimed = [point for point in self.points if point.candidate not in seen]
        among = trained or self.timed
        competed = len(self.finalists) if trained else len(self.points)
        device = task.remote.machine if task.remote else machine()
        return Found(
            folder=self.folder,
            points=[*trained, *self.timed, *untimed],
            dropped=self.dropped,
            choice=pick(
                among, budgets_of(options), task.max_drop, judge.compare, competed=competed
            ),
            options=options,
            max_drop=task.max_drop,
            metric=task.task.metric,
            unit=judge.unit,
            scored=len(self.points),
            seconds=time.perf_counter() - self.begun,
            target=task.target,
            timed_on=device if task.timed_now else None,
            frame=self.timing.frame if self.timing else "",
        )

    def _trained(self) -> tuple[Judge, list[Point]]:
        """The finalists in each precision, and their judge: of the images that all of them answered,
        since networks are compared image by image."""
        common = np.logical_and.reduce([finalist.answered for finalist in self.finalists])
        rows = np.flatnonzero(common)
        judge = self.task.judge().of(rows)
        points = []
        for finalist in self.finalists:
            for point in self.timed:
                if point.candidate != finalist.candidate or point.precision not in finalist.logits:
                    continue
                evidence = judge.evidence(finalist.logits[point.precision][rows])
                trained = judge.bounded(judge.point(finalist.candidate, evidence))
                points.append(
                    replace(
                        point,
                        evidence=evidence,
                        figure=trained.figure,
                        low=trained.low,
                        high=trained.high,
                        trained=True,
                        run=finalist.run,
                    )
                )
        return judge, points


def _timing(task: Search, folder: Path, near: Sequence[Point]) -> Timing:
    corner = task.corners[0]
    sample = task.canvases(*corner)
    rows = spread_evenly(sample.rows("train"), CALIBRATION)
    paths = [sample.images.images[row].path for row in rows]

    def pixels(preprocess: Preprocess) -> Array:
        canvases = np.stack([preprocess.canvas(preprocess.decode(path)) for path in paths])
        return preprocess.pixels(canvases)

    elsewhere = not task.remote and task.target != here()
    names = sorted(point.candidate.name for point in near)
    frame = task.options.frame or frame_of(sample)
    asked = [task.target, frame, len(task.images.names), names]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    given = task.options.latency
    return Timing(
        target=task.target,
        photograph=paths[0],
        frame=frame,
        readout=_untrained(task.task, len(task.images.names)),
        outputs=len(task.images.names),
        weights=task.plan.weights,
        preprocess=task.preprocess,
        pixels=pixels,
        device=task.remote,
        for_device=folder / TO_TIME if elsewhere else None,
        brought=read_times(Path(given), task.target, digest) if given else {},
        digest=digest,
    )


def _train_finalists(known: Standing, names: Sequence[str]) -> None:
    """The pick, the most accurate, and what may be as good and faster: trained in stages, and judged in
    8 bits, too, where the target has them. What each brings is told at once."""
    task = known.task
    for number, name in enumerate(names, start=1):
        run = known.run_of(name)
        console.say(f"\nfinalist {number}: {name}")
        options = TrainOptions(
            seed=task.options.seed,
            device=task.options.device,
            group_by=task.options.group_by,
            root=task.options.root,
            add=task.options.add,
            minutes=task.options.minutes,
            resume=True,
            quiet=task.options.quiet,
        )
        train(known.plan_of(name), task.data, run, options)
        if not task.ranks.main:
            continue
        logits, answered = _out_of_fold(task, run)
        precisions = {"fp32": logits}
        if any(point.precision == "int8" for point in known.timed):
            try:
                precisions["int8"] = _in_int8(known, name, run, logits)
            except FtkitError as error:
                console.warn(f"finalist {number}, {name}: not judged in 8 bits: {error}")
        known.finalists.append(
            Finalist(
                candidate=known.candidate(name), run=run.name, logits=precisions, answered=answered
            )
        )
        if not answered.all():
            console.warn(
                f"finalist {number}, {name}: trained in time to answer {answered.sum()} of "
                f"{len(answered)} images; the finalists are compared on those. Try more --minutes"
            )
        known.tell()


def _in_int8(known: Standing, name: str, run: Path, logits: Array) -> Array:
    """The same logits of the finalist's folds in 8 bits. logits: in fp32, for images that none answered; and
    for another processor, whose 8-bit answers only it knows: the export judges them there."""
    task = known.task
    if task.remote or task.target != here():
        return logits
    candidate = known.candidate(name)
    assert known.timing
    canvases = task.canvases(candidate.backbone, candidate.size)
    rows, answers = int8_answers(
        open_run(run),
        canvases,
        task.plan.export,
        task.target,
        known.timing.photograph,
        known.timing.frame,
    )
    every = np.zeros((len(canvases.images.images), logits.shape[1]), np.float32)
    places = canvases.rows("train")
    every[places] = logits
    every[rows] = answers
    found: Array = every[places]
    return found


def _out_of_fold(task: Search, folder: Path) -> tuple[Array, Array]:
    """Logits (n, K) of the training images out of fold, and which of them were answered, (n,) bool."""
    images = len(task.canvases(*task.corners[0]).images.images)
    with np.load(folder / OUT_OF_FOLD) as stored:
        logits = np.zeros((images, stored["logits"].shape[1]), np.float32)
        answered = np.zeros(images, bool)
        logits[stored["rows"]] = stored["logits"]
        answered[stored["rows"]] = True
        return logits[stored["train_rows"]], answered[stored["train_rows"]]


def _untrained(task: Task, outputs: int) -> Readout:
    """What stands behind an untrained head in a file that is timed."""
    if isinstance(task, Regression):
        nothing = (0.0,) * outputs
        return Values(means=task.means, spreads=task.spreads, units=task.units, margins=nothing)
    if isinstance(task, MultiLabel):
        return Labels(temperatures=(1.0,) * outputs, thresholds=(0.5,) * outputs)
    return OneClass()
