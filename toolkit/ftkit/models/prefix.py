"""Split the model at the frozen prefix, whose outputs are computed once and cached.

    graph = trace(model)                                   # None if the backbone cannot be traced
    nodes = frontier(graph, trained)                       # values that leave the frozen part
    prefix = frozen_part(graph, [nodes])                   # pixels -> those values
    suffix = trained_part(graph, nodes)                    # values -> logits; shares parameters

torch.fx (Reed et al., MLSys 2022) records the graph. A node is frozen if everything it depends on
is: parameters that do not train and modules in eval mode. An active dropout is never frozen, since
it differs in every pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ftkit.utils.compat import BatchNorm, get_notrace_functions, get_notrace_modules

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout2d, torch.dropout)


class Tracer(fx.Tracer):
    """Traces a model for torch.fx, with the leaves that timm declares."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """The model's graph in its current train/eval modes, or None if torch.fx cannot trace it."""
    try:
        tracer = Tracer()
        defaults = _defaulted_arguments(model)
        return fx.GraphModule(model, tracer.trace(model, concrete_args=defaults))
    except Exception:
        # A forward may do things that tracing does not support; the stage then runs live.
        return None


def _defaulted_arguments(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        item.name: item.default
        for item in parameters
        if item.default is not inspect.Parameter.empty
    }


def _trains(graph: fx.GraphModule, node: fx.Node, trained: Callable[[str], bool]) -> bool:
    if node.op == "get_attr":
        return trained(str(node.target))

    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        names = [name for name, _ in module.named_parameters()]
        if any(trained(f"{node.target}.{name}") for name in names):
            return True
        if isinstance(module, BatchNorm):
            return module.training
        return isinstance(module, DROPOUTS) and module.training and module.p > 0

    if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
        rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        on = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return bool(on) and bool(rate)

    return False


def frontier(graph: fx.GraphModule, trained: Callable[[str], bool]) -> list[fx.Node]:
    """Frozen values used by the trained part, in graph order; empty if it uses the input itself.

    trained(name): whether the parameter of that name trains.
    """
    moving: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        if _trains(graph, node, trained) or any(
            source in moving for source in node.all_input_nodes
        ):
            moving.add(node)

    crossing = []
    for node in graph.graph.nodes:
        if node in moving or node.op in ("get_attr", "output"):
            continue
        if any(user in moving or user.op == "output" for user in node.users):
            crossing.append(node)

    return [] if any(node.op == "placeholder" for node in crossing) else crossing


def needed_for(roots: Sequence[fx.Node], given: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Everything `roots` depend on, including themselves, without going beyond `given`."""
    needed: set[fx.Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in given:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def frozen_part(graph: fx.GraphModule, cuts: Sequence[Sequence[fx.Node]]) -> fx.GraphModule:
    """pixels -> the values of all cuts, each once, in graph order: one pass serves every stage."""
    wanted = {node for cut in cuts for node in cut}
    needed = needed_for(list(wanted))

    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node in needed:
            made[node] = copied.node_copy(node, lambda source: made[source])

    copied.output(tuple(made[node] for node in graph.graph.nodes if node in wanted))
    copied.lint()
    return fx.GraphModule(graph, copied)


def trained_part(graph: fx.GraphModule, cut: Sequence[fx.Node]) -> fx.GraphModule:
    """The values of one cut, in graph order -> logits; shares its parameters with the model."""
    needed = needed_for([node for node in graph.graph.nodes if node.op == "output"], given=cut)
    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {
        node: copied.placeholder(f"cut_{number}") for number, node in enumerate(cut)
    }

    for node in graph.graph.nodes:
        if node in needed:
            made[node] = copied.node_copy(node, lambda source: made[source])

    copied.lint()
    return fx.GraphModule(graph, copied)
