"""Train a stage with folds: decide on out-of-fold predictions, then refit on all images.

    train_folded_stage(work, number)

Each fold's model goes through the stages as the shipped model does, and predicts the images it has
not seen. A deeper stage is trained fold by fold until it is settled whether it is better than what
stood before: one that is surely worse costs one or two folds, not a whole training. What is kept is
then trained on all images, from the refit of the stage before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ftkit.models.freezing import set_mode
from ftkit.training.checkpoint import seeded
from ftkit.training.epochs import StageTraining, TrainingPart, check_frozen
from ftkit.training.fold_decision import OutOfFold, StageDecision, out_of_fold
from ftkit.training.folds import Folds, make_folds
from ftkit.training.head_start import as_weights, fit_heads, start_head
from ftkit.training.loader import Loader
from ftkit.training.precision import release
from ftkit.training.stage import remember_pristine, say_head_start
from ftkit.training.validate import DRIFT_IMAGES, Held, Validation, detached
from ftkit.training.work import StageResult, Work, compare_circumstances
from ftkit.utils import console
from ftkit_export.runtime.errors import FtkitError


def train_folded_stage(work: Work, number: int) -> StageResult:
    """Train one stage on folds and, if it is kept, on all images, from where work.state stands.

    Raises FtkitError if a frozen weight changed, or the stage needs a val split; Stopped after a
    signal.
    """
    stage = work.recipe.stages[number]
    run = work.state
    folds = work.folds
    assert folds  # the caller has looked
    if stage.patience:
        raise FtkitError(
            "stage.patience: expected 0 with folds, whose images must not choose the epoch that they judge, found "
            f"{stage.patience}. Try --folds 0"
        )

    run.begin_stage()
    loader = work.loaders.stage(number)
    console.say(f"{stage.train}: {loader.how}")
    compare_circumstances(run, {f"stage {number}": loader.kind})
    if number == 0:
        look_first_folded(work, loader)

    with work.stop.deferred():
        decision = StageDecision(work, number)
        while not decision.settled:
            _train_fold(work, number, loader, decision.next_fold)
            decision = StageDecision(work, number)
            if not run.late:
                console.say(f"{stage.train}: {decision}")

        while number == 0 and run.head_start and decision.worth_repeating:
            if not _repeat(work, loader, decision.divisions):
                break
            decision = StageDecision(work, number)
            console.say(f"{stage.train}: {decision}")

        if decision.left_open:
            console.say(decision.left_open)
        return _refit(work, number, loader, decision)


def look_first_folded(work: Work, loader: Loader) -> None:
    """Before any training, once: remember the pretrained embedding, and start every fold's head."""
    remember_pristine(work, loader, _some(work, loader))
    if work.recipe.starts_head and "oof" not in work.state.files:
        _start_heads(work, loader)


def _some(work: Work, loader: Loader) -> Held:
    """The first training images, to compare embeddings on."""
    return Held(loader.seen, work.labels["train"][:DRIFT_IMAGES])


def _start_heads(work: Work, loader: Loader) -> None:
    """A head in closed form for every fold, and one on all images: what the first stage must
    surpass."""
    run = work.state
    folds = work.folds
    assert folds
    backbone = work.backbone
    canvases = work.loaders.canvases
    start = start_head(
        backbone,
        loader,
        work.labels["train"],
        canvases.groups(canvases.rows("train")),
        work.recipe.stages[0],
        work.ranks,
        folds.masks(),
        work.task,
    )
    if start is None:
        return

    say_head_start(work, start.figures)
    roles = {
        f"fold{fold}": as_weights(backbone, weight, bias)
        for fold, (weight, bias) in enumerate(start.heads.by_fold)
    }
    answers = OutOfFold(start.heads.logits, start.embedding)
    run.save(base=backbone.model.state_dict(), oof=answers.tensors(), **roles)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A fold's weights, its predictions, and whether its loss was no longer finite."""

    weights: dict[str, torch.Tensor]
    judged: Validation
    broken: bool


def _train_fold(work: Work, number: int, loader: Loader, fold: int) -> None:
    """Train the stage for one fold, from its weights of the stage before, and predict its images."""
    run = work.state
    folds = work.folds
    assert folds
    run.fold = fold
    start = run.tensors(f"fold{fold}")
    trained = _trained_on(work, number, loader, folds, fold, start)
    if trained is None:
        run.next_part()
        run.save(step=None)
    else:
        _keep(work, fold, trained, start)


def _trained_on(
    work: Work,
    number: int,
    loader: Loader,
    folds: Folds,
    fold: int,
    start: Mapping[str, torch.Tensor],
) -> _Trained | None:
    """Train a stage from `start` on all folds but one, and predict that one; the model is left as
    it was. None where time ran out."""
    run = work.state
    model = work.backbone.model
    base = detached(model.state_dict())
    model.load_state_dict(start, strict=False)
    set_mode(model, work.loaders.trained[number], work.recipe.stages[number].batchnorm)

    held = folds.held(fold)
    judged_on = Held(
        read=lambda positions: loader.seen(held[positions]),
        labels=work.labels["train"][torch.from_numpy(held)],
    )
    part = TrainingPart(
        positions=folds.train(fold),
        held=judged_on,
        fold=run.fold,
        silent=folds is not work.folds,
    )
    training = StageTraining(work, number, loader, part)
    training.run()
    release(training.net)

    trained = None
    if not run.late:
        weights = detached(training.moving.result)
        judged = work.validated(loader, judged_on, weights, embeddings=len(held))
        check_frozen(training)
        if not training.part.silent and not training.broken:
            training.remember(judged, work.recipe.stages[number].epochs - 1)
        trained = _Trained(weights=weights, judged=judged, broken=training.broken)
    model.load_state_dict(base)
    return trained


