"""Why is a model slower than its baseline? The difference, shared out among operators and causes.

    found = explain(Condition(model="new.onnx"), Condition(model="old.onnx"), image="photo.png")
    found.causes[0].what, found.causes[0].ms             # "new: 2 Cast after blocks.1.0.conv_pw", 0.8
    profile(Condition(model="model.onnx")).steps         # one file alone: its operators, slowest first

Each fresh process opens the baseline twice and the candidate once, and runs them in turn under ONNX
Runtime's profiler; `operators.py` matches their operators. A cause is blamed where its share exceeds
zero with 95 % confidence, all causes together (Bonferroni), and is no less than half a per cent of the
baseline's time. The interval is Student's t over the processes, and at least as wide as that of the
baseline's two sessions (A/A).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from ftkit_export.proof.operators import Operator, Ran, parts_of, ran_as
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, in_child
from ftkit_export.runtime.session import OPTIMISED

PROCESSES = 8
ROUNDS = 60
SECONDS = 4.0  # of one process
LEAST_SHARE = 0.005  # of the baseline's time, to be blamed
BETWEEN = "between operators"


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
    parts = parts_of(named[2], named[0])
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
    if provider != "cpu":
        raise FtkitError(
            f"--profile: expected the provider cpu, found {provider}, whose operators run later than "
            "they are called. Try --providers cpu, or NVIDIA Nsight"
        )


def _differences(candidate: Condition, baseline: Condition) -> list[tuple[str, str]]:
    """What differs between the conditions, in words, and its kind: one entry at most, since a single
    measurement cannot share out a difference among several."""
    found = []
    if candidate.threads != baseline.threads:
        counts = [str(each.threads or "all") for each in (baseline, candidate)]
        found.append((f"threads: {counts[0]} before, {counts[1]} now", "threads"))
    if candidate.optimised != baseline.optimised:
        words = ["on" if each.optimised else "off" for each in (baseline, candidate)]
        found.append(
            (f"ONNX Runtime's optimiser: {words[0]} before, {words[1]} now", "optimisation")
        )
    if candidate.frame != baseline.frame:
        found.append((f"frame: {baseline.frame} before, {candidate.frame} now", "frame"))
    if candidate.spinning != baseline.spinning:
        words = ["spin" if each.spinning else "sleep" for each in (baseline, candidate)]
        found.append((f"idle threads: {words[0]} before, {words[1]} now", "threads"))
    return [("; ".join(what for what, _ in found), found[0][1])] if found else []


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
