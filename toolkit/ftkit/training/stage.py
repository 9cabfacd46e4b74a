"""One stage: one `for epoch`, one `for batch`, in the open.

outcome = train_stage(work, number)      # leaves work.backbone.model as the better of before and after

Every random number follows from (seed, stage, step), so a batch is the same whether the run was
interrupted or not, and whoever computes it: of several ranks, each takes a slice of the same global
batch.
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
from ftkit.models.weights import fingerprint
from ftkit.recipe import Recipe, Stage
from ftkit.training.checkpoint import State, Stop, Stopped, seeded
from ftkit.training.loader import Feed, Feeds, Fetched, ahead, under
from ftkit.training.lr_search import best_rate
from ftkit.training.optimizer import Moving, class_weights, make_optimizer, rate
from ftkit.training.precision import Compute, release
from ftkit.training.run import append
from ftkit.training.step import fresh_gradients, run_as
from ftkit.training.tensorboard import Log
from ftkit.training.validate import Score, Validation, detached, validate
from ftkit.utils import console
from ftkit.utils.distributed import Ranks
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

NEVER: Score = (-1.0, -math.inf)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of one training stage. val_accuracy, val_nll: of the weights it ended with; kept:
    whether they became the model.

    epochs: run, fewer than planned after an early stop. lr: peak rate. drift: linear CKA of the val
    embeddings with the pretrained backbone's, 1 = unmoved. None: the loss was no longer finite.
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
    """State and data that all stages of a run share."""

    recipe: Recipe
    backbone: Backbone
    feeds: Feeds
    state: State
    stop: Stop
    seed: int
    labels: dict[str, torch.Tensor]  # by split, on the device
    compute: Compute
    ranks: Ranks
    log: Log

    @property
    def balanced(self) -> bool:
        """Whether stages compete on balanced accuracy: where any of them balances its classes."""
        return any(stage.balance != "none" for stage in self.recipe.stages)

    def pause(self, moving: Moving) -> None:
        """Save when it is time or a signal came to any rank; then, after a signal, raise Stopped on
        all."""
        number = self.ranks.largest(self.stop.signal)
        if self.ranks.main and (number or self.state.due):
            self.state.save(step=moving.tensors())
        if number:
            raise Stopped(number)


def train_stage(work: Work, number: int) -> StageResult:
    """Train one stage, from where work.state stands; the model is then its result, or as before
    when that is no better.

    The last epoch is the stage's result, not the luckiest on a small val split; with patience, the
    best. Raises FtkitError when something frozen moved, Stopped after a signal.
    """
    stage = work.recipe.stages[number]
    run = work.state
    backbone = work.backbone
    labels = work.labels["train"]
    run.begin_stage()
    feed = work.feeds.stage(number)
    names = work.feeds.trained[number]
    console.say(f"{stage.train}: {feed.how}")
    compare_circumstances(run, {f"stage {number}": feed.kind})
    _remember_pristine(work, feed)
    frozen = _frozen_fingerprint(backbone.model, names)
    per_epoch = max(1, len(labels) // stage.batch_size)
    total = per_epoch * stage.epochs
    micro = stage.batch_size
    broken = False
    run.lr = _peak(work, number, feed, per_epoch)
    optimizer = make_optimizer(backbone, stage, fused=work.compute.device.type == "cuda")
    moving = Moving(backbone.model, under(names), stage, optimizer, work.compute)
    moving.load(run.tensors("step"))
    example = partial(_read, work, number, feed, _order(work, number, 0), per_epoch, 0)
    size = min(stage.batch_size, len(labels))
    net, together = run_as(
        feed, stage, work.compute, work.ranks, size, lambda: example()[1], total - run.step
    )
    weights = (
        class_weights(labels, len(work.feeds.canvases.images.classes))
        if stage.balance == "loss"
        else None
    )

    with work.stop.deferred():
        for epoch in range(run.epoch, stage.epochs):
            begun = time.perf_counter()
            jobs = range(run.step, per_epoch * (epoch + 1))
            read = partial(_read, work, number, feed, _order(work, number, epoch), per_epoch)

            standing = partial(_standing, work, number, feed, moving, total, begun, run.step)
            with console.bar(f"{stage.train} {epoch + 1}/{stage.epochs}", standing) as progress:
                for step, (share, fetched) in ahead(jobs, read):
                    lr = rate(step, total, stage, run.lr)
                    for group in moving.optimizer.param_groups:
                        group["lr"] = lr * group["scale"]

                    torch.manual_seed(_layers_seed(work, number, step))
                    with together:
                        tally, net, micro = fresh_gradients(
                            net, feed, feed.prepare(fetched), moving, weights, micro, share
                        )

                    moving.step(step + 1, work.ranks.sum(tally))
                    run.step = step + 1
                    progress(run.step - per_epoch * epoch, per_epoch)
                    work.pause(moving)

            loss, accuracy = moving.epoch()
            spent = time.perf_counter() - begun

            broken = not math.isfinite(loss)
            if broken:
                console.say(
                    f"{stage.train}: the loss is no longer finite; what was good before is kept. Try a lower lr"
                )
                break

            judged = _validated(work, feed, moving.result)
            speeds = work.ranks.gather(len(jobs) * size / work.ranks.world / spent)
            _report_epoch(
                work,
                number,
                loss,
                accuracy,
                judged,
                rate(run.step - 1, total, stage, run.lr),
                speeds,
            )

            if stage.patience and _out_of_patience(run, stage, moving, judged.score):
                console.say(
                    f"{stage.train}: no better for {stage.patience} epochs; its best epoch counts"
                )
                break

            work.pause(moving)

        release(net)
        return _settle(work, number, feed, moving, frozen, broken)


def _standing(
    work: Work, number: int, feed: Feed, moving: Moving, total: int, begun: float, before: int
) -> str:
    """The line below the bar: how the epoch, the stage and the run go. begun, before: the epoch's
    start and step."""
    stage = work.recipe.stages[number]
    run = work.state
    (loss, accuracy), done = moving.standing(), run.step - before
    parts = [f"stage {number + 1} of {len(work.recipe.stages)}"]

    if done:
        speed = done / (time.perf_counter() - begun)
        size = min(stage.batch_size, len(work.labels["train"]))
        parts += [
            f"loss {loss:.3f}",
            f"accuracy {accuracy:.3f}",
            f"rate {rate(run.step - 1, total, stage, run.lr or 0.0):.1e}",
            f"{speed * size:.0f} img/s",
            f"stage done in {console.clock((total - run.step) / speed)}",
        ]

        if feed.pass_s:
            parts.append(
                f"{console.clock(feed.pass_s * run.step * size)} of frozen passes read, not run"
            )

    return " · ".join([*parts, feed.how])


def _order(work: Work, number: int, epoch: int) -> Array:
    """Train positions in this epoch's order; drawn equally often by class where the stage balances
    by sampling."""
    stage = work.recipe.stages[number]
    labels = work.labels["train"].cpu()
    generator = torch.Generator().manual_seed(seeded("order", work.seed, number, epoch))

    if stage.balance == "sample":
        chances = class_weights(labels, int(labels.max()) + 1)[labels]
        return torch.multinomial(
            chances, len(labels), replacement=True, generator=generator
        ).numpy()

    return torch.randperm(len(labels), generator=generator).numpy()


def _read(
    work: Work, number: int, feed: Feed, order: Array, per_epoch: int, step: int
) -> tuple[float, Fetched]:
    """This rank's part of one step, and what its mean gradient weighs among the ranks'. Full
    batches; the rest is left out."""
    size = work.recipe.stages[number].batch_size
    at = step % per_epoch * size
    positions = order[at : at + size]
    part = work.ranks.part(len(positions))
    generator = torch.Generator().manual_seed(seeded("step", work.seed, number, step))
    share = (part.stop - part.start) * work.ranks.world / len(positions)
    return share, feed.fetch(positions, generator, part)


def _layers_seed(work: Work, number: int, step: int) -> int:
    """Of the global generator, which dropout draws from; another on each rank, for each has other
    images."""
    place = ("layers", work.seed, number, step)
    return seeded(*place) if work.ranks.main else seeded(*place, work.ranks.rank)


def _peak(work: Work, number: int, feed: Feed, per_epoch: int) -> float:
    """The stage's peak rate: as given, as found before an interruption, or by a fan of rates."""
    stage = work.recipe.stages[number]
    run = work.state

    if stage.lr != "auto":
        return stage.lr
    if run.lr is not None:
        return run.lr
    if feed.kind == "live":
        raise FtkitError(
            f"stage.lr: auto expected a cached head stage, found it {feed.how}. "
            f"Try a rate, e.g. --set stages.{number}.lr=1e-3"
        )

    def batches() -> Iterator[tuple[Array, torch.Generator]]:
        for epoch in range(stage.epochs):
            order = _order(work, number, epoch)
            for step in range(per_epoch):
                place = seeded("fan", work.seed, number, epoch * per_epoch + step)
                torch.manual_seed(place)  # dropout before the head draws from the global generator
                generator = torch.Generator().manual_seed(place)
                yield order[step * stage.batch_size : (step + 1) * stage.batch_size], generator

    found = best_rate(
        stage, work.backbone, feed, batches(), per_epoch * stage.epochs, work.labels["val"]
    )
    found = work.ranks.first(lambda: found)
    console.say(f"{stage.train}: rate {found:.0e}, the best of a fan on val")

    return found


