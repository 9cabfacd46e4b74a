"""Standard errors of any statistic, for independent or grouped images: the jackknife over groups.

    found = jackknife(lambda rows: float(auc(labels[rows], scores[rows])), len(labels), groups)
    found.value, found.interval(0.95)

The statistic is computed again without each group in turn (Quenouille 1956, Tukey 1958). Against the
bootstrap over groups it needs as many values as there are groups instead of a thousand, draws
nothing at random, and is as valid for statistics as smooth as these: means, and areas under curves.
The intervals are Student's t at the groups that contribute, as those of `intervals`.

`python bench/tasks.py --what coverage` simulates their coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ftkit_export.proof.intervals import has_groups
from ftkit_export.runtime.arrays import Array

MOST_BLOCKS = 100  # independent images are left out in so many blocks


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A statistic of `images`. error: its standard error; df: degrees of freedom of Student's t.
    clusters: groups, None where images have none and count as independent."""

    value: float
    error: float
    df: float
    images: int
    clusters: int | None = None

    def bounds(self, level: float) -> tuple[float, float]:
        """One-sided bounds, each at confidence `level`."""
        if self.df <= 0:
            return -math.inf, math.inf
        reach = float(stats.t.ppf(level, self.df)) * self.error
        return self.value - reach, self.value + reach

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided interval."""
        return self.bounds((1 + level) / 2)


def jackknife(
    statistic: Callable[[Array], float], images: int, groups: Sequence[str] | None = None
) -> Estimated:
    """Estimate a statistic of `images` images and its error.

    statistic: rows (n,) of the images -> its value; NaN where they do not define it, which leaves
    that group out. groups: a name per image, "" for an image on its own.
    """
    every = np.arange(images)
    grouped = has_groups(groups)
    blocks = _blocks(images, groups if grouped else None)
    count = int(blocks.max()) + 1 if images else 0
    value = statistic(every) if images else math.nan
    clusters = count if grouped else None
    if count < 2:
        return Estimated(value=value, error=math.inf, df=0.0, images=images, clusters=clusters)

    without = np.array([statistic(every[blocks != block]) for block in range(count)])
    without = without[np.isfinite(without)]
    apart = without - without.mean() if len(without) else without
    squares = apart**2
    variance = (count - 1) / count * float(squares.sum())
    contributing = float(squares.sum()) ** 2 / max(float((squares**2).sum()), 1e-300)

    return Estimated(
        value=value,
        error=math.sqrt(variance),
        df=min(count - 1.0, max(1.0, 2 * contributing - 1)) if variance else count - 1.0,
        images=images,
        clusters=clusters,
    )


def _blocks(images: int, groups: Sequence[str] | None) -> Array:
    """The block of each image, (n,) int from 0: its group, or one of MOST_BLOCKS at random."""
    if groups is None:
        order: Array = np.random.default_rng(0).permutation(images) % min(images, MOST_BLOCKS)
        return order
    names = [name or f"\0{number}" for number, name in enumerate(groups)]
    _, blocks = np.unique(names, return_inverse=True)
    return blocks
