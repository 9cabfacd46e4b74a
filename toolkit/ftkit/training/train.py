"""Staged fine-tuning, from a folder of images to a run folder: a loop over ftkit.training.stage.

train(recipe, "photos", Path("runs/lite0-1"))
train(recipe, "photos", Path("runs/lite0-1"), TrainOptions(resume=True))  # after an interruption

A resumed run ends with the same weights. Under torchrun every rank runs this function; only the
first writes files and prints.
"""

from __future__ import annotations

import shlex
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ftkit.options import TrainOptions
from ftkit.recipe import Recipe, Stage
from ftkit.training import checkpoint, precision
from ftkit.training.checkpoint import Stop, Stopped
from ftkit.training.finish import outcome_of_folds, write_run
from ftkit.training.folded import train_folded_stage
from ftkit.training.prepare import Request, as_begun, begin_or_resume, prepare, share
from ftkit.training.run import METRICS, SO_FAR, is_finished
from ftkit.training.stage import skip_stage, train_stage
from ftkit.training.tensorboard import require_tensorboard
from ftkit.utils import console
from ftkit.utils.cache_folder import limit_bytes
from ftkit.utils.distributed import SOLO, Ranks, joined, restarted
from ftkit_export.runtime.errors import FtkitError

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

        _require_alike(options, ranks)
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
                _train(as_begun(request, ranks), stop, ranks, opened)
        except Stopped as stopped:
            again = f"ftkit train {shlex.quote(str(data))} --out {shlex.quote(str(out))} --resume"
            done = "no stage had begun; the decoded images are kept"
            if checkpoint.exists(out):
                done = f"go on with: {again}\nor take what stands: ftkit export {shlex.quote(str(out))}"
            raise Stopped(stopped.signal, f"stopped; {done}" if ranks.main else "") from None
        except torch.OutOfMemoryError:
            raise FtkitError(
                "--device cuda: expected memory for a step's images, found too little on the GPU. Try a "
                "smaller batch_size, or --device cpu"
            ) from None
        except RuntimeError as error:
            raise precision.deterministic_or_say(error) or error from None

    return out


def _require_alike(options: TrainOptions, ranks: Ranks) -> None:
    """Raise FtkitError, on every rank, where options differ that decide what ranks wait for."""
    names = ("minutes", "allow_leakage", "tensorboard", "deterministic")
    every = ranks.gather({name: getattr(options, name) for name in names})
    for name in names:
        if len({each[name] for each in every}) > 1:
            raise FtkitError(
                f"--{name.replace('_', '-')}: expected the same on every machine, found others. Compare their commands"
            )


def _train(request: Request, stop: Stop, ranks: Ranks, opened: ExitStack) -> None:
    begun = time.perf_counter()
    prepared = prepare(request, ranks, opened)
    work = begin_or_resume(request, prepared, stop, ranks, opened, begun)
    share(work)
    console.say(HEADER)
    train_next = train_folded_stage if work.folds else train_stage
    for number in range(work.state.stage, len(request.recipe.stages)):
        if work.state.late and work.stands:
            skip_stage(work, number)
        else:
            train_next(work, number)
    held_out, fold_weights = outcome_of_folds(work, prepared.canvases)

    def written() -> None:
        if ranks.main:
            write_run(work, request, prepared, held_out, fold_weights, request.out)
            shutil.rmtree(request.out / "state")
            shutil.rmtree(request.out / SO_FAR, ignore_errors=True)

    ranks.together(written)


def write_so_far(folder: Path, data: str | Path | None = None) -> Path:
    """Judge what stands of an interrupted run and write it as a run of its own, RUN/so-far.

    The interrupted run is left as it is, and can still go on. data: where its images are now, if
    they moved. Raises FtkitError if nothing stands yet, or the run is in use.
    """
    options = TrainOptions(resume=True, known=True, device="cpu")
    source = checkpoint.source_of(folder)
    request = Request(
        recipe=Recipe(name="", backbone="", stages=(Stage(),)),
        data=data or source["data"],
        out=folder,
        seed=0,
        group_by="",
        options=replace(options, root=None if data else source["root"], add=source["add"]),
        compute=precision.prepare(torch.device("cpu"), options.deterministic),
    )
    with Stop() as stop, ExitStack() as opened:
        begun = time.perf_counter()
        request = as_begun(request, SOLO)
        prepared = prepare(request, SOLO, opened)
        work = begin_or_resume(request, prepared, stop, SOLO, opened, begun)
        base = work.state.tensors("base")
        if not base or not work.stands:
            raise FtkitError(
                f"{folder}: expected a run of which a model stands, found one stopped before. Try --resume"
            )

        work.backbone.model.load_state_dict(base)
        out = folder / SO_FAR
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if (folder / METRICS).exists():
            shutil.copyfile(folder / METRICS, out / METRICS)
        write_run(work, request, prepared, *outcome_of_folds(work, prepared.canvases), out)
        return out
