"""One stage: one `for epoch`, one `for batch`, in the open.

outcome = train_stage(work, number)      # leaves work.backbone.model as the better of before and after

Every random number follows from (seed, stage, step), so a batch is the same whether the run was interrupted or not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit import checkpoint, terminal
from ftkit.backbones import Backbone, features
from ftkit.evaluate import cka
from ftkit.fan import best_rate
from ftkit.feed import Feed, Feeds, ahead, under
from ftkit.optim import Batch, Moving, class_weights, gradients, make_optimizer, rate
from ftkit.recipe import Recipe, Stage
from ftkit.state import State, Stop, Stopped, seeded
from ftkit.weights import fingerprint
from ftkit_export.errors import FtkitError

Array = np.ndarray[Any, Any]
Score = tuple[float, float]  # accuracy, -NLL on val

EVAL_BATCH = 64
DRIFT_IMAGES = 2048  # val images whose embeddings are compared
NEVER: Score = (-1.0, -math.inf)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage came to. val_accuracy, val_nll: of the weights it ended with; kept: whether they became the model.

    epochs: run, fewer than planned after an early stop. lr: peak rate. drift: linear CKA of the val embeddings with the
    pretrained backbone's, 1 = unmoved. None: the loss was no longer finite.
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
    """What the stages of one run share."""

    recipe: Recipe
    backbone: Backbone
    feeds: Feeds
    state: State
    stop: Stop
    seed: int
    labels: dict[str, torch.Tensor]  # by split, on the device

    def pause(self, moving: Moving) -> None:
        """Save when it is time or a signal came; then, after a signal, raise Stopped."""
        if self.stop.signal or self.state.due:
            self.state.save(step=moving.tensors())
        if self.stop.signal:
            raise Stopped(self.stop.signal)


def train_stage(work: Work, number: int) -> StageResult:
    """Train one stage, from where work.state stands; the model is then its result, or as before when that is no better.

    The last epoch is the stage's result, not the luckiest on a small val split; with patience, the best. Raises
    FtkitError when something frozen moved, Stopped after a signal.
    """
    stage, run, backbone, labels = work.recipe.stages[number], work.state, work.backbone, work.labels["train"]
    run.begin_stage()
    feed, names = work.feeds.stage(number), work.feeds.trained[number]
    terminal.say(f"{stage.train}: {feed.how}")
    compare_circumstances(run, {f"stage {number}": feed.kind})
    _remember_pristine(work, feed)
    frozen, per_epoch = _frozen_fingerprint(backbone.model, names), max(1, len(labels) // stage.batch_size)
    total, micro, broken = per_epoch * stage.epochs, stage.batch_size, False
    run.lr = _peak(work, number, feed, per_epoch)
    moving = Moving(backbone.model, under(names), stage, make_optimizer(backbone, stage))
    moving.load(run.tensors("step"))
    weights = class_weights(labels, len(work.feeds.canvases.images.classes)) if stage.balance == "loss" else None
    with work.stop.deferred():
        for epoch in range(run.epoch, stage.epochs):
            begun, jobs = time.perf_counter(), range(run.step, per_epoch * (epoch + 1))
            read = partial(_read, work, number, feed, _order(work, number, epoch), per_epoch)
            with terminal.bar(f"{stage.train} {epoch + 1}/{stage.epochs}") as progress:
                for step, (positions, arrays, generator) in ahead(jobs, read):
                    lr = rate(step, total, stage, run.lr)
                    for group in moving.optimizer.param_groups:
                        group["lr"] = lr * group["scale"]
                    torch.manual_seed(seeded("layers", work.seed, number, step))  # dropout draws from the global one
                    batch, targets = feed.prepare(arrays, generator), labels[torch.from_numpy(positions)]
                    losses, hits, micro = _gradients(feed.net, batch, targets, moving, weights, micro)
                    moving.step(step + 1, losses, hits, len(positions))
                    run.step = step + 1
                    progress(run.step - per_epoch * epoch, per_epoch)
                    work.pause(moving)
            loss, accuracy = moving.epoch()
            broken = not math.isfinite(loss)
            if broken:
                terminal.say(
                    f"{stage.train}: the loss is no longer finite; what was good before is kept. Try a lower lr"
                )
                break
            score, _ = _validate(backbone, feed, work.labels["val"], moving.result)
            speed = max(1, len(jobs)) * stage.batch_size / (time.perf_counter() - begun)
            _report_epoch(work, number, loss, accuracy, score, rate(run.step - 1, total, stage, run.lr), speed)
            if stage.patience and _out_of_patience(run, stage, moving, score):
                terminal.say(f"{stage.train}: no better for {stage.patience} epochs; its best epoch counts")
                break
            work.pause(moving)
        return _settle(work, number, feed, moving, frozen, broken)


def _order(work: Work, number: int, epoch: int) -> Array:
    """Train positions in this epoch's order; drawn equally often by class where the stage balances by sampling."""
    stage, labels = work.recipe.stages[number], work.labels["train"].cpu()
    generator = torch.Generator().manual_seed(seeded("order", work.seed, number, epoch))
    if stage.balance == "sample":
        chances = class_weights(labels, int(labels.max()) + 1)[labels]
        return torch.multinomial(chances, len(labels), replacement=True, generator=generator).numpy()
    return torch.randperm(len(labels), generator=generator).numpy()


