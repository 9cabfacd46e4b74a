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
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftkit.benchmark.ssh import Device
from ftkit.options import SearchOptions, TrainOptions
from ftkit.searching.candidates import Candidate
from ftkit.searching.corners import Search, near_front, prepared, scored
from ftkit.searching.front import Choice, Point, pick
from ftkit.searching.result import Found, budgets_of, write
from ftkit.searching.timing import Timing, read_times, timed_points
from ftkit.training.run import OUT_OF_FOLD, is_finished
from ftkit.training.train import train
from ftkit.utils import console
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.targets import here

CALIBRATION = 16  # images for the ranges of 8-bit candidates, of which only the time is asked
TO_TIME = "to-time"  # in the search's folder: for a device that cannot be reached
FINALIST_FOLDS = 4  # to the last one, so that all are judged on the same images


def search(data: str | Path, options: SearchOptions) -> Found:
    """Search for the network that fits; write the folder options.out.

    What is known before the finalists are trained is written, too. Raises FtkitError for bad data
    or options, or where no backbone's weights are here.
    """
    begun = time.perf_counter()
    folder = Path(options.out) if options.out else Path("search")
    with Device.reached(options.on) if options.on else nullcontext() as device:
        task = prepared(Path(data), options, device)
        points, dropped = scored(task)
        console.say(f"{len(points)} candidates scored; {len(dropped)} corners left early")
        near = near_front(points, options.timed)
        timed = timed_points(near, _timing(task, folder, near))

    seen = {point.candidate for point in timed}
    untimed = [point for point in points if point.candidate not in seen]
    trained: list[Point] = []

    def told() -> Found:
        """Choose among the finalists, or before there are any, among all that were timed; write it."""
        found = Found(
            folder=folder,
            points=[*trained, *timed, *untimed],
            dropped=dropped,
            choice=pick(trained or timed, budgets_of(options), options.max_drop, task.groups),
            options=options,
            scored=len(points),
            seconds=time.perf_counter() - begun,
            target=task.target,
        )
        chosen = found.choice.point.candidate
        write(found, chosen.recipe(task.plan, task.preprocess(chosen.backbone, chosen.size)))
        return found

    found = told()
    trained += _finalists(task, folder, timed, found.choice)
    return told() if trained else found


def _timing(task: Search, folder: Path, near: Sequence[Point]) -> Timing:
    corner = task.corners[0]
    sample = task.canvases(*corner)
    rows = spread_evenly(sample.rows("train"), CALIBRATION)
    paths = [sample.images.images[row].path for row in rows]

    def pixels(preprocess: Preprocess) -> Array:
        canvases = np.stack([preprocess.canvas(preprocess.decode(path)) for path in paths])
        return preprocess.pixels(canvases)

    elsewhere = not task.device and task.target != here()
    names = sorted(point.candidate.name for point in near)
    digest = hashlib.sha256(json.dumps([task.target, names]).encode()).hexdigest()[:12]
    given = task.options.latency
    return Timing(
        target=task.target,
        photograph=paths[0],
        frame=task.options.frame or _size_of(paths[0], task.preprocess(*corner)),
        classes=len(task.images.classes),
        weights=task.plan.weights,
        preprocess=task.preprocess,
        pixels=pixels,
        device=task.device,
        for_device=folder / TO_TIME if elsewhere else None,
        brought=read_times(Path(given), task.target, digest) if given else {},
        digest=digest,
    )


def _size_of(path: Path, preprocess: Preprocess) -> str:
    """Size of an image file, "640x480"."""
    height, width = preprocess.decode(path).shape[:2]
    return f"{width}x{height}"


def _finalists(task: Search, folder: Path, timed: Sequence[Point], choice: Choice) -> list[Point]:
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
                add=task.options.add,
                minutes=task.options.minutes,
                resume=True,
                quiet=task.options.quiet,
            )
            train(plan, task.data, run, options)
        right = _right_of(task, run)
        if right is None:
            console.warn(f"finalist {number}: not all images were answered in time; it is left out")
            continue
        low, high, _ = share_interval(right, task.groups)
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


def _right_of(task: Search, folder: Path) -> Array | None:
    """Whether each training image was answered correctly out of fold; None if some were not answered."""
    labels = task.canvases(*task.corners[0]).labels
    with np.load(folder / OUT_OF_FOLD) as stored:
        rows = stored["rows"]
        if len(rows) < len(stored["train_rows"]):
            return None
        right = np.zeros(len(labels), bool)
        right[rows] = stored["logits"].argmax(1) == labels[rows]
        found: Array = right[stored["train_rows"]]
    return found