def _out_of_patience(run: State, stage: Stage, moving: Moving, score: Score) -> bool:
    if run.stage_best is None or score > run.stage_best:
        run.stage_best = score
        run.waited = 0
        moving.keep_best()
    else:
        run.waited += 1
    return run.waited >= stage.patience


def _settle(
    work: Work, number: int, feed: Feed, moving: Moving, frozen: str, broken: bool
) -> StageResult:
    """End a stage: audit what was frozen, keep the better weights, commit."""
    stage = work.recipe.stages[number]
    run = work.state
    model = work.backbone.model
    result = moving.best or moving.result
    score = NEVER

    drift = None
    accuracy = 0.0
    if not broken or moving.best:
        judged = _validated(work, feed, result)
        score = judged.score
        accuracy = judged.accuracy
        drift = cka(judged.embedding, run.tensors("pristine")["embedding"].numpy())

    best = run.best or NEVER
    better = score > best
    model.load_state_dict(detached(result if better else moving.before), strict=False)

    if _frozen_fingerprint(model, work.feeds.trained[number]) != frozen:
        raise FtkitError(
            f"stage {stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )

    assert run.lr is not None  # train_stage set it
    outcome = StageResult(
        train=stage.train,
        epochs=run.epoch,
        lr=run.lr,
        val_accuracy=accuracy,
        val_nll=None if score is NEVER else -score[1],
        drift=drift,
        seconds=run.stage_spent,
        how=feed.how,
        kept=better,
    )

    if not better:
        console.say(f"{stage.train}: no better than before on val; its weights are left out")

    run.stages.append(asdict(outcome))
    run.best = max(score, best)
    run.next_stage()
    run.save(step=None, base=model.state_dict())

    return outcome


def _remember_pristine(work: Work, feed: Feed) -> None:
    """Before anything has trained: what the pretrained backbone makes of the val images."""
    if "pristine" not in work.state.files:
        judged = _validated(work, feed, {})
        work.state.save(pristine={"embedding": torch.from_numpy(judged.embedding)})


def _validated(work: Work, feed: Feed, weights: dict[str, torch.Tensor]) -> Validation:
    return validate(
        work.backbone, feed, work.labels["val"], weights, work.ranks, balanced=work.balanced
    )


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)


