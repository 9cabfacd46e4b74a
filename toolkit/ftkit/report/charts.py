"""Charts as SVG: no script, no network, colours from the page's style sheet.

    chart = lines("Loss", [("train", "--one", losses), ("val", "--two", val_losses)], stages)

Every function returns markup that templates show as it is; what it was given is escaped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ftkit.benchmark.history import AFTER, BEFORE, changes

WIDTH = 460
HEIGHT = 224
LEFT = 56  # room for six characters
RIGHT = 12
TOP = 12
BOTTOM = 36
LONGEST = 64  # characters of a name
ChartSeries = tuple[str, str, Sequence[float]]  # name, colour variable, values


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from low to high."""
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / about))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [
        round(first * step + i * step, 12)
        for i in range(int((high - first * step) / step + 1e-9) + 1)
    ]


def figure(title: str, drawing: str, caption: str = "", height: int = HEIGHT) -> Markup:
    """A drawing of 460 x height with a title that screen readers also read."""
    return Markup(
        f'<figure><figcaption>{escape(title)}{caption and ": "}{caption}</figcaption><svg viewBox="0 0 {WIDTH} '
        f'{height}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )


def scales(
    xs: tuple[float, float], ys: tuple[float, float], height: int = HEIGHT
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Functions from data coordinates x and y to drawing coordinates."""
    wide = (xs[1] - xs[0]) or 1.0
    tall = (ys[1] - ys[0]) or 1.0
    return (
        lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (value - xs[0]) / wide,
        lambda value: TOP + (height - TOP - BOTTOM) * (ys[1] - value) / tall,
    )


def axes(
    xs: tuple[float, float],
    ys: tuple[float, float],
    x_name: str = "",
    y_name: str = "",
    *,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Horizontal grid lines, tick labels, and the names of both axes."""
    x, y = scales(xs, ys)
    parts = []
    for value in ticks(*ys):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )

    for value in ticks(*xs, 6) if x_ticks is None else x_ticks:
        parts.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - 21}" text-anchor="middle">{value:g}</text>'
        )

    if x_name:
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>'
        )
    if y_name:
        parts.append(f'<text x="{LEFT + 4}" y="{TOP + 2}">{escape(y_name)}</text>')

    return "".join(parts)


def legend(series: Sequence[ChartSeries]) -> str:
    """Series names in their colours, with markers that differ without colour too."""
    return ", ".join(
        f'<span style="color:var({colour})">{"○●"[i % 2]} {escape(name)}</span>'
        for i, (name, colour, _) in enumerate(series)
    )


def lines(
    title: str,
    series: Sequence[ChartSeries],
    bands: Sequence[tuple[int, str]] = (),
    x_name: str = "epoch",
) -> Markup:
    """Line chart with one value per epoch.

    bands: where each stage begins, with its name.
    """
    count = max(len(values) for _, _, values in series)
    finite = [value for _, _, values in series for value in values if math.isfinite(value)]
    if not finite:
        return Markup()

    room = (max(finite) - min(finite)) * 0.06 or 0.1
    xs = (0.5, count + 0.5)
    ys = (min(finite) - room, max(finite) + room)
    x, y = scales(xs, ys)

    parts = []
    for place, (begin, name) in enumerate(bands):
        end = bands[place + 1][0] if place + 1 < len(bands) else count
        if place % 2 == 0:
            parts.append(
                f'<rect x="{x(begin + 0.5):.1f}" width="{x(end + 0.5) - x(begin + 0.5):.1f}" y="{TOP}" '
                f'height="{HEIGHT - TOP - BOTTOM}" fill="var(--band)"/>'
            )
        parts.append(
            f'<text x="{x(begin + 0.5) + 3:.1f}" y="{HEIGHT - BOTTOM - 5}">{escape(name)}</text>'
        )

    parts.append(
        axes(xs, ys, x_name, x_ticks=[v for v in ticks(*xs, 6) if v == int(v) and v >= 1] or [1])
    )
    for i, (_, colour, values) in enumerate(series):
        known = [(x(at + 1), y(value)) for at, value in enumerate(values) if math.isfinite(value)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in known)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="1.8"/>'
        )
        fill = f"var({colour})" if i % 2 else "var(--paper)"
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{fill}" stroke="var({colour})"/>'
            for a, b in known
        ]

    return figure(title, "".join(parts), legend(series))


