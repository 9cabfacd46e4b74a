"""Choose each stage's loader, and run the frozen prefix once for all stages that can share it.

    loaders = StageLoaders(backbone, recipe, canvases, ...)
    loaders.share()
    loader = loaders.stage(2)

Usual plans only ever unfreeze more of the model, so every stage's cut is upstream of everything
that trained before it, and one pass of the prefix serves all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from ftkit.data.canvas import Canvases
from ftkit.data.prefetch import Source
from ftkit.models.backbones import Backbone
from ftkit.models.freezing import set_mode, trainable, under
from ftkit.models.prefix import frontier, frozen_part, trace, trained_part
from ftkit.models.weights import fingerprint
from ftkit.recipe import Recipe
from ftkit.tasks.task import SINGLE_LABEL, Task
from ftkit.training.distillation import Teacher, load_teacher
from ftkit.training.feature_cache import (
    Activations,
    CannotCacheError,
    Views,
    check,
    discard,
    fill,
)
from ftkit.training.loader import CachedLoader, LiveLoader, Loader
from ftkit.utils import console
from ftkit.utils.distributed import SOLO, Ranks
from ftkit_export.runtime.preprocess import Preprocess


@dataclass(frozen=True)
class _Cut:
    graph: fx.GraphModule
    nodes: tuple[fx.Node, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]


class StageLoaders:
    """Creates each stage's loader, and holds the activations that stages share."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        canvases: Canvases,
        preprocess: Preprocess,
        seed: int,
        device: torch.device,
        ranks: Ranks = SOLO,
        task: Task = SINGLE_LABEL,
    ):
        self.backbone = backbone
        self.recipe = recipe
        self.canvases = canvases
        self.preprocess = preprocess
        self.seed = seed
        self.device = device
        self.ranks = ranks
        self.pixels = Source(canvases.array, len(canvases.slots), preprocess.resize**2 * 3, device)
        self.task = task
        self._labels = task.targets(canvases)[canvases.rows("train")]
        self.trained = [trainable(backbone, stage.train) for stage in recipe.stages]
        self._shared: Activations | None = None
        self._cannot_share: CannotCacheError | None = None

    def stage(self, number: int) -> Loader:
        """The loader of stage `number`; also sets the model's train/eval modes for it."""
        stage = self.recipe.stages[number]
        set_mode(self.backbone.model, self.trained[number], stage.batchnorm)
        teacher = None
        if stage.teacher:
            images = self.canvases.images
            teacher = load_teacher(stage.teacher, self.preprocess, images, self.task)

        try:
            return self._cached(number, teacher, stage.views)
        except CannotCacheError as reason:
            return LiveLoader(
                model=self.backbone.model,
                labels=self._labels,
                device=self.device,
                reason=str(reason),
                canvases=self.canvases,
                pixels=self.pixels,
                preprocess=self.preprocess,
                augment=self.recipe.augment,
                teacher=teacher,
            )

    def first_look(self) -> CachedLoader | None:
        """The first stage's loader with the images as they are, before their augmented views are
        computed; None where its prefix cannot be cached."""
        self.share(most=1)
        set_mode(self.backbone.model, self.trained[0], self.recipe.stages[0].batchnorm)
        try:
            return self._cached(0, None, views=1)
        except CannotCacheError:
            return None

    def share(self, most: int | None = None) -> None:
        """Run the prefix once for every stage it serves, while the weights are still pretrained.

        most: views, by default all that a stage asks for.
        """
        self._shared = None
        self._cannot_share = None
        sharing = [
            n for n, s in enumerate(self.recipe.stages) if s.cache == "auto" and self._pristine(n)
        ]
        graph = trace(self.backbone.model.eval())
        if graph is None:
            return

        cuts = {n: frontier(graph, under(self.trained[n])) for n in sharing}
        served = [n for n in sharing if cuts[n]]
        if served:
            views = most or max(self.recipe.stages[n].views for n in served)
            try:
                self._shared = self._fill(graph, [cuts[n] for n in served], views)
            except CannotCacheError as reason:
                self._cannot_share = reason

    @property
    def left_to_run(self) -> float:
        """Seconds that the prefix of the views still to come will take, by those it has seen."""
        shared = self._shared
        if shared is None:
            return 0.0
        missing = max(0, max(stage.views for stage in self.recipe.stages) - shared.views)
        return missing * len(self._labels) * shared.pass_s

    def views(self, count: int) -> Views:
        """`count` augmented views of each image, as the prefix sees them."""
        return Views(
            canvases=self.canvases,
            preprocess=self.preprocess,
            augment=self.recipe.augment,
            count=count,
            seed=self.seed,
            source=self.pixels,
        )

    def _cached(self, number: int, teacher: Teacher | None, views: int) -> CachedLoader:
        """The loader of a stage whose prefix is cached. Raises CannotCacheError."""
        stage = self.recipe.stages[number]
        if stage.cache == "off":
            raise CannotCacheError("cache = off")

        cut = self._cut(number)
        prefix = frozen_part(cut.graph, [cut.nodes])
        activations = self._trusted(
            lambda: self._activations(number, cut, views), prefix, cut.names
        )

        training = trace(self.backbone.model)
        suffix = frontier(training, under(self.trained[number])) if training else []
        if training is None or [node.name for node in suffix] != cut.names:
            raise CannotCacheError("the graph differs between training and evaluation")

        taught = self._taught(teacher, views)
        return CachedLoader(
            net=trained_part(training, suffix),
            eval_net=trained_part(cut.graph, cut.nodes),
            labels=self._labels,
            device=self.device,
            how=self._how(activations, views),
            pass_s=activations.pass_s * self.ranks.local_world / self.ranks.world,
            activations=activations,
            names=cut.names,
            teacher=taught.arrays["teacher"] if taught else None,
            views=views,
        )

    def _how(self, activations: Activations, views: int) -> str:
        parameters = list(self.backbone.model.parameters())
        trains = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        share = trains / sum(parameter.numel() for parameter in parameters)
        origin = "found in the cache" if activations.found else "computed once"
        images = len(self.canvases.rows("train"))
        dtype = activations.kind.split()[0]
        how = f"frozen prefix {origin}: {views} views x {images}, {dtype}; {share:.0%} trains"

        if self.recipe.augment.mixes:
            how += "; no mixup or cutmix, which need live pixels"
        return how

    def _trusted(
        self, make: Callable[[], Activations], prefix: nn.Module, names: Sequence[str]
    ) -> Activations:
        """Activations from `make`, once they match a live pass of `prefix` on every rank.

        An entry of an earlier run that differs is replaced, once: something changed that its key
        does not cover. Raises CannotCacheError if they still differ.
        """
        activations = make()
        difference = self._difference(activations, prefix, names)

        # On any machine: all compute it again, or none
        if difference and any(self.ranks.gather(activations.found or activations.copied)):
            console.warn(
                f"cache: expected the values of a live pass, found that {difference}. Computing it again"
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
        """How they differ from a live pass, on the first rank where they do; "" if equal."""
        views = self.views(activations.views)
        return next(filter(None, self.ranks.gather(check(prefix, names, activations, views))), "")

    def _cut(self, number: int) -> _Cut:
        """The eval-mode graph and its cut; the model's modes are restored.

        Raises CannotCacheError.
        """
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
        """Whether stage `number` trains all that trained before it, so its prefix is unchanged."""
        now = under(self.trained[number])
        parameters = [name for name, _ in self.backbone.model.named_parameters()]
        before = [under(names) for names in self.trained[:number]]
        return all(now(name) for name in parameters if any(earlier(name) for earlier in before))

    def _activations(self, number: int, cut: _Cut, views: int) -> Activations:
        if self._pristine(number):
            if self._cannot_share:
                raise self._cannot_share
            if self._shared is not None:
                return self._shared
        return self._fill(cut.graph, [cut.nodes], views)

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
        """The teacher's logits for the same views, cached like a frozen prefix."""
        if teacher is None:
            return None

        teacher.to(self.device)

        def made() -> Activations:
            with console.bar("teacher") as progress:
                return fill(
                    teacher, teacher.key, ["teacher"], self.views(count), progress, self.ranks
                )

        return self._trusted(made, teacher, ["teacher"])
