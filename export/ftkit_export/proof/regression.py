"""Latency regression gate: ratio to a baseline with an interval, an A/A control, three outcomes.

    old, new = Condition(model="old.onnx", threads=1), Condition(model="new.onnx", threads=1)
    found = compare_latency(new, old, image="photo.png")
    found.verdict, found.ratio, found.low, found.high

Each fresh process opens the baseline twice and the candidate once, and runs the three in turn, in
changing order. Each round gives log(candidate / baseline), with the mean of both baseline sessions,
and the A/A control log(baseline / baseline). The ratio is the median over all rounds, its interval
a bootstrap over processes, then rounds; it is evaluated after 5, 10, 20, 40 and 80 processes, and
holds at all five looks jointly (95 %, Bonferroni). An interval alone is no gate: of 8 A/A
comparisons within one process, 2 excluded 1. So:

    passed         the upper bound is at most 1 + tolerance (5 %)
    failed         the lower bound exceeds 1 + margin, confirmed by a second round of fresh
                   processes; margin: the tolerance, or 3 standard deviations of the A/A control's
                   process medians if that is more
    inconclusive   neither within the time limit, or when more time could not settle it

So on a machine too noisy for the tolerance a slow model never passes: the result is inconclusive.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, Start, in_child, measure_start
from ftkit_export.runtime.verify import Outcome

# From one process: log ratios candidate / baseline, log ratios of the A/A control
Sample = tuple[Array, Array]

TOLERANCE = 0.05
# Cold starts of one model differ by several per cent: disk, page cache, the loader
COLD_TOLERANCE = 0.2
DRIFT = 0.15  # least margin against stored figures: repeated medians of a model spread by 14 %
LAYOUT = 0.1  # placement of large buffers: up to 8 % of memory, by a path's length alone
SECONDS = 120.0
LOOKS = (5, 10, 20, 40, 80)
GATE_ROUNDS = 40
FIRST_LOOK = LOOKS[0]
CONFIDENCE = 1 - 0.05 / len(LOOKS)
RESAMPLES = 2000
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
MEDIAN = 1.2533  # standard error of a median over that of a mean


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Ratio of candidate to baseline, with its interval.

    spread: standard deviation of the A/A control's process medians; margin: what the lower bound
    must exceed. Both are fractions (0.05 is 5 %).
    """

    ratio: float
    low: float
    high: float
    spread: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdict on one quantity.

    what: latency, cold start, memory, size. processes, seconds: that the verdict took.
    """

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
        """True only when the candidate is within the tolerance with confidence."""
        return self.verdict == "passed"


def estimate(samples: Sequence[Sample], tolerance: float) -> Estimate:
    """Hierarchical bootstrap of the median log ratio; seeded.

    The interval is at least as wide as the spread of the control implies.
    """
    rounds = min(len(ratios) for ratios, _ in samples)
    ratios = np.stack([item[:rounds] for item, _ in samples])
    rng = np.random.default_rng(0)
    processes = rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))
    picks = rng.integers(0, rounds, (RESAMPLES, len(ratios), rounds))
    medians = np.median(ratios[processes[:, :, None], picks].reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    spread = float(np.std([np.median(control) for _, control in samples], ddof=1))
    middle = float(np.median(ratios))
    # With few processes a bootstrap alone would be too narrow
    half = Z * MEDIAN * spread / math.sqrt(len(samples))

    return Estimate(
        ratio=math.exp(middle),
        low=math.exp(min(low, middle - half)),
        high=math.exp(max(high, middle + half)),
        spread=spread,
        margin=max(tolerance, math.expm1(3 * spread)),
    )


def decide(
    what: str,
    draw: Callable[[], Sample],
    *,
    tolerance: float = TOLERANCE,
    seconds: float = SECONDS,
    least: int = 2 * FIRST_LOOK,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Draw samples until the verdict is certain, or `seconds` would be exceeded.

    draw: measures in one fresh process. Raises FtkitError after the first one when a slow model
    leaves no time for `least` processes, by default two rounds.
    """
    begun = clock()
    drawn = 0

    def lasts(more: float) -> bool:
        spent = clock() - begun
        return spent + more * spent / max(1, drawn) <= seconds

    def settle() -> tuple[Estimate, Outcome]:
        nonlocal drawn
        samples: list[Sample] = []
        for look in LOOKS:
            while len(samples) < look:
                samples.append(draw())
                drawn += 1
                if drawn == 1 and (spent := clock() - begun) * least > 1.5 * seconds:
                    times = math.ceil(1.5 * spent * least / seconds)
                    raise FtkitError(
                        f"--seconds: expected time for {least} processes, found {spent:.1f} s for one and "
                        f"{seconds:.0f} s for all ({what}). Try {times} times as much"
                    )

            result = estimate(samples, tolerance)
            if result.high <= 1 + tolerance:
                return result, "passed"
            if result.low > 1 + result.margin:
                return result, "failed"

            more = _needed(result, tolerance, look) - look
            if math.isinf(more) or not lasts(max(more, look)):
                break

        return result, "inconclusive"

    result, outcome = settle()
    reason = _reason(result, outcome, tolerance)

    if outcome == "failed":
        if lasts(FIRST_LOOK):
            again, outcome = settle()
            reason = f"{_reason(again, outcome, tolerance)} in a second round; the first said {_percent(result.low)}"
            result = again
            outcome = "inconclusive" if outcome == "passed" else outcome
        else:
            reason = f"{reason}; no time was left for a second round, try more --seconds"
            outcome = "inconclusive"

    return Comparison(
        what=what,
        verdict=outcome,
        reason=reason,
        **vars(result),
        tolerance=tolerance,
        processes=drawn,
        seconds=clock() - begun,
    )


