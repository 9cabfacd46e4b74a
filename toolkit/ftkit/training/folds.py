"""Folds over the training images: every label is evidence.

    folds = make_folds(canvases, 5, seed=0)
    folds.train(2), folds.held(2)        # positions among the training images

Each fold's model is trained on the other folds and predicts its own; the shipped weights are then
trained on all of them. Groups and identical files are never split between folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ftkit.data.canvas import Canvases
from ftkit.data.dataset import clusters
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

AUTO = 5


@dataclass(frozen=True)
class Folds:
    """of: the fold of each training image, (n,) int64, 0 to count - 1."""

    of: Array

    @property
    def count(self) -> int:
        """Number of folds."""
        return int(self.of.max()) + 1

    def held(self, fold: int) -> Array:
        """Positions of the images that this fold's model must not see."""
        return np.flatnonzero(self.of == fold)

    def train(self, fold: int) -> Array:
        """Positions of the images that this fold's model is trained on."""
        return np.flatnonzero(self.of != fold)

    def masks(self) -> list[Array]:
        """Whether each image is held out, (n,) bool per fold."""
        return [self.of == fold for fold in range(self.count)]


def make_folds(canvases: Canvases, wanted: int, seed: int) -> Folds:
    """Divide the training images, stratified by class; as many folds as groups where those are fewer.

    Raises FtkitError where there are not two groups, or a class would be missing in training.
    """
    rows = canvases.rows("train")
    labels = canvases.labels[rows]
    groups = _together(canvases, rows)
    fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    count = min(wanted, len(np.unique(groups)))
    if count < 2 or fewest < 2:
        raise FtkitError(
            f"--folds {wanted}: expected every class in at least two groups (or on two single images), found one in "
            f"{fewest}. Try more groups, or --folds 0"
        )

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    of = np.zeros(len(rows), np.int64)
    for fold, (_, held) in enumerate(splitter.split(labels, labels, groups)):
        of[held] = fold

    # A fold may be left empty by a few large groups
    _, of = np.unique(of, return_inverse=True)
    folds = Folds(of.astype(np.int64))
    for fold in range(folds.count):
        missing = set(labels) - set(labels[folds.train(fold)])
        if missing:
            name = canvases.images.classes[min(missing)]
            raise FtkitError(
                f"--folds {wanted}: expected images of every class outside every fold, found none of {name!r} "
                f"outside one. Try more groups of it, fewer folds, or --folds 0"
            )

    return folds


def _together(canvases: Canvases, rows: Array) -> Array:
    """A number per image (n,), equal where images share a group or are identical files."""
    first: dict[str, int] = {}
    pairs = []
    for number, row in enumerate(rows):
        group = canvases.images.images[row].group
        for key in (f"file {canvases.digests[row]}", f"group {group}" if group else ""):
            if key:
                pairs.append((first.setdefault(key, number), number))

    return np.array(clusters(len(rows), pairs))