def bars(
    title: str,
    counts: Sequence[int],
    ends: tuple[str, str],
    marks: Sequence[tuple[float, str]] = (),
    caption: str = "",
) -> Markup:
    """Histogram.

    ends: labels of its first and last edge; marks: labelled positions (0..1 along the axis).
    """
    height = 136
    most = max(counts) or 1
    inner = height - BOTTOM - TOP
    step = (WIDTH - 20) / len(counts)
    parts = [
        f'<rect x="{10 + i * step:.1f}" width="{max(step - 1, 0.5):.1f}" y="{TOP + inner * (1 - count / most):.1f}" '
        f'height="{inner * count / most:.1f}" fill="var(--one)"/>'
        for i, count in enumerate(counts)
        if count
    ]

    for i, (place, name) in enumerate(marks):
        at = 10 + (WIDTH - 20) * min(max(place, 0.0), 1.0)
        side = "end" if place > 0.6 else "start"
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{2 + 14 * i}" y2="{height - BOTTOM}" stroke="var(--two)" '
            f'stroke-dasharray="4 3"/><text x="{at + (4 if side == "start" else -4):.1f}" y="{11 + 14 * i}" '
            f'text-anchor="{side}">{escape(name)}</text>'
        )

    parts.append(
        f'<line x1="10" x2="{WIDTH - 10}" y1="{height - BOTTOM}" y2="{height - BOTTOM}" stroke="var(--line)"/>'
        f'<text x="10" y="{height - 18}">{escape(ends[0])}</text><text x="{WIDTH - 10}" y="{height - 18}" '
        f'text-anchor="end">{escape(ends[1])}</text>'
    )
    return figure(title, "".join(parts), escape(caption), height)


def lengths(title: str, rows: Sequence[tuple[str, float, str]], most: float = 1.0) -> Markup:
    """Horizontal bars from 0 to `most`, one per row: (name, value, text)."""
    parts = []
    for i, (name, value, text) in enumerate(rows):
        y = 8 + i * 30
        wide = (WIDTH - 190) * min(max(value / most, 0.0), 1.0)
        parts.append(
            f'<text class="strong" x="0" y="{y + 15}">{escape(name[:16])}</text><rect x="110" y="{y + 2}" '
            f'width="{wide:.1f}" height="18" fill="var(--one)"/><text x="{116 + wide:.1f}" y="{y + 15}">'
            f"{escape(text)}</text>"
        )

    return figure(title, "".join(parts), "", 12 + 30 * len(rows))


def places(title: str, rows: Sequence[tuple[str, float, str]], most: float) -> Markup:
    """Horizontal bars under their names, which may be long: (name, value from 0 to `most`, text)."""
    parts = []
    for i, (name, value, text) in enumerate(rows):
        y = 4 + i * 36
        wide = (WIDTH - 190) * min(max(value / most, 0.0), 1.0)
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        parts.append(
            f'<text class="strong" x="0" y="{y + 11}">{escape(short)}<title>{escape(name)}</title></text>'
            f'<rect x="0" y="{y + 15}" width="{wide:.1f}" height="12" fill="var(--one)"/>'
            f'<text x="{6 + wide:.1f}" y="{y + 25}">{escape(text)}</text>'
        )
    return figure(title, "".join(parts), "", 8 + 36 * len(rows))


def course(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    unit: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Values over seconds. marks: (second, name), drawn as vertical lines."""
    room = (max(ys) - min(ys)) * 0.1 or abs(max(ys)) * 0.1 or 1.0
    ends = (min(ys) - room, max(ys) + room)
    x, y = scales((0.0, xs[-1]), ends)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    parts = [
        axes((0.0, xs[-1]), ends, "seconds", unit),
        f'<polyline points="{path}" fill="none" stroke="var(--one)" stroke-width="1.5"/>',
    ]
    for at, name in marks:
        side = "end" if at > 0.7 * xs[-1] else "start"
        parts.append(
            f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--two)" '
            f'stroke-dasharray="4 3"/><text x="{x(at) + (4 if side == "start" else -4):.1f}" y="{TOP + 12}" '
            f'text-anchor="{side}">{escape(name)}</text>'
        )
    return figure(title, "".join(parts))


def reliability_chart(title: str, bins_by_name: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Reliability diagram: accuracy against mean probability, one dot per bin.

    The area of a dot is its bin's share of the images. bins_by_name: name -> bins.
    """
    x, y = scales((0, 1), (0, 1))
    parts = [
        axes((0, 1), (0, 1), "predicted probability", "accuracy"),
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="var(--faint)" stroke-dasharray="4 4"/>',
    ]

    series: list[ChartSeries] = []
    for i, ((name, bins), colour) in enumerate(
        zip(bins_by_name.items(), ("--two", "--one"), strict=False)
    ):
        total = sum(images for images, _, _ in bins)
        path = " ".join(f"{x(top):.1f},{y(right):.1f}" for _, top, right in bins)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="1.2" opacity=".6"/>'
        )
        fill = f"var({colour})" if i % 2 else "var(--paper)"
        parts += [
            f'<circle cx="{x(top):.1f}" cy="{y(right):.1f}" r="{2 + 12 * math.sqrt(images / total):.1f}" '
            f'fill="{fill}" fill-opacity=".55" stroke="var({colour})"/>'
            for images, top, right in bins
        ]
        series.append((name, colour, ()))

    return figure(title, "".join(parts), legend(series))


