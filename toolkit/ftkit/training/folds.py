"""Folds over the training images: every label is evidence.

    folds = make_folds(canvases, 5, seed=0)
    folds.train(2), folds.held(2)        # positions among the training images

Each fold's model is trained on the other folds and predicts its own; the shipped weights are then
trained on all of them. Groups and identical files are never split between folds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ftkit.data.canvas import Canvases
from ftkit.data.dataset import Images, clusters, read_images
from ftkit.data.stratify import divide
from ftkit.recipe import Recipe
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError

AUTO = 4  # each model learns from three quarters; a stage on all folds costs four times its refit
ATTEMPTS = 10  # divisions tried until every class is outside every fold


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


def read_with_folds(
    recipe: Recipe,
    data: str | Path,
    seed: int,
    group_by: str,
    root: Path | None,
    add: Path | None = None,
) -> Images:
    """The images that a recipe trains on: without a val split, where folds take its place.

    With folds = "auto" a val split is cut where a class has one group, or a stage stops early. As
    dataset.read_images otherwise.
    """
    read = partial(read_images, data, seed, group_by, root, add=add, task=recipe.task)
    if not recipe.folds or (recipe.folds == "auto" and recipe.patient):
        return read()

    images = read(cut_val=False)
    return images if recipe.folds != "auto" or _all_in_two_groups(images) else read()


def _all_in_two_groups(images: Images) -> bool:
    """Whether every class is there in two groups, or every label with it and without it."""
    train = images.of("train")
    group = [image.group or str(image.path) for image in train]
    kinds: list[set[str]] = []
    if images.task == "single-label":
        for label in range(len(images.classes)):
            own = {name for name, image in zip(group, train, strict=True) if image.label == label}
            kinds += [own] if own else []
    else:
        kinds.append(set(group))
    if images.task == "multi-label":
        targets = np.array([image.targets for image in train])
        kinds += [
            {name for name, there in zip(group, column == value, strict=True) if there}
            for column in targets.T
            for value in (0, 1)
        ]
    return min(map(len, kinds)) >= 2


def make_folds(canvases: Canvases, wanted: int, seed: int, otherwise: str = "--folds 0") -> Folds:
    """Divide the training images, stratified by class, or by all labels; fewer folds where there are
    fewer groups, or no class has so many images. otherwise: the option that does without.

    Raises FtkitError where there are not two groups, or a class would be missing in training.
    """
    rows = canvases.rows("train")
    labels = canvases.labels[rows]
    groups = _together(canvases, rows)
    single = canvases.images.task == "single-label"
    fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    count = min(wanted, len(np.unique(groups)), int(np.bincount(labels).max()))
    if count < 2 and not single:
        raise FtkitError(
            f"--folds {wanted}: expected two groups of images or more, found one. Try more groups, or {otherwise}"
        )
    if count < 2 or (single and fewest < 2):
        raise FtkitError(
            f"--folds {wanted}: expected every class in at least two groups (or on two single images), found one in "
            f"{fewest}. Try more groups, or {otherwise}"
        )

    missing: set[int] = set()
    one_sided = ""
    for attempt in range(ATTEMPTS):
        number = seed + attempt * 1_000_003
        if canvases.images.task == "multi-label":
            folds = _filled(divide(canvases.targets[rows], groups, [1 / count] * count, number))
            one_sided = _one_sided(folds, canvases, rows)
        else:
            folds = _divided(labels, groups, count, number)
            missing = _missing(folds, labels) if single else set()
        if not missing and not one_sided:
            return folds

    name = canvases.images.classes[min(missing)] if missing else one_sided
    raise FtkitError(
        f"--folds {wanted}: expected images of every class outside every fold, found none of {name!r} outside one. "
        f"Try more groups of it, fewer folds, or {otherwise}"
    )


def _divided(labels: Array, groups: Array, count: int, seed: int) -> Folds:
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed % 2**32)
    of = np.zeros(len(labels), np.int64)
    with warnings.catch_warnings():
        # Of a class with fewer images than folds, which is then missing in some of them
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, held) in enumerate(splitter.split(labels, labels, groups)):
            of[held] = fold

    return _filled(of)


def _filled(of: Array) -> Folds:
    """Without the folds that a few large groups left empty."""
    _, of = np.unique(of, return_inverse=True)
    return Folds(of.astype(np.int64))


def _missing(folds: Folds, labels: Array) -> set[int]:
    """Classes that some fold's model would not learn."""
    return {
        label
        for fold in range(folds.count)
        for label in set(labels) - set(labels[folds.train(fold)])
    }


def _one_sided(folds: Folds, canvases: Canvases, rows: Array) -> str:
    """The first label that some fold's model would always, or never, see; "" for none."""
    targets = canvases.targets[rows]
    for fold in range(folds.count):
        own = targets[folds.train(fold)]
        for name, column in zip(canvases.images.target_names, own.T, strict=True):
            if not {0.0, 1.0} <= set(column):
                return name
    return ""


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
