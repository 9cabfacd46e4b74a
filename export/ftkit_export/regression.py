"""Is the candidate slower than the baseline? A gate with an interval, an A/A control, and an honest "inconclusive".

    found = compare(Condition(model="new.onnx", threads=1), Condition(model="old.onnx", threads=1), image="photo.png")
    found.verdict, found.ratio, found.low, found.high

Each fresh process holds the baseline twice and the candidate once, and runs the three in turn, in changing order. Each
round gives log(candidate / baseline), the baseline being the mean of both, and the A/A control log(baseline /
baseline). At least five processes; the ratio is the median over all rounds, its 95 % interval a bootstrap over
processes, then rounds. An interval alone is no gate: of 8 A/A comparisons within one process, 2 excluded 1. So:

    passed         the upper bound is at most 1 + tolerance (5 %)
    failed         the lower bound exceeds 1 + margin, and a second round of fresh processes says so too; margin: the
                   tolerance, or 3 standard deviations of the A/A control's process medians when that is more
    inconclusive   neither, by the time that is allowed, or when more of it could not settle the matter

A machine too noisy for the tolerance therefore never passes a slow model: it says inconclusive.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftkit_export.latency import Condition, Start, begin, in_child

Array = np.ndarray[Any, Any]
Outcome = Literal["passed", "failed", "inconclusive"]
Sample = tuple[Array, Array]  # of one process: log ratios candidate / baseline, log ratios of the A/A control

TOLERANCE = 0.05
COLD_TOLERANCE = 0.2  # cold starts of one model differ by several per cent: disk, page cache, the loader
DRIFT = 0.15  # the least margin against figures from another day: sequential medians of one model spread by 14 %
SECONDS = 120.0
PROCESSES, MOST, ROUNDS = 5, 100, 40
LEVEL, RESAMPLES = 0.95, 1000
Z95, MEDIAN = 1.959964, 1.2533  # normal quantile; a median's standard error over a mean's


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Candidate over baseline: ratio with its 95 % interval; spread: standard deviation of the A/A control's process
    medians; margin: what the lower bound must exceed. All but the ratios are shares (0.05 is 5 %)."""

    ratio: float
    low: float
    high: float
    spread: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One quantity judged. what: latency, cold start, memory, size. processes, seconds: what the answer took."""

    what: str
    verdict: Outcome
    reason: str
    ratio: float
    low: float
    high: float
    spread: float
    margin: float
    tolerance: float
    processes: int
    seconds: float

    @property
    def passed(self) -> bool:
        """True only when it is sure that the candidate is within the tolerance."""
        return self.verdict == "passed"


def estimate(samples: Sequence[Sample], tolerance: float) -> Estimate:
    """Hierarchical bootstrap of the median log ratio, and no narrower than the control's spread allows; seeded."""
    rounds = min(len(ratios) for ratios, _ in samples)
    ratios = np.stack([item[:rounds] for item, _ in samples])
    rng = np.random.default_rng(0)
    processes = rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))
    picks = rng.integers(0, rounds, (RESAMPLES, len(ratios), rounds))
    medians = np.median(ratios[processes[:, :, None], picks].reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    spread, middle = float(np.std([np.median(control) for _, control in samples], ddof=1)), float(np.median(ratios))
    half = Z95 * MEDIAN * spread / math.sqrt(len(samples))  # few processes: a bootstrap alone would be too narrow
    return Estimate(ratio=math.exp(middle), low=math.exp(min(low, middle - half)),
                    high=math.exp(max(high, middle + half)), spread=spread,
                    margin=max(tolerance, math.expm1(3 * spread)))  # fmt: skip


def decide(what: str, draw: Callable[[], Sample], *, tolerance: float = TOLERANCE, seconds: float = SECONDS) -> Verdict:
    """Draw samples until the answer is sure, or `seconds` would be over. draw: measures in one fresh process."""
    begun, drawn = time.perf_counter(), 0

    def lasts(more: float) -> bool:
        spent = time.perf_counter() - begun
        return spent + more * spent / max(1, drawn) <= seconds

    def settle() -> tuple[Estimate, Outcome]:
        nonlocal drawn
        samples: list[Sample] = []
        while True:
            samples.append(draw())
            drawn += 1
            if len(samples) < PROCESSES:
                continue
            found = estimate(samples, tolerance)
            if found.high <= 1 + tolerance:
                return found, "passed"
            if found.low > 1 + found.margin:
                return found, "failed"
            more = _needed(found, tolerance, len(samples)) - len(samples)
            if len(samples) >= MOST or math.isinf(more) or not lasts(more):
                return found, "inconclusive"

    found, outcome = settle()
    reason = _reason(found, outcome, tolerance)
    if outcome == "failed":
        if lasts(PROCESSES):
            again, outcome = settle()
            reason = f"{_reason(again, outcome, tolerance)} in a second round; the first said {_percent(found.low)}"
            found, outcome = again, "inconclusive" if outcome == "passed" else outcome
        else:
            reason, outcome = f"{reason}; no time was left for a second round", "inconclusive"
    return Verdict(what=what, verdict=outcome, reason=reason, **vars(found), tolerance=tolerance, processes=drawn,
                   seconds=time.perf_counter() - begun)  # fmt: skip


def _needed(found: Estimate, tolerance: float, processes: int) -> float:
    """How many processes will settle it, were the ratio what it seems: the interval shrinks with their square root.

    Halved, since the estimate moves too; infinite between the tolerance and the margin, where no number settles it.
    """
    if processes < 2 * PROCESSES:
        return processes + 1
    ratio, half = found.ratio - 1, (found.high - found.low) / 2
    away = max(tolerance - ratio, ratio - found.margin)
    return max(processes + 1, processes * (half / away) ** 2 / 2) if away > 0 else math.inf


def _reason(found: Estimate, outcome: Outcome, tolerance: float) -> str:
    if outcome == "passed":
        return f"at most {_percent(found.high)}, with 95 % confidence"
    if outcome == "failed":
        return f"at least {_percent(found.low)}, with 95 % confidence"
    if found.margin > tolerance:
        return f"too noisy to tell {tolerance:.0%}: the baseline differs from itself by {found.spread:.1%}"
    return f"too near to {tolerance:.0%} to be told in the time allowed"


def _percent(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'above' if ratio >= 1 else 'below'} the baseline"


def compare(
    candidate: Condition, baseline: Condition, image: str | Path | None = None, *, tolerance: float = TOLERANCE,
    seconds: float = SECONDS,
) -> Verdict:  # fmt: skip
    """The latency gate. image: what ftkit's own files are fed with. Raises FtkitError when a model does not run."""
    each = seconds / (2 * PROCESSES + 2)  # two rounds fit, whatever the model
    turns = itertools.cycle(range(3))

    def draw() -> Sample:
        place = next(turns)  # a session's place in memory has its own speed
        three = [baseline, baseline]
        three.insert(place, candidate)
        times = np.array(in_child("pairs", three, image, rounds=ROUNDS, seconds=each))
        return sample(times[:, place], *np.delete(times, place, axis=1).T)

    return decide("latency", draw, tolerance=tolerance, seconds=seconds)


def sample(candidate: Array, one: Array, other: Array) -> Sample:
    """Times (rounds,) of the candidate and of the baseline twice -> log ratios and their A/A control."""
    return np.log(candidate) - (np.log(one) + np.log(other)) / 2, np.log(other / one)


def compare_starts(
    candidate: Condition, baseline: Condition, image: str | Path | None = None, *, seconds: float = SECONDS
) -> tuple[Verdict, Verdict]:
    """Cold start and peak memory, of processes that do nothing else: baseline, candidate and baseline again, in turn.

    Cold start: session and first run; importing ONNX Runtime is not the model's doing. Both are told from the same
    processes. Raises FtkitError as compare.
    """
    drawn: list[list[Sample]] = []

    def take(number: int, which: int) -> Sample:
        if number == len(drawn):
            order = (2, 1, 0) if number % 2 else (0, 1, 2)
            starts = {place: begin((baseline, candidate, baseline)[place], image) for place in order}
            drawn.append([sample(*(np.array([getattr(starts[place], name)]) for place in (1, 0, 2)))
                          for name in ("open_ms", "peak_rss_bytes")])  # fmt: skip
        return drawn[number][which]

    numbers = itertools.count(), itertools.count()
    cold = decide("cold start", lambda: take(next(numbers[0]), 0), tolerance=COLD_TOLERANCE, seconds=seconds)
    return cold, decide("memory", lambda: take(next(numbers[1]), 1), seconds=seconds)


def compare_sizes(candidate: int, baseline: int) -> Verdict:
    """File sizes in bytes: exact, so there is nothing to be unsure of."""
    ratio = candidate / baseline
    found = Estimate(ratio=ratio, low=ratio, high=ratio, spread=0.0, margin=TOLERANCE)
    outcome: Outcome = "passed" if ratio <= 1 + TOLERANCE else "failed"
    reason = _percent(ratio)
    return Verdict(what="size", verdict=outcome, reason=reason, **vars(found), tolerance=TOLERANCE, processes=0,
                   seconds=0.0)  # fmt: skip


def compare_stored(now: Sequence[Start], then: Sequence[Start], *, same_machine: bool) -> list[Verdict]:
    """Latency, cold start and memory against figures of another day. No control in the same job, so the margin is 15 %
    at least; on another machine nothing is sure."""
    found = []
    for what, name, tolerance in (
        ("latency", "p50_ms", TOLERANCE),
        ("cold start", "open_ms", COLD_TOLERANCE),
        ("memory", "peak_rss_bytes", TOLERANCE),
    ):
        one, other = (np.log([getattr(start, name) for start in starts]) for starts in (now, then))
        rng = np.random.default_rng(0)
        picked = [np.median(logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))], axis=1) for logs in (one, other)]
        low, high = np.quantile(picked[0] - picked[1], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        spread = float(np.sqrt((np.var(one, ddof=1) + np.var(other, ddof=1)) / 2))
        drift = 0.0 if what == "memory" else DRIFT  # memory does not change with the hour
        item = Estimate(ratio=math.exp(np.median(one) - np.median(other)), low=math.exp(low), high=math.exp(high),
                        spread=spread, margin=max(tolerance, drift, math.expm1(3 * spread)))  # fmt: skip
        outcome: Outcome = "inconclusive"
        if same_machine and item.high <= 1 + tolerance:
            outcome = "passed"
        elif same_machine and item.low > 1 + item.margin:
            outcome = "failed"
        reason = _reason(item, outcome, tolerance) if same_machine else "advisory: the baseline is from another machine"
        found.append(Verdict(what=what, verdict=outcome, reason=reason, **vars(item), tolerance=tolerance,
                             processes=len(one), seconds=0.0))  # fmt: skip
    return found