def _repeat(work: Work, loader: Loader, division: int) -> bool:
    """Train the head stage on another division into folds, for its answers alone.

    An interrupted one is begun again. Returns False where there is no other division, or no time.
    """
    run = work.state
    folds = work.folds
    before = out_of_fold(run)
    assert folds
    assert before
    canvases = work.loaders.canvases
    labels = work.labels["train"]
    try:
        others = make_folds(canvases, folds.count, seeded("division", work.seed, division) % 2**31)
    except FtkitError:  # a class has too few groups for most divisions
        return False

    strength = run.head_start["strength"] if run.head_start else 0.0
    heads = fit_heads(
        work.backbone,
        before.embedding,
        labels,
        work.recipe.stages[0],
        work.ranks,
        others.masks(),
        work.task,
        (strength,),
    )
    assert heads  # as those of the first division

    answers = np.zeros_like(heads.logits)
    for fold, (weight, bias) in enumerate(heads.by_fold):
        run.next_part()
        run.files.pop("step", None)
        run.fold = division * (folds.count + 1) + fold + 1
        start = as_weights(work.backbone, weight, bias)
        trained = _trained_on(work, 0, loader, others, fold, start)
        if trained is None:
            run.next_part()
            run.save(step=None)
            return False
        answers[others.held(fold)] = trained.judged.logits

    right = [logits.argmax(1) == labels.cpu().numpy() for logits in (heads.logits, answers)]
    kept = run.tensors("repeats")
    run.next_part()
    run.save(
        step=None,
        repeats={
            name: torch.cat([*([kept[name]] if kept else []), torch.from_numpy(each)[:, None]], 1)
            for name, each in zip(("before", "after"), right, strict=True)
        },
    )
    return True


def _keep(work: Work, fold: int, trained: _Trained, start: Mapping[str, torch.Tensor]) -> None:
    """Commit a fold's weights and answers. start: its weights before."""
    run = work.state
    folds = work.folds
    assert folds
    held = folds.held(fold)
    judged = trained.judged
    answers = out_of_fold(run, "oof-new")
    if answers is None:
        shape = (len(folds.of), judged.logits.shape[1])
        answers = OutOfFold(
            np.full(shape, np.nan, np.float32),
            np.full((len(folds.of), judged.embedding.shape[1]), np.nan, np.float32),
        )

    answers.logits[held] = judged.logits
    answers.embedding[held] = judged.embedding
    run.broken_fold = trained.broken
    run.next_part()
    run.save(
        step=None,
        **{"oof-new": answers.tensors(), f"new{fold}": {**start, **trained.weights}},
    )


def _refit(work: Work, number: int, loader: Loader, decision: StageDecision) -> StageResult:
    """Train a stage that is kept on all images; end the stage."""
    stage = work.recipe.stages[number]
    run = work.state
    folds = work.folds
    assert folds
    model = work.backbone.model
    drift = None
    lr = run.lr
    kept = decision.better
    if decision.broken and not work.stands:
        raise FtkitError(
            f"stage {stage.train}: expected a finite loss, found another, and no head from before. Try a lower lr"
        )
    roles: dict[str, dict[str, torch.Tensor] | None] = {
        "step": None,
        "oof-new": None,
        "repeats": None,
    }

    if kept:
        run.late = False
        run.fold = folds.count
        console.say(f"{stage.train}: kept; now on all {len(folds.of)} images")
        set_mode(model, work.loaders.trained[number], stage.batchnorm)
        part = TrainingPart(positions=np.arange(len(folds.of)), held=None, fold=folds.count)
        training = StageTraining(work, number, loader, part)
        training.run()
        release(training.net)
        lr = run.lr
        if training.broken:
            raise FtkitError(
                f"stage {stage.train}: expected a finite loss on all images as on the folds, found another. Try a "
                "lower lr"
            )

        kept = not run.late
        result = training.moving.result if kept else training.moving.before
        model.load_state_dict(detached(result), strict=False)
        check_frozen(training)

    if kept:
        assert decision.after is not None
        drift = work.drift(work.validated(loader, _some(work, loader), {}).embedding)
        roles["oof"] = decision.after.tensors()
        for fold in range(folds.count):
            roles[f"fold{fold}"] = run.tensors(f"new{fold}") or None
    else:
        why = "out of time" if run.late else "no better out of fold"
        console.say(f"{stage.train}: {why}; its weights are left out")

    for fold in range(folds.count):
        roles[f"new{fold}"] = None

    compared = decision.compared
    outcome = StageResult(
        train=stage.train,
        epochs=stage.epochs,
        lr=lr or 0.0,
        val_accuracy=decision.accuracy,
        val_nll=decision.nll(decision.after) if decision.after and decision.done else None,
        drift=drift,
        seconds=run.stage_spent,
        how=loader.how,
        kept=kept,
        folds=len(decision.done),
        divisions=decision.divisions,
        verdict="late" if run.late else decision.verdict,
        losses=decision.losses,
        gain=None if compared is None else (-compared.drop, -compared.high, -compared.low),
    )
    run.stages.append(asdict(outcome))
    run.broken_fold = False
    run.next_stage()
    run.save(base=model.state_dict(), **roles)
    return outcome
