"""Strata: what stands for the class of images that have none.

    labels, names = strata_of("multi-label", targets, ("cracked", "poly"), groups)

- multi-label: an image counts under its rarest label, or under none of them. Splits and folds divide
  by all labels instead (stratify.py).
- regression: up to ten parts of equal number along the first quantity, which splits and folds divide
  evenly; each is of ten groups or more, since a group stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.readout import Task

PARTS = 10  # of a quantity
FEWEST = 10  # images of a stratum of labels; groups of a part
NONE = "no label"
NOT_KNOWN = "not known"


def strata_of(
    task: Task, targets: Array, names: Sequence[str], groups: Sequence[str]
) -> tuple[Array, tuple[str, ...]]:
    """(stratum of each image (N,) int, names of the strata). targets (N, K), NaN: not known. groups:
    a name per image, "" for one on its own."""
    if task == "multi-label":
        return _numbered(_rarest(targets), [*names, NONE])
    return _parts(targets[:, 0], np.array([name or f"\0{row}" for row, name in enumerate(groups)]))


def _rarest(targets: Array) -> Array:
    """Column of each image's rarest label, K for none; too small strata join a larger one."""
    present = targets == 1
    counts = present.sum(0)
    strata = _first_in(present, np.argsort(counts, kind="stable"))

    sizes = np.bincount(strata, minlength=len(counts) + 1)
    small = sizes[strata] < FEWEST
    if small.any():  # by their most frequent label
        strata[small] = _first_in(present[small], np.argsort(-counts, kind="stable"))
        sizes = np.bincount(strata, minlength=len(counts) + 1)
        strata[sizes[strata] < FEWEST] = int(sizes.argmax())
    return strata


def _first_in(present: Array, order: Array) -> Array:
    """The first column in this order that is set, (n,); K where none is."""
    ranked = present[:, order]
    first: Array = np.where(ranked.any(1), order[ranked.argmax(1)], present.shape[1])
    return first


def _parts(values: Array, groups: Array) -> tuple[Array, tuple[str, ...]]:
    known = ~np.isnan(values)
    count = max(1, min(PARTS, len(np.unique(groups[known])) // FEWEST))
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, count + 1)[1:-1]))
    parts = np.where(known, np.searchsorted(edges, values, side="left"), len(edges) + 1)

    # A few images whose value is not known, or of a value that many others nearly have
    sizes = [len(np.unique(groups[parts == part])) for part in range(len(edges) + 2)]
    parts[np.array(sizes)[parts] < FEWEST] = int(np.argmax(sizes))

    names = []
    for part in range(len(edges) + 1):
        own = values[(parts == part) & known]
        ends = (f"{own.min():g}", f"{own.max():g}") if len(own) else ("", "")
        names.append(" to ".join(dict.fromkeys(ends)))
    return _numbered(parts, [*names, NOT_KNOWN])


def _numbered(strata: Array, names: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """The strata that have images, numbered from 0, and their names."""
    used, numbers = np.unique(strata, return_inverse=True)
    return numbers, tuple(names[stratum] for stratum in used)
