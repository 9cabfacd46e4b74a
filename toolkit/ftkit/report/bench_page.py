"""A page of `ftkit bench`: where the time goes, what makes a file slower, or its course over time.

write_bench_page(Path("bench.html"), "my-model", found, verdicts, "why: not found out: ...")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from ftkit.benchmark.budgets import Budget, exit_code
from ftkit.benchmark.endurance import throttled_text
from ftkit.report import charts
from ftkit.report.pages import Table, render
from ftkit_export.proof.attribution import Explanation, Profile
from ftkit_export.proof.endurance import Course
from ftkit_export.proof.regression import Comparison
from ftkit_export.runtime.files import write_atomically

CHARTED = 16  # bars


@dataclass(frozen=True, kw_only=True)
class _Page:
    heading: str
    sentences: Sequence[str]
    charts: Sequence[Markup]
    table: Table | None = None


def write_bench_page(
    out: Path,
    name: str,
    found: Profile | Explanation | Course | None,
    verdicts: Sequence[Comparison] = (),
    remark: str = "",
    budgets: Sequence[Budget] = (),
) -> None:
    """Write the page. found: None where only the gate was asked, or its failure could not be explained, as
    remark says. verdicts: of the gate; budgets: with their verdicts."""
    if isinstance(found, Profile):
        page = _profile(found)
    elif isinstance(found, Explanation):
        page = _explanation(found)
    elif isinstance(found, Course):
        page = _course(found)
    else:
        outcome = exit_code([*(item.verdict for item in verdicts), *(b.verdict for b in budgets)])
        page = _Page(
            heading={0: "Passed", 1: "Failed", 3: "Not settled"}[outcome],
            sentences=[remark] if remark else [],
            charts=(),
        )
    page = replace(page, sentences=[*page.sentences, *map(_judged, budgets)])
    gate = Table(
        ("", "ratio", "95 %", "margin", "verdict", "why"),
        [
            (
                item.what,
                f"{item.ratio:.3f}",
                f"{item.low:.3f} to {item.high:.3f}",
                f"{item.margin:.0%}",
                item.verdict,
                item.reason,
            )
            for item in verdicts
        ],
        "The gate: this file over the baseline",
    )
    write_atomically(out, render("bench.html", name=name, page=page, gate=gate).encode())


def _profile(found: Profile) -> _Page:
    most = found.steps[0].ms if found.steps else 1.0
    bars = [
        (step.operator.place, step.ms, f"{step.operator.op} {step.ms:.3f} ms")
        for step in found.steps[:CHARTED]
    ]
    rows = [
        (
            step.operator.place,
            step.operator.op,
            step.operator.shape,
            step.ms,
            f"{100 * step.share:.1f} %",
        )
        for step in found.steps
    ]
    return _Page(
        heading="Where the time goes",
        sentences=[
            f"{found.total_ms:.2f} ms a run under ONNX Runtime's profiler, which slows it down; "
            f"{found.between_ms:.2f} ms of it between operators."
        ],
        charts=[charts.places("Slowest operators", bars, most)],
        table=Table(("module", "operator", "output", "ms", "share"), rows, "Every operator"),
    )


def _explanation(found: Explanation) -> _Page:
    listed = found.blamed or found.causes
    most = max((abs(cause.ms) for cause in listed), default=1.0)
    bars = [
        (cause.what, abs(cause.ms), f"{cause.ms:+.3f} ms [{cause.low:+.3f}, {cause.high:+.3f}]")
        for cause in listed[:CHARTED]
    ]
    sure = "surely" if found.blamed else "not surely"
    rows = [
        (cause.what, cause.ms, cause.low, cause.high, "yes" if cause.blamed else "")
        for cause in found.causes
    ]
    return _Page(
        heading="Why it differs",
        sentences=[
            f"{found.ms:+.2f} ms [{found.low:+.2f}, {found.high:+.2f}] on {found.baseline_ms:.2f} ms, under ONNX "
            f"Runtime's profiler. The causes drawn are {sure} slower than before, all together at 95 % confidence."
        ],
        charts=[charts.places("Causes", bars, most)],
        table=Table(("cause", "ms", "low", "high", "sure"), rows, "Every cause"),
    )


def _judged(budget: Budget) -> str:
    found = ", ".join(f"{value:.2f}" for value in budget.values[:1]) or "nothing"
    return f"Budget {budget.name} {budget.limit:g}: {budget.verdict}, found {found}."


def _course(course: Course) -> _Page:
    ends = [window["until_s"] for window in course.windows]
    means = [window["mean_ms"][0] for window in course.windows]
    settled = course.sustained
    marks = [] if course.throttled_s is None else [(course.throttled_s, "throttled")]
    drawn = [charts.course("Mean time of a run", ends, means, "ms", marks)]
    for name, title, unit in (("mhz", "Clock", "MHz"), ("celsius", "Temperature", "degrees")):
        known = [window for window in course.windows if window[name] is not None]
        if known:
            at = [window["until_s"] for window in known]
            drawn.append(charts.course(title, at, [window[name] for window in known], unit, marks))
    said = [
        f"Sustained: p50 {settled.p50_ms:.2f} ms, p95 {settled.p95_ms:.2f} ms, mean {settled.mean_ms:.2f} ms.",
        f"Warm-up: {course.warm_up_s:.0f} s."
        if course.warm_up_s
        else "No warm-up that could be seen.",
        f"Not throttled within {course.seconds:.0f} s."
        if course.throttled_s is None
        else f"{throttled_text(course).capitalize()}. " + "; ".join(course.why),
    ]
    if course.ratio is not None:
        said.append(
            f"In turn with the baseline: {course.ratio:.3f} [{course.ratio_low:.3f}, {course.ratio_high:.3f}] of its "
            f"time: {course.verdict}."
        )
    return _Page(heading="Its course over time", sentences=said, charts=drawn)
