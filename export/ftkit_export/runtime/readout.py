"""How a model's logits are read: one class, several labels at once, or numbers with a unit.

    readout = readout_of(metadata)
    answers = readout.answers(logits)          # what the image form puts out
    readout.decisions(logits)                  # the class; which labels apply; nothing for numbers

Differences of answers are measured in `unit`s: a probability, or the standard deviation of a value
over the training images. Tolerances then mean the same for every task.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ftkit_export.runtime.arrays import Array

Task = Literal["single-label", "multi-label", "regression"]
TASKS: tuple[Task, ...] = ("single-label", "multi-label", "regression")

NEVER = 2.0  # the threshold of a label that is not said
# Of a float32 softmax or sigmoid (exp, sum, quotient), whatever the size of the logits
ROUNDING = 4 * float(np.finfo(np.float32).eps)
# In a file's metadata, for other tasks than single-label
KEY = "readout"
NAMES = "names"  # of the outputs, in place of "labels"


class Readout(ABC):
    """How logits (N, K) are read. output: name of the image form's first output. decided: what is
    decided by them, "" for nothing."""

    task: ClassVar[Task]
    output: ClassVar[str] = "probabilities"
    decided: ClassVar[str] = "top-1"

    @abstractmethod
    def answers(self, logits: Array) -> Array:
        """Logits (N, K) -> answers (N, K), in the logits' dtype."""

    @abstractmethod
    def answer_limit(self, limit: float) -> float:
        """Tolerance of answers, in units, for logits with tolerance `limit`."""

    @abstractmethod
    def decisions(self, logits: Array) -> Array:
        """Logits (N, K) -> what is decided by them, (N, D) int: D = 1 class, K labels, or 0."""

    @abstractmethod
    def clear(self, logits: Array, limit: float) -> Array:
        """Whether no logits within twice `limit` of these decide otherwise, (N, D) bool."""

    @abstractmethod
    def moved(self, before: Array, after: Array) -> Array:
        """Whether each image's answer is another one, (N,) bool, from logits (N, K)."""

    @property
    def unit(self) -> Array | float:
        """What differences of answers are measured in, (K,) or one for all."""
        return 1.0

    def apart(self, one: Array, other: Array) -> float:
        """Largest difference of answers (N, K), in units."""
        return float((np.abs(one.astype(np.float64) - other) / self.unit).max())

    @abstractmethod
    def as_json(self) -> dict[str, object]:
        """As a file's metadata and manifest have it."""


@dataclass(frozen=True, kw_only=True)
class OneClass(Readout):
    """Softmax at a temperature over the classes."""

    task: ClassVar[Task] = "single-label"
    temperature: float = 1.0

    def answers(self, logits: Array) -> Array:
        """As Readout.answers: class probabilities."""
        return softmax(logits / logits.dtype.type(self.temperature))

    def answer_limit(self, limit: float) -> float:
        """As Readout.answer_limit."""
        return limit / self.temperature + ROUNDING

    def decisions(self, logits: Array) -> Array:
        """As Readout.decisions: the most probable class."""
        best: Array = logits.argmax(-1)[:, None]
        return best

    def clear(self, logits: Array, limit: float) -> Array:
        """As Readout.clear: the second class is far enough behind."""
        top = np.sort(logits, -1)
        far: Array = top[:, -1] - top[:, -2] >= 2 * limit
        return far[:, None]

    def moved(self, before: Array, after: Array) -> Array:
        """As Readout.moved: another class."""
        changed: Array = before.argmax(1) != after.argmax(1)
        return changed

    def as_json(self) -> dict[str, object]:
        """As Readout.as_json."""
        return {"task": self.task, "temperature": self.temperature}


