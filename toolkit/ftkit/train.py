"""Staged fine-tuning: one `for stage`, one `for epoch`, one `for batch`.

run = train(recipe, "photos", Path("runs/lite0-1"))
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ftkit import checkpoint, terminal
from ftkit.augment import evaluation
from ftkit.backbones import Backbone, build, fingerprint, trainable
from ftkit.cache import channels_last
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
    """What one stage came to. val_accuracy and val_nll are those of best_epoch; kept: whether it became the model."""

    train: str
    epochs: int
    best_epoch: int
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


def _average(mean: State, state: State, decay: float) -> None:
    pairs = [(mean[name], value) for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)


@torch.inference_mode()
def _validate(feed: Feed, labels: torch.Tensor) -> Array:
    """Logits (N, classes) float32 of the val split."""
    parts = [
        feed.eval_net(*feed.val(np.arange(i, min(i + EVAL_BATCH, len(labels)))))
        for i in range(0, len(labels), EVAL_BATCH)
    ]
    return torch.cat(parts).float().cpu().numpy()


def _score(logits: Array, labels: Array) -> tuple[float, float]:
    """(accuracy, -NLL): higher is better."""
    values, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    return float((values.argmax(1) == targets).float().mean()), -float(F.cross_entropy(values, targets))


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Array]:
    """Shuffled positions in full batches; the rest is dropped unless it is all there is."""
    order = torch.randperm(count, generator=generator).numpy()
    whole = max(1, count // size)
    for number in range(whole):
        yield order[number * size : (number + 1) * size]


def train_stage(
    number: int, recipe: Recipe, backbone: Backbone, feeds: Feeds, folder: Path, seed: int, best: tuple[float, float]
) -> tuple[StageResult, tuple[float, float]]:
    """Train one stage; leave the model at its best epoch, or as it was when no epoch beats `best` (accuracy, -NLL).

    Raises FtkitError when something frozen moved.
    """
    started, stage, model = time.perf_counter(), recipe.stages[number], backbone.model
    feed, names = feeds.stage(number), feeds.trained[number]
    frozen_before = _frozen_fingerprint(model, names)
    terminal.say(f"{stage.train}: {feed.how}")
    labels = torch.from_numpy(feeds.canvases.labels).to(feeds.device)
    train_labels = labels[torch.from_numpy(feeds.canvases.rows("train"))]
    val_labels = labels[torch.from_numpy(feeds.canvases.rows("val"))]
    optimizer = make_optimizer(model, stage, backbone.head)
    generator = torch.Generator().manual_seed(seed * 1009 + number)
    torch.manual_seed(seed * 1009 + number)  # dropout draws from the global generator
    before, result, best_epoch = _clone(_trained_state(model, names)), best, 0
    kept, mean = before, _clone(before)
    step, total = 0, stage.epochs * max(1, len(train_labels) // stage.batch_size)
    for epoch in range(1, stage.epochs + 1):
        begun, seen = time.perf_counter(), 0
        losses, hits = torch.zeros((), device=feeds.device), torch.zeros((), device=feeds.device)
        with terminal.bar(f"{stage.train} {epoch}/{stage.epochs}") as progress:
            for positions in _batches(len(train_labels), stage.batch_size, generator):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, total, stage)
                targets = train_labels[torch.from_numpy(positions)]
                logits = feed.net(*feed.train(positions, generator))
                loss = F.cross_entropy(logits, targets, label_smoothing=stage.label_smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's stub
                optimizer.step()
                step += 1
                if stage.ema:
                    _average(mean, _trained_state(model, names), min(stage.ema, (1 + step) / (10 + step)))
                losses += loss.detach() * len(positions)
                hits += (logits.detach().argmax(1) == targets).sum()
                seen += len(positions)
                progress(seen, len(train_labels))
        loss_sum, right = float(losses), int(hits)
        if not math.isfinite(loss_sum):
            terminal.say(f"{stage.train}: the loss is no longer finite; the last good weights are kept. Try a lower lr")
            break
        current = _clone(_trained_state(model, names))
        if stage.ema:
            model.load_state_dict(mean, strict=False)
        trained_modes = [module.training for module in model.modules()]
        model.eval()
        score = _score(_validate(feed, val_labels), val_labels.cpu().numpy())
        for module, mode in zip(model.modules(), trained_modes, strict=True):
            module.training = mode
        if score > result:
            result, best_epoch, kept = score, epoch, _clone(_trained_state(model, names))
        if stage.ema:
            model.load_state_dict(current, strict=False)
        seconds = time.perf_counter() - begun
        _report_epoch(folder, number, stage, epoch, loss_sum / seen, right / seen, score, rate(step - 1, total, stage),
                      seen / seconds, seconds * (stage.epochs - epoch))  # fmt: skip
    model.load_state_dict(kept, strict=False)
    if _frozen_fingerprint(model, names) != frozen_before:
        raise FtkitError(
            f"stage {stage.train}: expected frozen weights to stay, found them changed. Please report this"
        )
    outcome = StageResult(
        train=stage.train, epochs=stage.epochs, best_epoch=best_epoch, val_accuracy=result[0], val_nll=-result[1],
        seconds=time.perf_counter() - started, how=feed.how, kept=best_epoch > 0,
    )  # fmt: skip
    return outcome, result


def _frozen_fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    inside = under(names)
    holder = nn.Module()
    for index, (name, value) in enumerate(model.state_dict().items()):
        if not inside(name):
            holder.register_buffer(f"b{index}", value)
    return fingerprint(holder)


def _report_epoch(
    folder: Path, number: int, stage: Stage, epoch: int, loss: float, accuracy: float, score: tuple[float, float],
    lr: float, speed: float, left: float,
) -> None:  # fmt: skip
    terminal.say(
        f"{stage.train:<8} {epoch:>3}/{stage.epochs:<3}  {loss:.3f}   {accuracy:.3f}   {score[0]:.3f}  {lr:.1e} {speed:>7.0f} "
        f"{terminal.clock(left):>6}"
    )
    checkpoint.append(folder, {
        "stage": number, "train": stage.train, "epoch": epoch, "loss": loss, "train_accuracy": accuracy,
        "val_accuracy": score[0], "val_nll": -score[1], "lr": lr, "images_per_s": speed,
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
    backbone.model.to(target, memory_format=torch.channels_last)
    feeds = Feeds(backbone, recipe, canvases, preprocess, seed, target)
    terminal.say(f"{recipe.name}: {recipe.backbone}, weights {backbone.weights}, on {target.type}")
    terminal.say(HEADER)
    best, stages = (0.0, -math.inf), []
    for number in range(len(recipe.stages)):
        outcome, best = train_stage(number, recipe, backbone, feeds, out, seed, best)
        stages.append(outcome)
        if not outcome.kept:
            terminal.say(f"{outcome.train}: no epoch beat the stage before; its weights are left out")
    backbone.model.cpu().eval()
    temperature, metrics = _judge(backbone.model, canvases, preprocess)
    checkpoint.finish(out, backbone.model, {
        "schema": 1, "recipe": resolve(recipe), "classes": list(images.classes), "preprocess": asdict(preprocess),
        "temperature": temperature, "seed": seed, "data": str(Path(data).resolve()),
        "data_fingerprint": canvases.fingerprint, "bad_files": [[str(path), why] for path, why in canvases.bad],
        "splits": {split: len(canvases.rows(split)) for split in ("train", "val", "test")},
        "weights": backbone.weights, "model_fingerprint": fingerprint(backbone.model),
        "stages": [asdict(stage) for stage in stages], "metrics": {key: asdict(value) for key, value in metrics.items()},
        "seconds": time.perf_counter() - started, "environment": checkpoint.environment(),
    })  # fmt: skip
    test = metrics["test"]
    terminal.say(
        f"test accuracy {test.accuracy:.3f} [{test.accuracy_low:.3f}, {test.accuracy_high:.3f}] on {test.images} images; "
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
    """Temperature from val; then val and, once, test, by live float32 passes of the chosen model on the CPU."""
    logits = {}
    for split in ("val", "test"):
        rows = canvases.rows(split)
        with terminal.bar(f"evaluating {split}") as progress:
            parts = []
            for start in range(0, len(rows), EVAL_BATCH):
                batch = torch.from_numpy(canvases.array(rows[start : start + EVAL_BATCH]))
                with torch.inference_mode():
                    parts.append(model(channels_last(evaluation(batch, preprocess))).numpy())
                progress(start + len(batch), len(rows))
        logits[split] = np.concatenate(parts)
    labels = {split: canvases.labels[canvases.rows(split)] for split in logits}
    temperature = fit_temperature(logits["val"], labels["val"])
    classes = canvases.images.classes
    return temperature, {
        split: evaluate(softmax(logits[split] / temperature), labels[split], classes) for split in logits
    }
