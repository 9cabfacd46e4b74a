"""Train one stage: an explicit loop over epochs and batches.

outcome = train_stage(work, number)      # work.backbone.model keeps the better weights

Every random number follows from (seed, stage, step), so batches are the same whether or not the run
was interrupted, and whatever the number of ranks: each rank takes a slice of the same global batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ftkit.evaluation.metrics import cka
from ftkit.models.backbones import Backbone
from ftkit.models.freezing import under
from ftkit.models.weights import fingerprint
from ftkit.recipe import Recipe, Stage
from ftkit.training.checkpoint import Stop, Stopped, TrainState, seeded
from ftkit.training.closed_form import default_folds
from ftkit.training.folds import Folds
from ftkit.training.head_start import HeadStart, start_head
from ftkit.training.loader import Fetched, Loader, ahead
from ftkit.training.lr_search import best_rate
from ftkit.training.optimizer import StepState, class_weights, make_optimizer, rate
from ftkit.training.precision import Compute, release
from ftkit.training.run import append
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.step import fresh_gradients, run_as
from ftkit.training.tensorboard import Log
from ftkit.training.validate import DRIFT_IMAGES, Held, Score, Validation, detached, validate
from ftkit.utils import console
from ftkit.utils.distributed import Ranks
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

NEVER: Score = (-1.0, -math.inf)
SKETCHED = 4  # one in so many of a fold's images judges its epochs, but for the last
SURE_AFTER = 2.0  # seconds of training from which the rest is estimated


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of one training stage.

    val_accuracy, val_nll: of the stage's final weights. kept: whether they became the model.
    epochs: epochs run, fewer than planned after early stopping. lr: peak rate. drift: linear CKA of
    the val embeddings with the pretrained backbone's, 1 = unchanged. val_nll and drift are None if
    the loss was no longer finite. folds, divisions: trained on, with folds. gain: over what stood
    before, in accuracy, with its bounds. verdict: what these settled (fold_decision.Verdict), or
    "late" where --minutes ended the stage.
    """

    train: str
    epochs: int
    lr: float
    val_accuracy: float | None
    val_nll: float | None
    drift: float | None
    seconds: float
    how: str
    kept: bool
    folds: int = 0
    divisions: int = 1
    verdict: str | None = None
    gain: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """State and data shared by all stages of a run. budget: seconds for the whole of it."""

    recipe: Recipe
    backbone: Backbone
    loaders: StageLoaders
    state: TrainState
    stop: Stop
    seed: int
    labels: dict[str, torch.Tensor]  # by split, on the device
    compute: Compute
    ranks: Ranks
    log: Log
    folds: Folds | None = None
    budget: float = math.inf

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - self.state.spent

    @property
    def stands(self) -> bool:
        """Whether there is a model that could ship without a further stage."""
        return "oof" in self.state.files if self.folds else self.state.best is not None

    @property
    def balanced(self) -> bool:
        """Whether stages are compared by balanced accuracy: if any of them balances its classes."""
        return any(stage.balance != "none" for stage in self.recipe.stages)

    def val(self, loader: Loader) -> Held:
        """The val split."""
        return Held(loader.val, self.labels["val"])

    def validated(
        self,
        loader: Loader,
        held: Held,
        weights: dict[str, torch.Tensor],
        *,
        embeddings: int = DRIFT_IMAGES,
    ) -> Validation:
        """Evaluate weights on held-out images; {}: the model as it is."""
        return validate(
            self.backbone,
            loader,
            held,
            weights,
            self.ranks,
            balanced=self.balanced,
            embeddings=embeddings,
        )

    def drift(self, embedding: Array) -> float | None:
        """CKA with the pretrained backbone's embedding of the same images."""
        return cka(embedding, self.state.tensors("pristine")["embedding"].numpy())

    def pause(self, moving: StepState) -> None:
        """Save if a save is due or any rank received a signal.

        After a signal, Stopped is then raised on all ranks.
        """
        number = self.ranks.largest(self.stop.signal)
        if self.ranks.main and (number or self.state.due):
            self.state.save(step=moving.tensors())
        if number:
            raise Stopped(number)


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
    folds = default_folds(labels.cpu().numpy(), groups)
    start = start_head(
        work.backbone, loader, labels, groups, work.recipe.stages[0], work.ranks, folds
    )
    if start is None:
        return

    say_head_start(work, start.figures)
    run = work.state
    run.best = work.validated(loader, work.val(loader), {}).score
    run.save(base=work.backbone.model.state_dict())


def say_head_start(work: Work, figures: HeadStart) -> None:
    """Print what the features are worth, and remember it."""
    console.say(
        f"head: out-of-fold accuracy {figures.accuracy:.3f} [{figures.low:.3f}, {figures.high:.3f}] before training,\n"
        f"  by ridge regression on {ground(figures.images, figures.clusters)}"
    )
    work.state.head_start = asdict(figures)


