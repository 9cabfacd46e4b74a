"""Evaluate a trained multi-label or regression model: fit its readout on val, then test once.

verdict = evaluate_targets(outputs, canvases, task, recipe)
verdict.metrics["test"].macro_ap
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ftkit.data.canvas import Canvases
from ftkit.evaluation.model import Outputs
from ftkit.evaluation.multilabel import (
    MultiLabelMetrics,
    evaluate_labels,
    fit_labels,
    reliability_of_labels,
)
from ftkit.evaluation.regression import RegressionMetrics, evaluate_values, fit_values
from ftkit.recipe import Recipe
from ftkit.tasks.task import Regression, Task
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.readout import Labels, Readout, Values

WORST = 12
POINTS = 500  # of the residual chart
DIGITS = 7  # of the logits that run.json keeps


@dataclass(frozen=True, kw_only=True)
class TargetEvaluation:
    """Evaluation on val and test. readout: fitted on val. metrics: by split. mistakes: the worst answers
    on test, as run.json has them. reliability: of multi-label, before and after calibration, on test.
    residuals: of regression, (true, predicted) values of the first quantity on test. logits: of test.
    foreign, foreign_kept: as model.Evaluation."""

    readout: Readout
    metrics: dict[str, MultiLabelMetrics] | dict[str, RegressionMetrics]
    mistakes: list[dict[str, Any]]
    foreign: str
    foreign_kept: float
    logits: Array
    reliability: dict[str, Any] | None = None
    residuals: list[tuple[float, float]] | None = None

    def as_json(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "readout": self.readout.as_json(),
            "temperature": 1.0,
            "metrics": {split: _finite(asdict(item)) for split, item in self.metrics.items()},
            "mistakes": self.mistakes,
            "foreign": self.foreign,
            "foreign_kept": self.foreign_kept,
            "answers": [[float(f"{value:.{DIGITS}g}") for value in row] for row in self.logits],
            "reliability": self.reliability,
            "residuals": self.residuals,
        }


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON does not have: what the images do not define."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_of(
    readout: Readout, logits: Array, targets: Array, names: Sequence[str], groups: Sequence[str]
) -> dict[str, Any]:
    """Metrics of logits (n, K) as JSON data."""
    if isinstance(readout, Labels):
        found = asdict(evaluate_labels(readout, logits, targets, names, groups))
    else:
        assert isinstance(readout, Values)
        found = asdict(evaluate_values(readout, logits, targets, names, groups))
    cleaned: dict[str, Any] = _finite(found)
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
) -> TargetEvaluation:
    """Fit the readout on val, then evaluate on test once; test decides nothing."""
    every = task.targets(canvases).numpy()
    targets = {split: every[rows] for split, rows in outputs.rows.items()}
    if isinstance(task, Regression):
        return _values(outputs, canvases, task, targets, recipe)
    return _labels(outputs, canvases, targets, recipe)


def _labels(
    outputs: Outputs, canvases: Canvases, targets: dict[str, Array], recipe: Recipe
) -> TargetEvaluation:
    names = canvases.images.target_names
    wanted = recipe.precision if recipe.thresholds == "precision" else None
    readout = fit_labels(outputs.logits["val"], targets["val"], outputs.groups["val"], wanted)
    plain = Labels(temperatures=(1.0,) * len(names), thresholds=readout.thresholds)
    test = outputs.logits["test"]

    return TargetEvaluation(
        readout=readout,
        metrics={
            split: evaluate_labels(readout, logits, targets[split], names, outputs.groups[split])
            for split, logits in outputs.logits.items()
        },
        mistakes=_wrong_labels(outputs, canvases, readout, targets["test"]),
        reliability={
            "before": reliability_of_labels(plain.answers(test), targets["test"]),
            "after": reliability_of_labels(readout.answers(test), targets["test"]),
        },
        foreign=outputs.foreign.to_text(),
        foreign_kept=outputs.foreign_kept,
        logits=test,
    )


def _wrong_labels(
    outputs: Outputs, canvases: Canvases, readout: Labels, targets: Array
) -> list[dict[str, Any]]:
    """The most confident wrong labels: how far the probability is beyond the threshold."""
    probabilities = readout.answers(outputs.logits["test"])
    apart = probabilities - np.asarray(readout.thresholds)
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
            }
        )
    return mistakes


def _values(
    outputs: Outputs,
    canvases: Canvases,
    task: Regression,
    targets: dict[str, Array],
    recipe: Recipe,
) -> TargetEvaluation:
    names = canvases.images.target_names
    readout = fit_values(outputs.logits["val"], targets["val"], task, recipe.coverage)
    test = outputs.logits["test"]
    pairs = np.stack([targets["test"][:, 0], test[:, 0]], axis=1) * task.spreads[0] + task.means[0]
    pairs = pairs[~np.isnan(pairs).any(1)]
    spread = pairs[:: max(1, len(pairs) // POINTS)]

    return TargetEvaluation(
        readout=readout,
        metrics={
            split: evaluate_values(readout, logits, targets[split], names, outputs.groups[split])
            for split, logits in outputs.logits.items()
        },
        mistakes=_far_values(outputs, canvases, readout, targets["test"]),
        residuals=[(float(true), float(said)) for true, said in spread],
        foreign=outputs.foreign.to_text(),
        foreign_kept=outputs.foreign_kept,
        logits=test,
    )


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
                "class": _with_unit(name, float(true[image, quantity]), unit),
                "said": _with_unit(name, float(said[image, quantity]), unit),
                "probability": float(errors[image, quantity]),
            }
        )
    return mistakes


def _with_unit(name: str, value: float, unit: str) -> str:
    return f"{name} {value:.3g}{unit and ' '}{unit}"