def _report_epoch(
    work: Work,
    number: int,
    loss: float,
    accuracy: float,
    judged: Validation,
    lr: float,
    speeds: list[float],
) -> None:
    """Print the epoch's line and append it to metrics.jsonl; it counts from the next save on.
    speeds: images/s by rank, which add up."""
    stage = work.recipe.stages[number]
    run = work.state
    images = len(work.labels["train"])
    images_per_s = sum(speeds)
    run.epoch += 1
    run.lines += 1
    # None was left
    left = console.clock((stage.epochs - run.epoch) * images / images_per_s) if images_per_s else ""
    console.say(
        f"{stage.train:<8} {run.epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {judged.accuracy:.3f}  "
        f"{lr:.1e} {images_per_s:>7.0f} {left:>6}"
    )

    if len(speeds) > 1 and run.epoch == stage.epochs:
        console.say(f"{stage.train}: {min(speeds):.0f} to {max(speeds):.0f} img/s a rank")
    if not work.ranks.main:
        return

    line = {
        "stage": number,
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
    work.log(line, run.lines)


def compare_circumstances(run: State, now: dict[str, Any]) -> None:
    """Remember what the bits depend on; warn where an interrupted run had it otherwise."""
    for name, value in now.items():
        before = run.circumstances.setdefault(name, value)
        if before != value:
            console.warn(
                f"resume: expected {name} {before} as before the interruption, found {value}: the weights "
                "will be as good, not the same bit for bit"
            )
            run.circumstances[name] = value
