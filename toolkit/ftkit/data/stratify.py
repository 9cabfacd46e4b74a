"""Division of images that have several labels, so that every label is divided evenly.

    part = divide(targets, together, shares=(0.2, 0.8), seed=0)    # (N,) 0 or 1

Images that belong together are one unit. A unit goes where it lowers most the sum of squares of what
the parts lack, each label measured by how many images have it (so rare labels count most), each part by
its share. Those units go first that have most of the rare labels; the others then fill what is left.
bench/README.md compares it with other ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftkit_export.runtime.arrays import Array


def divide(
    targets: Array, together: Sequence[int] | Array, shares: Sequence[float], seed: int
) -> Array:
    """The part of each image, (N,) int64, below len(shares).

    targets (N, K): 1 where an image has a label, 0 where not, NaN where it is not known. together (N,):
    equal for images that may not be separated. shares: of the images for each part; they add up to 1.
    """
    _, unit = np.unique(np.asarray(together), return_inverse=True)
    features = np.c_[targets == 1, targets == 0, np.ones(len(targets))]
    counts = np.zeros((unit.max() + 1, features.shape[1]))
    np.add.at(counts, unit, features)
    own = counts / np.maximum(counts.sum(0), 1)  # a unit's share of all that have a label

    lacking = np.outer(shares, own.sum(0))
    part = np.zeros(len(own), np.int64)
    order = np.random.default_rng(seed % 2**64).permutation(len(own))
    for number in order[np.argsort(-(own[order] ** 2).sum(1), kind="stable")]:
        gain = (lacking @ own[number] - (own[number] ** 2).sum() / 2) / shares
        part[number] = gain.argmax()
        lacking[part[number]] -= own[number]

    return part[unit]
