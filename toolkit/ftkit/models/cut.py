"""Cut a backbone behind one of its blocks: fewer layers, a new head on pooled features.

    model = cut(model, "blocks.4", "mean", classes=4)             # blocks 5 and later are gone
    model = cut(model, "blocks.2+blocks.4", "mean+max", 4)        # features of two depths together

A network pretrained on large pictures of many things has its last layers for what small tasks do not
need: behind group 5 of 7, lite0 is as accurate on solar cells at 0.9 of the time. What remains is a
graph of torch.fx with the modules' own names, and two more: `pool` and `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ftkit.models.prefix import Tracer, needed_for
from ftkit_export.runtime.errors import FtkitError, choices

POOLINGS = ("mean", "mean+max")
POOL = "pool"
HEAD = "head"
SPATIAL = (3, 4)  # dimensions of tokens, and of maps, with the images


class Pool(nn.Module):
    """Feature maps -> one vector an image: their mean over space, or mean and maximum.

    Takes maps of any depth, (n, C, h, w), (n, h, w, C) or tokens (n, t, C); gives (n, features).
    axes: those of space, for each map.
    """

    def __init__(self, kind: str, axes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.kind = kind
        self.axes = tuple(axes)

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        pooled = []
        for value, axes in zip(maps, self.axes, strict=True):
            pooled.append(value.mean(axes))
            if self.kind == "mean+max":
                pooled.append(value.amax(axes))
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


class _Recording(Tracer):
    """Notes the value that each module gives."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = self.path_of_module(m)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.outputs[name] = output.node
        return output


def cut(model: nn.Module, where: str, pooling: str, classes: int, size: int) -> fx.GraphModule:
    """The model up to `where`, with a head of `classes` outputs on what is pooled there.

    where: the name of a module, or several with + between. size: S of the input in pixels. Raises
    FtkitError if there is no such module, torch.fx cannot trace the model, or a module's output is
    not one of features over space.
    """
    tracer = _Recording()
    try:
        graph = tracer.trace(model.eval())
    except Exception:
        # A forward may do things that tracing does not support
        raise FtkitError(
            f"cut: expected a backbone that torch.fx can trace, found {type(model).__name__}. Leave cut empty"
        ) from None

    names = where.split("+")
    for name in names:
        if name not in tracer.outputs:
            near = [known for known in tracer.outputs if known.count(".") <= 1]
            raise FtkitError(f"cut: expected the name of a block, {choices(name, near)}")

    maps = [tracer.outputs[name] for name in names]
    with torch.inference_mode():
        values = fx.GraphModule(model, _up_to(graph, maps))(torch.zeros(1, 3, size, size))
    axes = [space_axes(value, name) for value, name in zip(values, names, strict=True)]
    pool = Pool(pooling, axes)
    with torch.inference_mode():
        features = pool(*values).shape[1]

    return _with_head(model, _up_to(graph, maps), pool, nn.Linear(features, classes))


def _up_to(graph: fx.Graph, maps: Sequence[fx.Node]) -> fx.Graph:
    """A copy of what these values need, with them as its output."""
    needed = needed_for(maps)
    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            made[node] = copied.node_copy(node, lambda source: made[source])
    copied.output(tuple(made[node] for node in maps))
    return copied


def space_axes(value: torch.Tensor, name: str) -> tuple[int, ...]:
    """Axes of space of a feature map."""
    shape = tuple(value.shape)
    if len(shape) == 4:
        return (1, 2) if shape[1] == shape[2] != shape[3] else (2, 3)
    if len(shape) == 3:
        return (1,)
    raise FtkitError(
        f"cut: expected a block that gives features over space, found shape {shape} of {name}. Try an earlier block"
    )


def _with_head(model: nn.Module, graph: fx.Graph, pool: Pool, head: nn.Linear) -> fx.GraphModule:
    """The graph with its maps pooled and classified."""
    held = nn.Module()
    for name, child in model.named_children():
        held.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        held.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        held.register_buffer(name, buffer)
    for name, value in vars(model).items():
        if isinstance(value, torch.Tensor):  # a constant of forward, which tracing put here
            held.register_buffer(name, value, persistent=False)

    held.add_module(POOL, pool)
    held.add_module(HEAD, head)
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        pooled = graph.call_module(POOL, tuple(output.args[0]))
        logits = graph.call_module(HEAD, (pooled,))
    output.args = (logits,)
    return fx.GraphModule(held, graph)
