"""What a training begins from: the images, the pretrained model, and the state of the run.

prepared = prepare(request, ranks, opened)                # images decoded, folder locked
work = begin_or_resume(request, prepared, stop, ranks, opened, begun)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftkit.data.audit import audit, named, require_apart
from ftkit.data.canvas import Canvases, build_canvases
from ftkit.data.dataset import Images
from ftkit.models.backbones import Backbone, build, require_logits
from ftkit.models.freezing import trainable
from ftkit.options import TrainOptions
from ftkit.recipe import Recipe, resolve, restore
from ftkit.tasks.task import task_of
from ftkit.training import checkpoint, distillation
from ftkit.training.checkpoint import Stop
from ftkit.training.folded import look_first_folded
from ftkit.training.folds import AUTO, Folds, make_folds, read_with_folds
from ftkit.training.precision import Compute
from ftkit.training.run import (
    TENSORBOARD,
    create,
)
from ftkit.training.stage import look_first
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.tensorboard import Log, nowhere
from ftkit.training.tensorboard import tensorboard as log_events
from ftkit.training.work import Work, compare_circumstances
from ftkit.utils import console
from ftkit.utils.distributed import Ranks
from ftkit.utils.lock import locked
from ftkit.utils.malloc import keep_freed_memory
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import MAX_PIXELS, Preprocess, allowing


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train, and how. seed: for the splits, the head and every random draw."""

    recipe: Recipe
    data: str | Path
    out: Path
    seed: int
    group_by: str
    options: TrainOptions
    compute: Compute

    @property
    def root(self) -> Path | None:
        """Folder that the paths of a CSV are relative to."""
        return Path(self.options.root) if self.options.root else None

    @property
    def add(self) -> Path | None:
        """CSV of further images."""
        return Path(self.options.add) if self.options.add else None

    @property
    def plan(self) -> dict[str, Any]:
        """Recipe, seed and group_by as JSON data; a resumed run must have the same."""
        return {"recipe": resolve(self.recipe), "seed": self.seed, "group_by": self.group_by}


def as_begun(request: Request, ranks: Ranks) -> Request:
    """With options.known, the request with the recipe, seed and groups of the run it resumes, and, where
    its data is still there, with the run's `root` and added CSV."""
    if not request.options.known or not _is_resumed(request, ranks):
        return request

    plan, source = ranks.first(
        lambda: (checkpoint.plan_of(request.out), checkpoint.source_of(request.out))
    )
    options = request.options
    if source["data"] == str(Path(request.data).resolve()):
        options = replace(
            options, root=options.root or source["root"], add=options.add or source["add"]
        )
    return replace(
        request,
        recipe=restore(plan["recipe"]),
        seed=plan["seed"],
        group_by=plan.get("group_by", ""),
        options=options,
    )


