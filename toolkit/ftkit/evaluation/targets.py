"""Evaluate a trained multi-label or regression model: fit its readout on val, then test once.

data = evaluate_targets(outputs, canvases, task, recipe)        # as run.json has it
data["metrics"]["test"]["macro_ap"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ftkit.data.canvas import Canvases
from ftkit.evaluation.model import Outputs
from ftkit.evaluation.multilabel import evaluate_labels, fit_labels, reliability_of_labels
from ftkit.evaluation.regression import evaluate_values, fit_values
from ftkit.recipe import Recipe
from ftkit.tasks.task import Regression, Task
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.files import finite
from ftkit_export.runtime.readout import NEVER, Labels, Readout, Values, sigmoid

WORST = 12
POINTS = 500  # of the residual chart
DIGITS = 7  # of the logits that run.json keeps


def metrics_of(
    readout: Readout, logits: Array, targets: Array, names: Sequence[str], groups: Sequence[str]
) -> dict[str, Any]:
    """Metrics of logits (n, K) as JSON data."""
    if isinstance(readout, Labels):
        found = asdict(evaluate_labels(readout, logits, targets, names, groups))
    else:
        assert isinstance(readout, Values)
        found = asdict(evaluate_values(readout, logits, targets, names, groups))
    cleaned: dict[str, Any] = finite(found)
    return cleaned


def logits_behind(readout: Readout, answers: Array) -> Array:
    """The logits (n, K) float64 that a file's answers were made of; probabilities of 0 and 1 stand for
    the nearest that float32 tells apart."""
    wide = answers.astype(np.float64)
    if isinstance(readout, Labels):
        inside = np.clip(wide, np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).epsneg)
        logits: Array = np.log(inside / (1 - inside)) * readout.temperatures
        return logits
    assert isinstance(readout, Values)
    standard: Array = (wide - readout.means) / readout.spreads
    return standard


def evaluate_targets(
    outputs: Outputs, canvases: Canvases, task: Task, recipe: Recipe
) -> dict[str, Any]:
    """Fit the readout on val, then evaluate on test once; test decides nothing.

    Returns what run.json says of it. metrics: by split, as metrics_of. answers: logits of test. mistakes:
    the worst answers there. reliability: of labels, before and after calibration. residuals: (true,
    predicted) values of the first quantity. precision: of thresholds that were to bring one, None of
    others: which was wanted, and for each label whether it is "proven" with 95 % confidence, "observed"
    alone, or "not reached", so that the label is never said. foreign, foreign_kept: as model.Evaluation.
    """
    every = task.targets(canvases).numpy()
    targets = {split: every[rows] for split, rows in outputs.rows.items()}
    names = canvases.images.target_names
    logits = outputs.logits
    test = logits["test"]
    own: dict[str, Any]
    readout: Labels | Values
    if isinstance(task, Regression):
        readout = fit_values(logits["val"], targets["val"], task, recipe.coverage)
        own = {
            "mistakes": _far_values(outputs, canvases, readout, targets["test"]),
            "residuals": _residuals(test, targets["test"], task),
        }
    else:
        wanted = recipe.precision if recipe.thresholds == "precision" else None
        readout, proven = fit_labels(logits["val"], targets["val"], outputs.groups["val"], wanted)
        held = [
            "not reached" if threshold == NEVER else "proven" if shown else "observed"
            for threshold, shown in zip(readout.thresholds, proven, strict=True)
        ]
        own = {
            "precision": None if wanted is None else {"wanted": wanted, "labels": held},
            "mistakes": _wrong_labels(outputs, canvases, readout, targets["test"]),
            "reliability": {
                "before": reliability_of_labels(sigmoid(test), targets["test"]),
                "after": reliability_of_labels(readout.answers(test), targets["test"]),
            },
        }

    return {
        "readout": readout.as_json(),
        "temperature": 1.0,
        "metrics": {
            split: metrics_of(readout, logits[split], targets[split], names, outputs.groups[split])
            for split in logits
        },
        "foreign": outputs.foreign.to_text(),
        "foreign_kept": outputs.foreign_kept,
        "answers": [[float(f"{value:.{DIGITS}g}") for value in row] for row in test],
        **own,
    }


def _residuals(logits: Array, targets: Array, task: Regression) -> list[tuple[float, float]]:
    """(true, predicted) values of the first quantity, at most about POINTS."""
    pairs = np.stack([targets[:, 0], logits[:, 0]], axis=1) * task.spreads[0] + task.means[0]
    pairs = pairs[~np.isnan(pairs).any(1)]
    return [(float(true), float(said)) for true, said in pairs[:: max(1, len(pairs) // POINTS)]]


def _wrong_labels(
    outputs: Outputs, canvases: Canvases, readout: Labels, targets: Array
) -> list[dict[str, Any]]:
    """The most confident wrong labels: how far the probability is beyond the threshold."""
    probabilities = readout.answers(outputs.logits["test"])
    apart = probabilities - np.minimum(readout.thresholds, 1.0)
    wrong = ~np.isnan(targets) & ((apart >= 0) != (targets == 1))
    order = np.argsort(-np.where(wrong, np.abs(apart), -1), axis=None, kind="stable")
    mistakes = []
    for place in order[: min(WORST, int(wrong.sum()))]:
        image, label = np.unravel_index(place, wrong.shape)
        name = canvases.images.target_names[label]
        there = targets[image, label] == 1
        mistakes.append(
            {
                "row": int(outputs.rows["test"][image]),
                "class": name if there else f"not {name}",
                "said": f"not {name}" if there else name,
                "probability": float(probabilities[image, label]),
                "said_label": int(label),
                "output": name,
            }
        )
    return mistakes


def _far_values(
    outputs: Outputs, canvases: Canvases, readout: Values, targets: Array
) -> list[dict[str, Any]]:
    """The largest errors, in standard deviations."""
    logits = outputs.logits["test"]
    errors = np.nan_to_num(np.abs(logits - targets), nan=-1.0)
    said = readout.answers(logits)
    true = readout.answers(targets)
    mistakes = []
    for place in np.argsort(-errors, axis=None, kind="stable")[:WORST]:
        image, quantity = np.unravel_index(place, errors.shape)
        if errors[image, quantity] < 0:
            break
        name = canvases.images.target_names[quantity]
        unit = readout.units[quantity]
        mistakes.append(
            {
                "row": int(outputs.rows["test"][image]),
                "class": with_unit(name, float(true[image, quantity]), unit),
                "said": with_unit(name, float(said[image, quantity]), unit),
                "error": float(errors[image, quantity]),
                "said_label": int(quantity),
                "output": name,
            }
        )
    return mistakes


def with_unit(name: str, value: float, unit: str) -> str:
    """A value in words: "width 3.2 mm"."""
    return f"{name} {value:.3g}{unit and ' '}{unit}"