def _needed(result: Estimate, tolerance: float, processes: int) -> float:
    """Number of processes that would settle it, if the ratio is as estimated.

    The interval shrinks with their square root. Halved, since the estimate moves too; infinite
    between tolerance and margin, where no number settles it, and beyond the last look.
    """
    if processes < 2 * FIRST_LOOK:
        return 2 * processes

    ratio = result.ratio - 1
    half = (result.high - result.low) / 2
    away = max(tolerance - ratio, ratio - result.margin)
    needed = processes * (half / away) ** 2 / 2 if away > 0 else math.inf

    return needed if needed <= LOOKS[-1] else math.inf


def _reason(result: Estimate, outcome: Outcome, tolerance: float) -> str:
    if outcome == "passed":
        return f"at most {_percent(result.high)}, with 95 % confidence"
    if outcome == "failed":
        return f"at least {_percent(result.low)}, with 95 % confidence"
    if result.margin > tolerance:
        return f"too noisy to tell {tolerance:.0%}: the baseline differs from itself by {result.spread:.1%}"
    return f"too near to {tolerance:.0%} to decide in the time allowed"


def _percent(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'above' if ratio >= 1 else 'below'} the baseline"


def compare_latency(
    candidate: Condition,
    baseline: Condition,
    image: str | Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    seconds: float = SECONDS,
) -> Comparison:
    """Compare latencies: the regression gate.

    image: input for files exported by ftkit. Raises FtkitError when a model does not run.
    """
    each = seconds / (2 * FIRST_LOOK + 3)  # so that two rounds fit, including process starts
    turns = itertools.cycle(range(3))

    def draw() -> Sample:
        place = next(turns)  # a session's speed depends on its place in memory
        three = [baseline, baseline]
        three.insert(place, candidate)
        times = np.array(in_child("pairs", three, image, rounds=GATE_ROUNDS, seconds=each))
        return sample(times[:, place], *np.delete(times, place, axis=1).T)

    return decide("latency", draw, tolerance=tolerance, seconds=seconds)


def sample(candidate: Array, one: Array, other: Array) -> Sample:
    """Log ratios, and those of the A/A control, from the times of one process.

    Times (rounds,) of the candidate, and of the baseline twice.
    """
    return np.log(candidate) - (np.log(one) + np.log(other)) / 2, np.log(other / one)


