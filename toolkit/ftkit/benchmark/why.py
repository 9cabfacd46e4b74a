"""Which operators take a file's time, and which make it slower than another: as text and as data.

print(causes_text(explain_files("new", "old", options)))
print(profile_text(profile_file("bundle", options)))
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from ftkit.benchmark.budgets import conditions_of
from ftkit.options import BenchOptions
from ftkit.utils import console
from ftkit_export.proof.attribution import Cause, Explanation, Profile, explain, profile

LISTED = 12  # operators; a page and --json have all
NAMED = 5  # causes that are not blamed


def explain_files(
    candidate: str | Path, baseline: str | Path, options: BenchOptions
) -> Explanation:
    """As attribution.explain, in the first condition of `options`."""
    (one, other), image = conditions_of([candidate, baseline], options)
    return explain(one, other, image)


def profile_file(model: str | Path, options: BenchOptions) -> Profile:
    """As attribution.profile, in the first condition of `options`."""
    (condition,), image = conditions_of([model], options)
    return profile(condition, image)


def causes_text(found: Explanation) -> str:
    """The difference and its causes, within 80 columns."""
    bounds = f"[{found.low:+.2f}, {found.high:+.2f}]"
    lines = [f"why: {found.ms:+.2f} ms {bounds} on {found.baseline_ms:.2f} ms, under the profiler"]
    blamed = found.blamed
    listed = blamed[:LISTED] or found.causes[:NAMED]
    if not blamed:
        lines.append("no cause is sure; the largest differences:")
    for cause in listed:
        lines.append(_line(cause))
    rest = [cause for cause in found.causes if cause not in listed]
    if rest:
        lines.append(f"  {sum(cause.ms for cause in rest):+.2f} ms  {len(rest)} others together")
    return "\n".join(lines)


def _line(cause: Cause) -> str:
    head = f"  {cause.ms:+.2f} ms [{cause.low:+.2f}, {cause.high:+.2f}]  "
    return textwrap.fill(head + cause.what, 80, subsequent_indent=" " * 8)


def profile_text(found: Profile) -> str:
    """The slowest operators, within 80 columns."""
    rows = [("operator of", "operator", "output", "ms", "share")]
    for step in found.steps[:LISTED]:
        own = step.operator
        rows.append(
            (
                own.place[-28:],
                own.op[:16],
                own.shape[:20],
                f"{step.ms:.3f}",
                f"{100 * step.share:.1f} %",
            )
        )
    others = found.steps[LISTED:]
    if others:
        took = sum(step.ms for step in others)
        share = f"{100 * took / found.total_ms:.1f} %"
        rows.append((f"{len(others)} others", "", "", f"{took:.3f}", share))
    rows.append(
        (
            "between operators",
            "",
            "",
            f"{found.between_ms:.3f}",
            f"{100 * found.between_ms / found.total_ms:.1f} %",
        )
    )
    return f"{console.table(rows)}\n{found.total_ms:.2f} ms a run under the profiler, which slows it down"