@dataclass(frozen=True, kw_only=True)
class Labels(Readout):
    """A sigmoid at a temperature for each label, which applies from its threshold on.

    temperatures, thresholds (of the probability, or NEVER): one per label.
    """

    task: ClassVar[Task] = "multi-label"
    decided: ClassVar[str] = "label"
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]

    def answers(self, logits: Array) -> Array:
        """As Readout.answers: a probability per label."""
        return sigmoid(logits / np.asarray(self.temperatures, logits.dtype))

    def answer_limit(self, limit: float) -> float:
        """As Readout.answer_limit: a sigmoid is at most a quarter as steep as its logits."""
        return limit / min(self.temperatures) / 4 + ROUNDING

    def decisions(self, logits: Array) -> Array:
        """As Readout.decisions: 1 for each label that applies."""
        return (logits >= self.cuts).astype(np.int64)

    def clear(self, logits: Array, limit: float) -> Array:
        """As Readout.clear."""
        far: Array = np.abs(logits - self.cuts) >= 2 * limit
        return far

    def moved(self, before: Array, after: Array) -> Array:
        """As Readout.moved: another set of labels."""
        changed: Array = (self.decisions(before) != self.decisions(after)).any(1)
        return changed

    @property
    def cuts(self) -> Array:
        """Logits at the thresholds, (K,)."""
        share = np.minimum(np.asarray(self.thresholds, np.float64), 1.0)
        with np.errstate(divide="ignore"):
            cuts: Array = np.log(share / (1 - share)) * self.temperatures
        return cuts

    def as_json(self) -> dict[str, object]:
        """As Readout.as_json."""
        return {
            "task": self.task,
            "temperatures": list(self.temperatures),
            "thresholds": list(self.thresholds),
        }


@dataclass(frozen=True, kw_only=True)
class Values(Readout):
    """Numbers, each in its unit: logits are standardised values.

    means, spreads: of the training images, in the unit. units: their names, "" for none. margins: half
    the width of the interval that holds `share` of the true values.
    """

    task: ClassVar[Task] = "regression"
    output: ClassVar[str] = "values"
    decided: ClassVar[str] = ""
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    units: tuple[str, ...]
    margins: tuple[float, ...]
    share: float = 0.9

    def answers(self, logits: Array) -> Array:
        """As Readout.answers: values in their units."""
        kind = logits.dtype
        values: Array = logits * np.asarray(self.spreads, kind) + np.asarray(self.means, kind)
        return values

    def answer_limit(self, limit: float) -> float:
        """As Readout.answer_limit: the mean is added in float32."""
        offset = max(abs(m) / s for m, s in zip(self.means, self.spreads, strict=True))
        return limit + ROUNDING * (1 + offset)

    def decisions(self, logits: Array) -> Array:
        """As Readout.decisions: none."""
        return np.zeros((len(logits), 0), np.int64)

    def clear(self, logits: Array, limit: float) -> Array:
        """As Readout.clear."""
        return np.zeros((len(logits), 0), bool)

    def moved(self, before: Array, after: Array) -> Array:
        """As Readout.moved: by more than a tenth of a standard deviation."""
        changed: Array = (np.abs(before - after) > 0.1).any(1)
        return changed

    @property
    def unit(self) -> Array | float:
        """As Readout.unit: the standard deviations."""
        return np.asarray(self.spreads)

    def as_json(self) -> dict[str, object]:
        """As Readout.as_json."""
        return {
            "task": self.task,
            "means": list(self.means),
            "spreads": list(self.spreads),
            "units": list(self.units),
            "margins": list(self.margins),
            "share": self.share,
        }


def readout_of(data: Mapping[str, object]) -> Readout:
    """Inverse of `as_json`. Raises ValueError, TypeError or KeyError for other data."""
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    kinds: dict[object, type[OneClass] | type[Labels] | type[Values]] = {
        kind.task: kind for kind in (OneClass, Labels, Values)
    }
    task = fields.pop("task")
    if task not in kinds:
        raise ValueError(f"the task {task!r}")
    readout = kinds[task](**fields)  # type: ignore[arg-type]
    _require_sane(readout)
    return readout


def _require_sane(readout: OneClass | Labels | Values) -> None:
    positive: Sequence[float]
    if isinstance(readout, OneClass):
        positive = (readout.temperature,)
    elif isinstance(readout, Labels):
        positive = (*readout.temperatures, *readout.thresholds)
        if len(readout.temperatures) != len(readout.thresholds):
            raise ValueError("temperatures and thresholds of different number")
    else:
        positive = readout.spreads
        lengths = {len(readout.means), len(readout.units), len(readout.margins)}
        if lengths != {len(readout.spreads)} or not all(m >= 0 for m in readout.margins):
            raise ValueError("means, units and margins that do not fit the spreads")
    if not all(float(value) > 0 for value in positive):
        raise ValueError("temperatures, thresholds or spreads that are not positive")


def of_metadata(metadata: Mapping[str, str]) -> Readout:
    """The readout in a file's metadata. Raises ValueError, TypeError or KeyError where it is damaged."""
    if KEY in metadata:
        return readout_of(json.loads(metadata[KEY]))
    return readout_of(
        {"task": "single-label", "temperature": float(metadata.get("temperature", 1))}
    )


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in the dtype given."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-logits)), without overflow, in the dtype given."""
    small = np.exp(-np.abs(logits))
    result: Array = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return result
