"""Audit of labels that apply together, and of numbers.

found = audit_targets(images)
print(found, *found.lines(), sep="\\n")
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ftkit.data.dataset import Images, below
from ftkit.utils import console
from ftkit_export.runtime.arrays import Array

PAIRS = 8  # shown; --json has all
OUTLIERS = 5
FENCES = 3.0  # interquartile ranges beyond the quartiles (Tukey 1977: far out)


@dataclass(frozen=True, kw_only=True)
class LabelAudit:
    """counts: label -> (images with it, without it, of which it is not known). together: "a + b" ->
    images that have both, most frequent first; never: pairs that no image has, of labels that would
    meet five times by chance."""

    counts: dict[str, tuple[int, int, int]]
    together: dict[str, int]
    never: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.counts)} labels"

    def lines(self) -> list[str]:
        """As text."""
        rows = [("label", "with it", "without", "not known")]
        rows += [
            (name, str(there), str(absent), str(unknown))
            for name, (there, absent, unknown) in self.counts.items()
        ]
        lines = [console.table(rows)]
        shown = [f"{pair} {count}" for pair, count in list(self.together.items())[:PAIRS]]
        if shown:
            lines.append(f"together {', '.join(shown)}")
        if self.never:
            more = ", ..." if len(self.never) > PAIRS else ""
            lines.append(f"never    {', '.join(self.never[:PAIRS])}{more}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a quantity is spread. outliers: files more than three interquartile ranges beyond the
    quartiles, the furthest first."""

    unit: str
    known: int
    least: float
    median: float
    most: float
    outliers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ValueAudit:
    """quantities: name -> how it is spread."""

    quantities: dict[str, Spread]

    def __str__(self) -> str:
        count = len(self.quantities)
        return f"{count} {'quantity' if count == 1 else 'quantities'}"

    def lines(self) -> list[str]:
        """As text."""
        rows = [("quantity", "unit", "known", "least", "median", "most", "outliers")]
        rows += [
            (
                name,
                spread.unit,
                str(spread.known),
                f"{spread.least:.4g}",
                f"{spread.median:.4g}",
                f"{spread.most:.4g}",
                str(len(spread.outliers)),
            )
            for name, spread in self.quantities.items()
        ]
        lines = [console.table(rows)]
        for name, spread in self.quantities.items():
            lines += [f"  {name} far out: {path}" for path in spread.outliers[:OUTLIERS]]
        return lines


def audit_targets(images: Images) -> LabelAudit | ValueAudit | None:
    """What is known of the labels or quantities; None of single-label data."""
    if images.task == "single-label":
        return None
    targets = np.array([image.targets for image in images.images], np.float64)
    if images.task == "multi-label":
        return _labels(images.target_names, targets)
    return ValueAudit(
        quantities={
            name: _spread(images, column, unit)
            for name, unit, column in zip(images.target_names, images.units, targets.T, strict=True)
        }
    )


def _labels(names: tuple[str, ...], targets: Array) -> LabelAudit:
    has = targets == 1
    counts = {
        name: (
            int(has[:, k].sum()),
            int((targets[:, k] == 0).sum()),
            int(np.isnan(targets[:, k]).sum()),
        )
        for k, name in enumerate(names)
    }
    both = {
        (a, b): int((has[:, a] & has[:, b]).sum()) for a, b in combinations(range(len(names)), 2)
    }
    expected = {(a, b): has[:, a].sum() * has[:, b].sum() / max(1, len(targets)) for a, b in both}
    named = {pair: f"{names[pair[0]]} + {names[pair[1]]}" for pair in both}
    ordered = sorted((pair for pair, count in both.items() if count), key=lambda pair: -both[pair])
    return LabelAudit(
        counts=counts,
        together={named[pair]: both[pair] for pair in ordered},
        never=tuple(
            named[pair] for pair, count in both.items() if not count and expected[pair] >= 5
        ),
    )


def _spread(images: Images, column: Array, unit: str) -> Spread:
    known = np.flatnonzero(~np.isnan(column))
    values = column[known]
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    beyond = np.maximum(low - values, values - high) - FENCES * (high - low)
    far = known[np.argsort(-beyond, kind="stable")][: int((beyond > 0).sum())]
    return Spread(
        unit=unit,
        known=len(known),
        least=float(values.min()),
        median=float(median),
        most=float(values.max()),
        outliers=tuple(below(images.root, images.images[row].path) for row in far),
    )
