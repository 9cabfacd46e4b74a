"""The operators that ONNX Runtime makes of a file, named by module, and matched with another file's.

    ran = ran_as(nodes, source, optimised)      # nodes: as the profiler names them
    parts_of(candidate, baseline)               # which operators of the two become one cause

An operator's place is the module whose weights it uses or follows, which survives optimisation. Places
of two files are aligned in order, by name and by what they do: names may differ, or be numbered anew
behind an added layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import onnx

INPUT = "input"  # the place of operators in front of the first weights
WEIGHTED = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "QGemm",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
)
NODE = ("name", "op", "provider", "shape")
# Endings that exporters, quantizers and ONNX Runtime give to a weight's or a value's name
WEIGHT_ENDINGS = re.compile(r"(\.weight|\.bias)?([_.](quantized|q|int8|nchwc|reordered))*$")
ADDED = re.compile(r"^fused |_nchwc(_token_\d+)?$|_token_\d+$")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A node of an optimised graph. place: the module it belongs to. shape: of its first output."""

    place: str
    name: str
    op: str
    provider: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What ONNX Runtime makes of a file. operators: in the order in which they run. kinds: place ->
    operators that the file itself has there."""

    operators: tuple[Operator, ...]
    kinds: Mapping[str, Counter[str]]


@dataclass(frozen=True)
class Part:
    """What becomes one cause: rows of the candidate's times less rows of the baseline's."""

    kind: str
    what: str
    new: tuple[int, ...] = ()
    old: tuple[int, ...] = ()


def ran_as(nodes: Sequence[Mapping[str, Any]], source: Path, optimised: Path) -> Ran:
    """Name the profiled nodes by module. source: the file; optimised: what ONNX Runtime made of it."""
    graph = onnx.load(source, load_external_data=False).graph
    places = _places(graph)
    kinds: dict[str, Counter[str]] = {}
    for node in graph.node:
        if node.output and node.output[0] in places:
            kinds.setdefault(places[node.output[0]], Counter())[node.op_type] += 1

    made: dict[str, str] = {}  # value of the optimised graph -> place
    by_name: dict[str, str] = {}
    unnamed: dict[str, list[str]] = {}  # operator -> places, in order
    for node in onnx.load(optimised, load_external_data=False).graph.node:
        names = [*node.output, node.name]
        names += [ADDED.sub("", name) for name in names]
        found = next((places[name] for name in names if name in places), None)
        if found is None:
            found = next((made[name] for name in node.input if name in made), INPUT)
        made.update(dict.fromkeys(node.output, found))
        if node.name:
            by_name[node.name] = found
        else:
            unnamed.setdefault(node.op_type, []).append(found)

    operators = []
    for told in nodes:
        place = by_name.get(told["name"])
        if place is None:
            left = unnamed.get(told["op"])
            place = left.pop(0) if left else INPUT
        operators.append(Operator(place=place, **{key: told[key] for key in NODE}))
    return Ran(operators=tuple(operators), kinds=kinds)


def _places(graph: onnx.GraphProto) -> dict[str, str]:
    """Value or node name -> the module whose weights made it, or were the last before it."""
    weights = {item.name for item in graph.initializer if len(item.dims) >= 2}
    weights |= {
        node.output[0]
        for node in graph.node
        if node.op_type == "Constant"
        and any(len(each.t.dims) >= 2 for each in node.attribute if each.name == "value")
    }
    stored: dict[str, str] = {name: name for name in weights}  # value -> the weight it is made of
    places: dict[str, str] = {}
    for node in graph.node:
        if node.input and node.input[0] in stored and node.op_type not in WEIGHTED:
            for name in node.output:  # a weight dequantized, transposed, cast
                stored[name] = stored[node.input[0]]
            continue
        place = next((places[name] for name in node.input if name in places), INPUT)
        if node.op_type in WEIGHTED:
            own = next((stored[name] for name in node.input if name in stored), None)
            if own is not None:
                named = WEIGHT_ENDINGS.sub("", own)
                place = named if named != own else node.name or node.output[0]
        for name in (*node.output, node.name):
            if name:
                places[name] = place
    return places


def parts_of(candidate: Ran, baseline: Ran) -> list[Part]:
    """Match the operators of two files; what becomes one cause each."""
    new, old = candidate.operators, baseline.operators
    parts: list[Part] = []
    added: dict[str, _Places] = {}  # what there is more of -> where
    for one, other in _aligned(_by_place(new), _by_place(old), new, old):
        place = one.name if one else other.name if other else INPUT
        news, olds = one.rows if one else [], other.rows if other else []
        pairs, fresh, gone = _matched(news, olds, new, old)
        before = baseline.kinds.get(other.name, Counter()) if other else Counter()
        more = (candidate.kinds.get(one.name, Counter()) if one else Counter()) - before
        # Of another precision: what it was fused with before means nothing
        other_kind = any(new[a].op.startswith("Q") != old[b].op.startswith("Q") for a, b in pairs)
        lost = _fusion_lost(fresh, gone, olds, before, new, old)
        if lost and not more and not other_kind:
            parts.append(Part("fusion", f"{lost} in {place}", tuple(news), tuple(olds)))
            continue
        parts += [_pair_part(place, new[a], old[b], a, b) for a, b in pairs]
        if fresh and more:  # with all that ONNX Runtime makes of it
            kinds = sorted(more)
            what = ", ".join(f"{{}} {kind}" for kind in kinds)
            counts = [more[kind] for kind in kinds]
            added.setdefault(f"new: {what}", _Places()).add(place, fresh, gone, counts)
            continue
        for row in fresh:
            added.setdefault(f"new: {{}} {new[row].op}", _Places()).add(place, [row], [], [1])
        for row in gone:
            added.setdefault(f"gone: {{}} {old[row].op}", _Places()).add(place, [], [row], [1])

    for what, found in added.items():
        named = f"{what.format(*found.counts)} {found.where}"
        parts.append(Part(what.split(":")[0], named, tuple(found.new), tuple(found.old)))
    return parts


def _fusion_lost(
    fresh: Sequence[int],
    gone: Sequence[int],
    olds: Sequence[int],
    before: Counter[str],
    new: Sequence[Operator],
    old: Sequence[Operator],
) -> str:
    """In words, operators that run by themselves now, and that the baseline's own file had, too, where
    ONNX Runtime made them part of others; "" where there are none.

    before: operators of the baseline's file there.
    """
    ran = Counter(old[row].op for row in olds)
    apart = sorted({new[row].op for row in fresh if ran[new[row].op] < before[new[row].op]})
    left = [old[row].op for row in gone]
    if not apart or set(apart) & set(left) or not olds:
        return ""
    fused = sorted({op for op in left if op not in before})
    if fused:
        return f"fusion lost: {' and '.join(apart)} instead of {' and '.join(fused)}"
    return f"fusion lost: {' and '.join(apart)} apart from {old[olds[0]].op}"


class _Places:
    """Where the same operators were added, or left out."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.new: list[int] = []
        self.old: list[int] = []
        self.counts: list[int] = []

    def add(
        self, place: str, new: Sequence[int], old: Sequence[int], counts: Iterable[int]
    ) -> None:
        """One more place, with its rows of both files, and how many of each kind."""
        self.names.append(place)
        self.new += new
        self.old += old
        more = list(counts)
        self.counts = [a + b for a, b in zip(self.counts or [0] * len(more), more, strict=True)]

    @property
    def where(self) -> str:
        """In words."""
        names = list(dict.fromkeys(self.names))
        if len(names) > 1:
            return f"in {len(names)} places"
        return "in front of the network" if names[0] == INPUT else f"after {names[0]}"


