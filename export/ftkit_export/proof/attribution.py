"""Why is a model slower than its baseline? The difference, shared out among operators and causes.

    found = explain(Condition(model="new.onnx"), Condition(model="old.onnx"), image="photo.png")
    found.causes[0].what, found.causes[0].ms             # "new: 2 Cast after blocks.1.0.conv_pw", 0.8
    profile(Condition(model="model.onnx")).steps         # one file alone: its operators, slowest first

Each fresh process opens the baseline twice and the candidate once, and runs them in turn under ONNX
Runtime's profiler. Operators are named by the module whose weights they use or follow, which both
files share though their node names differ; where names differ too, modules are matched by operator,
shape and order. A cause is blamed where its share exceeds zero with 95 % confidence, all causes together
(Bonferroni), and is no less than half a per cent of the baseline's time. The interval is Student's t
over the processes, and at least as wide as that of the baseline's two sessions (A/A).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scipy import stats

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, in_child
from ftkit_export.runtime.session import OPTIMISED, PROVIDERS

PROCESSES = 8
ROUNDS = 60
SECONDS = 4.0  # of one process
LEAST_SHARE = 0.005  # of the baseline's time, to be blamed
INPUT = "input"  # the place of operators in front of the first weights
BETWEEN = "between operators"
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
ACTIVATIONS = ("Relu", "Clip", "HardSigmoid", "HardSwish", "Sigmoid", "LeakyRelu", "Tanh")
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


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operator with its time in ms, mean over processes, and its share of a run."""

    operator: Operator
    ms: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A file's operators, slowest first. total_ms: of a run under the profiler; between_ms: what no
    operator accounts for."""

    total_ms: float
    between_ms: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A part of the difference. what: in words; ms, with bounds that hold for all causes together.

    kind: operator (one that both files have), new, gone, fusion (lost), provider, threads,
    optimisation, frame, or between.
    """

    kind: str
    what: str
    ms: float
    low: float
    high: float
    blamed: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The whole difference in ms, candidate less baseline, with its 95 % bounds; and its causes: the
    blamed ones first, then by size."""

    ms: float
    low: float
    high: float
    baseline_ms: float
    causes: tuple[Cause, ...]

    @property
    def blamed(self) -> tuple[Cause, ...]:
        """The causes that surely cost time."""
        return tuple(cause for cause in self.causes if cause.blamed)


@dataclass(frozen=True)
class _Part:
    """What becomes one cause: rows of the candidate's times less rows of the baseline's."""

    kind: str
    what: str
    new: tuple[int, ...] = ()
    old: tuple[int, ...] = ()


def profile(
    condition: Condition, image: str | Path | None = None, *, processes: int = 3
) -> Profile:
    """Time each operator of one file. Raises FtkitError for another provider than cpu."""
    require_cpu(condition.provider)
    times, totals, (ran,) = _run([condition], image, processes)
    (ms,) = (table.mean(0) for table in times)
    total = float(totals[:, 0].mean())
    steps = [
        Step(operator=operator, ms=float(took), share=float(took) / total)
        for operator, took in zip(ran.operators, ms, strict=True)
    ]
    return Profile(
        total_ms=total,
        between_ms=max(0.0, total - float(ms.sum())),
        steps=tuple(sorted(steps, key=lambda step: -step.ms)),
    )


def explain(
    candidate: Condition,
    baseline: Condition,
    image: str | Path | None = None,
    *,
    processes: int = PROCESSES,
) -> Explanation:
    """Share out the difference in time between two files, or conditions.

    Raises FtkitError for another provider than cpu, whose operators run later than their calls, and
    when a file does not run.
    """
    for condition in (candidate, baseline):
        require_cpu(condition.provider)
    alike = replace(baseline, model=candidate.model)
    conditions = [baseline, baseline, alike]
    if alike != candidate:
        conditions.append(candidate)

    times, totals, named = _run(conditions, image, processes)
    one, other, new = times[:3]
    control = totals[:, 1] - totals[:, 0]
    parts = _parts(named[2], named[0])
    count = len(parts) + 1 + len(_differences(candidate, baseline))
    every = totals[:, -1] - totals[:, :2].mean(1)
    ms, low, high = _bounds(every, control, 1)
    level = LEAST_SHARE * float(totals[:, :2].mean())

    causes = []
    for what, kind in _differences(candidate, baseline):
        causes.append(_cause(kind, what, totals[:, -1] - totals[:, 2], control, count, level))
    for part in parts:
        old = (one[:, part.old].sum(1) + other[:, part.old].sum(1)) / 2
        noise = other[:, part.old].sum(1) - one[:, part.old].sum(1)
        moved = new[:, part.new].sum(1) - old
        causes.append(_cause(part.kind, part.what, moved, noise, count, level))
    within = new.sum(1) - (one.sum(1) + other.sum(1)) / 2
    rest = totals[:, 2] - totals[:, :2].mean(1) - within
    causes.append(_cause("between", BETWEEN, rest, control, count, level))

    causes.sort(key=lambda cause: (not cause.blamed, -abs(cause.ms)))
    return Explanation(
        ms=ms,
        low=low,
        high=high,
        baseline_ms=float(totals[:, :2].mean()),
        causes=tuple(causes),
    )


def require_cpu(provider: str) -> None:
    """Raise FtkitError for a provider whose operators only start when they are called."""
    if PROVIDERS[provider].gpu:
        raise FtkitError(
            f"--profile: expected the provider cpu, found {provider}, whose operators run later than "
            "they are called. Try --providers cpu, or NVIDIA Nsight"
        )


def _differences(candidate: Condition, baseline: Condition) -> list[tuple[str, str]]:
    """What differs between the conditions, in words, and its kind."""
    found = []
    if candidate.threads != baseline.threads:
        counts = [str(each.threads or "all") for each in (baseline, candidate)]
        found.append((f"threads: {counts[0]} before, {counts[1]} now", "threads"))
    if candidate.optimised != baseline.optimised:
        words = ["on" if each.optimised else "off" for each in (baseline, candidate)]
        found.append(
            (f"ONNX Runtime's optimiser: {words[0]} before, {words[1]} now", "optimisation")
        )
    if candidate.provider != baseline.provider:
        found.append(
            (f"provider: {baseline.provider} before, {candidate.provider} now", "provider")
        )
    if candidate.frame != baseline.frame:
        found.append((f"frame: {baseline.frame} before, {candidate.frame} now", "frame"))
    if candidate.spinning != baseline.spinning:
        words = ["spin" if each.spinning else "sleep" for each in (baseline, candidate)]
        found.append((f"idle threads: {words[0]} before, {words[1]} now", "threads"))
    return found[:1]  # a single measurement cannot share it out among several


def _run(
    conditions: Sequence[Condition], image: str | Path | None, processes: int
) -> tuple[list[Array], Array, list[Ran]]:
    """Per condition times (processes, operators); totals (processes, conditions); what ran."""
    tables: list[list[list[float]]] = [[] for _ in conditions]
    totals = []
    named: list[Ran] = []
    for number in range(processes):
        shift = number % len(conditions)
        order = [*range(shift, len(conditions)), *range(shift)]
        if number % 2:
            order.reverse()
        with tempfile.TemporaryDirectory() as scratch:
            told = in_child(
                "profile",
                [conditions[place] for place in order],
                image,
                rounds=ROUNDS,
                seconds=SECONDS,
                folder=scratch,
            )
            by_place = {place: told[index] for index, place in enumerate(order)}
            if not named:
                named = [
                    ran_as(
                        by_place[place]["nodes"],
                        Path(conditions[place].model),
                        Path(scratch) / str(order.index(place)) / OPTIMISED,
                    )
                    for place in range(len(conditions))
                ]
        for place, table in enumerate(tables):
            table.append([node["ms"] for node in by_place[place]["nodes"]])
        totals.append([by_place[place]["total_ms"] for place in range(len(conditions))])
    return [np.array(table) for table in tables], np.array(totals), named


def _bounds(moved: Array, noise: Array, count: int) -> tuple[float, float, float]:
    """Mean over processes, with bounds that hold for `count` of them together."""
    middle = float(moved.mean())
    spread = max(float(moved.std(ddof=1)), math.sqrt(0.75) * float(noise.std(ddof=1)))
    quantile = float(stats.t.ppf(1 - 0.025 / count, len(moved) - 1))
    reach = quantile * spread / math.sqrt(len(moved))
    return middle, middle - reach, middle + reach


def _cause(kind: str, what: str, moved: Array, noise: Array, count: int, least: float) -> Cause:
    ms, low, high = _bounds(moved, noise, count)
    blamed = low > 0 and ms >= least
    return Cause(kind=kind, what=what, ms=ms, low=low, high=high, blamed=blamed)


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


def _parts(candidate: Ran, baseline: Ran) -> list[_Part]:
    """Match the operators of two files; what becomes one cause each."""
    new, old = candidate.operators, baseline.operators
    parts: list[_Part] = []
    added: dict[str, _Places] = {}  # what there is more of -> where
    for place, news, olds in _matched_places(new, old):
        pairs, fresh, gone = _matched(news, olds, new, old)
        before = baseline.kinds.get(place, Counter())
        more = candidate.kinds.get(place, Counter()) - before
        apart = sorted({new[row].op for row in fresh} & before.keys() & set(ACTIVATIONS))
        if fresh and more:  # with all that ONNX Runtime makes of it
            kinds = sorted(more)
            what = ", ".join(f"{{}} {kind}" for kind in kinds)
            counts = [more[kind] for kind in kinds]
            added.setdefault(f"new: {what}", _Places()).add(place, news, olds, counts)
        elif apart and pairs and not any(old[row].op in ACTIVATIONS for row in olds):
            what = f"fusion lost: {' and '.join(apart)} apart from {old[olds[0]].op} in {place}"
            parts.append(_Part("fusion", what, tuple(news), tuple(olds)))
        else:
            parts += [_pair_part(place, new[a], old[b], a, b) for a, b in pairs]
            for row in fresh:
                added.setdefault(f"new: {{}} {new[row].op}", _Places()).add(place, [row], [], [1])
            for row in gone:
                added.setdefault(f"gone: {{}} {old[row].op}", _Places()).add(place, [], [row], [1])

    for what, found in added.items():
        named = f"{what.format(*found.counts)} {found.where}"
        parts.append(_Part(what.split(":")[0], named, tuple(found.new), tuple(found.old)))
    return parts


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


def _pair_part(place: str, new: Operator, old: Operator, one: int, other: int) -> _Part:
    what = f"{place}: {new.op}" if place != INPUT else f"{new.op} in front of the network"
    if new.op != old.op:
        what += f" instead of {old.op}"
    if new.provider != old.provider:
        return _Part(
            "provider", f"{what}, on {new.provider} instead of {old.provider}", (one,), (other,)
        )
    if new.shape != old.shape:
        what += f", {new.shape} instead of {old.shape}"
    return _Part("operator", what, (one,), (other,))


def _matched_places(
    new: Sequence[Operator], old: Sequence[Operator]
) -> list[tuple[str, list[int], list[int]]]:
    """(place, rows of the new file, rows of the old one) for every place of either file."""
    news, olds = _by_place(new), _by_place(old)
    shared = news.keys() & olds.keys()
    if len(shared) * 2 < max(len(news), len(olds)):  # named otherwise: by what they do, in order
        mine, theirs = (
            [tuple((file[row].op, file[row].shape) for row in rows) for rows in places.values()]
            for file, places in ((new, news), (old, olds))
        )
        names, others = list(news), list(olds)
        renamed = {}
        for block in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
            for offset in range(block.size):
                renamed[others[block.b + offset]] = names[block.a + offset]
        olds = {renamed.get(place, place): rows for place, rows in olds.items()}
    return [
        (place, news.get(place, []), olds.get(place, [])) for place in dict.fromkeys([*news, *olds])
    ]


def _by_place(operators: Sequence[Operator]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, operator in enumerate(operators):
        rows.setdefault(operator.place, []).append(row)
    return rows


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
