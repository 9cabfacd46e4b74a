"""Staged fine-tuning, from a folder of images to a run folder: a loop over ftkit.training.stage.

train(recipe, "photos", Path("runs/lite0-1"))
train(recipe, "photos", Path("runs/lite0-1"), TrainOptions(resume=True))  # after an interruption

A resumed run ends with the same weights. Under torchrun every rank runs this function; only the
first writes files and prints.
"""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ftkit.data.audit import audit, named, require_apart
from ftkit.data.canvas import Canvases, build_canvases
from ftkit.data.dataset import Images, below, splits_csv
from ftkit.evaluation.bundle import DIGEST, SPLITS_CSV, TRAINED_ON
from ftkit.evaluation.metrics import Mistake
from ftkit.evaluation.model import HeldOut, evaluate_model
from ftkit.models.backbones import Backbone, build
from ftkit.models.freezing import trainable
from ftkit.models.pipeline import Part, describe
from ftkit.models.weights import fingerprint
from ftkit.options import TrainOptions
from ftkit.recipe import Recipe, resolve, restore
from ftkit.report.build import pictures, save_pictures, write_report
from ftkit.training import checkpoint, distillation, precision
from ftkit.training.checkpoint import Stop, Stopped
from ftkit.training.fold_decision import out_of_fold
from ftkit.training.folded import look_first_folded, train_folded_stage
from ftkit.training.folds import AUTO, Folds, make_folds, read_with_folds
from ftkit.training.precision import Compute
from ftkit.training.run import (
    FOLD_WEIGHTS,
    OUT_OF_FOLD,
    RUN_SCHEMA,
    create,
    environment,
    finish,
    is_finished,
    read_metrics,
)
from ftkit.training.stage import (
    Work,
    compare_circumstances,
    look_first,
    skip_stage,
    train_stage,
)
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.tensorboard import Log, nowhere, require_tensorboard
from ftkit.training.tensorboard import tensorboard as log_events
from ftkit.utils import console
from ftkit.utils.cache_folder import LARGE, limit_bytes, trim
from ftkit.utils.distributed import Ranks, joined, restarted
from ftkit.utils.lock import locked
from ftkit.utils.malloc import keep_freed_memory
from ftkit_export.files import write_atomically
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import MAX_PIXELS, Preprocess

HEADER = "stage     epoch    loss   train     val     rate   img/s   left"


def train(recipe: Recipe, data: str | Path, out: Path, options: TrainOptions | None = None) -> Path:
    """Fine-tune `recipe` on `data`, print a line per epoch, write the run folder `out`, return it.

    options: its out, recipe, settings and weights are ignored, since the other arguments come from
    them. Raises FtkitError for bad data, a bad recipe, unavailable weights, an existing `out`, a
    resume with another recipe, seed or data, or a lost rank; Stopped (a KeyboardInterrupt) after
    Ctrl-C or SIGTERM, with the run saved.
    """
    limit_bytes()  # reports an invalid limit before the training, not after
    options = options or TrainOptions()
    if restarted():
        options = replace(options, resume=True)

    with Stop() as stop, joined(options.device) as (place, ranks):
        if ranks.first(lambda: options.resume and is_finished(out)):
            console.say(f"{out}: finished already")
            return out

        if options.tensorboard:
            ranks.together(require_tensorboard)

        try:
            with ExitStack() as opened:
                request = Request(
                    recipe=recipe,
                    data=data,
                    out=out,
                    seed=options.seed,
                    group_by=options.group_by,
                    options=options,
                    compute=precision.prepare(place, options.deterministic),
                )
                _train(_as_begun(request, ranks), stop, ranks, opened)
        except Stopped as stopped:
            again = f"ftkit train {shlex.quote(str(data))} --out {shlex.quote(str(out))} --resume"
            done = (
                f"go on with: {again}"
                if checkpoint.exists(out)
                else "no stage had begun; the decoded images are kept"
            )
            raise Stopped(stopped.signal, f"stopped; {done}" if ranks.main else "") from None
        except torch.OutOfMemoryError:
            raise FtkitError(
                "--device cuda: expected memory for a step's images, found too little on the GPU. Try a "
                "smaller batch_size, or --device cpu"
            ) from None
        except RuntimeError as error:
            raise precision.deterministic_or_say(error) or error from None

    return out


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
    def plan(self) -> dict[str, Any]:
        """Recipe, seed and group_by as JSON data; a resumed run must have the same."""
        return {"recipe": resolve(self.recipe), "seed": self.seed, "group_by": self.group_by}