def _pair_part(place: str, new: Operator, old: Operator, one: int, other: int) -> Part:
    what = f"{place}: {new.op}" if place != INPUT else f"{new.op} in front of the network"
    if new.op != old.op:
        what += f" instead of {old.op}"
    if new.provider != old.provider:
        return Part(
            "provider", f"{what}, on {new.provider} instead of {old.provider}", (one,), (other,)
        )
    if new.shape != old.shape:
        what += f", {new.shape} instead of {old.shape}"
    return Part("operator", what, (one,), (other,))


@dataclass(frozen=True)
class _Place:
    """A module, and the rows of its operators."""

    name: str
    rows: list[int]


def _by_place(operators: Sequence[Operator]) -> list[_Place]:
    """In the order in which they first run."""
    rows: dict[str, list[int]] = {}
    for row, operator in enumerate(operators):
        rows.setdefault(operator.place, []).append(row)
    return [_Place(name, listed) for name, listed in rows.items()]


def _aligned(
    news: Sequence[_Place], olds: Sequence[_Place], new: Sequence[Operator], old: Sequence[Operator]
) -> list[tuple[_Place | None, _Place | None]]:
    """Every place of either file, once, beside what matches it in the other."""
    by_name = {place.name: place for place in olds}
    if {place.name for place in news} == by_name.keys():
        return [(place, by_name[place.name]) for place in news]

    pairs = dict(_best_alignment(_likeness(news, olds, new, old)))
    # What runs in another order is still known by its name
    taken = set(pairs.values())
    left = {olds[place].name: place for place in range(len(olds)) if place not in taken}
    for number, place in enumerate(news):
        if number not in pairs and place.name in left:
            pairs[number] = left[place.name]
    taken = set(pairs.values())
    return [
        *((place, olds[pairs[n]] if n in pairs else None) for n, place in enumerate(news)),
        *((None, place) for n, place in enumerate(olds) if n not in taken),
    ]


