"""Load the training data of one stage: cached activations of its frozen prefix, or live pixels.

batch = loader.prepare(loader.fetch(positions, generator, ranks.part(len(positions))))
logits = loader.net(*batch.inputs)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ftkit.data.augment import Mixing, augmented, drawn, evaluation, mixed, mixing_of
from ftkit.data.canvas import Canvases
from ftkit.data.prefetch import Source, array_source, pinned
from ftkit.models.inference import Tensors, channels_last
from ftkit.recipe import Augment
from ftkit.tasks.losses import Batch
from ftkit.training.distillation import Teacher
from ftkit.training.feature_cache import Activations
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Part of a batch as read from storage, with its random draws.

    tensors: on their way to the device. draw: from augment.drawn. With mixup or cutmix: others, the
    partners' labels (n,); place, indices (2, n) of the images and their partners in the tensors.
    """

    tensors: list[torch.Tensor]
    labels: torch.Tensor
    draw: torch.Tensor | None = None
    others: torch.Tensor | None = None
    place: torch.Tensor | None = None
    mixing: Mixing | None = None


class Loader(ABC):
    """Data and networks of one stage.

    net: in training mode where it trains. eval_net: used on the val split; both share the model's
    parameters. how: one phrase for the log. kind: what reproducibility depends on ("live", "float16
    by onnxruntime"). pass_s: seconds per image of the frozen prefix when it was cached; 0 without a
    cache.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        eval_net: nn.Module,
        labels: torch.Tensor,
        device: torch.device,
        how: str,
        kind: str,
        pass_s: float = 0.0,
    ):
        self.net = net
        self.eval_net = eval_net
        self.how = how
        self.kind = kind
        self.pass_s = pass_s
        self._labels = labels
        self._device = device

    @abstractmethod
    def fetch(self, positions: Array, generator: torch.Generator, part: slice) -> Fetched:
        """Draw for a whole batch of train positions (n,) and read what one part of it needs.

        May run on any thread.
        """

    @abstractmethod
    def prepare(self, fetched: Fetched) -> Batch:
        """Assemble the batch on the device."""

    @abstractmethod
    def seen(self, positions: Array) -> Tensors:
        """Inputs of eval_net for these train positions (n,), not augmented."""

    @abstractmethod
    def val(self, positions: Array) -> Tensors:
        """Inputs of eval_net for the val positions (n,)."""

    def _pinned(self, host: torch.Tensor) -> torch.Tensor:
        return pinned(host, self._device)

    def _moved(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._device, non_blocking=True)


class CachedLoader(Loader):
    """Batches of cached activations of the frozen prefix.

    names: the prefix outputs, in the order net takes them. teacher: the teacher's logits for the
    same views, for distillation.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        eval_net: nn.Module,
        labels: torch.Tensor,
        device: torch.device,
        how: str,
        pass_s: float,
        activations: Activations,
        names: Sequence[str],
        teacher: Array | None,
        views: int,
    ):
        super().__init__(
            net=net,
            eval_net=eval_net,
            labels=labels,
            device=device,
            how=how,
            kind=activations.kind,
            pass_s=pass_s,
        )
        self._activations = activations
        self._views = views
        self._inputs = [array_source(activations.arrays[name], device) for name in names]
        self._teacher = [] if teacher is None else [array_source(teacher, device)]

    def fetch(self, positions: Array, generator: torch.Generator, part: slice) -> Fetched:
        """As Loader.fetch."""
        views = torch.randint(self._views, (len(positions),), generator=generator).numpy()
        items = self._activations.items(views[part], positions[part])
        return Fetched(
            tensors=[source.fetch(items) for source in (*self._inputs, *self._teacher)],
            labels=self._pinned(self._labels[positions[part]]),
        )

    def prepare(self, fetched: Fetched) -> Batch:
        """As Loader.prepare."""
        sources = (*self._inputs, *self._teacher)
        tensors = _floats(
            source.take(tensor) for source, tensor in zip(sources, fetched.tensors, strict=True)
        )
        inputs = len(self._inputs)
        return Batch(
            inputs=tensors[:inputs],
            targets=self._moved(fetched.labels),
            teacher=tensors[inputs] if self._teacher else None,
        )

    def seen(self, positions: Array) -> Tensors:
        """As Loader.seen: view 0 is the evaluation crop."""
        items = self._activations.items(np.zeros(len(positions), int), positions)
        return _floats(source.take(source.fetch(items)) for source in self._inputs)

    def val(self, positions: Array) -> Tensors:
        """As Loader.val."""
        items = self._activations.val_items(positions)
        return _floats(source.take(source.fetch(items)) for source in self._inputs)


