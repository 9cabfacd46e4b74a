"""Does a model keep its speed? Warm-up told from throttling, throttling from a regression.

    course = run_on(Condition(model="model.onnx"), image="photo.png", seconds=600)
    course.throttled_s, course.sustained.p50_ms, course.why

The course is cut into stretches of even speed: binary segmentation of the windows' mean times, a cut
kept where both sides differ by 5 % and by far more than their noise. A first stretch that is slower
than what follows is warm-up. Throttling begins with the first stretch, after a fast one, that is
10 % slower than the fastest; it may come and go. A baseline, run in turn with the model, throttles
alike: so its own course tells of the machine, and the ratio of both tells of the model. Throttling is
looked for in mean times, which pauses of a processor (a CPU quota's, say) add to; the ratio is of
medians, which leave out pauses that happened to fall on one of the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, in_child
from ftkit_export.runtime.verify import Outcome

LEAST_STEP = 0.05  # between stretches: a smaller change is none
SLOWER = 0.10  # than the fastest stretch: throttled
SURE = 5.0  # standard errors between the sides of a cut
FEWEST = 4  # windows in a stretch
APART = 5  # windows that hardly depend on each other
LEAST_NOISE = 0.002  # of a window: clocks and schedulers are no better
MOST_ALIKE = 0.9
WARM_UP_SHARE = 0.25  # of the course, at most
SAME_PROCESS = 0.10  # two sessions of one model in one process may differ by that
SHORTEST_S = 20.0
SLOW_SHARE = 0.05  # of the windows: less is no throttling
WITHIN = (np.arange(20) + 0.5) / 20  # quantiles that stand for a window's runs


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of even speed: its windows from `first` to before `last`, and the mean time of a run."""

    first: int
    last: int
    mean_ms: float


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """Latency of the runs once it has settled: throttled, on and off or for good, where it throttles."""

    mean_ms: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class Course:
    """The course of a model that ran without a pause.

    windows: as runtime/sustained.py has them. warm_up_s: 0 without one. throttled_s: time to
    throttling, None without. throttled_share: of the time from then on that is slow, less than 1 where it
    throttles on and off. slowdown: sustained over fastest, of what ran in turn. why: what the
    system says of it, in words. ratio, with bounds: of the model's median to the baseline's; None
    without one. It fails beyond `margin`, which grows with what the two sessions of the baseline differ
    by, and passes within `tolerance`, which does not.
    """

    windows: Sequence[Mapping[str, Any]]
    seconds: float
    warm_up_s: float
    throttled_s: float | None
    throttled_share: float
    slowdown: float
    sustained: Sustained
    why: tuple[str, ...]
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    margin: float = 0.0
    tolerance: float = 0.0

    @property
    def verdict(self) -> Outcome | None:
        """Of the comparison with the baseline; None without one."""
        if self.ratio is None or self.ratio_low is None or self.ratio_high is None:
            return None
        if self.ratio_low > 1 + self.margin:
            return "failed"
        return "passed" if self.ratio_high <= 1 + self.tolerance else "inconclusive"


def run_on(
    candidate: Condition,
    baseline: Condition | None = None,
    *,
    image: str | Path | None = None,
    seconds: float,
    tolerance: float = 0.05,
    run: Callable[..., dict[str, Any]] = in_child,
) -> Course:
    """Run a model for `seconds` without a pause, in turn with a baseline if there is one.

    run: does it, by default in a process of its own here. Raises FtkitError for less than 20 seconds,
    and as latency.measure.
    """
    if seconds < SHORTEST_S:
        raise FtkitError(
            f"--sustained: expected at least {SHORTEST_S:.0f} s, found {seconds:g}. Try 10m"
        )
    # The baseline twice, as a control
    conditions = [candidate, baseline, baseline] if baseline else [candidate]
    told = run("sustained", conditions, image, seconds=seconds)
    return judged(told["windows"], tolerance)


