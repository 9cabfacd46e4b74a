"""What a stage trains on: cached activations where freezing allows, live canvases elsewhere.

    feeds = Feeds(backbone, recipe, canvases, ...)
    feed = feeds.stage(2)
    batch = feed.prepare(feed.fetch(positions, generator), generator)
    logits = feed.net(*batch.inputs)

Stages only ever thaw more of the model in the usual plans, so every stage's cut is upstream of all that trained before
it: one pass of the prefix then serves all stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from ftkit import terminal
from ftkit.augment import augmented, evaluation, mixed
from ftkit.backbones import Backbone, trainable
from ftkit.cache import Activations, Tensors, Views, channels_last, check, fill
from ftkit.canvas import Canvases
from ftkit.optim import Batch
from ftkit.prefix import frontier, frozen_part, trace, trained_part
from ftkit.recipe import Recipe
from ftkit.teacher import Teacher, load
from ftkit.weights import fingerprint
from ftkit_export.preprocess import Preprocess

Array = np.ndarray[Any, Any]
Job = TypeVar("Job")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One stage's data and nets.

    fetch(positions, generator) reads arrays of train positions, on any thread; prepare makes a Batch of them; val gives
    what eval_net takes. how: one phrase for the log. kind: what the bits depend on ("live", "float16 by onnxruntime").
    net is in training mode where it trains; both nets share the model's parameters.
    """

    net: nn.Module
    eval_net: nn.Module
    fetch: Callable[[Array, torch.Generator], list[Array]]
    prepare: Callable[[list[Array], torch.Generator], Batch]
    val: Callable[[Array], Tensors]
    how: str
    kind: str


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
    """Everything frozen is in eval mode without gradients; what is named trains (BatchNorm's statistics on wish)."""
    model.eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
            continue
        module = model.get_submodule(name)
        module.train().requires_grad_(True)
        if not batchnorm:
            for inner in module.modules():
                if isinstance(inner, nn.modules.batchnorm._BatchNorm):
                    inner.eval()