def points(
    title: str, placed: Sequence[tuple[str, float, float, bool]], x_name: str, y_name: str
) -> Markup:
    """Scatter plot of numbered points (name, x, y, whether chosen), named in the caption."""
    across = [item[1] for item in placed]
    up = [item[2] for item in placed]
    room = (max(up) - min(up)) * 0.25 or 0.01
    xs = (0.0, max(across) * 1.1)
    ys = (min(up) - room, max(up) + room)
    x, y = scales(xs, ys)
    parts = [axes(xs, ys, x_name, y_name)]

    taken: list[tuple[float, float]] = []
    for i, (_, a, b, chosen) in enumerate(placed, start=1):
        fill = "--good" if chosen else "--one"
        at = (x(a), y(b) - 8)
        while any(abs(at[0] - c) < 14 and abs(at[1] - d) < 12 for c, d in taken):
            at = (at[0] + 12, at[1])  # do not overlap another number
        taken.append(at)
        parts.append(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" fill="var({fill})"/><text class="strong" '
            f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="middle">{i}</text>'
        )

    names = "; ".join(
        f"{i} {escape(name)}{' (chosen)' if chosen else ''}"
        for i, (name, _, _, chosen) in enumerate(placed, 1)
    )
    return figure(title, "".join(parts), names)


def scatter(
    title: str, pairs: Sequence[tuple[float, float]], x_name: str, y_name: str, margin: float
) -> Markup:
    """True and predicted values (x, y): a dot each, the line where they are equal, and `margin` on either
    side of it."""
    if not pairs:
        return Markup()
    every = [value for pair in pairs for value in pair]
    room = (max(every) - min(every)) * 0.05 or 0.5
    ends = (min(every) - room, max(every) + room)
    x, y = scales(ends, ends)
    parts = [axes(ends, ends, x_name, y_name)]

    def drawn(shift: float, dashes: str) -> str:
        low = max(ends[0], ends[0] - shift)
        high = min(ends[1], ends[1] - shift)
        return (
            f'<line x1="{x(low):.1f}" y1="{y(low + shift):.1f}" x2="{x(high):.1f}" '
            f'y2="{y(high + shift):.1f}" stroke="var(--faint)" stroke-dasharray="{dashes}"/>'
        )

    parts += [drawn(0.0, "none"), drawn(margin, "4 4"), drawn(-margin, "4 4")]
    parts += [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" fill="var(--one)" fill-opacity=".5"/>'
        for a, b in pairs
    ]
    return figure(title, "".join(parts))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of a series over time. day: "2026-11-26". modified: the commit had changes
    that were not committed."""

    day: str
    commit: str
    modified: bool
    value: float


def over_time(title: str, series: Sequence[Point]) -> Markup:
    """Milliseconds over time, a dot per measurement, with a list of the change points below."""
    width = 860
    height = 170
    left = 60
    values = [point.value for point in series]
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
        middle = (x(i) + x(i - 1)) / 2
        parts.append(
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="4" y2="{height - 20}" '
            'stroke="var(--two)" stroke-dasharray="4 4"/>'
        )

    path = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--one)" stroke-width="2"/>')

    for i, point in enumerate(series):
        commit = f"{point.commit or 'no commit'}{' modified' if point.modified else ''}"
        parts.append(
            f'<circle cx="{x(i):.1f}" cy="{y(point.value):.1f}" r="3" fill="var(--one)">'
            f"<title>{escape(point.day)} {escape(commit)}: {point.value:.4g} ms</title></circle>"
        )

    for i in sorted({0, len(values) - 1}):
        anchor = "start" if i == 0 else "end"
        parts.append(
            f'<text x="{x(i):.1f}" y="{height - 4}" text-anchor="{anchor}">'
            f"{escape(series[i].day)} {escape(series[i].commit[:7])}</text>"
        )

    return Markup(
        f"<figure><figcaption>{escape(title)}, last {values[-1]:.4g} ms</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{_change_points(series, marked)}</figure>"
    )


def _change_points(series: Sequence[Point], marked: Sequence[int]) -> str:
    """Each with its commit and the medians before and after."""
    items = []
    for i in marked:
        before = statistics.median(point.value for point in series[max(0, i - BEFORE) : i])
        after = statistics.median(point.value for point in series[i : i + AFTER])
        point = series[i]
        items.append(
            f"<li>{escape(point.day)}, commit {escape(point.commit or 'unknown')}: "
            f"{before:.4g} to {after:.4g} ms</li>"
        )

    return f"<ul>{''.join(items)}</ul>" if items else ""
