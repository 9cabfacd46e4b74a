"""Train a stage with folds: decide on out-of-fold predictions, then refit on all images.

    train_folded_stage(work, number)

Each fold's model goes through the stages as the shipped model does, and predicts the images it has
not seen. A deeper stage is trained fold by fold until it is settled whether it is better than what
stood before: one that is surely worse costs one or two folds, not a whole training. What is kept is
then trained on all images, from the refit of the stage before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ftkit.models.freezing import set_mode
from ftkit.training.checkpoint import TrainState
from ftkit.training.head_start import start_head
from ftkit.training.loader import Loader
from ftkit.training.precision import release
from ftkit.training.stage import (
    StageResult,
    StageTraining,
    TrainingPart,
    Work,
    check_frozen,
    compare_circumstances,
    remember_pristine,
    say_head_start,
)
from ftkit.training.validate import DRIFT_IMAGES, Held, Validation, detached
from ftkit.utils import console
from ftkit_export.proof.decision import Paired, paired
from ftkit_export.runtime.arrays import Array
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
    remember_pristine(work, loader, _some(work, loader))
    if number == 0 and stage.train == "head" and stage.init == "ridge" and "oof" not in run.files:
        _start_heads(work, loader)

    with work.stop.deferred():
        decision = _Decision(work, number)
        while not decision.settled:
            _train_fold(work, number, loader, decision.next_fold)
            decision = _Decision(work, number)
            console.say(f"{stage.train}: {decision}")

        return _refit(work, number, loader, decision)


def _some(work: Work, loader: Loader) -> Held:
    """The first training images, to compare embeddings on."""
    return Held(loader.seen, work.labels["train"][:DRIFT_IMAGES])


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for every training image by models that have not seen it; NaN where no fold's
    model has predicted it. logits (n, classes), embedding (n, features), float32."""

    logits: Array
    embedding: Array

    @property
    def known(self) -> Array:
        """Whether each image is predicted, (n,) bool."""
        return ~np.isnan(self.logits[:, 0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """As TrainState keeps it."""
        return {
            "logits": torch.from_numpy(self.logits),
            "embedding": torch.from_numpy(self.embedding),
        }


def out_of_fold(run: TrainState, role: str = "oof") -> OutOfFold | None:
    """What stands, or under "oof-new" the stage in training. Collective."""
    found = run.tensors(role)
    if not found:
        return None
    return OutOfFold(found["logits"].numpy(), found["embedding"].numpy())


class _Decision:
    """Whether a stage is better than what stood before, on the folds trained so far.

    A stage is kept when it is surely better; when all folds are trained and it is still open, when
    it is better on them. Bounds hold for all looks together.
    """

    def __init__(self, work: Work, number: int):
        folds = work.folds
        assert folds
        run = work.state
        self.before = out_of_fold(run)
        self.after = out_of_fold(run, "oof-new")
        self._labels = work.labels["train"].cpu().numpy()
        self._folds = list(range(folds.count))
        if self.before is not None:
            known = self.before.known
            self._folds = [fold for fold in self._folds if known[folds.held(fold)].all()]

        done = [k for k in self._folds if self.after and self.after.known[folds.held(k)].all()]
        self._left = [k for k in self._folds if k not in done]
        self.done = done
        self.rows = np.flatnonzero(np.isin(folds.of, done))
        self.broken = run.broken_fold
        self._cheap = work.recipe.stages[number].train == "head"

        self.compared: Paired | None = None
        if self.before is not None and self.after is not None and len(done):
            groups = work.loaders.canvases.groups(work.loaders.canvases.rows("train"))
            self.compared = paired(
                self._right(self.before),
                self._right(self.after),
                [groups[row] for row in self.rows],
                looks=len(self._folds),
            )

    def _right(self, answers: OutOfFold) -> Array:
        right: Array = answers.logits[self.rows].argmax(1) == self._labels[self.rows]
        return right

    @property
    def next_fold(self) -> int:
        """The fold to train next."""
        return self._left[0]

    @property
    def settled(self) -> bool:
        """Whether no further fold is needed. A head's are cheap: all of them are trained."""
        if self.broken or not self._left:
            return True
        if self._cheap:
            return False
        return self.compared is not None and (self.compared.low > 0 or self.compared.high < 0)

    @property
    def accuracy(self) -> float:
        """Out-of-fold accuracy of the stage so far."""
        if self.after is None or not len(self.rows):  # its first fold broke
            return 0.0
        return float(self._right(self.after).mean())

    @property
    def better(self) -> bool:
        """Whether the stage is kept."""
        if self.broken or self.after is None:
            return False
        if self.before is None or self.compared is None:
            return True
        if self.compared.low > 0 or self.compared.high < 0:
            return self.compared.high < 0
        return self._score(self.after) > self._score(self.before)

    def _score(self, answers: OutOfFold) -> tuple[float, float]:
        return float(self._right(answers).mean()), -self.nll(answers)

    def nll(self, answers: OutOfFold) -> float:
        """Of the answers on the folds trained so far."""
        logits = torch.from_numpy(answers.logits[self.rows]).double()
        labels = torch.from_numpy(self._labels[self.rows])
        return float(torch.nn.functional.cross_entropy(logits, labels))

    def __str__(self) -> str:
        text = f"fold {len(self.done)} of {len(self._folds)}: accuracy {self.accuracy:.3f}"
        if self.broken:
            return f"{text}; the loss is no longer finite"
        if self.compared is None:
            return text
        gain, low, high = (
            -100 * value for value in (self.compared.drop, self.compared.high, self.compared.low)
        )
        settled = "open"
        if self.compared.high < 0:
            settled = "surely better"
        elif self.compared.low > 0:
            settled = "surely worse"
        of = f"{self.compared.images} images"
        if self.compared.clusters is not None:
            of = f"{self.compared.clusters} groups"
        return f"{text}, {gain:+.1f} points [{low:+.1f}, {high:+.1f}], {of}: {settled}"


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
    )
    if start is None:
        return

    say_head_start(work, start.figures)
    head = backbone.head
    roles = {
        f"fold{fold}": {f"{head}.weight": weight, f"{head}.bias": bias}
        for fold, (weight, bias) in enumerate(start.by_fold)
    }
    answers = OutOfFold(start.logits, start.embedding)
    run.save(base=backbone.model.state_dict(), oof=answers.tensors(), **roles)


def _train_fold(work: Work, number: int, loader: Loader, fold: int) -> None:
    """Train the stage for one fold, from its weights of the stage before, and predict its images."""
    run = work.state
    folds = work.folds
    assert folds
    run.fold = fold
    backbone = work.backbone
    base = detached(backbone.model.state_dict())
    backbone.model.load_state_dict(run.tensors(f"fold{fold}"), strict=False)
    names = work.loaders.trained[number]
    set_mode(backbone.model, names, work.recipe.stages[number].batchnorm)

    held = folds.held(fold)
    judged_on = Held(
        read=lambda positions: loader.seen(held[positions]),
        labels=work.labels["train"][torch.from_numpy(held)],
    )
    part = TrainingPart(positions=folds.train(fold), held=judged_on, fold=fold)
    training = StageTraining(work, number, loader, part)
    training.run()
    release(training.net)

    result = training.moving.result
    judged = work.validated(loader, judged_on, result, embeddings=len(held))
    check_frozen(training)
    _keep(work, fold, result, judged, broken=training.broken)
    backbone.model.load_state_dict(base)


def _keep(
    work: Work,
    fold: int,
    weights: dict[str, torch.Tensor],
    judged: Validation,
    *,
    broken: bool,
) -> None:
    """Commit a fold's weights and answers."""
    run = work.state
    folds = work.folds
    assert folds
    held = folds.held(fold)
    answers = out_of_fold(run, "oof-new")
    if answers is None:
        shape = (len(folds.of), judged.logits.shape[1])
        answers = OutOfFold(
            np.full(shape, np.nan, np.float32),
            np.full((len(folds.of), judged.embedding.shape[1]), np.nan, np.float32),
        )

    answers.logits[held] = judged.logits
    answers.embedding[held] = judged.embedding
    before = run.tensors(f"fold{fold}")
    run.broken_fold = broken
    run.next_part()
    run.save(
        step=None,
        **{"oof-new": answers.tensors(), f"new{fold}": {**before, **detached(weights)}},
    )


def _refit(work: Work, number: int, loader: Loader, decision: _Decision) -> StageResult:
    """Train a stage that is kept on all images; end the stage."""
    stage = work.recipe.stages[number]
    run = work.state
    folds = work.folds
    assert folds
    model = work.backbone.model
    drift = None
    lr = run.lr
    roles: dict[str, dict[str, torch.Tensor] | None] = {"step": None, "oof-new": None}

    if decision.better:
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

        model.load_state_dict(detached(training.moving.result), strict=False)
        check_frozen(training)
        drift = work.drift(work.validated(loader, _some(work, loader), {}).embedding)
        assert decision.after is not None
        roles["oof"] = decision.after.tensors()
        for fold in range(folds.count):
            roles[f"fold{fold}"] = run.tensors(f"new{fold}") or None
    else:
        console.say(f"{stage.train}: no better out of fold; its weights are left out")

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
        kept=decision.better,
        folds=len(decision.done),
        gain=None if compared is None else (-compared.drop, -compared.high, -compared.low),
    )
    run.stages.append(asdict(outcome))
    run.broken_fold = False
    run.next_stage()
    run.save(base=model.state_dict(), **roles)
    return outcome
