"""Standard errors of any statistic, for independent or grouped images: the jackknife over groups.

    found = jackknife(lambda rows: float(auc(labels[rows], scores[rows])), len(labels), groups)
    found.value, found.interval(0.95)

The statistic is computed again without each group in turn (Quenouille 1956, Tukey 1958). Against the
bootstrap over groups it needs as many values as there are groups, at most MOST_BLOCKS, instead of a
thousand, draws nothing at random, and is as valid for statistics as smooth as these: means, and areas
under curves.
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

MOST_BLOCKS = 100  # so many blocks of independent images, or of groups, are left out in turn


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
    statistic: Callable[[Array], float],
    images: int,
    groups: Sequence[str] | None = None,
    least: float = 0.0,
) -> Estimated:
    """Estimate a statistic of `images` images and its error.

    statistic: rows (n,) of the images -> its value; NaN where they do not define it: where that is so
    without one of the groups, nothing is known of the error. groups: a name per image, "" for an
    image on its own. least: the error is at least that.
    """
    every = np.arange(images)
    blocks, clusters = _blocks(images, groups)
    count = int(blocks.max()) + 1 if images else 0
    value = statistic(every) if images else math.nan
    unknown = Estimated(value=value, error=math.inf, df=0.0, images=images, clusters=clusters)
    if count < 2:
        return unknown

    without = np.array([statistic(every[blocks != block]) for block in range(count)])
    if not np.isfinite(without).all():
        return unknown
    squares = (without - without.mean()) ** 2
    variance = (count - 1) / count * float(squares.sum())
    contributing = float(squares.sum()) ** 2 / max(float((squares**2).sum()), 1e-300)

    return Estimated(
        value=value,
        error=max(math.sqrt(variance), least),
        df=min(count - 1.0, max(1.0, 2 * contributing - 1)) if variance else count - 1.0,
        images=images,
        clusters=clusters,
    )


def _blocks(images: int, groups: Sequence[str] | None) -> tuple[Array, int | None]:
    """The block of each image, (n,) int from 0, of at most MOST_BLOCKS; and the number of groups.

    More groups than that, or images without groups, are put into blocks at random.
    """
    if not images:
        return np.zeros(0, np.int64), None
    of = np.arange(images)
    count = images
    grouped = groups is not None and has_groups(groups)
    if groups is not None and grouped:
        names = [name or f"\0{number}" for number, name in enumerate(groups)]
        unique, of = np.unique(names, return_inverse=True)
        count = len(unique)
    shuffled = np.arange(count)
    if not grouped or count > MOST_BLOCKS:
        shuffled = np.random.default_rng(0).permutation(count) % min(count, MOST_BLOCKS)
    blocks: Array = shuffled[of]
    return blocks, count if grouped else None