def _likeness(
    news: Sequence[_Place], olds: Sequence[_Place], new: Sequence[Operator], old: Sequence[Operator]
) -> np.ndarray[Any, Any]:
    """(places of the new file, of the old one): 1 for the same name, up to 1 for the same operators, and
    up to 2 for operators with the same shapes."""
    known: dict[tuple[Any, Any], float] = {}

    def what(place: _Place, file: Sequence[Operator]) -> tuple[tuple[str, str], ...]:
        return tuple((file[row].op, file[row].shape) for row in place.rows)

    mine, theirs = [what(place, new) for place in news], [what(place, old) for place in olds]
    found = np.zeros((len(news), len(olds)))
    for i, one in enumerate(mine):
        for j, other in enumerate(theirs):
            if (one, other) not in known:
                known[one, other] = _overlap([op for op, _ in one], [op for op, _ in other])
                known[one, other] += 2 * _overlap(one, other)
            found[i, j] = known[one, other] + (news[i].name == olds[j].name)
    return found


def _overlap(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Share of the longer list that both have."""
    return (Counter(one) & Counter(other)).total() / max(len(one), len(other))


def _best_alignment(likeness: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Pairs (row, column), both increasing, with the largest sum; none of likeness 0."""
    rows, columns = likeness.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            paired = best[i - 1, j - 1] + likeness[i - 1, j - 1]
            best[i, j] = max(paired, best[i - 1, j], best[i, j - 1])

    pairs = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs


def _matched(
    news: Sequence[int], olds: Sequence[int], new: Sequence[Operator], old: Sequence[Operator]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Operators of one place: matched pairs in order, new ones, and those that are gone."""
    kinds = [new[row].op for row in news], [old[row].op for row in olds]
    pairs = [
        (news[block.a + offset], olds[block.b + offset])
        for block in SequenceMatcher(None, *kinds, autojunk=False).get_matching_blocks()
        for offset in range(block.size)
    ]
    fresh = _others(news, (one for one, _ in pairs))
    gone = _others(olds, (other for _, other in pairs))
    # The operator with the weights, of another kind: Conv instead of QLinearConv
    heavy = [
        [row for row in rows if file[row].op in WEIGHTED]
        for rows, file in ((fresh, new), (gone, old))
    ]
    if len(heavy[0]) == len(heavy[1]) == 1:
        pairs.append((heavy[0][0], heavy[1][0]))
        fresh.remove(heavy[0][0])
        gone.remove(heavy[1][0])
    return pairs, fresh, gone


def _others(rows: Sequence[int], taken: Iterable[int]) -> list[int]:
    left = Counter(rows)
    left.subtract(taken)
    return [row for row in rows if left[row] > 0]