@dataclass(frozen=True, kw_only=True)
class TrainingPart:
    """The images of one training. positions: among the train images (n,). held: what it is judged
    on; None for a refit on all. fold: its number, or the number of folds for the refit; None
    without folds. silent: not part of the trace."""

    positions: Array
    held: Held | None
    fold: int | None = None
    silent: bool = False


class StageTraining:
    """A stage while it trains.

    net: the loader's net, run in the fastest way here. moving: the weights that train.
    """

    def __init__(self, work: Work, number: int, loader: Loader, part: TrainingPart):
        model = work.backbone.model
        self.work = work
        self.number = number
        self.stage = work.recipe.stages[number]
        self.loader = loader
        self.part = part
        self.labels = work.labels["train"][torch.from_numpy(part.positions)]
        self.seed = [work.seed, number] if part.fold is None else [work.seed, number, part.fold]
        self.names = work.loaders.trained[number]
        self.frozen = _frozen_fingerprint(model, self.names)
        self.steps_per_epoch = max(1, len(self.labels) // self.stage.batch_size)
        self.steps = self.steps_per_epoch * self.stage.epochs
        self.images_per_step = min(self.stage.batch_size, len(self.labels))
        self.broken = False  # set when the loss is no longer finite

        work.state.lr = _peak(self)
        fused = work.compute.device.type == "cuda"
        optimizer = make_optimizer(work.backbone, self.stage, fused=fused)
        self.moving = StepState(model, under(self.names), self.stage, optimizer, work.compute)
        self.moving.load(work.state.tensors("step"))

        self.net, self._together = run_as(
            loader,
            self.stage,
            work.compute,
            work.ranks,
            self.images_per_step,
            lambda: self._read(self.order(0), 0)[1],
            self.steps - work.state.step,
        )
        self._micro = self.stage.batch_size
        self._class_weights = (
            class_weights(self.labels, len(work.loaders.canvases.images.classes))
            if self.stage.balance == "loss"
            else None
        )

    def run(self) -> None:
        """Train all epochs that are left; fewer, with work.state.late set, for want of time."""
        self._begun = time.perf_counter()
        self._first = self.work.state.step
        while self.work.state.epoch < self.stage.epochs:
            if not self.epoch():
                break
            self.work.pause(self.moving)

    def _is_late(self) -> bool:
        """Whether the rest of this training, and of a refit after it, would take longer than what is
        left of the budget. Collective; sets work.state.late."""
        work = self.work
        if work.budget == math.inf or not work.stands:
            return False

        done = work.state.step - self._first
        spent = time.perf_counter() - self._begun
        left = self.steps - work.state.step
        if self.part.fold is not None and self.part.held:
            images = len(work.labels["train"])
            left += max(1, images // self.stage.batch_size) * self.stage.epochs
        needed = work.ranks.first(lambda: spent / done * left if spent > SURE_AFTER else 0.0)
        remaining = work.ranks.first(lambda: work.left)
        work.state.late = needed > remaining

        if work.state.late:
            console.say(
                f"{self.stage.train}: stopped, {console.clock(needed)} more are needed and "
                f"{console.clock(max(0, remaining))} left"
            )
        return work.state.late

    def epoch(self) -> bool:
        """Train one epoch, or the rest of an interrupted one, and validate.

        Returns whether the stage continues.
        """
        run = self.work.state
        begun = time.perf_counter()
        first = run.step
        end = self.steps_per_epoch * (run.epoch + 1)
        read = partial(self._read, self.order(run.epoch))
        fold = (
            "" if self.part.fold is None or not self.part.held else f" fold {self.part.fold + 1},"
        )
        title = f"{self.stage.train}{fold} {run.epoch + 1}/{self.stage.epochs}"

        with console.bar(title, partial(self._standing, begun, first)) as progress:
            for step, (share, fetched) in ahead(range(first, end), read):
                self._step(step, share, fetched)
                progress(run.step - end + self.steps_per_epoch, self.steps_per_epoch)
                self.work.pause(self.moving)
                if self._is_late():
                    return False

        loss, accuracy = self.moving.epoch()
        seconds = time.perf_counter() - begun
        self.broken = not math.isfinite(loss)
        if self.broken:
            console.say(
                f"{self.stage.train}: the loss is no longer finite; what was good before is kept. Try a lower lr"
            )
            return False

        held = self.part.held

        if held and self.part.fold is not None:
            self._sketch(held)
            return True

        judged = self.work.validated(self.loader, held, self.moving.result) if held else None
        images = (end - first) * self.images_per_step
        speeds = self.work.ranks.gather(images / self.work.ranks.world / seconds)
        self._report(loss, accuracy, judged, speeds)

        if (
            self.stage.patience
            and judged
            and _out_of_patience(run, self.stage, self.moving, judged.score)
        ):
            console.say(
                f"{self.stage.train}: no improvement for {self.stage.patience} epochs; its best epoch is kept"
            )
            return False

        return True

    def _step(self, step: int, share: float, fetched: Fetched) -> None:
        lr = self._rate(step)
        for group in self.moving.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        torch.manual_seed(self._layers_seed(step))
        with self._together:
            tally, self.net, self._micro = fresh_gradients(
                self.net,
                self.loader,
                self.loader.prepare(fetched),
                self.moving,
                self._class_weights,
                self._micro,
                share,
            )

        self.moving.step(step + 1, self.work.ranks.sum(tally))
        self.work.state.step = step + 1

    def order(self, epoch: int) -> Array:
        """Train positions in this epoch's order.

        With balance = "sample", every class is drawn equally often.
        """
        labels = self.labels.cpu()
        seed = seeded("order", *self.seed, epoch)
        generator = torch.Generator().manual_seed(seed)

        if self.stage.balance == "sample":
            chances = class_weights(labels, int(labels.max()) + 1)[labels]
            drawn = torch.multinomial(chances, len(labels), replacement=True, generator=generator)
        else:
            drawn = torch.randperm(len(labels), generator=generator)

        positions: Array = self.part.positions[drawn.numpy()]
        return positions

    def _read(self, order: Array, step: int) -> tuple[float, Fetched]:
        """Read this rank's part of one step, with the weight of its mean gradient among the ranks'.

        Only full batches: the remainder of an epoch is dropped.
        """
        ranks = self.work.ranks
        size = self.stage.batch_size
        at = step % self.steps_per_epoch * size
        positions = order[at : at + size]
        part = ranks.part(len(positions))
        seed = seeded("step", *self.seed, step)
        generator = torch.Generator().manual_seed(seed)
        share = (part.stop - part.start) * ranks.world / len(positions)

        return share, self.loader.fetch(positions, generator, part)

    def _rate(self, step: int) -> float:
        return rate(step, self.steps, self.stage, self.work.state.lr or 0.0)

    def _layers_seed(self, step: int) -> int:
        """Seed of the global generator, for dropout; differs by rank, since their images do."""
        place = ("layers", *self.seed, step)
        ranks = self.work.ranks
        return seeded(*place) if ranks.main else seeded(*place, ranks.rank)

    def _standing(self, begun: float, first: int) -> str:
        """Status line below the progress bar: epoch, stage and run.

        begun, first: start time and first step of the epoch.
        """
        run = self.work.state
        loss, accuracy = self.moving.standing()
        done = run.step - first
        parts = [f"stage {self.number + 1} of {len(self.work.recipe.stages)}"]

        if done:
            speed = done / (time.perf_counter() - begun)
            parts += [
                f"loss {loss:.3f}",
                f"accuracy {accuracy:.3f}",
                f"rate {self._rate(run.step - 1):.1e}",
                f"{speed * self.images_per_step:.0f} img/s",
                f"stage done in {console.clock((self.steps - run.step) / speed)}",
            ]
            if saved := self.loader.pass_s * run.step * self.images_per_step:
                parts.append(f"{console.clock(saved)} of frozen passes read, not run")

        return " · ".join([*parts, self.loader.how])

    def _sketch(self, held: Held) -> None:
        """End a fold's epoch: judge it on a quarter of the images, if it is not the last one, which
        the caller judges on all."""
        run = self.work.state
        if run.epoch + 1 < self.stage.epochs and not self.part.silent:
            picked = np.arange(0, len(held.labels), SKETCHED)
            quarter = Held(lambda at: held.read(picked[at]), held.labels[torch.from_numpy(picked)])
            self.remember(self.work.validated(self.loader, quarter, self.moving.result), run.epoch)
        run.epoch += 1

    def remember(self, judged: Validation, epoch: int) -> None:
        """Add a fold's epoch (from 0) to the stage's out-of-fold curve."""
        run = self.work.state
        images = len(judged.logits)
        sums = (judged.accuracy * images, images, -judged.score[1] * images)
        if epoch == len(run.curve):
            run.curve.append([0.0, 0.0, 0.0])
        run.curve[epoch] = [
            before + more for before, more in zip(run.curve[epoch], sums, strict=True)
        ]

    def _held_out(self, judged: Validation | None) -> tuple[float, float]:
        """(accuracy, NLL) after this epoch: on val, or of the folds' models after as many."""
        if judged:
            return judged.accuracy, -judged.score[1]
        right, images, nll = self.work.state.curve[self.work.state.epoch]
        return right / images, nll / images

    def _report(
        self, loss: float, accuracy: float, judged: Validation | None, speeds: list[float]
    ) -> None:
        """Print the epoch's line and append it to metrics.jsonl; valid from the next save on.

        speeds: images/s by rank, which add up.
        """
        stage = self.stage
        run = self.work.state
        images_per_s = sum(speeds)
        lr = self._rate(run.step - 1)
        held_accuracy, held_nll = self._held_out(judged)
        run.epoch += 1
        run.lines += 1

        left = ""
        if images_per_s:  # zero if the run was resumed at the end of an epoch
            seconds = (stage.epochs - run.epoch) * len(self.labels) / images_per_s
            left = console.clock(seconds)
        console.say(
            f"{stage.train:<8} {run.epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {held_accuracy:.3f}  "
            f"{lr:.1e} {images_per_s:>7.0f} {left:>6}"
        )
        if len(speeds) > 1 and run.epoch == stage.epochs:
            console.say(f"{stage.train}: {min(speeds):.0f} to {max(speeds):.0f} img/s a rank")

        if not self.work.ranks.main:
            return

        line = {
            "stage": self.number,
            "train": stage.train,
            "epoch": run.epoch,
            "loss": loss,
            "train_accuracy": accuracy,
            "val_accuracy": held_accuracy,
            "val_nll": held_nll,
            "lr": lr,
            "images_per_s": images_per_s,
            **({"images_per_s_by_rank": speeds} if len(speeds) > 1 else {}),
        }
        append(run.folder, line)
        self.work.log(line, run.lines)


def _peak(training: StageTraining) -> float:
    """The stage's peak rate: given, from the checkpoint, or found by learning-rate search."""
    stage = training.stage
    work = training.work
    if stage.lr != "auto":
        return stage.lr
    if work.state.lr is not None:
        return work.state.lr
    if training.loader.kind == "live":
        raise FtkitError(
            f"stage.lr: auto expected a cached head stage, found it {training.loader.how}. "
            f"Try a rate, e.g. --set stages.{training.number}.lr=1e-3"
        )

    def batches() -> Iterator[tuple[Array, torch.Generator]]:
        size = stage.batch_size
        for epoch in range(stage.epochs):
            order = training.order(epoch)
            for step in range(training.steps_per_epoch):
                number = epoch * training.steps_per_epoch + step
                seed = seeded("fan", *training.seed, number)
                torch.manual_seed(seed)  # dropout before the head draws from the global generator
                yield order[step * size : (step + 1) * size], torch.Generator().manual_seed(seed)

    held = training.part.held
    assert held  # a refit has the rate of its folds
    peak = best_rate(stage, work.backbone, training.loader, batches(), training.steps, held)
    peak = work.ranks.first(lambda: peak)
    console.say(f"{stage.train}: rate {peak:.0e}, the best of a fan")
    return peak


def _out_of_patience(run: TrainState, stage: Stage, moving: StepState, score: Score) -> bool:
    if run.stage_best is None or score > run.stage_best:
        run.stage_best = score
        run.waited = 0
        moving.keep_best()
    else:
        run.waited += 1
    return run.waited >= stage.patience


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
    if not training.broken or moving.best:
        judged = work.validated(training.loader, work.val(training.loader), result)
        score = judged.score
        accuracy = judged.accuracy
        drift = work.drift(judged.embedding)

    best = run.best or NEVER
    better = score > best and not run.late
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
        verdict="late" if run.late else None,
    )

    if not better:
        why = "out of time" if run.late else "no better than before on val"
        console.say(f"{stage.train}: {why}; its weights are left out")

    run.stages.append(asdict(outcome))
    run.best = best if run.late else max(score, best)
    run.next_stage()
    run.save(step=None, base=model.state_dict())
    return outcome


def check_frozen(training: StageTraining) -> None:
    """Raise FtkitError if a weight changed that the stage does not train."""
    if _frozen_fingerprint(training.work.backbone.model, training.names) != training.frozen:
        raise FtkitError(
            f"stage {training.stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )


def remember_pristine(work: Work, loader: Loader, held: Held) -> None:
    """Save the pretrained backbone's embeddings of held-out images, before any training."""
    if "pristine" not in work.state.files:
        judged = work.validated(loader, held, {})
        work.state.save(pristine={"embedding": torch.from_numpy(judged.embedding)})


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)


def compare_circumstances(run: TrainState, now: dict[str, Any]) -> None:
    """Record what reproducibility depends on; warn if it differs from before the interruption."""
    for name, value in now.items():
        before = run.circumstances.setdefault(name, value)
        if before != value:
            console.warn(
                f"resume: expected {name} {before} as before the interruption, found {value}: the weights "
                "will be as good, not the same bit for bit"
            )
            run.circumstances[name] = value