def _is_resumed(request: Request, ranks: Ranks) -> bool:
    return ranks.first(lambda: request.options.resume and checkpoint.exists(request.out))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The decoded and audited images, and the pretrained model.

    audit: JSON data, on the first rank. going_on: whether a run is resumed.
    """

    images: Images
    canvases: Canvases
    audit: dict[str, Any]
    backbone: Backbone
    preprocess: Preprocess
    going_on: bool


def _planned(request: Request) -> tuple[Images, Backbone, Preprocess]:
    """Read the list of images and build the pretrained model.

    Raises FtkitError for a typo, before the slow decoding.
    """
    recipe = request.recipe
    images = read_with_folds(
        recipe, request.data, request.seed, request.group_by, request.root, request.add
    )
    torch.manual_seed(request.seed)
    backbone = build(
        recipe.backbone,
        len(images.names),
        recipe.weights,
        cut=recipe.cut,
        pooling=recipe.pooling,
    )

    task = task_of(images)
    task.require(recipe)
    for stage in recipe.stages:
        trainable(backbone, stage.train)
        if stage.teacher:
            distillation.require_teacher(stage.teacher, images, task)

    preprocess = recipe.preprocess or backbone.preprocess
    require_logits(backbone.model, recipe.backbone, preprocess.size, len(images.names))
    return images, backbone, preprocess


def prepare(request: Request, ranks: Ranks, opened: ExitStack) -> Prepared:
    """Read, decode and audit the images; the run folder is created and locked before decoding."""
    recipe = request.recipe
    if _is_resumed(request, ranks):
        source = ranks.first(lambda: checkpoint.source_of(request.out))
        opened.enter_context(allowing(source["max_pixels"]))
    images, backbone, preprocess = ranks.together(lambda: _planned(request))
    going_on = ranks.first(lambda: _begun(request.out, request.options.resume, opened))

    with console.bar("decoding") as progress:
        canvases = build_canvases(images, preprocess, progress, ranks)
    if not (going_on or request.options.allow_leakage):
        ranks.together(lambda: require_apart(canvases))

    audited: dict[str, Any] = {}
    with console.bar("comparing") as progress:
        if ranks.main:
            audited = named(audit(images, canvases, progress, preprocess.fit), canvases, most=20)

    _say_data(canvases)
    console.say(
        f"{recipe.name}: {recipe.backbone} on {request.compute}\nweights: {backbone.weights}"
    )

    if ranks.world > 1:
        console.say(
            f"{ranks.world} ranks, {ranks.local_world} on this machine: each computes its share of every batch"
        )

    return Prepared(
        images=images,
        canvases=canvases,
        audit=audited,
        backbone=backbone,
        preprocess=preprocess,
        going_on=going_on,
    )


def begin_or_resume(
    request: Request,
    prepared: Prepared,
    stop: Stop,
    ranks: Ranks,
    opened: ExitStack,
    begun: float,
) -> Work:
    """The state of a new or interrupted run, and everything its stages need."""
    canvases = prepared.canvases
    backbone = prepared.backbone
    device = request.compute.device
    run = _state(request, prepared, ranks)
    run.seconds += time.perf_counter() - begun
    run.late = False  # it may have more time now

    keep_freed_memory()
    backbone.model.to(device).to(memory_format=torch.channels_last)
    task = task_of(canvases.images)
    loaders = StageLoaders(
        backbone, request.recipe, canvases, prepared.preprocess, request.seed, device, ranks, task
    )
    log: Log = nowhere
    if request.options.tensorboard and ranks.main:  # only once there is a run that can be resumed
        log = opened.enter_context(log_events(request.out / TENSORBOARD, run.lines))

    folds = _folds(request, canvases, ranks)

    every = task.targets(canvases).to(device)
    return Work(
        recipe=request.recipe,
        backbone=backbone,
        loaders=loaders,
        state=run,
        stop=stop,
        seed=request.seed,
        labels={split: every[torch.from_numpy(canvases.rows(split))] for split in ("train", "val")},
        compute=request.compute,
        ranks=ranks,
        log=log,
        task=task,
        folds=folds,
        budget=math.inf if request.options.minutes is None else 60 * request.options.minutes,
    )


def share(work: Work) -> None:
    """Run the frozen prefix for all stages; before that, as soon as it has seen each image once, say
    what a head on it is worth."""
    first = work.recipe.stages[0]
    run = work.state
    if run.files:
        console.say(
            f"going on after {len(run.stages)} stages, {run.epoch} epochs and {run.step} steps of the next"
        )
    compare_circumstances(run, _circumstances(work))

    if work.recipe.starts_head and first.cache == "auto" and first.views > 1 and not run.files:
        loader = work.loaders.first_look()
        if loader and work.folds:
            look_first_folded(work, loader)
        elif loader:
            look_first(work, loader)
        needed = work.loaders.left_to_run if loader else 0.0
        run.late = work.ranks.first(lambda: needed > work.left)

    if not (run.late and work.stands):
        work.loaders.share()
    if base := run.tensors("base"):
        work.backbone.model.load_state_dict(base)
    run.save()


def _folds(request: Request, canvases: Canvases, ranks: Ranks) -> Folds | None:
    """The folds asked for; none where a val split is given, which then decides."""
    wanted = request.recipe.folds
    if not wanted:
        return None
    if len(canvases.rows("val")):
        if wanted != "auto":
            console.warn(
                "folds: expected no val split, found one in the data. It decides; no folds are made"
            )
        return None

    count = AUTO if wanted == "auto" else wanted
    folds = ranks.together(lambda: make_folds(canvases, count, request.seed))
    console.say(
        f"{folds.count} folds of {len(folds.of)} images: what is decided is decided on them"
    )
    return folds


def _state(request: Request, prepared: Prepared, ranks: Ranks) -> checkpoint.TrainState:
    """The state of a new run, or of the interrupted one.

    Raises FtkitError if plan or data differ between ranks, or from those the run was started with.
    """
    plan = {
        **request.plan,
        "data_fingerprint": prepared.canvases.fingerprint,
        "groups": prepared.canvases.images.grouping,
    }
    if len({json.dumps(each) for each in ranks.gather(plan)}) > 1:
        raise FtkitError(
            f"{request.data}: expected the same recipe, seed, images, labels and splits on every machine, found "
            "others. Compare the machines' commands and files"
        )

    if prepared.going_on:
        run = checkpoint.read_state(request.out, plan, ranks)
    else:
        source = {
            "data": str(Path(request.data).resolve()),
            "root": request.root and str(request.root.resolve()),
            "add": request.add and str(request.add.resolve()),
            "max_pixels": os.environ.get(MAX_PIXELS),
        }
        run = checkpoint.TrainState(folder=request.out, plan=plan, source=source)

    run.ranks = ranks
    return run


def _circumstances(work: Work) -> dict[str, Any]:
    """What bit-for-bit reproducibility depends on besides the plan."""
    return {
        "threads": torch.get_num_threads(),
        "device": work.compute.device.type,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory format": "channels_last",
        "precision": str(work.compute.dtype or torch.float32),
        "prefix batch": work.loaders.views(1).chunk,
        "weights": work.backbone.weights,
        "ranks": work.ranks.world,
    }


def _begun(out: Path, resume: bool, opened: ExitStack) -> bool:
    """Whether `out` holds a run to resume; otherwise create the folder.

    The folder stays locked until `opened` is closed.
    """
    going_on = resume and checkpoint.exists(out)
    if not going_on:
        create(out)
    opened.enter_context(locked(out))
    return going_on


def _say_data(canvases: Canvases) -> None:
    images = canvases.images
    sizes = {split: len(images.of(split)) for split in ("train", "val", "test")}
    counts = ", ".join(f"{size} {split}" for split, size in sizes.items() if size)
    made = f" ({' and '.join(images.made)} made here)" if images.made else ""
    console.say(f"{len(images.images)} images of {_kinds(images)}: {counts}{made}")
    if images.task != "single-label":
        task = task_of(images)
        console.say(f"{images.task}: {', '.join(_quantities(images))}; judged by {task.metric}")

    for split in ("val", "test"):
        if sizes[split] and (missing := images.unjudged(split)):
            console.say(
                f"no {split} image of {', '.join(missing)}: {split} says nothing of {_them(missing)}"
            )

    for path, reason in canvases.bad[:5]:
        console.say(f"left out {path}: {reason}")
    if canvases.bad:
        console.say(f"{len(canvases.bad)} unreadable files left out")


def _kinds(images: Images) -> str:
    """How many classes, labels or quantities, in words."""
    count = len(images.names)
    if images.task == "single-label":
        return f"{count} classes"
    one, many = ("label", "labels") if images.task == "multi-label" else ("quantity", "quantities")
    return f"{count} {one if count == 1 else many}"


def _quantities(images: Images) -> list[str]:
    """The labels, or the quantities with their units."""
    named = zip(images.target_names, images.units, strict=True)
    return [f"{name} [{unit}]" if unit else name for name, unit in named]


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