def ahead(jobs: Iterable[Job], work: Callable[[Job], Made], depth: int = 2) -> Iterator[tuple[Job, Made]]:
    """Each job with what `work` made of it in a thread that stays up to `depth` jobs ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Job, Future[Made]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


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
        teacher = load(stage.teacher, self.preprocess, self.canvases.images.classes) if stage.teacher else None
        if stage.cache == "off":
            return self._live("cache = off", teacher)
        cut = self._cut(number)
        if isinstance(cut, str):
            return self._live(cut, teacher)
        kept = self._activations(number, cut)
        if isinstance(kept, str):
            return self._live(kept, teacher)
        if reason := check(frozen_part(cut.graph, [cut.nodes]), cut.names, kept, self._views(kept.views)):
            return self._live(reason, teacher)
        training = trace(model)
        suffix = frontier(training, under(names)) if training else []
        if training is None or [node.name for node in suffix] != cut.names:
            return self._live("the graph differs between training and evaluation", teacher)
        return self._cached(number, cut, training, suffix, kept, teacher)

    def _cached(
        self, number: int, cut: _Cut, training: fx.GraphModule, suffix: list[fx.Node], activations: Activations,
        teacher: Teacher | None,
    ) -> Feed:  # fmt: skip
        stage, model, rows = self.recipe.stages[number], self.backbone.model, self.canvases.rows("train")
        taught = self._taught(teacher, stage.views)
        if isinstance(taught, str):
            return self._live(taught, teacher)

        def fetch(positions: Array, generator: torch.Generator) -> list[Array]:
            views = torch.randint(stage.views, (len(positions),), generator=generator).numpy()
            arrays = activations.train(cut.names, views, positions)
            return arrays if taught is None else [*arrays, *taught.train(["teacher"], views, positions)]

        def prepare(arrays: list[Array], generator: torch.Generator) -> Batch:
            tensors = self._tensors(arrays)
            if taught is None:
                return Batch(inputs=tensors)
            return Batch(inputs=tensors[:-1], teacher=tensors[-1])

        share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(
            p.numel() for p in model.parameters()
        )
        origin = "found in the cache" if activations.found else "computed once"
        unmixed = "; mixup and cutmix are for live pixels" if self.recipe.augment.mixes else ""
        return Feed(
            net=trained_part(training, suffix), eval_net=trained_part(cut.graph, cut.nodes), fetch=fetch,
            prepare=prepare, val=lambda positions: self._tensors(activations.val(cut.names, positions)),
            how=f"frozen prefix {origin}: {stage.views} views x {len(rows)}, {activations.kind.split()[0]}; "
            f"{share:.0%} trains{unmixed}", kind=activations.kind,
        )  # fmt: skip

    def _tensors(self, arrays: Sequence[Array]) -> Tensors:
        """Arrays as kept -> float32 tensors on the device, channels last where 4-D."""
        moved = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays)
        return tuple(channels_last(tensor.float()) for tensor in moved)

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

    def _views(self, count: int) -> Views:
        return Views(
            canvases=self.canvases, preprocess=self.preprocess, augment=self.recipe.augment, count=count,
            seed=self.seed, device=self.device,
        )  # fmt: skip

    def share(self) -> None:
        """Run the prefix for every stage it serves: once, while the weights are still the pretrained ones."""
        sharing = [n for n, s in enumerate(self.recipe.stages) if s.cache == "auto" and self._pristine(n)]
        graph = trace(self.backbone.model.eval())
        if graph is None:
            return
        cuts = {n: frontier(graph, under(self.trained[n])) for n in sharing}
        served = [n for n in sharing if cuts[n]]
        if served:
            views = max(self.recipe.stages[n].views for n in served)
            self._shared = self._fill(graph, [cuts[n] for n in served], views)

    def _activations(self, number: int, cut: _Cut) -> Activations | str:
        if self._shared is not None and self._pristine(number):
            return self._shared
        return self._fill(cut.graph, [cut.nodes], self.recipe.stages[number].views)

    def _fill(self, graph: fx.GraphModule, cuts: Sequence[Sequence[fx.Node]], count: int) -> Activations | str:
        wanted = {node.name for cut in cuts for node in cut}
        names = [node.name for node in graph.graph.nodes if node.name in wanted]
        prefix = frozen_part(graph, cuts)
        with terminal.bar("frozen prefix") as progress:
            return fill(prefix, prefix.code + fingerprint(prefix), names, self._views(count), progress)

    def _taught(self, teacher: Teacher | None, count: int) -> Activations | str | None:
        """The teacher's logits of the same views: its model is a frozen prefix too, and runs once."""
        if teacher is None:
            return None
        teacher.to(self.device)
        with terminal.bar("teacher") as progress:
            return fill(teacher, teacher.key, ["teacher"], self._views(count), progress)

    def _live(self, reason: str, teacher: Teacher | None) -> Feed:
        rows, val_rows = self.canvases.rows("train"), self.canvases.rows("val")
        if teacher is not None:
            teacher.to(self.device)

        def prepare(arrays: list[Array], generator: torch.Generator) -> Batch:
            canvases = torch.from_numpy(arrays[0]).to(self.device, non_blocking=True)
            pixels = augmented(canvases, self.preprocess, self.recipe.augment, generator)
            pixels, partner, share = mixed(pixels, self.recipe.augment, generator)
            pixels = channels_last(pixels)
            with torch.no_grad():
                answers = None if teacher is None else teacher(pixels)
            return Batch(inputs=(pixels,), teacher=answers, partner=partner, share=share)

        def val(positions: Array) -> Tensors:
            canvases = torch.from_numpy(self.canvases.array(val_rows[positions])).to(self.device)
            return (channels_last(evaluation(canvases, self.preprocess)),)

        model = self.backbone.model
        return Feed(
            net=model, eval_net=model, fetch=lambda positions, generator: [self.canvases.array(rows[positions])],
            prepare=prepare, val=val, how=f"live: {reason}", kind="live",
        )  # fmt: skip