def _as_begun(request: Request, ranks: Ranks) -> Request:
    """With options.known, the request with the recipe, seed and groups of the run it resumes."""
    options = request.options
    known = options.known and options.resume
    plan = ranks.first(
        lambda: (
            checkpoint.plan_of(request.out) if known and checkpoint.exists(request.out) else None
        )
    )
    if not plan:
        return request

    return replace(
        request,
        recipe=restore(plan["recipe"]),
        seed=plan["seed"],
        group_by=plan.get("group_by", ""),
    )


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


def _train(request: Request, stop: Stop, ranks: Ranks, opened: ExitStack) -> None:
    begun = time.perf_counter()
    prepared = _prepare(request, ranks, opened)
    work = _begin_or_resume(request, prepared, stop, ranks, opened, begun)
    console.say(HEADER)
    train_next = train_folded_stage if work.folds else train_stage
    for number in range(work.state.stage, len(request.recipe.stages)):
        if work.state.late and work.stands:
            skip_stage(work, number)
        else:
            train_next(work, number)
    held_out, fold_weights = _out_of_fold(work, prepared.canvases)
    ranks.together(
        lambda: _finish(work, request, prepared, held_out, fold_weights) if ranks.main else None
    )


def _planned(request: Request) -> tuple[Images, Backbone, Preprocess]:
    """Read the list of images and build the pretrained model.

    Raises FtkitError for a typo, before the slow decoding.
    """
    recipe = request.recipe
    images = read_with_folds(recipe, request.data, request.seed, request.group_by, request.root)
    torch.manual_seed(request.seed)
    backbone = build(recipe.backbone, len(images.classes), recipe.weights)

    for stage in recipe.stages:
        trainable(backbone, stage.train)
        if stage.teacher:
            distillation.require_teacher(stage.teacher, images.classes)

    return images, backbone, recipe.preprocess or backbone.preprocess


def _prepare(request: Request, ranks: Ranks, opened: ExitStack) -> Prepared:
    """Read, decode and audit the images; the run folder is created and locked before decoding."""
    recipe = request.recipe
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


