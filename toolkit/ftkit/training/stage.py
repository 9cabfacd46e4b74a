"""Train one stage with a val split, and keep its weights if they are better there.

    outcome = train_stage(work, number)      # work.backbone.model keeps the better weights

With folds: folded.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import torch

from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training.closed_form import default_folds
from ftkit.training.epochs import StageTraining, TrainingPart, check_frozen
from ftkit.training.fold_decision import (
    Verdict,
    in_words,
    losses_in_words,
    losses_of,
    verdict_of,
    what_is_open,
)
from ftkit.training.head_start import HeadStart, start_head
from ftkit.training.loader import Loader
from ftkit.training.precision import release
from ftkit.training.validate import Held, Score, Validation, detached
from ftkit.training.work import StageResult, Work, compare_circumstances
from ftkit.utils import console
from ftkit_export.proof.decision import Comparison
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array

NEVER: Score = (-math.inf, -math.inf)


def train_stage(work: Work, number: int) -> StageResult:
    """Train one stage from the position in work.state, and keep its weights if they are better.

    The stage's result is its last epoch, not the luckiest one on a small val split; with patience,
    its best. If that is no better than the model before, the weights are restored. Raises
    FtkitError if a frozen weight changed, Stopped after a signal.
    """
    stage = work.recipe.stages[number]
    work.state.begin_stage()
    loader = work.loaders.stage(number)
    console.say(f"{stage.train}: {loader.how}")
    compare_circumstances(work.state, {f"stage {number}": loader.kind})
    if number == 0:
        look_first(work, loader)

    part = TrainingPart(positions=np.arange(len(work.labels["train"])), held=work.val(loader))
    training = StageTraining(work, number, loader, part)
    with work.stop.deferred():
        training.run()
        release(training.net)
        return _settle(training)


def skip_stage(work: Work, number: int) -> StageResult:
    """Leave a stage out for want of time."""
    stage = work.recipe.stages[number]
    console.say(f"{stage.train}: left out, no time is left")
    outcome = StageResult(
        train=stage.train,
        epochs=0,
        lr=0.0,
        val_accuracy=None,
        val_nll=None,
        drift=None,
        seconds=0.0,
        how="no time was left",
        kept=False,
        verdict="late",
    )
    work.state.stages.append(asdict(outcome))
    work.state.next_stage()
    work.state.save()
    return outcome


def look_first(work: Work, loader: Loader) -> None:
    """Before any training, once: remember the pretrained embedding, and start the head."""
    remember_pristine(work, loader, work.val(loader))
    if work.recipe.starts_head and work.state.best is None:
        _start_head(work, loader)


def _start_head(work: Work, loader: Loader) -> None:
    """Begin with a head fitted in closed form: the first stage must do better on val to replace it."""
    canvases = work.loaders.canvases
    groups = canvases.groups(canvases.rows("train"))
    labels = work.labels["train"]
    strata = canvases.labels[canvases.rows("train")]
    start = start_head(
        work.backbone,
        loader,
        labels,
        groups,
        work.recipe.stages[0],
        work.ranks,
        default_folds(strata, groups),
        work.task,
    )
    if start is None:
        return

    say_head_start(work, start.figures)
    run = work.state
    judged = work.validated(loader, work.val(loader), {})
    run.best = judged.score
    run.save(base=work.backbone.model.state_dict(), val=_answers(judged))


def say_head_start(work: Work, figures: HeadStart) -> None:
    """Print what the features are worth, and remember it."""
    console.say(
        f"head: out-of-fold {work.task.metric} {console.with_bounds(figures.accuracy, figures.low, figures.high)} "
        "before training,\n"
        f"  by ridge regression on {ground(figures.images, figures.clusters)}"
    )
    work.state.head_start = asdict(figures)


def _settle(training: StageTraining) -> StageResult:
    """End a stage: check the frozen weights, keep the better weights, commit."""
    stage = training.stage
    work = training.work
    moving = training.moving
    run = work.state
    model = work.backbone.model
    result = moving.best or moving.result

    score = NEVER
    drift = None
    accuracy = 0.0
    compared = verdict = losses = None
    answers: dict[str, torch.Tensor] = {}
    stood = run.tensors("val")
    if not training.broken or moving.best:
        judged = work.validated(training.loader, work.val(training.loader), result)
        score = judged.score
        accuracy = judged.accuracy
        drift = work.drift(judged.embedding)
        answers = _answers(judged)
        by_recall = work.balanced and work.task is SINGLE_LABEL
        if stood and not by_recall and not run.late:
            compared = _compared(work, stood["logits"], answers["logits"])

    best = run.best or NEVER
    better = score > best
    if compared is not None:
        verdict = verdict_of(compared, _limit(work))
        both = (stood["logits"].numpy(), answers["logits"].numpy(), _val_labels(work))
        losses = losses_of(work.task, verdict, *both)
        better = losses[1] < losses[0] if losses else better
    better = better and not run.late
    model.load_state_dict(detached(result if better else moving.before), strict=False)
    check_frozen(training)

    assert run.lr is not None  # StageTraining set it
    outcome = StageResult(
        train=stage.train,
        epochs=run.epoch,
        lr=run.lr,
        val_accuracy=accuracy,
        val_nll=None if score is NEVER else -score[1],
        drift=drift,
        seconds=run.stage_spent,
        how=training.loader.how,
        kept=better,
        verdict="late" if run.late else verdict,
        gain=None if compared is None else (-compared.drop, -compared.high, -compared.low),
        losses=losses,
    )

    if compared is not None and verdict is not None:
        _say_how_sure(work, stage.train, compared, verdict)
    if losses:
        console.say(losses_in_words(losses))
    if not better:
        why = "out of time" if run.late else "no better than before on val"
        console.say(f"{stage.train}: {why}; its weights are left out")

    run.stages.append(asdict(outcome))
    run.best = score if better else best
    run.next_stage()
    run.save(step=None, base=model.state_dict(), **({"val": answers} if better else {}))
    return outcome


def _answers(judged: Validation) -> dict[str, torch.Tensor]:
    """On val, as TrainState keeps it."""
    return {"logits": torch.from_numpy(judged.logits)}


def _compared(work: Work, before: torch.Tensor, after: torch.Tensor) -> Comparison:
    """What a stage loses on val against what stood before."""
    canvases = work.loaders.canvases
    return work.task.compare(
        before.numpy(),
        after.numpy(),
        _val_labels(work),
        canvases.groups(canvases.rows("val")),
        1,
    )


def _val_labels(work: Work) -> Array:
    labels: Array = work.labels["val"].cpu().numpy()
    return labels


def _limit(work: Work) -> float:
    return work.task.limit(work.recipe.export)


def _say_how_sure(work: Work, name: str, compared: Comparison, verdict: Verdict) -> None:
    """Print the gain with its bounds and, where it is open, what would settle it."""
    limit = _limit(work)
    console.say(f"{name}: {in_words(compared, verdict, limit)}")
    if verdict == "open":
        console.say(what_is_open(compared, limit))
        images = work.loaders.canvases.images
        count = len(images.of("train")) + len(images.of("val"))
        if "val" not in images.made:
            console.say(f"  with val's images in train, folds would decide, on {count} images")
        elif not work.recipe.folds:
            console.say(f"  without --folds 0, folds would decide, on {count} images")


def remember_pristine(work: Work, loader: Loader, held: Held) -> None:
    """Save the pretrained backbone's embeddings of held-out images, before any training."""
    if "pristine" not in work.state.files:
        judged = work.validated(loader, held, {})
        work.state.save(pristine={"embedding": torch.from_numpy(judged.embedding)})
