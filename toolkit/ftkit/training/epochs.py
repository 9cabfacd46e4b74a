"""The training loop of a stage: epochs, steps, and the trace's line for each epoch.

    training = StageTraining(work, number, loader, part)
    training.run()                                # training.moving.result has the weights

Every random number follows from (seed, stage, step), so batches are the same whether or not the run
was interrupted, and whatever the number of ranks: each rank takes a slice of the same global batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from ftkit.models.freezing import under
from ftkit.models.weights import fingerprint
from ftkit.recipe import Stage
from ftkit.tasks.losses import class_weights
from ftkit.training.checkpoint import TrainState, seeded
from ftkit.training.loader import Fetched, Loader, ahead
from ftkit.training.lr_search import best_rate
from ftkit.training.optimizer import StepState, make_optimizer, rate
from ftkit.training.run import append
from ftkit.training.step import fresh_gradients, run_as
from ftkit.training.validate import Held, Score, Validation
from ftkit.training.work import Work
from ftkit.utils import console
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

SKETCHED = 4  # one in so many of a fold's images judges its epochs, but for the last
SURE_AFTER = 2.0  # seconds of training from which the rest is estimated


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
        self.moving = StepState(
            model, under(self.names), self.stage, optimizer, work.compute, work.task
        )
        self.moving.load(work.state.tensors("step"))

        with work.compute.searching():
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
            work.task.weights(self.labels, len(work.loaders.canvases.images.names))
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
        with self._together, self.work.compute.searching():
            tally, self.net, self._micro = fresh_gradients(
                self.net,
                self.loader.net,
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
                f"{self.work.task.shown} {console.figure(accuracy)}",
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
            f"{stage.train:<8} {run.epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {console.figure(accuracy)}   "
            f"{console.figure(held_accuracy)}  "
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
    peak = best_rate(
        stage, work.backbone, training.loader, batches(), training.steps, held, work.task
    )
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


def check_frozen(training: StageTraining) -> None:
    """Raise FtkitError if a weight changed that the stage does not train."""
    if _frozen_fingerprint(training.work.backbone.model, training.names) != training.frozen:
        raise FtkitError(
            f"stage {training.stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)
