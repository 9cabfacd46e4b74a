"""Latency over time as a page: write_history(read_history(path), Path("ftkit-bench.html"))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ftkit.benchmark.history import Series
from ftkit.report.charts import Point, over_time
from ftkit.report.pages import render
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically


def plot(series: Series, lines: Sequence[Mapping[str, Any]]) -> Markup:
    """One series as a chart. lines: of the history, those without the series are skipped."""
    points = [
        Point(
            day=line["time"][:10],
            commit=line["commit"],
            modified=line["modified"],
            value=float(line["series"][series]),
        )
        for line in lines
        if series in line["series"]
    ]
    return over_time(series.title, points)


def write_history(lines: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the page: a heading per machine, a plot per condition. lines: from read_history."""
    if not lines:
        raise FtkitError(
            f"{out}: expected at least one measurement, found none. Try `ftkit bench MODEL --save`"
        )

    machines: dict[str, list[Markup]] = {}
    for series in sorted({series for line in lines for series in line["series"]}):
        machines.setdefault(series.machine, []).append(plot(series, lines))

    write_atomically(out, render("latency_history.html", machines=machines).encode())