def judged(windows: Sequence[Mapping[str, Any]], tolerance: float = 0.05) -> Course:
    """Judge a course of the model alone, or of the model and the baseline twice.

    Raises FtkitError for a course of fewer windows than two stretches have.
    """
    if len(windows) < 2 * FEWEST:
        spent = windows[-1]["until_s"]
        raise FtkitError(
            f"--sustained: expected at least {2 * FEWEST} windows of five runs, found {len(windows)} in {spent:.0f} s. "
            f"Try {math.ceil(2 * spent * 2 * FEWEST / len(windows)):d}s"
        )
    means = np.array([window["mean_ms"] for window in windows])
    ends = np.array([window["until_s"] for window in windows])
    judge = means[:, 0] if means.shape[1] == 1 else means[:, 1:].mean(1)
    parts = stretches(judge)
    warm = _warm_up(parts, len(judge))
    settled = parts[warm:]
    fastest = min(settled, key=lambda part: part.mean_ms)
    slow = _slow(settled, fastest.mean_ms)
    start = slow[0].first if slow else settled[0].first
    own = windows[start:]
    lengths = np.diff(ends, prepend=0.0)
    throttled = [window for part in slow for window in range(part.first, part.last)]

    course = Course(
        windows=windows,
        seconds=float(ends[-1]),
        warm_up_s=float(ends[settled[0].first - 1]) if settled[0].first else 0.0,
        throttled_s=float(ends[start - 1]) if slow else None,
        throttled_share=float(lengths[throttled].sum() / lengths[start:].sum()) if slow else 0.0,
        slowdown=float(np.median(judge[throttled])) / fastest.mean_ms if slow else 1.0,
        sustained=_settled(own, lengths[start:] / means[start:].sum(1)),
        why=_why(windows[fastest.first : fastest.last], [windows[each] for each in throttled])
        if slow
        else (),
    )
    if means.shape[1] == 1:
        return course

    logs = np.log([window["p50_ms"] for window in windows[settled[0].first :]])
    ratios = logs[:, 0] - logs[:, 1:].mean(1)
    middle = float(np.median(ratios))
    error = _Noise.of(ratios).error(len(ratios))
    reach = float(stats.t.ppf(0.975, len(ratios) - 1)) * error
    control = abs(float(np.median(logs[:, 2] - logs[:, 1])))
    return Course(
        **{
            **vars(course),
            "ratio": math.exp(middle),
            "ratio_low": math.exp(middle - reach),
            "ratio_high": math.exp(middle + reach),
            "margin": max(tolerance, SAME_PROCESS, math.expm1(3 * control)),
            "tolerance": max(tolerance, SAME_PROCESS),
        }
    )


def stretches(values: Array) -> list[Stretch]:
    """Cut a course (n,) of times into stretches of even speed."""
    logs = np.log(values)
    cuts = sorted([0, *_cuts(logs, 0, len(logs)), len(logs)])
    return [
        Stretch(first=first, last=last, mean_ms=float(np.exp(np.median(logs[first:last]))))
        for first, last in itertools.pairwise(cuts)
    ]


def _cuts(logs: Array, first: int, last: int) -> list[int]:
    """Where logs[first:last] is to be cut: where both sides are most even, if their levels surely
    differ; then its sides alike."""
    places = range(first + FEWEST, last - FEWEST + 1)
    if not places:
        return []
    best = min(places, key=lambda cut: _uneven(logs[first:cut]) + _uneven(logs[cut:last]))
    one, other = logs[first:best], logs[best:last]
    noise = _Noise.of(one, other)
    step = abs(float(np.median(one) - np.median(other)))
    error = math.hypot(noise.error(len(one)), noise.error(len(other)))
    if step < math.log1p(LEAST_STEP) or step <= SURE * error:
        return []
    return [*_cuts(logs, first, best), best, *_cuts(logs, best, last)]


