"""Answers of multi-label and regression files on labelled images, and what changed since a release.

    target_answers(answers, images, model, asked, told).against(old, max_drop=0.01)

Targets and answers are in the order that was asked for, targets NaN where one is not known.
"""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ftkit.data.dataset import Asked, Labelled
from ftkit.evaluation.answers import Answers, Change, Regressed, drop_text, judged
from ftkit.evaluation.multilabel import MultiLabelMetrics, evaluate_labels
from ftkit.evaluation.regression import RegressionMetrics, WithBounds, evaluate_values
from ftkit.evaluation.targets import logits_behind, with_unit
from ftkit.tasks.task import MultiLabel, Regression, Task
from ftkit.utils import console
from ftkit_export.proof.decision import Comparison
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.files import finite
from ftkit_export.runtime.predict import AnyModel
from ftkit_export.runtime.readout import Labels, Values


def target_answers(
    answers: Array,
    images: Sequence[Labelled],
    model: AnyModel,
    asked: Asked,
    told: dict[str, Any],
) -> Answers:
    """What a file's answers (N, K) say of the images. told: the fields of Answers."""
    order = [model.labels.index(name) for name in asked.names]
    mine = answers[:, order].astype(np.float64)
    targets = np.array([image.targets for image in images], np.float64)
    readout = model.readout
    if isinstance(readout, Labels):
        labels = replace(
            readout,
            temperatures=tuple(readout.temperatures[k] for k in order),
            thresholds=tuple(readout.thresholds[k] for k in order),
        )
        logits = logits_behind(labels, mine)
        return LabelAnswers(
            readout=labels,
            answers=mine,
            targets=targets,
            metrics=evaluate_labels(labels, logits, targets, asked.names, told["groups"]),
            **told,
        )

    assert isinstance(readout, Values)
    values = replace(
        readout,
        means=tuple(readout.means[k] for k in order),
        spreads=tuple(readout.spreads[k] for k in order),
        units=tuple(readout.units[k] for k in order),
        margins=tuple(readout.margins[k] for k in order),
    )
    standard = (targets - values.means) / values.spreads
    logits = logits_behind(values, mine)
    return ValueAnswers(
        readout=values,
        answers=mine,
        targets=targets,
        metrics=evaluate_values(values, logits, standard, asked.names, told["groups"]),
        **told,
    )