def _read(
    work: Work, number: int, feed: Feed, order: Array, per_epoch: int, step: int
) -> tuple[Array, list[Array], torch.Generator]:
    """One step's positions, its arrays, and the generator that goes on drawing. Full batches; the rest is left out."""
    size = work.recipe.stages[number].batch_size
    at = step % per_epoch * size
    positions = order[at : at + size]
    generator = torch.Generator().manual_seed(seeded("step", work.seed, number, step))
    return positions, feed.fetch(positions, generator), generator


def _gradients(
    net: nn.Module, batch: Batch, targets: torch.Tensor, moving: Moving, weights: torch.Tensor | None, micro: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Fresh gradients of one batch; out of memory, in halves that add up. Returns the size that fitted too."""
    while True:
        moving.optimizer.zero_grad()
        try:
            return *gradients(net, batch, targets, moving.stage, weights, micro), micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise FtkitError(
                    f"stage {moving.stage.train}: expected memory for one image at a time, found too little on the "
                    "GPU. Try a smaller preprocess.size, or --device cpu"
                ) from None
            micro = (micro + 1) // 2
            torch.cuda.empty_cache()
            terminal.say(f"{moving.stage.train}: out of GPU memory; from here in steps of {micro} images that add up")


def _peak(work: Work, number: int, feed: Feed, per_epoch: int) -> float:
    """The stage's peak rate: as given, as found before an interruption, or by a fan of rates."""
    stage, run = work.recipe.stages[number], work.state
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
        stage, work.backbone, feed, batches(), per_epoch * stage.epochs, work.labels["train"], work.labels["val"]
    )
    terminal.say(f"{stage.train}: rate {found:.0e}, the best of a fan on val")
    return found


def _out_of_patience(run: State, stage: Stage, moving: Moving, score: Score) -> bool:
    if run.stage_best is None or score > run.stage_best:
        run.stage_best, run.waited = score, 0
        moving.keep_best()
    else:
        run.waited += 1
    return run.waited >= stage.patience


