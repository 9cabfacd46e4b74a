"""Evaluate a trained model: fit temperature and abstain threshold on val, then test once.

outputs = outputs_of(backbone, canvases, preprocess, held_out)
verdict = evaluate_model(outputs, canvases, precision=0.95)
verdict.metrics["test"].accuracy
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ftkit.data.augment import evaluation
from ftkit.data.canvas import Canvases
from ftkit.evaluation.metrics import (
    Abstention,
    Metrics,
    Mistake,
    abstain_threshold,
    abstention,
    evaluate,
    fit_temperature,
    reliability,
    worst_mistakes,
)
from ftkit.models.backbones import Backbone
from ftkit.models.inference import PREFIX_BATCH, WithEmbedding, runner
from ftkit.utils import console
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.out_of_distribution import OutOfDistribution, fit
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import softmax

FOREIGN_IMAGES = 256  # training images; 512 and 1,398 find no more out-of-distribution images
FOREIGN_EACH = 10  # per class at least: its mean needs more than one


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation of a trained model on val and test.

    temperature and abstention's threshold are fitted on val. metrics: by split, calibrated;
    uncalibrated: at temperature 1, by split: {"nll": .., "ece": ..}. reliability: of test,
    {"before": .., "after": ..} temperature scaling, as metrics.reliability. abstention and
    mistakes: on test. foreign: out-of-distribution statistics as stored in the exported file;
    foreign_kept: share of test images that they accept. answers: predicted class number of each
    test image.
    """

    temperature: float
    metrics: dict[str, Metrics]
    uncalibrated: dict[str, dict[str, float]]
    reliability: dict[str, tuple[tuple[int, float, float], ...]]
    abstention: Abstention
    mistakes: tuple[Mistake, ...]
    foreign: str
    foreign_kept: float
    answers: tuple[int, ...]


class Inference:
    """Inference in float32 on the CPU, with the model prepared once.

    Called with (rows, label) -> [logits (N, classes), embedding (N, D)]; label: of the progress
    bar.
    """

    def __init__(self, backbone: Backbone, canvases: Canvases, preprocess: Preprocess):
        self._canvases = canvases
        self._preprocess = preprocess
        self._run, _ = runner(
            WithEmbedding(backbone), self._pixels(np.arange(min(PREFIX_BATCH, len(canvases.slots))))
        )

    def _pixels(self, rows: Array) -> torch.Tensor:
        return evaluation(torch.from_numpy(self._canvases.array(rows)), self._preprocess)

    def __call__(self, rows: Array, label: str) -> list[Array]:
        parts = []
        with console.bar(label) as progress:
            for start in range(0, len(rows), PREFIX_BATCH):
                parts.append(self._run(self._pixels(rows[start : start + PREFIX_BATCH])))
                progress(start + len(parts[-1][0]), len(rows))
        return [np.concatenate(column) for column in zip(*parts, strict=True)]


@dataclass(frozen=True)
class HeldOut:
    """Out-of-fold predictions. rows (n,): of the canvases; logits (n, classes); embedding (n, D);
    foreign (n,): out-of-distribution scores.

    Each image's embedding and score are those of its fold's model, among whose training images it
    is judged: models do not share an embedding.
    """

    rows: Array
    logits: Array
    embedding: Array
    foreign: Array


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model says of val and test, by split: rows of the canvases, logits (n, K), groups.

    foreign: out-of-distribution statistics; foreign_kept: share of test images that they accept.
    """

    rows: dict[str, Array]
    logits: dict[str, Array]
    groups: dict[str, list[str]]
    foreign: OutOfDistribution
    foreign_kept: float


def outputs_of(
    backbone: Backbone, canvases: Canvases, preprocess: Preprocess, held_out: HeldOut | None
) -> Outputs:
    """Run a model once on what it is judged on.

    held_out: out-of-fold predictions in the place of val, where the run had folds.
    """
    answers = Inference(backbone, canvases, preprocess)
    rows = {split: canvases.rows(split) for split in ("val", "test")}
    outputs = {"test": answers(rows["test"], "evaluating test")}
    if held_out:
        rows["val"] = held_out.rows
        outputs["val"] = [held_out.logits, held_out.embedding]
    else:
        outputs["val"] = answers(rows["val"], "evaluating val")

    foreign = familiar(answers, canvases, canvases.rows("train"), outputs["val"][1])
    if held_out:
        threshold_out_of_fold = float(np.quantile(held_out.foreign, foreign.kept))
        foreign = replace(foreign, threshold=threshold_out_of_fold)
    return Outputs(
        rows=rows,
        logits={split: outputs[split][0] for split in rows},
        groups={split: canvases.groups(rows[split]) for split in rows},
        foreign=foreign,
        foreign_kept=float((foreign.score(outputs["test"][1]) <= foreign.threshold).mean()),
    )


def evaluate_model(outputs: Outputs, canvases: Canvases, precision: float) -> Evaluation:
    """Fit everything on val, then evaluate on test once; test decides nothing."""
    rows = outputs.rows
    logits = outputs.logits
    groups = outputs.groups
    labels = {split: canvases.labels[rows[split]] for split in rows}
    temperature = fit_temperature(logits["val"], labels["val"], groups["val"])
    probabilities = {split: softmax(logits[split] / temperature) for split in rows}
    threshold, proven = abstain_threshold(
        probabilities["val"], labels["val"], precision, groups["val"]
    )
    classes = canvases.images.classes
    plain = {split: evaluate(softmax(logits[split]), labels[split], classes) for split in rows}

    return Evaluation(
        temperature=temperature,
        metrics={
            split: evaluate(probabilities[split], labels[split], classes, groups[split])
            for split in rows
        },
        uncalibrated={split: {"nll": item.nll, "ece": item.ece} for split, item in plain.items()},
        reliability={
            "before": reliability(softmax(logits["test"]), labels["test"]),
            "after": reliability(probabilities["test"], labels["test"]),
        },
        abstention=abstention(probabilities["test"], labels["test"], precision, threshold, proven),
        mistakes=worst_mistakes(probabilities["test"], labels["test"], rows["test"]),
        foreign=outputs.foreign.to_text(),
        foreign_kept=outputs.foreign_kept,
        answers=tuple(map(int, logits["test"].argmax(1))),
    )


def familiar(answers: Inference, canvases: Canvases, rows: Array, val: Array) -> OutOfDistribution:
    """Out-of-distribution statistics from some of the training images (rows) of every class;
    threshold from the embedding of val."""
    labels = canvases.labels[rows]
    present = np.unique(labels)
    each = max(FOREIGN_EACH, -(-FOREIGN_IMAGES // len(present)))
    rows = np.concatenate([spread_evenly(rows[labels == label], each) for label in present])
    _, embedding = answers(rows, "what is familiar")
    return fit(embedding, canvases.labels[rows], val)
