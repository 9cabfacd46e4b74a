"""Latency over time as a page: write_history(history.read(path), Path("ftkit-bench.html"))."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftkit.benchmark.history import AFTER, BEFORE, Series, changes
from ftkit.report.html import page
from ftkit_export.files import write_atomically
from ftkit_export.runtime.errors import FtkitError


def plot(series: Series, lines: Sequence[Mapping[str, Any]]) -> str:
    """One series as SVG, with a table of its change points below."""
    values = [float(line["series"][series]) for line in lines]
    width = 860
    height = 170
    left = 60
    low = min(values) * 0.97
    high = max(values) * 1.03
    marked = changes(values)

    def x(index: int) -> float:
        return left + (width - left - 20) * (index + 0.5) / len(values)

    def y(value: float) -> float:
        return 14 + (height - 40) * (high - value) / (high - low)

    parts = [
        f'<text x="0" y="{y(value) + 4:.1f}">{value:.3g} ms</text>'
        for value in (min(values), max(values))
    ]
    for i in marked:
        parts.append(
            f'<line x1="{(x(i) + x(i - 1)) / 2:.1f}" x2="{(x(i) + x(i - 1)) / 2:.1f}" y1="4" '
            f'y2="{height - 20}" stroke="var(--two)" stroke-dasharray="4 4"/>'
        )

    points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline points="{points}" fill="none" stroke="var(--one)" stroke-width="2"/>')

    for i, (line, value) in enumerate(zip(lines, values, strict=True)):
        said = f"{line['time'][:10]} {line['commit'] or 'no commit'}{' modified' if line['modified'] else ''}"
        parts.append(
            f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" fill="var(--one)">'
            f"<title>{escape(said)}: {value:.4g} ms</title></circle>"
        )

    for i in sorted({0, len(values) - 1}):
        anchor = "start" if i == 0 else "end"
        parts.append(
            f'<text x="{x(i):.1f}" y="{height - 4}" text-anchor="{anchor}">'
            f"{escape(lines[i]['time'][:10])} {escape(lines[i]['commit'][:7])}</text>"
        )

    said = ""
    for i in marked:
        was, now = (
            statistics.median(values[a:b]) for a, b in ((max(0, i - BEFORE), i), (i, i + AFTER))
        )
        commit = escape(lines[i]["commit"] or "unknown")
        said += (
            f"<li>{escape(lines[i]['time'][:10])}, commit {commit}: {was:.4g} to {now:.4g} ms</li>"
        )

    return (
        f'<figure><figcaption>{escape(series.title)}, last {values[-1]:.4g} ms</figcaption><svg viewBox="0 0 {width} '
        f'{height}" role="img" aria-label="{escape(series.title)}">{"".join(parts)}</svg>'
        f"{f'<ul>{said}</ul>' if said else ''}</figure>"
    )


def write_history(lines: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the page: a heading a machine, a plot a condition. lines: as read."""
    if not lines:
        raise FtkitError(
            f"{out}: expected at least one measurement, found none. Try `ftkit bench MODEL --save`"
        )

    every = sorted({series for line in lines for series in line["series"]})
    body = ["<h1>Latency over time</h1>"]
    machines = dict.fromkeys(series.machine for series in every)

    if len(machines) > 1:
        body.append(
            "<p>Several machines: each has plots of its own, and a difference between them is advisory.</p>"
        )

    for machine in machines:
        body.append(f"<h2>{escape(machine)}</h2>")
        for series in every:
            if series.machine == machine:
                there = [line for line in lines if series in line["series"]]
                body.append(plot(series, there))

    write_atomically(out, page("ftkit: latency over time", body))