@dataclass(frozen=True, kw_only=True)
class _TargetAnswers(Answers):
    """answers, targets: (N, K) float64; probabilities, or values in their units."""

    answers: Array
    targets: Array
    metrics: MultiLabelMetrics | RegressionMetrics

    @property
    def figures(self) -> dict[str, Any]:
        """As Answers.figures."""
        figures: dict[str, Any] = finite(asdict(self.metrics))
        return figures

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The labels or quantities."""

    @abstractmethod
    def right(self, old: Any) -> Array:
        """Whether each answer is correct, (N, K) bool, as `old` counts it."""

    @abstractmethod
    def regressed(self, row: int, place: int) -> Regressed:
        """One answer that no longer is correct."""

    def changed(self, old: Any, task: Task, before: Array, after: Array, max_drop: float) -> Change:
        """Compare logits of an old and of this release; targets as the task has them."""
        targets = self.targets
        if isinstance(task, Regression):
            targets = (targets - task.means) / task.spreads
        names = [
            name
            for place, name in enumerate(self.names)
            if not np.isnan(task.part(place).figure(after[:, [place]], targets[:, [place]]))
        ]
        parts: dict[str, Comparison] = {}
        for name in names:
            place = self.names.index(name)
            known = ~np.isnan(targets[:, place])
            parts[name] = task.part(place).compare(
                before[known][:, [place]],
                after[known][:, [place]],
                targets[known][:, [place]],
                [group for group, there in zip(self.groups, known, strict=True) if there],
                len(names),
            )

        known = ~np.isnan(targets)
        was = old.right(old) & known
        now = self.right(old) & known
        return judged(
            task.compare(before, after, targets, self.groups, 1),
            parts,
            max_drop,
            [self.regressed(int(row), int(place)) for row, place in np.argwhere(was & ~now)],
            int((now & ~was).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class LabelAnswers(_TargetAnswers):
    """Answers of a multi-label file."""

    readout: Labels
    metrics: MultiLabelMetrics

    @property
    def names(self) -> list[str]:
        """As _TargetAnswers.names."""
        return [label.name for label in self.metrics.labels]

    @property
    def headline(self) -> str:
        """As Answers.headline."""
        return f"macro-AP {self.metrics.macro_ap:.4f}"

    def right(self, old: Any) -> Array:
        """As _TargetAnswers.right: by its own thresholds."""
        said = self.answers >= np.asarray(self.readout.thresholds)
        same: Array = said == (self.targets == 1)
        return same

    def regressed(self, row: int, place: int) -> Regressed:
        """As _TargetAnswers.regressed."""
        name = self.names[place]
        there = self.targets[row, place] == 1
        return Regressed(
            image=str(self.files[row]),
            label=name if there else f"not {name}",
            said=f"not {name}" if there else name,
            probability=float(self.answers[row, place]),
        )

    def against(self, old: Answers, *, max_drop: float) -> Change:
        """As Answers.against: macro-AP, and the average precision of each label."""
        assert isinstance(old, LabelAnswers)  # require_same compared the tasks
        before, after = (logits_behind(each.readout, each.answers) for each in (old, self))
        return self.changed(old, MultiLabel(), before, after, max_drop)

    def table(self, change: Change | None) -> str:
        """As Answers.table."""
        metrics = self.metrics
        whole = metrics.subset_accuracy
        lines = [
            f"{self.headline} {_interval(metrics.macro_ap_low, metrics.macro_ap_high)} on "
            f"{ground(metrics.images, metrics.clusters)}",
            f"macro-F1 {metrics.macro_f1:.3f}, all labels right {_share(whole)}",
        ]
        head = ("label", "images", "have it", "AP", "F1", "precision", "recall")
        rows: list[tuple[str, ...]] = [(*head, *["drop, points"] * bool(change))]
        for label in metrics.labels:
            shares = (label.ap, label.f1, label.precision, label.recall)
            rows.append(
                (
                    label.name,
                    str(label.images),
                    str(label.positives),
                    *map(_share, shares),
                    *_drop(label.name, change),
                )
            )
        return "\n".join([*lines, console.table(rows)])


@dataclass(frozen=True, kw_only=True)
class ValueAnswers(_TargetAnswers):
    """Answers of a regression file."""

    readout: Values
    metrics: RegressionMetrics

    @property
    def names(self) -> list[str]:
        """As _TargetAnswers.names."""
        return [quantity.name for quantity in self.metrics.quantities]

    @property
    def headline(self) -> str:
        """As Answers.headline."""
        return f"mean absolute error {self.metrics.mae:.4g}"

    def right(self, old: Any) -> Array:
        """As _TargetAnswers.right: within the interval's width of the older release."""
        inside: Array = np.abs(self.answers - self.targets) <= np.asarray(old.readout.margins)
        return inside

    def regressed(self, row: int, place: int) -> Regressed:
        """As _TargetAnswers.regressed."""
        name, unit = self.names[place], self.readout.units[place]
        return Regressed(
            image=str(self.files[row]),
            label=with_unit(name, float(self.targets[row, place]), unit),
            said=with_unit("", float(self.answers[row, place]), unit).strip(),
            probability=None,
        )

    def against(self, old: Answers, *, max_drop: float) -> Change:
        """As Answers.against: the mean absolute error, of all and of each quantity.

        Of several quantities, in the standard deviations of the older release's training images.
        """
        assert isinstance(old, ValueAnswers)  # require_same compared the tasks
        readout = old.readout
        task = Regression(means=readout.means, spreads=readout.spreads, units=readout.units)
        before, after = (logits_behind(readout, each.answers) for each in (old, self))
        return self.changed(old, task, before, after, max_drop)

    def table(self, change: Change | None) -> str:
        """As Answers.table."""
        metrics = self.metrics
        only = metrics.quantities[0].unit if len(metrics.quantities) == 1 else "(in deviations)"
        found = f"{self.headline} {only}".rstrip()
        bounds = _interval(metrics.mae_low, metrics.mae_high)
        lines = [
            textwrap.fill(f"{found} {bounds} on {ground(metrics.images, metrics.clusters)}", 80)
        ]
        share = f"in {100 * metrics.share:.0f} %"
        head = ("quantity", "images", "MAE", "rank", share)
        last = ("rise, %",) if change else ("RMSE", "R2")
        rows: list[tuple[str, ...]] = [(*head, *last)]
        for item in metrics.quantities:
            name = f"{item.name} [{item.unit}]" if item.unit else item.name
            own = (
                name,
                str(item.images),
                f"{item.mae.value:.4g}",
                *map(_rounded, (item.rank, item.covered)),
            )
            more = _drop(item.name, change) or [f"{item.rmse.value:.4g}", _rounded(item.r2)]
            rows.append((*own, *more))
        return "\n".join([*lines, console.table(rows)])


def _interval(low: float | None, high: float | None) -> str:
    return console.interval(low, high) or "[unknown]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rounded(figure: WithBounds) -> str:
    return "-" if np.isnan(figure.value) else f"{figure.value:.3f}"


def _drop(name: str, change: Change | None) -> list[str]:
    if change is None:
        return []
    return [drop_text(change.parts[name], 1) if name in change.parts else ""]