class LiveLoader(Loader):
    """Batches of augmented pixels for the whole model. reason: why there is no cache."""

    def __init__(
        self,
        *,
        model: nn.Module,
        labels: torch.Tensor,
        device: torch.device,
        reason: str,
        canvases: Canvases,
        pixels: Source,
        preprocess: Preprocess,
        augment: Augment,
        teacher: Teacher | None,
    ):
        super().__init__(
            net=model,
            eval_net=model,
            labels=labels,
            device=device,
            how=f"live: {reason}",
            kind="live",
        )
        self._train_rows = canvases.rows("train")
        self._val_rows = canvases.rows("val")
        self._pixels = pixels
        self._preprocess = preprocess
        self._augment = augment
        self._teacher = teacher.to(device) if teacher else None

    def fetch(self, positions: Array, generator: torch.Generator, part: slice) -> Fetched:
        """As Loader.fetch."""
        draw = drawn(len(positions), generator)
        labels = self._labels[positions]

        mixing = mixing_of(len(positions), self._preprocess.size, self._augment, generator)
        if mixing is None:
            return Fetched(
                tensors=[self._pixels.fetch(self._train_rows[positions[part]])],
                labels=self._pinned(labels[part]),
                draw=self._pinned(draw[:, part]),
            )

        partner = mixing.partner[part]  # may be an image of another rank: both ranks then read it
        wanted, place = np.unique(
            np.r_[np.arange(len(positions))[part], partner.numpy()], return_inverse=True
        )

        return Fetched(
            tensors=[self._pixels.fetch(self._train_rows[positions[wanted]])],
            labels=self._pinned(labels[part]),
            draw=self._pinned(draw[:, wanted]),
            others=self._pinned(labels[partner]),
            place=self._pinned(torch.from_numpy(place).view(2, -1)),
            mixing=mixing.of(part).mapped(self._pinned),
        )

    def prepare(self, fetched: Fetched) -> Batch:
        """As Loader.prepare."""
        assert fetched.draw is not None  # fetch drew it
        canvases = self._pixels.take(fetched.tensors[0])
        pixels = augmented(canvases, self._preprocess, self._augment, fetched.draw)

        mixing = None
        others = None
        if fetched.mixing is not None and fetched.place is not None and fetched.others is not None:
            mixing = fetched.mixing.mapped(self._moved)
            place = self._moved(fetched.place)
            pixels = mixed(pixels[place[0]], pixels[place[1]], mixing)
            others = self._moved(fetched.others)

        pixels = channels_last(pixels)
        with torch.no_grad():
            answers = None if self._teacher is None else self._teacher(pixels)

        return Batch(
            inputs=(pixels,),
            targets=self._moved(fetched.labels),
            teacher=answers,
            others=others,
            share=mixing.share if mixing else None,
        )

    def seen(self, positions: Array) -> Tensors:
        """As Loader.seen."""
        return self._evaluated(self._train_rows[positions])

    def val(self, positions: Array) -> Tensors:
        """As Loader.val."""
        return self._evaluated(self._val_rows[positions])

    def _evaluated(self, rows: Array) -> Tensors:
        canvases = self._pixels.take(self._pixels.fetch(rows))
        return (channels_last(evaluation(canvases, self._preprocess)),)


def _floats(values: Iterable[torch.Tensor]) -> Tensors:
    """Convert stored values to float32, channels last where 4-D."""
    return tuple(channels_last(value.float()) for value in values)


def ahead(
    steps: Iterable[Item], work: Callable[[Item], Made], depth: int = 2
) -> Iterator[tuple[Item, Made]]:
    """Yield each step with the result of `work`, computed in a thread up to `depth` steps ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        try:
            for step in steps:
                waiting.append((step, pool.submit(work, step)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()

            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