def _settle(work: Work, number: int, feed: Feed, moving: Moving, frozen: str, broken: bool) -> StageResult:
    """End a stage: audit what was frozen, keep the better weights, commit."""
    stage, run, model = work.recipe.stages[number], work.state, work.backbone.model
    result, score, drift = moving.best or moving.result, NEVER, None
    if not broken or moving.best:
        score, embedding = _validate(work.backbone, feed, work.labels["val"], result)
        drift = cka(embedding, run.tensors("pristine")["embedding"].numpy())
    best = run.best or NEVER
    better = score > best
    model.load_state_dict(_detached(result if better else moving.before), strict=False)
    if _frozen_fingerprint(model, work.feeds.trained[number]) != frozen:
        raise FtkitError(
            f"stage {stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )
    assert run.lr is not None  # train_stage set it
    outcome = StageResult(
        train=stage.train, epochs=run.epoch, lr=run.lr, val_accuracy=max(score[0], 0.0),
        val_nll=None if score is NEVER else -score[1], drift=drift, seconds=run.stage_spent, how=feed.how, kept=better,
    )  # fmt: skip
    if not better:
        terminal.say(f"{stage.train}: no better than before on val; its weights are left out")
    run.stages.append(asdict(outcome))
    run.best = max(score, best)
    run.next_stage()
    run.save(step=None, base=model.state_dict())
    return outcome


def _detached(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, so that loading a model from its own tensors is harmless."""
    return {name: value.detach().clone() for name, value in values.items()}


@torch.inference_mode()
def _validate(
    backbone: Backbone, feed: Feed, labels: torch.Tensor, weights: dict[str, torch.Tensor]
) -> tuple[Score, Array]:
    """(accuracy, -NLL) on the val split of these weights, and its first embeddings; the model is left as it was."""
    model = backbone.model
    modes = [module.training for module in model.modules()]
    own = {name: value.clone() for name, value in model.state_dict().items() if name in weights}
    model.eval().load_state_dict(_detached(weights), strict=False)
    logits, embeddings = [], []
    for start in range(0, len(labels), EVAL_BATCH):
        inputs = feed.val(np.arange(start, min(start + EVAL_BATCH, len(labels))))
        found, answer = features(feed.eval_net, model.get_submodule(backbone.head), inputs)
        logits.append(answer.float())
        if start < DRIFT_IMAGES:
            embeddings.append(found.cpu().numpy())
    model.load_state_dict(own, strict=False)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    whole = torch.cat(logits)
    accuracy = (whole.argmax(1) == labels).float().mean()
    return (float(accuracy), -float(F.cross_entropy(whole, labels))), np.concatenate(embeddings)


def _remember_pristine(work: Work, feed: Feed) -> None:
    """Before anything has trained: what the pretrained backbone makes of the val images."""
    if "pristine" not in work.state.files:
        _, embedding = _validate(work.backbone, feed, work.labels["val"], {})
        work.state.save(pristine={"embedding": torch.from_numpy(embedding)})


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)


def _report_epoch(
    work: Work, number: int, loss: float, accuracy: float, score: Score, lr: float, images_per_s: float
) -> None:
    """Print the epoch's line and append it to metrics.jsonl; it counts from the next save on."""
    stage, run, images = work.recipe.stages[number], work.state, len(work.labels["train"])
    run.epoch += 1
    run.lines += 1
    left = terminal.clock((stage.epochs - run.epoch) * images / max(images_per_s, 1e-9))
    terminal.say(
        f"{stage.train:<8} {run.epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {score[0]:.3f}  {lr:.1e} "
        f"{images_per_s:>7.0f} {left:>6}"
    )
    checkpoint.append(run.folder, {
        "stage": number, "train": stage.train, "epoch": run.epoch, "loss": loss, "train_accuracy": accuracy,
        "val_accuracy": score[0], "val_nll": -score[1], "lr": lr, "images_per_s": images_per_s,
    })  # fmt: skip


def compare_circumstances(run: State, now: dict[str, Any]) -> None:
    """Remember what the bits depend on; warn where an interrupted run had it otherwise."""
    for name, value in now.items():
        before = run.circumstances.setdefault(name, value)
        if before != value:
            print(f"warning: resume: expected {name} {before} as before the interruption, found {value}: the weights "
                  "will be as good, not the same bit for bit", file=sys.stderr)  # fmt: skip
            run.circumstances[name] = value