def _begin_or_resume(
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
    loaders = StageLoaders(
        backbone, request.recipe, canvases, prepared.preprocess, request.seed, device, ranks
    )
    log: Log = nowhere
    if request.options.tensorboard and ranks.main:  # only once there is a run that can be resumed
        log = opened.enter_context(log_events(request.out / "tensorboard", run.lines))

    if prepared.going_on:
        console.say(
            f"going on after {len(run.stages)} stages, {run.epoch} epochs and {run.step} steps of the next"
        )
    compare_circumstances(run, _circumstances(request, backbone, loaders, ranks))
    folds = _folds(request, canvases, ranks)

    every = torch.from_numpy(canvases.labels).to(device)
    work = Work(
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
        folds=folds,
        budget=math.inf if request.options.minutes is None else 60 * request.options.minutes,
    )
    _share(work)
    return work


def _share(work: Work) -> None:
    """Run the frozen prefix for all stages; before that, as soon as it has seen each image once, say
    what a head on it is worth."""
    first = work.recipe.stages[0]
    run = work.state
    if work.recipe.starts_head and first.cache == "auto" and first.views > 1 and not run.files:
        loader = work.loaders.first_look()
        if loader and work.folds:
            look_first_folded(work, loader)
        elif loader:
            look_first(work, loader)
        needed = work.loaders.left_to_run if loader else 0.0
        run.late = work.ranks.first(lambda: needed > work.left)

    if not run.late:
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
    plan = {**request.plan, "data_fingerprint": prepared.canvases.fingerprint}
    if len({json.dumps(each) for each in ranks.gather(plan)}) > 1:
        raise FtkitError(
            f"{request.data}: expected the same recipe, seed, images, labels and splits on every machine, found "
            "others. Compare the machines' commands and files"
        )

    if prepared.going_on:
        run = checkpoint.read_state(request.out, plan, ranks)
    else:
        run = checkpoint.TrainState(folder=request.out, plan=plan)

    run.ranks = ranks
    return run


def _circumstances(
    request: Request, backbone: Backbone, loaders: StageLoaders, ranks: Ranks
) -> dict[str, Any]:
    """What bit-for-bit reproducibility depends on besides the plan."""
    return {
        "threads": torch.get_num_threads(),
        "device": request.compute.device.type,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory format": "channels_last",
        "precision": str(request.compute.dtype or torch.float32),
        "prefix batch": loaders.views(1).chunk,
        "weights": backbone.weights,
        "ranks": ranks.world,
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


def _finish(
    work: Work,
    request: Request,
    prepared: Prepared,
    held_out: HeldOut | None,
    fold_weights: Mapping[str, torch.Tensor],
) -> None:
    """Evaluate the final weights once, and write the run."""
    run = work.state
    canvases = prepared.canvases
    backbone = work.backbone
    backbone.model.cpu().eval()
    verdict = evaluate_model(
        backbone, canvases, prepared.preprocess, work.recipe.precision, held_out
    )
    seconds = run.spent
    run_json = {
        "schema": RUN_SCHEMA,
        "recipe": resolve(work.recipe),
        "classes": list(prepared.images.classes),
        "preprocess": asdict(prepared.preprocess),
        **asdict(verdict),
        "mistakes": _named(verdict.mistakes, prepared.images, canvases),
        "seed": work.seed,
        "group_by": run.plan["group_by"],
        "audit": prepared.audit,
        "data": str(Path(request.data).resolve()),
        "root": request.root and str(request.root.resolve()),
        "max_pixels": os.environ.get(MAX_PIXELS),
        "data_fingerprint": canvases.fingerprint,
        "bad_files": [[str(path), why] for path, why in canvases.bad],
        "splits": {split: len(canvases.rows(split)) for split in ("train", "val", "test")},
        "weights": backbone.weights,
        "model_fingerprint": fingerprint(backbone.model),
        "head_start": run.head_start,
        "folds": _told_folds(work, canvases, held_out),
        "stages": run.stages,
        "pipeline": [asdict(part) for part in _pipeline(work, prepared)],
        "seconds": seconds,
        "environment": environment(),
    }

    if held_out:
        _write_folds(work, held_out, fold_weights)
    _write(run.folder, run_json, work, canvases)

    _say_cache()
    test = verdict.metrics["test"]
    console.say(
        f"test accuracy {test.accuracy:.3f} [{test.accuracy_low:.3f}, {test.accuracy_high:.3f}] on "
        f"{ground(test.images, test.clusters)}; trained in {console.clock(seconds)}"
    )


def _pipeline(work: Work, prepared: Prepared) -> list[Part]:
    """The steps of the trained model, with the stages that trained them and were kept."""
    trained = [
        (stage["train"], work.loaders.trained[number])
        for number, stage in enumerate(work.state.stages)
        if stage["kept"]
    ]
    return describe(work.backbone, trained, prepared.preprocess.size)


def _out_of_fold(work: Work, canvases: Canvases) -> tuple[HeldOut | None, dict[str, torch.Tensor]]:
    """The out-of-fold predictions of what the stages ended with, and the folds' weights as
    "FOLD/NAME". Collective."""
    answers = out_of_fold(work.state) if work.folds else None
    if answers is None or work.folds is None:
        return None, {}

    known = answers.known
    held_out = HeldOut(
        rows=canvases.rows("train")[known],
        logits=answers.logits[known],
        embedding=answers.embedding[known],
    )
    weights = {
        f"{fold}/{name}": value.contiguous()
        for fold in range(work.folds.count)
        for name, value in work.state.tensors(f"fold{fold}").items()
    }
    return held_out, weights


def _told_folds(work: Work, canvases: Canvases, held_out: HeldOut | None) -> dict[str, Any] | None:
    """Folds as run.json has them: their number, and each one's images and accuracy."""
    if not work.folds or held_out is None:
        return None

    right = held_out.logits.argmax(1) == canvases.labels[held_out.rows]
    of = work.folds.of[np.isin(canvases.rows("train"), held_out.rows)]
    parts = [right[of == fold] for fold in range(work.folds.count)]
    return {
        "count": work.folds.count,
        "images": [len(part) for part in parts],
        "accuracy": [float(part.mean()) if len(part) else None for part in parts],
    }


def _write_folds(work: Work, held_out: HeldOut, weights: Mapping[str, torch.Tensor]) -> None:
    """oof.npz, and each fold's weights where they differ from the shipped ones: an export decides
    on them."""
    assert work.folds
    folder = work.state.folder
    content = io.BytesIO()
    np.savez_compressed(
        content,
        fold=work.folds.of,
        train_rows=work.loaders.canvases.rows("train"),
        rows=held_out.rows,
        logits=held_out.logits,
        embedding=held_out.embedding.astype(np.float16),
    )
    write_atomically(folder / OUT_OF_FOLD, content.getvalue())
    write_atomically(folder / FOLD_WEIGHTS, safetensors.torch.save(dict(weights)))


def _write(folder: Path, run_json: dict[str, Any], work: Work, canvases: Canvases) -> None:
    """Write report, training digests and splits; then weights and run.json, to finish the run."""
    shown = pictures(canvases, run_json["mistakes"])
    save_pictures(folder / "mistakes", shown)
    as_read_back = json.loads(json.dumps(run_json))
    write_report(folder / "report.html", as_read_back, read_metrics(folder), shown)

    rows = [row for split in ("train", "val") for row in canvases.rows(split)]
    digests = sorted(canvases.digests[row][:DIGEST] for row in rows)
    write_atomically(folder / TRAINED_ON, "".join(f"{digest}\n" for digest in digests).encode())
    write_atomically(folder / SPLITS_CSV, splits_csv(canvases.images))
    finish(folder, work.backbone.model, run_json)
    shutil.rmtree(folder / "state")


def _say_cache() -> None:
    """Trim the cache to its limit, and print its size if it is large."""
    left, removed = trim()
    if left > LARGE:
        gone = f"; {removed / 1e9:.1f} GB of the least recently used removed" if removed else ""
        console.say(
            f"cache: {left / 1e9:.1f} GB of at most {limit_bytes() / 1e9:g} (`ftkit cache`){gone}"
        )


def _named(mistakes: Sequence[Mistake], images: Images, canvases: Canvases) -> list[dict[str, Any]]:
    """Mistakes with each image's path in the data and class names."""
    return [
        {
            "image": below(images.root, canvases.images.images[item.row].path),
            "class": images.classes[item.label],
            "said": images.classes[item.said],
            "probability": item.probability,
            "row": item.row,
            "said_label": item.said,
        }
        for item in mistakes
    ]


def _say_data(canvases: Canvases) -> None:
    images = canvases.images
    sizes = {split: len(images.of(split)) for split in ("train", "val", "test")}
    counts = ", ".join(f"{size} {split}" for split, size in sizes.items() if size)
    made = f" ({' and '.join(images.made)} made here)" if images.made else ""
    console.say(f"{len(images.images)} images of {len(images.classes)} classes: {counts}{made}")

    for split in ("val", "test"):
        if sizes[split] and (missing := images.unjudged(split)):
            console.say(
                f"no {split} image of {', '.join(missing)}: {split} says nothing of {_them(missing)}"
            )

    for path, reason in canvases.bad[:5]:
        console.say(f"left out {path}: {reason}")
    if canvases.bad:
        console.say(f"{len(canvases.bad)} unreadable files left out")


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
