"""What a model learns and how it is judged: one class, several labels at once, or numbers.

    task = task_of(canvases)
    task.loss(logits, batch, stage, weights)            # per image
    task.figure(logits, targets)                        # accuracy, macro-AP, mean absolute error
    task.compare(before, after, targets, groups, looks)

Targets are class numbers (n,) int64; or labels (n, K) of 1 and 0, or standardised values (n, K),
float32 with NaN where one is not known. The figures of regression are in the value's unit or, of
several values, in standard deviations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from ftkit.data.canvas import Canvases
from ftkit.data.dataset import Images
from ftkit.recipe import Export, Recipe, Stage
from ftkit.tasks.losses import (
    Batch,
    class_loss,
    class_weights,
    label_loss,
    label_weights,
    least_nll,
    value_loss,
)
from ftkit_export.proof.decision import Comparison, difference, lost, paired
from ftkit_export.proof.intervals import share_interval
from ftkit_export.proof.jackknife import Estimated, jackknife
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.readout import Task as TaskName

MOST_RISE = 100.0  # of an error, as a share of it


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A task's figure with its 95 % interval, None where the images do not tell it. clusters: groups that
    it rests on, None where images have none."""

    value: float
    low: float | None
    high: float | None
    clusters: int | None


class Task(ABC):
    """What a model of these images learns. name: as recipe.task has it. metric: what its figure is;
    shown: what the trace has of a training step. rising: whether a higher figure is better. recalls:
    whether its outputs have a recall. balances: of a stage, that mean something; settings: of a recipe and
    its export, that others do not take."""

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    shown: ClassVar[str]
    rising: ClassVar[bool] = True
    recalls: ClassVar[bool] = True
    balances: ClassVar[tuple[str, ...]] = ("none",)
    settings: ClassVar[tuple[str, ...]]

    @property
    def size(self) -> float:
        """What a figure of 1 is worth; figures of regression are in the user's unit."""
        return 1.0

    @abstractmethod
    def targets(self, canvases: Canvases) -> torch.Tensor:
        """Of every row of the canvases."""

    @abstractmethod
    def loss(
        self, logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss per image (n,), float32, from logits (n, K)."""

    @abstractmethod
    def weights(self, targets: torch.Tensor, width: int) -> torch.Tensor:
        """What the loss weights with balance = "loss", (K,)."""

    @abstractmethod
    def figures(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Per image (n,), what the trace shows of a training step."""

    @abstractmethod
    def figure(self, logits: Array, targets: Array) -> float:
        """The metric of logits (n, K)."""

    @abstractmethod
    def interval(self, logits: Array, targets: Array, groups: Sequence[str]) -> Figure:
        """The metric with its interval."""

    @abstractmethod
    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """Negative log-likelihood, or what stands for it."""

    @abstractmethod
    def compare(
        self, before: Array, after: Array, targets: Array, groups: Sequence[str], looks: int
    ) -> Comparison:
        """What is lost from logits `before` to `after`, (n, K)."""

    def deciding_loss(self, logits: Array, targets: Array) -> float | None:
        """What decides between two models that the metric leaves open; None: the metric all the same."""
        return None

    def part(self, place: int) -> Task:
        """The task of one label or quantity alone."""
        return self

    @abstractmethod
    def limit(self, export: Export) -> float:
        """What may be lost: a fraction."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """As run.json has it; inverse: task_from."""

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, *, balanced: bool
    ) -> tuple[float, float, float]:
        """(what stages are compared by, higher is better; mean loss; the figure)."""
        figure = self.figure(logits.cpu().numpy(), targets.cpu().numpy())
        compared = figure if self.rising else -figure
        if not math.isfinite(figure):  # what these images do not define, or what diverged
            compared = -math.inf
            figure = 0.0
        return compared, self.mean_loss(logits, targets), figure

    def require(self, recipe: Recipe) -> None:
        """Raise FtkitError for settings that mean nothing to the task."""
        for number, stage in enumerate(recipe.stages):
            if stage.balance not in self.balances:
                raise FtkitError(
                    f"stages.{number}.balance: expected {' or '.join(self.balances)} with task={self.name}, found "
                    f"{stage.balance}. Leave it out"
                )
        self.require_own("recipe", recipe, ("precision", "thresholds", "coverage"))
        self.require_export(recipe.export)

    def require_export(self, export: Export) -> None:
        """The same for the settings of an export."""
        self.require_own("export", export, ("max_accuracy_drop", "max_error_rise"))
        for name, found in (
            ("qat_epochs", export.qat_epochs or None),
            ("min_recall", None if self.recalls else export.min_recall),
        ):
            if found is not None:
                raise FtkitError(
                    f"export.{name}: expected none with task={self.name}, found {found}. Leave it out"
                )

    def require_own(self, where: str, settings: Recipe | Export, names: Sequence[str]) -> None:
        """Raise FtkitError for one of these settings that was changed and is another task's."""
        for name in names:
            found = getattr(settings, name)
            if name not in self.settings and found != getattr(type(settings), name):
                place = name if where == "recipe" else f"{where}.{name}"
                raise FtkitError(
                    f"{place}: expected it as it is with task={self.name}, which it says nothing to, found {found}. "
                    "Leave it out"
                )


class SingleLabel(Task):
    """One of several classes."""

    name: ClassVar[TaskName] = "single-label"
    metric: ClassVar[str] = "accuracy"
    shown: ClassVar[str] = "accuracy"
    balances: ClassVar[tuple[str, ...]] = ("none", "loss", "sample")
    settings: ClassVar[tuple[str, ...]] = ("precision", "max_accuracy_drop")

    def targets(self, canvases: Canvases) -> torch.Tensor:
        """As Task.targets."""
        return torch.from_numpy(canvases.labels)

    def loss(
        self, logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """As Task.loss."""
        return class_loss(logits, batch, stage, weights)

    def weights(self, targets: torch.Tensor, width: int) -> torch.Tensor:
        """As Task.weights."""
        return class_weights(targets, width)

    def figures(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As Task.figures: whether it is right."""
        return logits.argmax(1) == targets

    def figure(self, logits: Array, targets: Array) -> float:
        """As Task.figure: accuracy."""
        return float(self._right(logits, targets).mean())

    def interval(self, logits: Array, targets: Array, groups: Sequence[str]) -> Figure:
        """As Task.interval."""
        right = self._right(logits, targets)
        low, high, clusters = share_interval(right, groups)
        return Figure(value=float(right.mean()), low=low, high=high, clusters=clusters)

    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """As Task.mean_loss."""
        return float(F.cross_entropy(logits, targets))

    def compare(
        self, before: Array, after: Array, targets: Array, groups: Sequence[str], looks: int
    ) -> Comparison:
        """As Task.compare: accuracy, paired."""
        return paired(self._right(before, targets), self._right(after, targets), groups, looks)

    def deciding_loss(self, logits: Array, targets: Array) -> float | None:
        """As Task.deciding_loss: the loss of calibrated answers, in which every image tells something, and
        not only those whose answer changes (bench/README.md, "Stages that accuracy leaves open")."""
        return least_nll(logits, targets)

    def limit(self, export: Export) -> float:
        """As Task.limit."""
        return export.max_accuracy_drop

    def as_json(self) -> dict[str, Any]:
        """As Task.as_json."""
        return {"name": self.name}

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, *, balanced: bool
    ) -> tuple[float, float, float]:
        """As Task.score. balanced: by the mean recall of the classes."""
        right = self.figures(logits, targets).float()
        recalls = torch.stack([right[targets == label].mean() for label in targets.unique()])
        compared = recalls.mean() if balanced else right.mean()
        return float(compared), self.mean_loss(logits, targets), float(right.mean())

    def require_export(self, export: Export) -> None:
        """As Task.require_export."""
        self.require_own("export", export, ("max_accuracy_drop", "max_error_rise"))

    def _right(self, logits: Array, targets: Array) -> Array:
        right: Array = logits.argmax(1) == targets
        return right


SINGLE_LABEL = SingleLabel()


class MultiLabel(Task):
    """Several labels, each of which applies or not."""

    name: ClassVar[TaskName] = "multi-label"
    metric: ClassVar[str] = "macro-AP"
    shown: ClassVar[str] = "labels right"
    balances: ClassVar[tuple[str, ...]] = ("none", "loss")
    settings: ClassVar[tuple[str, ...]] = ("precision", "thresholds", "max_accuracy_drop")

    def targets(self, canvases: Canvases) -> torch.Tensor:
        """As Task.targets."""
        return torch.from_numpy(canvases.targets).float()

    def loss(
        self, logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """As Task.loss."""
        return label_loss(logits, batch, stage, weights)

    def weights(self, targets: torch.Tensor, width: int) -> torch.Tensor:
        """As Task.weights."""
        return label_weights(targets)

    def figures(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As Task.figures: share of the known labels that are right at a probability of 0.5."""
        known = ~targets.isnan()
        right = ((logits >= 0) == (targets == 1)) & known
        return right.sum(1) / known.sum(1).clamp(min=1)

    def figure(self, logits: Array, targets: Array) -> float:
        """As Task.figure: average precision, its mean over the labels that some image has; NaN for none,
        0 for what diverged."""
        return macro_precision(logits, targets, (targets == 1).any(0))

    def interval(self, logits: Array, targets: Array, groups: Sequence[str]) -> Figure:
        """As Task.interval."""
        return bounded(self.estimate(logits, targets, groups), 0.0, 1.0)

    def estimate(self, logits: Array, targets: Array, groups: Sequence[str]) -> Estimated:
        """The metric with its error: unknown where all images that have a label are in one group."""
        there = (targets == 1).any(0)
        return jackknife(
            lambda rows: macro_precision(logits[rows], targets[rows], there),
            len(targets),
            groups,
            one_image(targets),
        )

    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """As Task.mean_loss: binary cross-entropy of the known labels."""
        batch = Batch(inputs=(), targets=targets.to(logits))
        return float(label_loss(logits, batch, Stage(), None).mean())

    def compare(
        self, before: Array, after: Array, targets: Array, groups: Sequence[str], looks: int
    ) -> Comparison:
        """As Task.compare: macro-AP."""
        name = "macro-AP drop"
        if not np.isfinite(after).all() and np.isfinite(before).all():
            return lost(len(targets), looks, name=name)

        there = (targets == 1).any(0)

        def drop(rows: Array) -> float:
            return macro_precision(before[rows], targets[rows], there) - macro_precision(
                after[rows], targets[rows], there
            )

        return difference(drop, len(targets), groups, looks, name=name, least=one_image(targets))

    def limit(self, export: Export) -> float:
        """As Task.limit."""
        return export.max_accuracy_drop

    def as_json(self) -> dict[str, Any]:
        """As Task.as_json."""
        return {"name": self.name}


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Numbers. means, spreads: of the training images, in the unit; the model learns standardised
    values. units: "" for none."""

    name: ClassVar[TaskName] = "regression"
    metric: ClassVar[str] = "mean absolute error"
    shown: ClassVar[str] = "mean absolute error"
    rising: ClassVar[bool] = False
    recalls: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ("coverage", "max_error_rise")

    means: tuple[float, ...]
    spreads: tuple[float, ...]
    units: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What the figures are in."""
        return self.units[0] if len(self.units) == 1 else "standard deviations"

    @property
    def size(self) -> float:
        """As Task.size: the spread of the one quantity; figures of several are in spreads."""
        return self.spreads[0] if len(self.spreads) == 1 else 1.0

    def part(self, place: int) -> Task:
        """As Task.part."""
        return Regression(
            means=self.means[place : place + 1],
            spreads=self.spreads[place : place + 1],
            units=self.units[place : place + 1],
        )

    def targets(self, canvases: Canvases) -> torch.Tensor:
        """As Task.targets: standardised."""
        standard = (canvases.targets - self.means) / self.spreads
        return torch.from_numpy(standard).float()

    def loss(
        self, logits: torch.Tensor, batch: Batch, stage: Stage, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """As Task.loss."""
        return value_loss(logits, batch)

    def weights(self, targets: torch.Tensor, width: int) -> torch.Tensor:
        """As Task.weights: nothing to balance."""
        return torch.ones(width)

    def figures(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As Task.figures: mean absolute error of the known values."""
        known = ~targets.isnan()
        apart = (logits - targets.nan_to_num()).abs() * known
        return apart.sum(1) / known.sum(1).clamp(min=1) * self.size

    def figure(self, logits: Array, targets: Array) -> float:
        """As Task.figure: mean absolute error; infinite for what diverged, NaN where nothing is known."""
        known = ~np.isnan(targets)
        errors = np.abs(logits.astype(np.float64) - targets)[known]
        if not len(errors):
            return math.nan
        return float(errors.mean()) * self.size if np.isfinite(errors).all() else math.inf

    def interval(self, logits: Array, targets: Array, groups: Sequence[str]) -> Figure:
        """As Task.interval."""
        return bounded(self.estimate(logits, targets, groups), 0.0, math.inf)

    def estimate(self, logits: Array, targets: Array, groups: Sequence[str]) -> Estimated:
        """The metric with its error."""
        return jackknife(
            lambda rows: self.figure(logits[rows], targets[rows]), len(targets), groups
        )

    def mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """As Task.mean_loss: Huber's."""
        return float(value_loss(logits, Batch(inputs=(), targets=targets.to(logits))).mean())

    def compare(
        self, before: Array, after: Array, targets: Array, groups: Sequence[str], looks: int
    ) -> Comparison:
        """As Task.compare: the error's rise, as a share of it."""
        name = "rise of the mean absolute error"
        if not np.isfinite(after).all() and np.isfinite(before).all():
            return lost(len(targets), looks, name=name, unit="%", most=MOST_RISE)

        def rise(rows: Array) -> float:
            error = self.figure(before[rows], targets[rows])
            return self.figure(after[rows], targets[rows]) / max(error, 1e-12) - 1

        return difference(rise, len(targets), groups, looks, name=name, unit="%", most=MOST_RISE)

    def limit(self, export: Export) -> float:
        """As Task.limit."""
        return export.max_error_rise

    def as_json(self) -> dict[str, Any]:
        """As Task.as_json."""
        return {
            "name": self.name,
            "means": list(self.means),
            "spreads": list(self.spreads),
            "units": list(self.units),
        }


def average_precisions(scores: Array, targets: Array) -> Array:
    """Average precision of each label (K,) over the images for which it is known; NaN where no image
    has it."""
    found = np.full(targets.shape[1], np.nan)
    for place in range(targets.shape[1]):
        known = ~np.isnan(targets[:, place])
        own = targets[known, place]
        if own.any():
            found[place] = average_precision_score(own, scores[known, place])
    return found


def macro_precision(scores: Array, targets: Array, there: Array) -> float:
    """Mean of the average precisions of some labels, there (K,) bool; NaN where there is none of them, or no
    image has one; 0 for what diverged."""
    if not np.isfinite(scores).all():
        return 0.0
    found = average_precisions(scores, targets)[there]
    return float(found.mean()) if len(found) else math.nan


def one_image(targets: Array) -> float:
    """What one image that has the rarest label is worth of macro-AP, from labels (n, K)."""
    positives = (targets == 1).sum(0)
    there = positives[positives > 0]
    return 1 / (len(there) * int(there.min())) if len(there) else 1.0


def bounded(found: Estimated, least: float, most: float) -> Figure:
    """An estimate with its 95 % interval, of a statistic that lies within these bounds."""
    low, high = (min(max(bound, least), most) for bound in found.interval())
    return Figure(
        value=found.value,
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
        clusters=found.clusters,
    )


def task_of(images: Images) -> Task:
    """The task of labelled images; regression is standardised by their train split."""
    if images.task == "single-label":
        return SINGLE_LABEL
    if images.task == "multi-label":
        return MultiLabel()
    train = np.array([image.targets for image in images.of("train")])
    spreads = np.nanstd(train, axis=0)
    if not (spreads > 0).all():
        name = images.target_names[int(np.argmin(spreads))]
        raise FtkitError(
            f"{images.root}: expected different values of {name!r} among the training images, found one for all. "
            "Try more images"
        )
    return Regression(
        means=tuple(map(float, np.nanmean(train, axis=0))),
        spreads=tuple(map(float, spreads)),
        units=images.units,
    )


def task_from(data: Mapping[str, Any] | None) -> Task:
    """The task that run.json names; runs of older versions have none."""
    if not data or data["name"] == "single-label":
        return SINGLE_LABEL
    if data["name"] == "multi-label":
        return MultiLabel()
    return Regression(
        means=tuple(data["means"]), spreads=tuple(data["spreads"]), units=tuple(data["units"])
    )


def headline(metrics: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """The task's figure with its 95 % interval, from metrics as JSON has them; None for a bound that the
    images do not tell."""
    name = next(name for name in ("accuracy", "macro_ap", "mae") if name in metrics)
    return metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]