def _uneven(logs: Array) -> float:
    """Sum of the deviations from the median."""
    return float(np.abs(logs - np.median(logs)).sum())


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """Of one window: its standard deviation, and the correlation of neighbours."""

    deviation: float
    alike: float

    @staticmethod
    def of(*sides: Array) -> _Noise:
        """From differences of windows within each side, which further steps hardly touch."""
        near, far = (
            1.4826 * float(np.median(differences)) / math.sqrt(2) if len(differences) else 0.0
            for lag in (1, APART)
            for differences in [np.concatenate([np.abs(s[lag:] - s[:-lag]) for s in sides])]
        )
        deviation = max(near, far, LEAST_NOISE)
        alike = 1 - (near / deviation) ** 2
        return _Noise(deviation=deviation, alike=min(max(alike, 0.0), MOST_ALIKE))

    def error(self, windows: int) -> float:
        """Standard error of the median of so many windows in a row; at most that of one."""
        widened = (1 + self.alike) / (1 - self.alike)
        return 1.2533 * self.deviation * math.sqrt(min(1.0, widened / windows))


def _warm_up(parts: Sequence[Stretch], windows: int) -> int:
    """How many of the first stretches are warm-up: slower than the next, and early."""
    count = 0
    while count + 1 < len(parts) and (
        parts[count].mean_ms > parts[count + 1].mean_ms
        and parts[count].last <= max(FEWEST, WARM_UP_SHARE * windows)
    ):
        count += 1
    return count


def _slow(parts: Sequence[Stretch], fastest_ms: float) -> list[Stretch]:
    """The slow stretches from the first on that follows a faster one, where they fill SLOW_SHARE of the
    windows: what a first stretch was slowed down by has ended."""
    slow = [part.mean_ms >= (1 + SLOWER) * fastest_ms for part in parts]
    begun = slow.index(False)
    found = [part for place, part in enumerate(parts) if slow[place] and place > begun]
    windows = parts[-1].last - parts[0].first
    enough = sum(part.last - part.first for part in found) >= SLOW_SHARE * windows
    return found if enough else []


def _settled(windows: Sequence[Mapping[str, Any]], runs: Array) -> Sustained:
    """Of all runs of the first model in these windows. runs: how many each has, or in proportion.

    A window tells its p50 and p95 alone: its faster half is taken to last its p50, the slowest 5 % its
    p95, and those between to lie evenly.
    """
    p50, p95 = (np.array([window[name][0] for window in windows]) for name in ("p50_ms", "p95_ms"))
    above = np.clip((WITHIN - 0.5) / (0.95 - 0.5), 0, 1)
    values = (p50[:, None] + (p95 - p50)[:, None] * above).ravel()
    weights = np.repeat(runs / len(WITHIN), len(WITHIN))
    order = np.argsort(values)
    shares = weights[order].cumsum() / weights.sum()

    def quantile(share: float) -> float:
        return float(values[order][min(int(np.searchsorted(shares, share)), len(order) - 1)])

    means = np.array([window["mean_ms"][0] for window in windows])
    return Sustained(
        mean_ms=float((means * runs).sum() / runs.sum()),
        p50_ms=quantile(0.5),
        p95_ms=quantile(0.95),
    )


def _why(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    """What the system says of a slowdown, in words; nothing where it does not tell."""

    def medians(name: str) -> tuple[float, float] | None:
        both = [[w[name] for w in part if w[name] is not None] for part in (before, after)]
        return (float(np.median(both[0])), float(np.median(both[1]))) if all(both) else None

    said = []
    if (clock := medians("mhz")) and clock[1] < 0.93 * clock[0]:
        said.append(f"the clock fell from {clock[0]:.0f} to {clock[1]:.0f} MHz")
    if (heat := medians("celsius")) and heat[1] > heat[0] + 3:
        said.append(f"it warmed up from {heat[0]:.0f} to {heat[1]:.0f} degrees")
    if (cap := medians("capped")) and cap[1] > cap[0] + 0.05:
        said.append(f"a CPU quota stopped it for {100 * cap[1]:.0f} % of the time")
    if (host := medians("stolen")) and host[1] > host[0] + 0.05:
        said.append(f"the host took {100 * host[1]:.0f} % of the time")
    if (others := medians("ousted")) and others[1] > 2 * others[0] + 20:
        said.append(f"other processes took the processor {others[1]:.0f} times a second")
    return tuple(said)
