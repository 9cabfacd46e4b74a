"""What a search compares networks by: the figure of the task, of answers out of fold.

    judge = judge_of(task, targets, groups, outputs=4)
    point = judge.point(candidate, judge.evidence(logits))
    judge.compare(best, point, looks=5)            # what is lost

The evidence of a network is what it takes to compare it with another one, image by image: whether it
was right, where there is one class an image; else its logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ftkit.searching.candidates import Candidate
from ftkit.searching.front import Point
from ftkit.tasks.task import Regression, Task
from ftkit.training.closed_form import Aim
from ftkit.training.head_start import aim_of
from ftkit.utils import console
from ftkit_export.proof.decision import Comparison, paired
from ftkit_export.proof.intervals import share_interval
from ftkit_export.runtime.arrays import Array

NEAR = 0.02  # accuracy, or macro-AP, below the front at which a candidate is still timed
NEAR_ERROR = 0.04  # of the least error, above it


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge(ABC):
    """targets: of n images, as the task has them; groups: of each image, "" for one on its own;
    outputs: of the networks' heads."""

    task: Task
    targets: Array = field(repr=False)
    groups: Sequence[str] = field(repr=False)
    outputs: int

    def of(self, places: Array) -> Judge:
        """The same for some of the images."""
        groups = [self.groups[place] for place in places]
        return replace(self, targets=self.targets[places], groups=groups)

    @property
    def aim(self) -> Aim:
        """What linear heads are fitted to."""
        return aim_of(self.task, self.targets, self.outputs)

    def near(self, best: float) -> float:
        """How far below the score `best` a candidate may be to be timed."""
        return NEAR if self.task.rising else NEAR_ERROR * abs(best)

    def text(self, figure: float) -> str:
        """A figure for people: with its unit, if it has one."""
        return console.with_unit(figure, self.unit)

    @property
    def unit(self) -> str:
        """Of the figure; "" for none."""
        return self.task.unit if isinstance(self.task, Regression) else ""

    @abstractmethod
    def evidence(self, logits: Array) -> Array:
        """What to keep of logits (n, K)."""

    @abstractmethod
    def point(self, candidate: Candidate, evidence: Array) -> Point:
        """A point in fp32 that is not timed; its interval may be left to `bounded`."""

    @abstractmethod
    def bounded(self, point: Point) -> Point:
        """The point with its interval."""

    @abstractmethod
    def compare(self, before: Point, after: Point, looks: int) -> Comparison:
        """What is lost from one to the other."""


class _Right(Judge):
    """By the share of images that are answered correctly."""

    def evidence(self, logits: Array) -> Array:
        right: Array = logits.argmax(1) == self.targets
        return right

    def point(self, candidate: Candidate, evidence: Array) -> Point:
        low, high, _ = share_interval(evidence, self.groups)
        return Point(
            candidate=candidate,
            precision="fp32",
            evidence=evidence,
            figure=float(evidence.mean()),
            low=low,
            high=high,
        )

    def bounded(self, point: Point) -> Point:
        return point

    def compare(self, before: Point, after: Point, looks: int) -> Comparison:
        return paired(before.evidence, after.evidence, self.groups, looks=looks)


class _Answers(Judge):
    """By the task's own metric. Its interval takes a hundred values of it, so not every candidate gets
    one."""

    def evidence(self, logits: Array) -> Array:
        return logits.astype(np.float32)

    def point(self, candidate: Candidate, evidence: Array) -> Point:
        return Point(
            candidate=candidate,
            precision="fp32",
            evidence=evidence,
            figure=self.task.figure(evidence, self.targets),
            low=None,
            high=None,
            rising=self.task.rising,
        )

    def bounded(self, point: Point) -> Point:
        found = self.task.interval(point.evidence, self.targets, self.groups)
        return replace(point, low=found.low, high=found.high)

    def compare(self, before: Point, after: Point, looks: int) -> Comparison:
        return self.task.compare(before.evidence, after.evidence, self.targets, self.groups, looks)


def judge_of(task: Task, targets: Array, groups: Sequence[str], outputs: int) -> Judge:
    """The judge of a task's networks on these images."""
    kind = _Right if task.name == "single-label" else _Answers
    return kind(task=task, targets=targets, groups=groups, outputs=outputs)
