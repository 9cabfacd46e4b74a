"""Staged fine-tuning: one `for stage`, one `for epoch`, one `for batch`.

run = train(recipe, "photos", Path("runs/lite0-1"))
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit import checkpoint, terminal
from ftkit.augment import evaluation
from ftkit.backbones import Backbone, build, fingerprint, trainable
from ftkit.cache import CHUNK, runner
from ftkit.canvas import Canvases
from ftkit.canvas import build as build_canvases
from ftkit.evaluate import Metrics, evaluate, fit_temperature
from ftkit.feed import Feed, Feeds, under
from ftkit.intake import read
from ftkit.recipe import Recipe, Stage, resolve
from ftkit_export.errors import FtkitError
from ftkit_export.parity import softmax
from ftkit_export.preprocess import Preprocess

Array = np.ndarray[Any, Any]
State = dict[str, torch.Tensor]

HEADER = "stage     epoch    loss   train     val     rate   img/s   left"
EVAL_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage came to. val_accuracy, val_nll: after its last epoch; kept: whether it became the model."""

    train: str
    epochs: int
    val_accuracy: float
    val_nll: float
    seconds: float
    how: str
    kept: bool


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> device. Raises FtkitError when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise FtkitError("--device cuda: expected a GPU torch can use, found none. Try --device cpu, or `ftkit doctor`")
    return torch.device(name)


def rate(step: int, total: int, stage: Stage) -> float:
    """Learning rate at `step` of `total`: a linear rise over `warmup`, then the schedule's shape.

    onecycle is a cosine with a rise over at least 20 % of the steps.
    """
    warmup = max(stage.warmup, 0.2 if stage.schedule == "onecycle" else 0.0)
    rise = round(warmup * total)
    if step < rise:
        return stage.lr * (step + 1) / rise
    if stage.schedule == "constant":
        return stage.lr
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def make_optimizer(model: nn.Module, stage: Stage, head: str) -> torch.optim.Optimizer:
    """A fresh optimizer over what requires gradients, in the named groups head and blocks, each with and without decay.

    Vectors (biases, normalisation) take no weight decay.
    """
    is_head = under((head,))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = stage.weight_decay if parameter.ndim > 1 else 0.0
            key = f"{'head' if is_head(name) else 'blocks'}{'' if decay else ' without decay'}"
            groups.setdefault(key, {"name": key, "params": [], "weight_decay": decay})["params"].append(parameter)
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups.values(), lr=stage.lr, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(groups.values(), lr=stage.lr)


def _trained_state(model: nn.Module, names: tuple[str, ...]) -> State:
    inside = under(names)
    return {name: value for name, value in model.state_dict().items() if inside(name)}