def compare_starts(
    candidate: Condition,
    baseline: Condition,
    image: str | Path | None = None,
    *,
    seconds: float = SECONDS,
) -> tuple[Comparison, Comparison]:
    """Compare cold start and peak memory, in processes that do nothing else.

    Baseline, candidate and baseline again, in turn. Cold start: session and first run; importing
    ONNX Runtime does not depend on the model. Memory: from other processes, in which a path's
    length does not matter (`measure_start`). Raises FtkitError as compare_latency.
    """

    def draws(name: str, *, even_heap: bool) -> Callable[[], Sample]:
        orders = itertools.cycle(((0, 1, 2), (2, 1, 0)))

        def draw() -> Sample:
            starts = {
                place: measure_start(
                    (baseline, candidate, baseline)[place], image, steady=False, even_heap=even_heap
                )
                for place in next(orders)
            }
            return sample(*(np.array([getattr(starts[place], name)]) for place in (1, 0, 2)))

        return draw

    cold = decide(
        "cold start",
        draws("open_ms", even_heap=False),
        tolerance=COLD_TOLERANCE,
        seconds=seconds / 2,
        least=FIRST_LOOK,
    )

    # A file whose cold starts had time enough is not refused for memory
    left = max(seconds / 2, seconds - cold.seconds)
    return cold, decide("memory", draws("peak_rss_bytes", even_heap=True), seconds=left, least=1)


def compare_sizes(candidate: int, baseline: int) -> Comparison:
    """Compare file sizes in bytes: exact, so never inconclusive."""
    ratio = candidate / baseline
    result = Estimate(ratio=ratio, low=ratio, high=ratio, spread=0.0, margin=TOLERANCE)
    outcome: Outcome = "passed" if ratio <= 1 + TOLERANCE else "failed"
    reason = _percent(ratio)

    return Comparison(
        what="size",
        verdict=outcome,
        reason=reason,
        **vars(result),
        tolerance=TOLERANCE,
        processes=0,
        seconds=0.0,
    )


def compare_stored(
    now: Callable[[], Sequence[Start]], then: Sequence[Start], *, elsewhere: str = ""
) -> list[Comparison]:
    """Compare latency, cold start and memory with stored figures from another day.

    now: measures (called again to confirm a failure). elsewhere: in which way the figures are of another
    machine; "" for the same. Without a control in the same job, differences below 15 % of a time, or 10 %
    of memory, cannot be detected; on another machine, every result is inconclusive.
    """
    first = list(now())
    comparisons = [_stored(what, first, then, elsewhere) for what in STORED_FIGURES]
    if any(item.verdict == "failed" for item in comparisons):
        second = list(now())
        for place, item in enumerate(comparisons):
            if item.verdict == "failed":
                again = _stored(item.what, second, then, elsewhere)
                comparisons[place] = (
                    again
                    if again.verdict == "failed"
                    else replace(
                        item,
                        verdict="inconclusive",
                        reason="a second round did not confirm the first, which failed",
                    )
                )

    return comparisons


STORED_FIGURES = {
    "latency": ("p50_ms", DRIFT),
    "cold start": ("open_ms", COLD_TOLERANCE),
    "memory": ("peak_rss_bytes", LAYOUT),
}


def _stored(what: str, now: Sequence[Start], then: Sequence[Start], elsewhere: str) -> Comparison:
    name, tolerance = STORED_FIGURES[what]
    one, other = (np.log([getattr(start, name) for start in starts]) for starts in (now, then))
    rng = np.random.default_rng(0)
    picked = [
        np.median(logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))], axis=1)
        for logs in (one, other)
    ]
    low, high = np.quantile(picked[0] - picked[1], ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    spread = float(np.sqrt((np.var(one, ddof=1) + np.var(other, ddof=1)) / 2))
    result = Estimate(
        ratio=math.exp(np.median(one) - np.median(other)),
        low=math.exp(low),
        high=math.exp(high),
        spread=spread,
        margin=max(tolerance, math.expm1(3 * spread)),
    )

    outcome: Outcome = "inconclusive"
    if not elsewhere and result.high <= 1 + tolerance:
        outcome = "passed"
    elif not elsewhere and result.low > 1 + result.margin:
        outcome = "failed"

    reason = (
        f"{_reason(result, outcome, tolerance)}; from another day, so {tolerance:.0%} is the least that "
        "can be told"
    )
    if elsewhere:
        reason = f"advisory: the baseline is from another machine ({elsewhere})"

    return Comparison(
        what=what,
        verdict=outcome,
        reason=reason,
        **vars(result),
        tolerance=tolerance,
        processes=len(one),
        seconds=0.0,
    )
