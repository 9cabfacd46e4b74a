"""What a stage trains on: cached activations where freezing allows, live canvases elsewhere.

    feeds = Feeds(backbone, recipe, canvases, ...)
    feed = feeds.stage(2)
    logits = feed.net(*feed.train(positions, generator))

Stages only ever thaw more of the model in the usual plans, so every stage's cut is upstream of all that trained before
it: one pass of the prefix then serves all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ftkit import terminal
from ftkit.augment import augmented, evaluation
from ftkit.backbones import Backbone, trainable
from ftkit.cache import Activations, Tensors, channels_last, fill
from ftkit.canvas import Canvases
from ftkit.prefix import frontier, frozen_part, trace, trained_part
from ftkit.recipe import Recipe
from ftkit_export.preprocess import Preprocess

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One stage's data and nets. train(positions, generator) and val(positions) give what net and eval_net take.

    how: one phrase for the log. net is in training mode where it trains; both share the model's parameters.
    """

    net: nn.Module
    eval_net: nn.Module
    train: Callable[[Array, torch.Generator], Tensors]
    val: Callable[[Array], Tensors]
    how: str


@dataclass(frozen=True)
class _Cut:
    graph: fx.GraphModule
    nodes: tuple[fx.Node, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]


def under(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a parameter's name lies in one of the modules named."""
    return lambda parameter: any(parameter == name or parameter.startswith(name + ".") for name in names)


def set_mode(model: nn.Module, names: Sequence[str], batchnorm: bool) -> None:
    """Everything frozen is in eval mode without gradients; the modules named train (BatchNorm's statistics on wish)."""
    model.eval().requires_grad_(False)
    for name in names:
        module = model.get_submodule(name)
        module.train().requires_grad_(True)
        if not batchnorm:
            for inner in module.modules():
                if isinstance(inner, nn.modules.batchnorm._BatchNorm):
                    inner.eval()


class Feeds:
    """Makes each stage's feed, and holds the activations that stages share."""

    def __init__(
        self, backbone: Backbone, recipe: Recipe, canvases: Canvases, preprocess: Preprocess, seed: int,
        device: torch.device,
    ):  # fmt: skip
        self.backbone, self.recipe, self.canvases = backbone, recipe, canvases
        self.preprocess, self.seed, self.device = preprocess, seed, device
        self.trained = [trainable(backbone, stage.train) for stage in recipe.stages]
        self._shared: Activations | str | None = None

    def stage(self, number: int) -> Feed:
        """The feed of stage `number`; sets the model's modes for it."""
        stage, names, model = self.recipe.stages[number], self.trained[number], self.backbone.model
        set_mode(model, names, stage.batchnorm)
        if stage.cache == "off":
            return self._live("live: cache = off")
        cut = self._cut(number)
        if isinstance(cut, str):
            return self._live(f"live: {cut}")
        activations = self._activations(number, cut)
        if isinstance(activations, str):
            return self._live(f"live: {activations}")
        training = trace(model)
        suffix = frontier(training, under(names)) if training else []
        if training is None or [node.name for node in suffix] != cut.names:
            return self._live("live: the graph differs between training and evaluation")
        rows = self.canvases.rows("train")
        share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(
            p.numel() for p in model.parameters()
        )
        origin = "found in the cache" if activations.found else "computed once"

        def train(positions: Array, generator: torch.Generator) -> Tensors:
            views = torch.randint(stage.views, (len(positions),), generator=generator).numpy()
            return self._to_device(activations.train(cut.names, views, positions))

        return Feed(
            net=trained_part(training, suffix), eval_net=trained_part(cut.graph, cut.nodes), train=train,
            val=lambda positions: self._to_device(activations.val(cut.names, positions)),
            how=f"frozen prefix {origin}: {stage.views} views x {len(rows)} images; {share:.0%} of the weights train",
        )  # fmt: skip

    def _to_device(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def _cut(self, number: int) -> _Cut | str:
        """The eval-mode graph and its cut, or why there is none. Leaves the model's modes as they were."""
        modes = {name: module.training for name, module in self.backbone.model.named_modules()}
        graph = trace(self.backbone.model.eval())
        for name, module in self.backbone.model.named_modules():
            module.training = modes[name]
        if graph is None:
            return "torch.fx cannot trace this backbone"
        nodes = frontier(graph, under(self.trained[number]))
        return _Cut(graph, tuple(nodes)) if nodes else "nothing is frozen"

    def _pristine(self, number: int) -> bool:
        """Whether everything that trained before stage `number` trains in it too: its prefix is then as it was."""
        now = under(self.trained[number])
        parameters = [name for name, _ in self.backbone.model.named_parameters()]
        before = [under(names) for names in self.trained[:number]]
        return all(now(name) for name in parameters if any(earlier(name) for earlier in before))

    def _activations(self, number: int, cut: _Cut) -> Activations | str:
        if not self._pristine(number):
            return self._fill(cut.graph, [cut.nodes], self.recipe.stages[number].views)
        if self._shared is None:
            sharing = [n for n, s in enumerate(self.recipe.stages) if s.cache == "auto" and self._pristine(n)]
            cuts = [frontier(cut.graph, under(self.trained[n])) for n in sharing]
            views = max(self.recipe.stages[n].views for n in sharing)
            self._shared = self._fill(cut.graph, cuts, views)
        return self._shared

    def _fill(self, graph: fx.GraphModule, cuts: Sequence[Sequence[fx.Node]], views: int) -> Activations | str:
        wanted = {node.name for cut in cuts for node in cut}
        names = [node.name for node in graph.graph.nodes if node.name in wanted]
        with terminal.bar("frozen prefix") as progress:
            return fill(
                frozen_part(graph, cuts), names, self.canvases, preprocess=self.preprocess,
                augment=self.recipe.augment, views=views, seed=self.seed, device=self.device, progress=progress,
            )  # fmt: skip

    def _live(self, how: str) -> Feed:
        rows, val_rows = self.canvases.rows("train"), self.canvases.rows("val")

        def train(positions: Array, generator: torch.Generator) -> Tensors:
            canvases = torch.from_numpy(self.canvases.array(rows[positions])).to(self.device)
            return (channels_last(augmented(canvases, self.preprocess, self.recipe.augment, generator)),)

        def val(positions: Array) -> Tensors:
            canvases = torch.from_numpy(self.canvases.array(val_rows[positions])).to(self.device)
            return (channels_last(evaluation(canvases, self.preprocess)),)

        model = self.backbone.model
        return Feed(net=model, eval_net=model, train=train, val=val, how=how)
