"""A search as a page: the chart of the task's figure over time first, then tables, then what was left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ftkit.report.pages import Table, render
from ftkit.utils import console
from ftkit_export.runtime.files import write_atomically

WIDTH = 860
HEIGHT = 420
LEFT = 56
RIGHT = 20
TOP = 24
BOTTOM = 46
Scale = Callable[[float], float]  # a value -> its place in the drawing
FAR = 0.15  # below the best accuracy or macro-AP
MARGIN = 0.01
MARKS = ("circle", "square", "diamond", "triangle")


def write_search(out: Path, told: Mapping[str, Any]) -> None:
    """Write the page. told: the data of search.json."""
    timed = [point for point in told["points"] if point["p50_ms"] is not None]
    # Where nothing was timed: those of which there is a file
    timed = timed or [point for point in told["points"] if point["size_bytes"] is not None]
    # A figure that is none comes last
    ordered = sorted(
        told["points"],
        key=lambda point: (
            point["figure"] is None,
            (point["figure"] or 0) * (-1 if told["rising"] else 1),
        ),
    )
    drawn = [point for point in timed if point["figure"] is not None]
    page = render(
        "search.html",
        told=told,
        chart=front_chart(drawn, told),
        pick=console.with_unit(told["pick"]["figure"], told["unit"]),
        front=_table([point for point in timed if point["front"]], told["unit"]),
        every=_table(ordered, told["unit"]),
        dropped=Table(
            ("backbone", "pixels", "why it was left"),
            [(each["backbone"], each["size"], each["reason"]) for each in told["dropped"]],
        ),
        open=Table(
            ("network", "p50 ms", "what it loses", "95 % bounds", "accepted at"),
            [
                (
                    each["name"],
                    each["p50_ms"],
                    f"{100 * each['against_best']['drop']:+.1f} {each['against_best']['unit']}",
                    f"{100 * each['against_best']['low']:+.1f} to {100 * each['against_best']['high']:+.1f}",
                    accepting(each["against_best"]["high"]),
                )
                for each in told["open"]
            ],
        ),
    )
    write_atomically(out, page.encode())


def accepting(high: float) -> str:
    """The option with which a search takes what may lose so much; "" where none would."""
    limit = math.ceil(1000 * high) / 1000
    return f"--max-drop {limit:g}" if limit <= 1 else ""


def _table(points: Sequence[Mapping[str, Any]], unit: str) -> Table:
    rows = [
        (
            f"{'pick: ' if point['pick'] else ''}{point['name']}",
            console.with_unit(point["figure"], unit),
            console.interval(point["low"], point["high"]),
            "" if point["p50_ms"] is None else f"{point['p50_ms']:.2f}",
            "" if point["core_ms"] is None else f"{point['core_ms']:.2f}",
            "" if point["size_bytes"] is None else f"{point['size_bytes'] / 1e6:.2f}",
            "" if point["peak_rss_bytes"] is None else f"{point['peak_rss_bytes'] / 1e6:.0f}",
            "" if point["cold_ms"] is None else f"{point['cold_ms']:.0f}",
            f"{point['multiplications'] / 1e6:.0f}",
        )
        for point in points
    ]
    head = (
        "network",
        "out of fold",
        "95 %",
        "p50 ms",
        "of that the network",
        "MB",
        "memory, MB",
        "first answer, ms",
        "million multiplications",
    )
    return Table(head, rows)


def front_chart(points: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> Markup:
    """The figure with its interval over p50 (log scale); a mark per backbone; filled: int8. Over
    multiplications where nothing was timed.

    The front is a line with the input size at each of its marks, the pick is named, the budget of p50 is a
    dashed line, and what exceeds any budget is faint.
    """
    costs = [_cost(point) for point in points]
    what = "latency (one thread)" if points[0]["p50_ms"] is not None else "multiplications"
    limits = {name: limit for name, limit in told["budgets"].items() if name == "p50_ms"}
    xs = (
        math.log(min([*costs, *limits.values()]) * 0.9),
        math.log(max([*costs, *limits.values()]) * 1.1),
    )
    ys = _range_of(points, rising=told["rising"])

    def x(value: float) -> float:
        return float(LEFT + (WIDTH - LEFT - RIGHT) * (math.log(value) - xs[0]) / (xs[1] - xs[0]))

    def y(value: float) -> float:
        bounded = float(min(max(value, ys[0]), ys[1]))
        return float(TOP + (HEIGHT - TOP - BOTTOM) * (ys[1] - bounded) / (ys[1] - ys[0]))

    cost = "p50, ms" if what.startswith("latency") else "million multiplications"
    parts = [_grid(x, y, xs, ys, cost)]
    for name, limit in limits.items():
        parts.append(
            f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="var(--two)" stroke-dasharray="5 4"/><text x="{x(limit) + 4:.1f}" y="{TOP + 10}">'
            f"{name[:3]} budget {limit:g} ms</text>"
        )

    front = sorted((point for point in points if point["front"]), key=_cost)
    for point in front:
        parts.append(
            f'<text x="{x(_cost(point)):.1f}" y="{y(point["figure"]) + 19:.1f}" text-anchor="middle">'
            f"{point['size']}</text>"
        )
    line = " ".join(f"{x(_cost(p)):.1f},{y(p['figure']):.1f}" for p in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--one)" stroke-width="1.5"/>')

    backbones = list(dict.fromkeys(point["backbone"] for point in points))
    for point in points:
        mark = MARKS[backbones.index(point["backbone"]) % len(MARKS)]
        parts.append(_mark(point, mark, x(_cost(point)), y))

    pick = next((point for point in points if point["pick"]), None)
    if pick:
        at = x(_cost(pick))
        anchor = "end" if at > WIDTH / 2 else "start"
        parts.append(
            f'<text class="strong" x="{at + (-9 if anchor == "end" else 9):.1f}" y="{y(pick["figure"]) - 9:.1f}" '
            f'text-anchor="{anchor}">{escape(pick["name"])}</text>'
        )

    shapes = ", ".join(
        f"{escape(name)} a {MARKS[i % len(MARKS)]}" for i, name in enumerate(backbones)
    )
    faint = "; faint: exceeds a budget" if any(point["over"] for point in points) else ""
    caption = (
        f"filled: int8, open: fp32; {shapes}; the line: the front, with its input sizes{faint}"
    )
    metric, unit = told["metric"], told["unit"]
    named = f"{metric[0].upper()}{metric[1:]}{f', {unit},' if unit else ''}"
    title = escape(f"{named} out of fold over {what}")
    return Markup(
        f'<figure><figcaption>{title}: {caption}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{title}">{"".join(parts)}</svg></figure>'
    )


def _range_of(points: Sequence[Mapping[str, Any]], *, rising: bool) -> tuple[float, float]:
    """What the figure's axis shows: the intervals, but little of what is far worse than the best, whose
    marks are then at the edge."""
    figures = [point["figure"] for point in points]
    lows = [each["figure"] if each["low"] is None else each["low"] for each in points]
    highs = [each["figure"] if each["high"] is None else each["high"] for each in points]
    if rising:
        return max(min(lows), max(figures) - FAR, 0.0) - MARGIN, min(1.0, max(highs)) + MARGIN
    best = min(figures)
    return max(0.0, min(lows)) * 0.95, min(max(highs), 3 * best) * 1.05 or 1.0


def _cost(point: Mapping[str, Any]) -> float:
    """p50 in ms or, where it was not timed, millions of multiplications."""
    timed = point["p50_ms"]
    return float(point["multiplications"] / 1e6 if timed is None else timed)


def _grid(x: Scale, y: Scale, xs: tuple[float, float], ys: tuple[float, float], unit: str) -> str:
    """Grid lines with their values. xs: bounds of log(ms); ys: of the figure."""
    parts = []
    rough = (ys[1] - ys[0]) / 8
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(each * ten for each in (1, 2, 5, 10) if each * ten >= rough)
    decimals = max(0, -math.floor(math.log10(step)))
    first = math.ceil(ys[0] / step)
    for number in range(first, first + 12):
        value = number * step
        if value > ys[1]:
            break
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.{decimals}f}</text>'
        )

    for power in range(-3, 6):
        for digit in (1, 2, 5):
            time = digit * 10.0**power
            if xs[0] <= math.log(time) <= xs[1]:
                parts.append(
                    f'<line x1="{x(time):.1f}" x2="{x(time):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                    f'stroke="var(--line)"/><text x="{x(time):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                    f'text-anchor="middle">{time:g}</text>'
                )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{unit} (log scale)</text>'
    )
    return "".join(parts)


def _mark(point: Mapping[str, Any], mark: str, at: float, y: Scale) -> str:
    """A point with its interval, named when the pointer is over it."""
    colour = "var(--good)" if point["pick"] else "var(--one)" if point["front"] else "var(--faint)"
    fill = colour if point["precision"] == "int8" else "var(--paper)"
    up = y(point["figure"])
    size = 7.0 if point["trained"] else 5.0
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
    }
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.5"'
    if mark == "circle":
        shape = f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{size}" {style}/>'
    else:
        outline = " ".join(f"{at + size * a:.1f},{up + size * b:.1f}" for a, b in corners[mark])
        shape = f'<polygon points="{outline}" {style}/>'
    told = f"{point['name']}: {point['figure']:.4g}, {_cost(point):.2f}"
    interval = (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(point["low"]):.1f}" y2="{y(point["high"]):.1f}" '
        f'stroke="{colour}" stroke-width="1" opacity="{0.5 if point["front"] else 0.25}"/>'
        if point["low"] is not None and point["high"] is not None
        else ""
    )
    faint = ' opacity="0.35"' if point["over"] else ""
    return f"<g{faint}>{interval}{shape}<title>{escape(told)}</title></g>"