def _clone(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _average(mean: State, current: State, decay: float) -> None:
    floating = [name for name, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([mean[name] for name in floating], [current[name] for name in floating], 1 - decay)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Array]:
    """Shuffled positions in full batches; the rest is dropped unless it is all there is."""
    order = torch.randperm(count, generator=generator).numpy()
    whole = max(1, count // size)
    for number in range(whole):
        yield order[number * size : (number + 1) * size]


def train_stage(
    number: int, recipe: Recipe, backbone: Backbone, feeds: Feeds, folder: Path, seed: int, best: tuple[float, float]
) -> tuple[StageResult, tuple[float, float]]:
    """Train one stage; leave the model as it then is, or as it was when that does not beat `best` (accuracy, -NLL).

    The last epoch is the stage's result, not the luckiest on a small val split. Returns the outcome and the score of
    what was kept. Raises FtkitError when something frozen moved.
    """
    started, stage, model = time.perf_counter(), recipe.stages[number], backbone.model
    feed, names = feeds.stage(number), feeds.trained[number]
    frozen = _frozen_fingerprint(model, names)
    terminal.say(f"{stage.train}: {feed.how}")
    labels = torch.from_numpy(feeds.canvases.labels).to(feeds.device)
    train_labels = labels[torch.from_numpy(feeds.canvases.rows("train"))]
    val_labels = labels[torch.from_numpy(feeds.canvases.rows("val"))]
    optimizer = make_optimizer(model, stage, backbone.head)
    generator = torch.Generator().manual_seed(seed * 1009 + number)
    torch.manual_seed(seed * 1009 + number)  # dropout draws from the global generator
    current = _trained_state(model, names)  # the model's own tensors: they follow it
    before = _clone(current)
    mean = _clone(before) if stage.ema else None
    score = (0.0, -math.inf)
    for epoch in range(1, stage.epochs + 1):
        begun = time.perf_counter()
        loss, accuracy, lr = _train_epoch(epoch, stage, model, feed, train_labels, optimizer, generator, current, mean)
        if not math.isfinite(loss):
            terminal.say(f"{stage.train}: the loss is no longer finite; the weights before it are kept. Try a lower lr")
            score = (0.0, -math.inf)
            break
        score = _validate(model, feed, val_labels, mean)
        _report_epoch(folder, number, stage, epoch, loss, accuracy, score, lr,
                      len(train_labels), time.perf_counter() - begun)  # fmt: skip
    better = score > best
    model.load_state_dict((mean or {}) if better else before, strict=False)
    if _frozen_fingerprint(model, names) != frozen:
        raise FtkitError(
            f"stage {stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )
    outcome = StageResult(
        train=stage.train, epochs=stage.epochs, val_accuracy=score[0], val_nll=-score[1],
        seconds=time.perf_counter() - started, how=feed.how, kept=better,
    )  # fmt: skip
    return outcome, max(score, best)


def _train_epoch(
    epoch: int, stage: Stage, model: nn.Module, feed: Feed, labels: torch.Tensor, optimizer: torch.optim.Optimizer,
    generator: torch.Generator, current: State, mean: State | None,
) -> tuple[float, float, float]:  # fmt: skip
    """One pass over the train split -> (mean loss, accuracy, last rate). Moves the averaged weights `mean`."""
    per_epoch = max(1, len(labels) // stage.batch_size)
    step, total, seen = (epoch - 1) * per_epoch, stage.epochs * per_epoch, 0
    losses, hits = torch.zeros((), device=labels.device), torch.zeros((), device=labels.device)
    with terminal.bar(f"{stage.train} {epoch}/{stage.epochs}") as progress:
        for positions in _batches(len(labels), stage.batch_size, generator):
            lr = rate(step, total, stage)
            for group in optimizer.param_groups:
                group["lr"] = lr
            targets = labels[torch.from_numpy(positions)]
            logits = feed.net(*feed.train(positions, generator))
            loss = F.cross_entropy(logits, targets, label_smoothing=stage.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if mean is not None:
                _average(mean, current, min(stage.ema, (1 + step) / (10 + step)))
            losses += loss.detach() * len(positions)
            hits += (logits.detach().argmax(1) == targets).sum()
            seen += len(positions)
            progress(seen, len(labels))
    return float(losses) / seen, float(hits) / seen, lr


@torch.inference_mode()
def _validate(model: nn.Module, feed: Feed, labels: torch.Tensor, mean: State | None) -> tuple[float, float]:
    """(accuracy, -NLL) on the val split, of the averaged weights where there are any; the model is left as it was."""
    modes = [module.training for module in model.modules()]
    own = {name: value.clone() for name, value in model.state_dict().items() if name in (mean or {})}
    model.eval().load_state_dict(mean or {}, strict=False)
    starts = range(0, len(labels), EVAL_BATCH)
    logits = torch.cat([feed.eval_net(*feed.val(np.arange(i, min(i + EVAL_BATCH, len(labels))))) for i in starts])
    model.load_state_dict(own, strict=False)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    accuracy = (logits.argmax(1) == labels).float().mean()
    return float(accuracy), -float(F.cross_entropy(logits.float(), labels))


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)


def _report_epoch(
    folder: Path, number: int, stage: Stage, epoch: int, loss: float, accuracy: float, score: tuple[float, float],
    lr: float, images: int, seconds: float,
) -> None:  # fmt: skip
    terminal.say(
        f"{stage.train:<8} {epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {score[0]:.3f}  {lr:.1e} "
        f"{images / seconds:>7.0f} {terminal.clock(seconds * (stage.epochs - epoch)):>6}"
    )
    checkpoint.append(folder, {
        "stage": number, "train": stage.train, "epoch": epoch, "loss": loss, "train_accuracy": accuracy,
        "val_accuracy": score[0], "val_nll": -score[1], "lr": lr, "images_per_s": images / seconds,
    })  # fmt: skip


def train(recipe: Recipe, data: str | Path, out: Path, *, seed: int = 0, device: str = "auto") -> Path:
    """Fine-tune `recipe` on `data`, print a line an epoch, and write the run folder `out`. Returns `out`.

    Raises FtkitError for bad data, a bad recipe, weights that cannot be had, or an `out` that exists.
    """
    started, target = time.perf_counter(), pick_device(device)
    images = read(data, seed)
    torch.manual_seed(seed)
    backbone = build(recipe.backbone, len(images.classes), recipe.weights)
    preprocess = recipe.preprocess or backbone.preprocess
    for stage in recipe.stages:
        trainable(backbone, stage.train)  # a typo must show before an hour of decoding
    checkpoint.create(out)
    with terminal.bar("decoding") as progress:
        canvases = build_canvases(images, preprocess, progress)
    _say_data(canvases)
    backbone.model.to(target).to(memory_format=torch.channels_last)
    feeds = Feeds(backbone, recipe, canvases, preprocess, seed, target)
    terminal.say(f"{recipe.name}: {recipe.backbone}, weights {backbone.weights}, on {target.type}")
    terminal.say(HEADER)
    best, stages = (0.0, -math.inf), []
    for number in range(len(recipe.stages)):
        outcome, best = train_stage(number, recipe, backbone, feeds, out, seed, best)
        stages.append(outcome)
        if not outcome.kept:
            terminal.say(f"{outcome.train}: no better than before on val; its weights are left out")
    backbone.model.cpu().eval()
    temperature, metrics = _judge(backbone.model, canvases, preprocess)
    checkpoint.finish(out, backbone.model, {
        "schema": 1, "recipe": resolve(recipe), "classes": list(images.classes), "preprocess": asdict(preprocess),
        "temperature": temperature, "seed": seed, "data": str(Path(data).resolve()),
        "data_fingerprint": canvases.fingerprint, "bad_files": [[str(path), why] for path, why in canvases.bad],
        "splits": {split: len(canvases.rows(split)) for split in ("train", "val", "test")},
        "weights": backbone.weights, "model_fingerprint": fingerprint(backbone.model),
        "stages": [asdict(stage) for stage in stages],
        "metrics": {split: asdict(value) for split, value in metrics.items()},
        "seconds": time.perf_counter() - started, "environment": checkpoint.environment(),
    })  # fmt: skip
    test = metrics["test"]
    terminal.say(
        f"test accuracy {test.accuracy:.3f} [{test.accuracy_low:.3f}, {test.accuracy_high:.3f}] on {test.images} "
        "images; "
        f"trained in {terminal.clock(time.perf_counter() - started)}"
    )
    return out


def _say_data(canvases: Canvases) -> None:
    images = canvases.images
    counts = ", ".join(f"{len(images.of(split))} {split}" for split in ("train", "val", "test"))
    made = f" ({' and '.join(images.made)} split made here)" if images.made else ""
    terminal.say(f"{len(images.images)} images of {len(images.classes)} classes: {counts}{made}")
    for path, reason in canvases.bad[:5]:
        terminal.say(f"left out {path}: {reason}")
    if canvases.bad:
        terminal.say(f"{len(canvases.bad)} unreadable files left out")


def _judge(model: nn.Module, canvases: Canvases, preprocess: Preprocess) -> tuple[float, dict[str, Metrics]]:
    """Temperature from val; then val and, once, test, by the chosen model in float32 on the CPU."""
    logits = {}
    for split in ("val", "test"):
        rows = canvases.rows(split)
        pixels = partial(_evaluation_pixels, canvases, preprocess, rows)
        run = runner(model, pixels(0))
        with terminal.bar(f"evaluating {split}") as progress:
            parts = []
            for start in range(0, len(rows), CHUNK):
                parts.append(run(pixels(start))[0])
                progress(start + len(parts[-1]), len(rows))
        logits[split] = np.concatenate(parts)
    labels = {split: canvases.labels[canvases.rows(split)] for split in logits}
    temperature = fit_temperature(logits["val"], labels["val"])
    classes = canvases.images.classes
    return temperature, {
        split: evaluate(softmax(logits[split] / temperature), labels[split], classes) for split in logits
    }


def _evaluation_pixels(canvases: Canvases, preprocess: Preprocess, rows: Array, start: int) -> torch.Tensor:
    return evaluation(torch.from_numpy(canvases.array(rows[start : start + CHUNK])), preprocess)
