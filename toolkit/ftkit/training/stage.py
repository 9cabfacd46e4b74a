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

import torch
from torch import nn

from ftkit.evaluation.metrics import cka
from ftkit.models.backbones import Backbone
from ftkit.models.freezing import under
from ftkit.models.weights import fingerprint
from ftkit.recipe import Recipe, Stage
from ftkit.training.checkpoint import Stop, Stopped, TrainState, seeded
from ftkit.training.head_start import start_head
from ftkit.training.loader import Fetched, Loader, ahead
from ftkit.training.lr_search import best_rate
from ftkit.training.optimizer import StepState, class_weights, make_optimizer, rate
from ftkit.training.precision import Compute, release
from ftkit.training.run import append
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.step import fresh_gradients, run_as
from ftkit.training.tensorboard import Log
from ftkit.training.validate import Score, Validation, detached, validate
from ftkit.utils import console
from ftkit.utils.distributed import Ranks
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

NEVER: Score = (-1.0, -math.inf)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of one training stage.

    val_accuracy, val_nll: of the stage's final weights. kept: whether they became the model.
    epochs: epochs run, fewer than planned after early stopping. lr: peak rate. drift: linear CKA of
    the val embeddings with the pretrained backbone's, 1 = unchanged. val_nll and drift are None if
    the loss was no longer finite.
    """

    train: str
    epochs: int
    lr: float
    val_accuracy: float
    val_nll: float | None
    drift: float | None
    seconds: float
    how: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """State and data shared by all stages of a run."""

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

    @property
    def balanced(self) -> bool:
        """Whether stages are compared by balanced accuracy: if any of them balances its classes."""
        return any(stage.balance != "none" for stage in self.recipe.stages)

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
    _remember_pristine(work, loader)
    if number == 0 and stage.train == "head" and stage.init == "ridge" and work.state.best is None:
        _start_head(work, loader)

    training = StageTraining(work, number, loader)
    with work.stop.deferred():
        while work.state.epoch < stage.epochs:
            if not training.epoch():
                break
            work.pause(training.moving)

        release(training.net)
        return _settle(training)


def _start_head(work: Work, loader: Loader) -> None:
    """Begin with a head fitted in closed form: the first stage must do better on val to replace it."""
    canvases = work.loaders.canvases
    start = start_head(
        work.backbone,
        loader,
        work.labels["train"],
        canvases.groups(canvases.rows("train")),
        work.recipe.stages[0],
        work.ranks,
    )
    if start is None:
        return

    console.say(
        f"head: out-of-fold accuracy {start.accuracy:.3f} [{start.low:.3f}, {start.high:.3f}] on "
        f"{ground(start.images, start.clusters)}, by ridge regression, before training"
    )
    run = work.state
    run.head_start = asdict(start)
    run.best = _validated(work, loader, {}).score
    run.save(base=work.backbone.model.state_dict())


class StageTraining:
    """A stage while it trains.

    net: the loader's net, run in the fastest way here. moving: the weights that train.
    """

    def __init__(self, work: Work, number: int, loader: Loader):
        model = work.backbone.model
        self.work = work
        self.number = number
        self.stage = work.recipe.stages[number]
        self.loader = loader
        self.labels = work.labels["train"]
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

    def epoch(self) -> bool:
        """Train one epoch, or the rest of an interrupted one, and validate.

        Returns whether the stage continues.
        """
        run = self.work.state
        begun = time.perf_counter()
        first = run.step
        end = self.steps_per_epoch * (run.epoch + 1)
        read = partial(self._read, self.order(run.epoch))
        title = f"{self.stage.train} {run.epoch + 1}/{self.stage.epochs}"

        with console.bar(title, partial(self._standing, begun, first)) as progress:
            for step, (share, fetched) in ahead(range(first, end), read):
                self._step(step, share, fetched)
                progress(run.step - end + self.steps_per_epoch, self.steps_per_epoch)
                self.work.pause(self.moving)

        loss, accuracy = self.moving.epoch()
        seconds = time.perf_counter() - begun
        self.broken = not math.isfinite(loss)
        if self.broken:
            console.say(
                f"{self.stage.train}: the loss is no longer finite; what was good before is kept. Try a lower lr"
            )
            return False

        judged = _validated(self.work, self.loader, self.moving.result)
        images = (end - first) * self.images_per_step
        speeds = self.work.ranks.gather(images / self.work.ranks.world / seconds)
        self._report(loss, accuracy, judged, speeds)

        if self.stage.patience and _out_of_patience(run, self.stage, self.moving, judged.score):
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
        seed = seeded("order", self.work.seed, self.number, epoch)
        generator = torch.Generator().manual_seed(seed)

        if self.stage.balance == "sample":
            chances = class_weights(labels, int(labels.max()) + 1)[labels]
            return torch.multinomial(
                chances, len(labels), replacement=True, generator=generator
            ).numpy()

        return torch.randperm(len(labels), generator=generator).numpy()

    def _read(self, order: Array, step: int) -> tuple[float, Fetched]:
        """Read this rank's part of one step, with the weight of its mean gradient among the ranks'.

        Only full batches: the remainder of an epoch is dropped.
        """
        ranks = self.work.ranks
        size = self.stage.batch_size
        at = step % self.steps_per_epoch * size
        positions = order[at : at + size]
        part = ranks.part(len(positions))
        seed = seeded("step", self.work.seed, self.number, step)
        generator = torch.Generator().manual_seed(seed)
        share = (part.stop - part.start) * ranks.world / len(positions)

        return share, self.loader.fetch(positions, generator, part)

    def _rate(self, step: int) -> float:
        return rate(step, self.steps, self.stage, self.work.state.lr or 0.0)

    def _layers_seed(self, step: int) -> int:
        """Seed of the global generator, for dropout; differs by rank, since their images do."""
        place = ("layers", self.work.seed, self.number, step)
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

    def _report(
        self, loss: float, accuracy: float, judged: Validation, speeds: list[float]
    ) -> None:
        """Print the epoch's line and append it to metrics.jsonl; valid from the next save on.

        speeds: images/s by rank, which add up.
        """
        stage = self.stage
        run = self.work.state
        images_per_s = sum(speeds)
        lr = self._rate(run.step - 1)
        run.epoch += 1
        run.lines += 1

        left = ""
        if images_per_s:  # zero if the run was resumed at the end of an epoch
            seconds = (stage.epochs - run.epoch) * len(self.labels) / images_per_s
            left = console.clock(seconds)
        console.say(
            f"{stage.train:<8} {run.epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {judged.accuracy:.3f}  "
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
            "val_accuracy": judged.accuracy,
            "val_nll": -judged.score[1],
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
                seed = seeded("fan", work.seed, training.number, number)
                torch.manual_seed(seed)  # dropout before the head draws from the global generator
                yield order[step * size : (step + 1) * size], torch.Generator().manual_seed(seed)

    peak = best_rate(
        stage, work.backbone, training.loader, batches(), training.steps, work.labels["val"]
    )
    peak = work.ranks.first(lambda: peak)
    console.say(f"{stage.train}: rate {peak:.0e}, the best of a fan on val")
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
        judged = _validated(work, training.loader, result)
        score = judged.score
        accuracy = judged.accuracy
        drift = cka(judged.embedding, run.tensors("pristine")["embedding"].numpy())

    best = run.best or NEVER
    better = score > best
    model.load_state_dict(detached(result if better else moving.before), strict=False)
    if _frozen_fingerprint(model, training.names) != training.frozen:
        raise FtkitError(
            f"stage {stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )

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
    )

    if not better:
        console.say(f"{stage.train}: no better than before on val; its weights are left out")

    run.stages.append(asdict(outcome))
    run.best = max(score, best)
    run.next_stage()
    run.save(step=None, base=model.state_dict())
    return outcome


def _remember_pristine(work: Work, loader: Loader) -> None:
    """Save the pretrained backbone's val embeddings, before any training."""
    if "pristine" not in work.state.files:
        judged = _validated(work, loader, {})
        work.state.save(pristine={"embedding": torch.from_numpy(judged.embedding)})


def _validated(work: Work, loader: Loader, weights: dict[str, torch.Tensor]) -> Validation:
    return validate(
        work.backbone, loader, work.labels["val"], weights, work.ranks, balanced=work.balanced
    )


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
