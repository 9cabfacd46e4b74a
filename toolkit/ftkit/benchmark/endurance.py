"""`ftkit bench --sustained`: a model without a pause, here or over ssh; as text and as data.

course = sustained("bundle", options, seconds=600)
print(course_text(course))
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftkit.benchmark.budgets import Budget, conditions_of
from ftkit.benchmark.ssh import Device
from ftkit.options import BenchOptions
from ftkit_export.proof.endurance import Course, run_on
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import machine

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
BLOCKS = "▁▂▃▄▅▆▇█"
WIDE = 64  # characters of the course in a terminal
JUDGED = ("p50_ms", "p95_ms")


def parse_duration(text: str) -> float:
    """ "10m" -> 600.0 seconds. Raises FtkitError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not found:
        raise FtkitError(f"--sustained {text}: expected a duration, found another form. Try 10m")
    return float(found[1]) * UNITS[found[2]]


def sustained(
    model: str | Path,
    options: BenchOptions,
    seconds: float,
    *,
    host: str | None = None,
) -> tuple[Course, Mapping[str, Any]]:
    """Run a model for `seconds`, in turn with options.against if there is one; its course, and the
    machine. host: on that machine."""
    models = [model, options.against] if options.against else [model]
    conditions, image = conditions_of(models, options)
    if host:
        if image is None:
            raise FtkitError(
                f"--ssh {host}: expected a bundle, found a single file. Try a folder that `ftkit export` made"
            )
        with Device.reached(host) as device:
            path = Path(conditions[0].model)
            course = run_on(
                conditions[0],
                seconds=seconds,
                run=lambda *_, **__: device.sustained(path, image, conditions[0], seconds),
            )
            return course, device.machine
    baseline = conditions[1] if options.against else None
    course = run_on(
        conditions[0], baseline, image=image, seconds=seconds, tolerance=options.max_slowdown
    )
    return course, machine()


def course_text(course: Course) -> str:
    """The course, and what it says, within 80 columns."""
    settled = course.sustained
    lines = [
        f"{_sparkline(course)}  {course.seconds:.0f} s",
        f"sustained: p50 {settled.p50_ms:.2f} ms, p95 {settled.p95_ms:.2f} ms, mean {settled.mean_ms:.2f} ms",
    ]
    if course.warm_up_s:
        lines.append(f"warm-up: {course.warm_up_s:.0f} s")
    if course.throttled_s is None:
        lines.append(f"not throttled within {course.seconds:.0f} s")
    else:
        why = "; ".join(course.why) or "this system does not tell why"
        lines.append(f"{throttled_text(course)}; {why}")
    if course.ratio is not None:
        assert course.ratio_low is not None and course.ratio_high is not None
        lines.append(
            f"in turn with the baseline: {course.ratio:.3f} [{course.ratio_low:.3f}, {course.ratio_high:.3f}] of its "
            f"time, {course.margin:.0%} tolerated in one process: {REGRESSION[str(course.verdict)]}"
        )
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in lines)


def throttled_text(course: Course) -> str:
    """When it throttled, how often, and how much."""
    often = (
        ""
        if course.throttled_share > ALWAYS
        else f", on and off, {course.throttled_share:.0%} of the time"
    )
    return f"throttled after {course.throttled_s:.0f} s{often}: {course.slowdown:.2f} times as long as at its fastest"


ALWAYS = 0.995  # of the time
REGRESSION = {"passed": "no regression", "failed": "a regression", "inconclusive": "not settled"}


def _sparkline(course: Course) -> str:
    """Mean times of WIDE parts of the course, from the fastest to the slowest."""
    means = [window["mean_ms"][0] for window in course.windows]
    count = min(WIDE, len(means))
    parts = [
        means[place * len(means) // count : (place + 1) * len(means) // count]
        for place in range(count)
    ]
    values = [sum(part) / len(part) for part in parts]
    low = min(values)
    span = max(max(values) - low, 0.1 * low)  # so that noise does not look like a change
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)


def require_judged(limits: Mapping[str, float]) -> None:
    """Raise FtkitError for a budget that a course does not tell."""
    for name in limits:
        if name not in JUDGED:
            raise FtkitError(
                f"--budget {name}: expected p50_ms or p95_ms with --sustained, found another. Leave out one of them"
            )


def judge_course(course: Course, limits: Mapping[str, float]) -> Sequence[Budget]:
    """Budgets of the sustained p50 and p95."""
    return [
        Budget(name=name, limit=limit, values=(getattr(course.sustained, name),))
        for name, limit in limits.items()
    ]


def as_json(course: Course) -> dict[str, Any]:
    """As plain data."""
    return {**asdict(course), "verdict": course.verdict}
