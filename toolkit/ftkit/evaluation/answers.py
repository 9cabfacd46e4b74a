"""What a released file answers on labelled images, and what changed since an older release; for any task.

answers = answers_of("bundle", images)         # a subclass of Answers, by the bundle's task
answers.text()
change = answers.against(answers_of("old-bundle", images), max_drop=0.01)
change.verdict, change.regressed, change.parts
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.proof.decision import Comparison, Verdict
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

LISTED = 20  # regressed images that are printed; --json has them all


@dataclass(frozen=True, kw_only=True)
class Regressed:
    """An image that was answered correctly before and no longer is. label: what is true, said: the
    answer, both in words. probability: of that answer; None for a number."""

    image: str
    label: str
    said: str
    probability: float | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """Comparison of a new release with an old one on the same images.

    compared: over all images, by the task's metric. parts: per class, label or quantity, with bounds
    that hold for all of them together. repaired: images that are right now and were not.

    verdict: refused also when a single part lost more than the limit with confidence, whatever the
    others gained.
    """

    verdict: Verdict
    max_drop: float
    compared: Comparison
    parts: Mapping[str, Comparison]
    regressed: tuple[Regressed, ...]
    repaired: int

    @property
    def worse_parts(self) -> list[str]:
        """Classes, labels or quantities that lost more than the limit, with confidence."""
        return [
            name
            for name, comparison in self.parts.items()
            if comparison.verdict(self.max_drop) == "refused"
        ]

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def require_numbers(answers: Array, files: Sequence[Path]) -> None:
    """Raise FtkitError where a file's answers (N, K) are no numbers: no metric means anything then, and the
    first class would count as said."""
    broken = np.flatnonzero(~np.isfinite(answers).all(1))
    if len(broken):
        raise FtkitError(
            f"{files[broken[0]]}: expected numbers as the model's answer, found NaN or Inf, for {len(broken)} of "
            f"{len(answers)} images. Do not ship it; try another variant or provider"
        )


def judged(
    compared: Comparison,
    parts: Mapping[str, Comparison],
    max_drop: float,
    regressed: Sequence[Regressed],
    repaired: int,
) -> Change:
    """A Change with its verdict."""
    refused = any(part.verdict(max_drop) == "refused" for part in parts.values())
    return Change(
        verdict="refused" if refused else compared.verdict(max_drop),
        max_drop=max_drop,
        compared=compared,
        parts=parts,
        regressed=tuple(regressed),
        repaired=repaired,
    )


@dataclass(frozen=True, kw_only=True)
class Answers(ABC):
    """A file's answers on labelled images, in their order.

    groups: "" for none; unreadable: messages on the images left out; placement: where the operators
    ran, in words (session.Session.placement).
    """

    files: tuple[Path, ...]
    groups: tuple[str, ...]
    unreadable: tuple[str, ...]
    placement: str

    @property
    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """The metrics as plain data."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """The task's metric, by name and value."""

    @abstractmethod
    def against(self, old: Answers, *, max_drop: float) -> Change:
        """Paired comparison with an older release on the same images; each bound is one-sided, 95 %."""

    @abstractmethod
    def table(self, change: Change | None) -> str:
        """What is known of these answers, and a row for each part; within 80 columns."""

    def text(self, old: Answers | None = None, change: Change | None = None) -> str:
        """The result as text, and what changed since `old`. Within 80 columns, except for paths."""
        lines = [self.table(change)]
        if old and change:
            lines += _changed(change)
            lines.append(f"{old.headline} -> {self.headline.rpartition(' ')[2]}")
            told = change.compared
            lines.append(f"{told.name} {told.text}, limit {change.max_drop * 100:.2f}")
            lines.append(change.verdict)
        return "\n".join(lines)


def _changed(change: Change) -> list[str]:
    lines = [
        f"{len(change.regressed)} formerly right and now wrong, {change.repaired} the other way"
    ]
    for item in change.regressed[:LISTED]:
        sure = "" if item.probability is None else f" {item.probability:.3f}"
        lines.append(f"  {item.image}  {item.label} -> {item.said}{sure}")
    if len(change.regressed) > LISTED:
        lines.append(f"  and {len(change.regressed) - LISTED} more: see --json")
    lines += [f"{name} surely lost more than {change.max_drop:.1%}" for name in change.worse_parts]
    return lines


def drop_text(comparison: Comparison, digits: int = 2) -> str:
    """A drop with its bounds, in hundredths, for a table."""
    drop, low, high = (
        f"{100 * value:+.{digits}f}" for value in (comparison.drop, comparison.low, comparison.high)
    )
    return f"{drop} [{low}, {high}]"
