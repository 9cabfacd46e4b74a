"""What is searched: backbone x input size x depth x pooling.

space = candidates(["efficientnet_lite0"], sizes=[96, 160, 224])
space[0].name, space[0].multiplications
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ftkit.models.backbones import Backbone, build, observe, pooled_blocks
from ftkit.models.cut import POOLINGS
from ftkit.recipe import Recipe
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess

SHORT = "efficientnet_"  # left out of names, for people
LEAST_SHARE = 0.02  # of the whole network's multiplications: shallower cuts see edges only
# Depths that a head sees together, up to the middle of the network: behind lite0's group 2 that brings
# 1.0 to 1.6 points (solar cells, 128 and 224 px, random and by module), further back nothing
TOGETHER = 3
SMALLEST = 96
STEP = 32  # pixels between input sizes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network to score. cut: as in a recipe, "" for the whole one. multiplications: of one image."""

    backbone: str
    size: int
    cut: str
    pooling: str
    multiplications: int

    @property
    def name(self) -> str:
        """Backbone, input size, depth, and pooling where it is not the mean."""
        first, *others = self.cut.split("+")
        short = [name.rsplit(".", 1)[-1] for name in others]
        depth = "+".join([first, *short]) or "whole"
        parts = [self.backbone.removeprefix(SHORT), f"{self.size} px", depth]
        return " ".join([*parts, "mean+max"] if self.pooling != "mean" else parts)

    def recipe(self, base: Recipe, preprocess: Preprocess) -> Recipe:
        """The recipe that trains it, with the stages of `base`. preprocess: of its input size."""
        return replace(
            base,
            name="search",
            backbone=self.backbone,
            cut=self.cut,
            pooling=self.pooling,
            preprocess=preprocess,
        )


class UnfitSizeError(FtkitError):
    """A backbone does not take this input size."""


def sizes_of(own: int) -> list[int]:
    """Input sizes from SMALLEST to the backbone's own, and one above."""
    smaller = range(SMALLEST, own, STEP)
    return [*smaller, own, own + STEP]


def candidates(backbone: Backbone, size: int) -> list[Candidate]:
    """Every depth and pooling of one backbone at one input size, and several depths together."""
    try:
        names = pooled_blocks(backbone, size)
        counts = _multiplications(backbone, names, size)
    except Exception as error:  # a model's forward may raise anything
        raise UnfitSizeError(
            f"{backbone.name} at {size} px: expected an input size that it takes, found: "
            f"{str(error).splitlines()[0]}"
        ) from None
    whole = counts[""]
    found = [
        Candidate(
            backbone=backbone.name,
            size=size,
            cut=name,
            pooling=pooling,
            multiplications=counts[name],
        )
        for name in names
        if counts[name] >= LEAST_SHARE * whole
        for pooling in POOLINGS
    ]
    together = [
        Candidate(
            backbone=backbone.name,
            size=size,
            cut="+".join(names[max(0, place + 1 - TOGETHER) : place + 1]),
            pooling="mean+max",
            multiplications=counts[names[place]],
        )
        for place in range(1, (len(names) + 1) // 2)
        if counts[names[place]] >= LEAST_SHARE * whole
    ]
    last = Candidate(
        backbone=backbone.name, size=size, cut="", pooling="mean", multiplications=whole
    )
    return [*found, *together, last]


def _multiplications(backbone: Backbone, names: Sequence[str], size: int) -> dict[str, int]:
    """Multiplications of linear layers and convolutions up to each block's end; "": of all."""
    counts: dict[str, int] = {}
    total = 0

    def count(weight: torch.Tensor, output: torch.Tensor) -> None:
        nonlocal total
        total += weight.numel() * (output[0].numel() // weight.shape[0])

    def note(name: str, _: object) -> None:
        counts[name] = total

    layers = [
        (name, partial(count, module.weight))
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    # A block that is a layer itself is counted before it is noted
    observe(backbone, size, [*layers, *((name, partial(note, name)) for name in names)])
    counts[""] = total
    return counts


def backbone_of(name: str, weights: str = "pretrained") -> Backbone:
    """A pretrained backbone to take features from; its head, which nothing uses, is zero.

    So the backbone has one fingerprint, by which its features are found again.
    """
    backbone = build(name, 2, weights)
    with torch.no_grad():
        for parameter in backbone.model.get_submodule(backbone.head).parameters():
            parameter.zero_()
    return backbone
