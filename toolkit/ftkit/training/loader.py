"""Load what a stage trains on: cached activations where freezing allows, live canvases elsewhere.

    feeds = Feeds(backbone, recipe, canvases, ...)
    feed = feeds.stage(2)
    batch = feed.prepare(feed.fetch(positions, generator, ranks.part(len(positions))))
    logits = feed.net(*batch.inputs)

Stages only ever thaw more of the model in the usual plans, so every stage's cut is upstream of all
that trained before it: one pass of the prefix then serves all stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import fx, nn

from ftkit.data.augment import Mixing, augmented, drawn, evaluation, mixed, mixing_of
from ftkit.data.canvas import Canvases
from ftkit.data.prefetch import Source, array_source, pinned
from ftkit.models.backbones import Backbone, trainable
from ftkit.models.inference import Tensors, channels_last
from ftkit.models.prefix import frontier, frozen_part, trace, trained_part
from ftkit.models.weights import fingerprint
from ftkit.recipe import Recipe
from ftkit.training.distillation import Teacher, load
from ftkit.training.feature_cache import (
    Activations,
    CannotCacheError,
    Views,
    check,
    discard,
    fill,
)
from ftkit.training.optimizer import Batch
from ftkit.utils import console
from ftkit.utils.distributed import SOLO, Ranks
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess

Job = TypeVar("Job")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A part of a batch as read, with its random draws. tensors: on their way to the device. draw:
    of augment.drawn.

    With mixed pixels, others: the partners' labels (n,); place: where the images (n,) and their
    partners (n,) lie.
    """

    tensors: list[torch.Tensor]
    labels: torch.Tensor
    draw: torch.Tensor | None = None
    others: torch.Tensor | None = None
    place: torch.Tensor | None = None
    mixing: Mixing | None = None


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One stage's data and nets.

    fetch(positions, generator, part) draws for a whole batch of train positions and reads what a
    part of it needs, on any thread; prepare makes a Batch of that on the device; val gives what
    eval_net takes. how: one phrase for the log. kind: what the bits depend on ("live", "float16 by
    onnxruntime"). pass_s: seconds per image of the frozen part, when it was cached; 0 without a
    cache. net is in training mode where it trains; both nets share the model's parameters.
    """

    net: nn.Module
    eval_net: nn.Module
    fetch: Callable[[Array, torch.Generator, slice], Fetched]
    prepare: Callable[[Fetched], Batch]
    val: Callable[[Array], Tensors]
    how: str
    kind: str
    pass_s: float = 0.0


@dataclass(frozen=True)
class _Cut:
    graph: fx.GraphModule
    nodes: tuple[fx.Node, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]


def under(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a parameter's name lies in one of the modules named."""
    return lambda parameter: any(
        parameter == name or parameter.startswith(name + ".") for name in names
    )


def set_mode(model: nn.Module, names: Sequence[str], batchnorm: bool) -> None:
    """Everything frozen is in eval mode without gradients; what is named trains (BatchNorm's
    statistics on wish)."""
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


def ahead(
    jobs: Iterable[Job], work: Callable[[Job], Made], depth: int = 2
) -> Iterator[tuple[Job, Made]]:
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


def _floats(values: Sequence[torch.Tensor]) -> Tensors:
    """As kept -> float32, channels last where 4-D."""
    return tuple(channels_last(value.float()) for value in values)


class Feeds:
    """Makes each stage's feed, and holds the activations that stages share."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        canvases: Canvases,
        preprocess: Preprocess,
        seed: int,
        device: torch.device,
        ranks: Ranks = SOLO,
    ):
        self.backbone = backbone
        self.recipe = recipe
        self.canvases = canvases
        self.preprocess = preprocess
        self.seed = seed
        self.device = device
        self.ranks = ranks
        self.pixels = Source(canvases.array, len(canvases.slots), preprocess.resize**2 * 3, device)
        self._labels = torch.from_numpy(canvases.labels[canvases.rows("train")])
        self.trained = [trainable(backbone, stage.train) for stage in recipe.stages]
        self._shared: Activations | None = None
        self._cannot_share: CannotCacheError | None = None

    def _pinned(self, host: torch.Tensor) -> torch.Tensor:
        return pinned(host, self.device)

    def _moved(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device, non_blocking=True)

    def stage(self, number: int) -> Feed:
        """The feed of stage `number`; sets the model's modes for it."""
        stage = self.recipe.stages[number]
        names = self.trained[number]
        model = self.backbone.model
        set_mode(model, names, stage.batchnorm)

        teacher = (
            load(stage.teacher, self.preprocess, self.canvases.images.classes)
            if stage.teacher
            else None
        )
        try:
            return self._from_cache(number, teacher)
        except CannotCacheError as reason:
            return self._live(str(reason), teacher)

    def _from_cache(self, number: int, teacher: Teacher | None) -> Feed:
        """The feed of a stage whose prefix is cached. Raises CannotCacheError."""
        if self.recipe.stages[number].cache == "off":
            raise CannotCacheError("cache = off")

        cut = self._cut(number)
        prefix = frozen_part(cut.graph, [cut.nodes])
        activations = self._trusted(lambda: self._activations(number, cut), prefix, cut.names)

        training = trace(self.backbone.model)
        suffix = frontier(training, under(self.trained[number])) if training else []
        if training is None or [node.name for node in suffix] != cut.names:
            raise CannotCacheError("the graph differs between training and evaluation")
        return self._cached(number, cut, training, suffix, activations, teacher)

    def _trusted(
        self, make: Callable[[], Activations], prefix: nn.Module, names: Sequence[str]
    ) -> Activations:
        """The activations that `make` finds or computes, when they equal a live pass of `prefix` on
        every rank. Raises CannotCacheError.

        An entry of an earlier run that differs is replaced, once: something changed that its key
        does not tell.
        """
        activations = make()
        difference = self._difference(activations, prefix, names)
        if difference and activations.found:
            console.warn(
                f"cache: expected what a live pass gives, found that {difference}. It is computed anew"
            )
            discard(activations, self.ranks)
            if activations is self._shared:
                self._shared = None
            activations = make()
            difference = self._difference(activations, prefix, names)

        if difference:
            raise CannotCacheError(difference)

        return activations

    def _difference(self, activations: Activations, prefix: nn.Module, names: Sequence[str]) -> str:
        """How they differ from a live pass, on the first rank where they do; "" where they do not."""
        views = self.views(activations.views)
        return next(filter(None, self.ranks.gather(check(prefix, names, activations, views))), "")

    def _cached(
        self,
        number: int,
        cut: _Cut,
        training: fx.GraphModule,
        suffix: list[fx.Node],
        activations: Activations,
        teacher: Teacher | None,
    ) -> Feed:
        stage = self.recipe.stages[number]
        model = self.backbone.model
        rows = self.canvases.rows("train")
        taught = self._taught(teacher, stage.views)
        kept = {
            **{name: activations.arrays[name] for name in cut.names},
            **({"teacher": taught.arrays["teacher"]} if taught else {}),
        }

        sources = [array_source(array, self.device) for array in kept.values()]

        def fetch(positions: Array, generator: torch.Generator, part: slice) -> Fetched:
            views = torch.randint(stage.views, (len(positions),), generator=generator).numpy()
            items = activations.items(views[part], positions[part])
            labels = self._pinned(self._labels[positions[part]])
            return Fetched(tensors=[source.fetch(items) for source in sources], labels=labels)

        def prepare(fetched: Fetched) -> Batch:
            values = [
                source.take(tensor) for source, tensor in zip(sources, fetched.tensors, strict=True)
            ]
            tensors = _floats(values)
            targets = self._moved(fetched.labels)
            if taught is None:
                return Batch(inputs=tensors, targets=targets)
            return Batch(inputs=tensors[:-1], targets=targets, teacher=tensors[-1])

        def val(positions: Array) -> Tensors:
            items = activations.val_items(positions)
            return _floats(
                [source.take(source.fetch(items)) for source in sources[: len(cut.names)]]
            )

        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        share = sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
        origin = "found in the cache" if activations.found else "computed once"
        dtype = activations.kind.split()[0]
        how = f"frozen prefix {origin}: {stage.views} views x {len(rows)}, {dtype}; {share:.0%} trains"

        if self.recipe.augment.mixes:
            how += "; mixup and cutmix are for live pixels"

        return Feed(
            net=trained_part(training, suffix),
            eval_net=trained_part(cut.graph, cut.nodes),
            fetch=fetch,
            prepare=prepare,
            val=val,
            how=how,
            kind=activations.kind,
            pass_s=activations.pass_s * self.ranks.local_world / self.ranks.world,
        )

    def _cut(self, number: int) -> _Cut:
        """The eval-mode graph and its cut. Leaves the model's modes as they were. Raises
        CannotCacheError."""
        modes = {name: module.training for name, module in self.backbone.model.named_modules()}
        graph = trace(self.backbone.model.eval())

        for name, module in self.backbone.model.named_modules():
            module.training = modes[name]
        if graph is None:
            raise CannotCacheError("torch.fx cannot trace this backbone")

        nodes = frontier(graph, under(self.trained[number]))
        if not nodes:
            raise CannotCacheError("nothing is frozen")
        return _Cut(graph, tuple(nodes))

    def _pristine(self, number: int) -> bool:
        """Whether everything that trained before stage `number` trains in it too: its prefix is
        then as it was."""
        now = under(self.trained[number])
        parameters = [name for name, _ in self.backbone.model.named_parameters()]
        before = [under(names) for names in self.trained[:number]]
        return all(now(name) for name in parameters if any(earlier(name) for earlier in before))

    def views(self, count: int) -> Views:
        return Views(
            canvases=self.canvases,
            preprocess=self.preprocess,
            augment=self.recipe.augment,
            count=count,
            seed=self.seed,
            source=self.pixels,
        )

    def share(self) -> None:
        """Run the prefix for every stage it serves: once, while the weights are still the
        pretrained ones."""
        sharing = [
            n for n, s in enumerate(self.recipe.stages) if s.cache == "auto" and self._pristine(n)
        ]
        graph = trace(self.backbone.model.eval())
        if graph is None:
            return

        cuts = {n: frontier(graph, under(self.trained[n])) for n in sharing}
        served = [n for n in sharing if cuts[n]]
        if served:
            views = max(self.recipe.stages[n].views for n in served)
            try:
                self._shared = self._fill(graph, [cuts[n] for n in served], views)
            except CannotCacheError as reason:
                self._cannot_share = reason

    def _activations(self, number: int, cut: _Cut) -> Activations:
        if self._pristine(number):
            if self._cannot_share:
                raise self._cannot_share
            if self._shared is not None:
                return self._shared
        return self._fill(cut.graph, [cut.nodes], self.recipe.stages[number].views)

    def _fill(
        self, graph: fx.GraphModule, cuts: Sequence[Sequence[fx.Node]], count: int
    ) -> Activations:
        wanted = {node.name for cut in cuts for node in cut}
        names = [node.name for node in graph.graph.nodes if node.name in wanted]
        prefix = frozen_part(graph, cuts)
        with console.bar("frozen prefix") as progress:
            key = prefix.code + fingerprint(prefix)
            return fill(prefix, key, names, self.views(count), progress, self.ranks)

    def _taught(self, teacher: Teacher | None, count: int) -> Activations | None:
        """The teacher's logits of the same views: its model is a frozen prefix too, and runs once."""
        if teacher is None:
            return None

        teacher.to(self.device)

        def made() -> Activations:
            with console.bar("teacher") as progress:
                return fill(
                    teacher, teacher.key, ["teacher"], self.views(count), progress, self.ranks
                )

        return self._trusted(made, teacher, ["teacher"])

    def _live(self, reason: str, teacher: Teacher | None) -> Feed:
        rows = self.canvases.rows("train")
        val_rows = self.canvases.rows("val")

        if teacher is not None:
            teacher.to(self.device)

        def fetch(positions: Array, generator: torch.Generator, part: slice) -> Fetched:
            draw = drawn(len(positions), generator)
            labels = self._labels[positions]

            mixing = mixing_of(len(positions), self.preprocess.size, self.recipe.augment, generator)
            if mixing is None:
                return Fetched(
                    tensors=[self.pixels.fetch(rows[positions[part]])],
                    labels=self._pinned(labels[part]),
                    draw=self._pinned(draw[:, part]),
                )

            partner = mixing.partner[part]  # it may be another rank's image: both read it
            wanted, place = np.unique(
                np.r_[np.arange(len(positions))[part], partner.numpy()], return_inverse=True
            )

            return Fetched(
                tensors=[self.pixels.fetch(rows[positions[wanted]])],
                labels=self._pinned(labels[part]),
                draw=self._pinned(draw[:, wanted]),
                others=self._pinned(labels[partner]),
                place=self._pinned(torch.from_numpy(place).view(2, -1)),
                mixing=mixing.of(part).mapped(self._pinned),
            )

        def prepare(fetched: Fetched) -> Batch:
            assert fetched.draw is not None  # fetch drew it
            canvases = self.pixels.take(fetched.tensors[0])
            mixing = None
            others = None
            pixels = augmented(canvases, self.preprocess, self.recipe.augment, fetched.draw)

            if (
                fetched.mixing is not None
                and fetched.place is not None
                and fetched.others is not None
            ):
                mixing = fetched.mixing.mapped(self._moved)
                place = self._moved(fetched.place)
                pixels = mixed(pixels[place[0]], pixels[place[1]], mixing)
                others = self._moved(fetched.others)

            pixels = channels_last(pixels)
            with torch.no_grad():
                answers = None if teacher is None else teacher(pixels)

            return Batch(
                inputs=(pixels,),
                targets=self._moved(fetched.labels),
                teacher=answers,
                others=others,
                share=mixing.share if mixing else None,
            )

        def val(positions: Array) -> Tensors:
            canvases = self.pixels.take(self.pixels.fetch(val_rows[positions]))
            return (channels_last(evaluation(canvases, self.preprocess)),)

        model = self.backbone.model

        return Feed(
            net=model,
            eval_net=model,
            fetch=fetch,
            prepare=prepare,
            val=val,
            how=f"live: {reason}",
            kind="live",
        )
