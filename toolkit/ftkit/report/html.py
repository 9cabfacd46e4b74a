"""Building blocks of every page: style, tables, figures drawn as SVG. No script, no network.

html = page("ftkit: lite0", [section("Gates", table(("gate", "value"), rows)), lines("Loss", ...)])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ftkit.utils.console import short

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --faint: #555a60; --paper: #fff; --line: #d8dce0; --band: #f3f5f8;
  --good: #0b6b3a; --bad: #b3261e; --one: #1f5fa8; --two: #b45309; --cell: 31, 95, 168; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #b0b6bc; --paper: #16181a; --line: #3a3f44;
  --band: #1f2327; --good: #6fd39a; --bad: #ff8a80; --one: #7db4f0; --two: #f0b067; --cell: 125, 180, 240; } }
@media print { :root { --ink: #000; --faint: #444; --paper: #fff; --line: #bbb; --band: #f3f5f8; --good: #0b6b3a;
  --bad: #b3261e; --one: #1f5fa8; --two: #b45309; --cell: 31, 95, 168; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem }
h1, p, figcaption, li { overflow-wrap: anywhere }
p, figcaption, caption { color: var(--faint); margin: .3rem 0; text-align: left } figure { margin: 0 }
figcaption, caption { font-size: .9rem } a { color: var(--one) }
nav { margin: .8rem 0; font-size: .9rem } nav a { margin-right: .9rem; white-space: nowrap; display: inline-block }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
/* Shadows at the edges of what is wider than its place: they go where there is no more to see. */
.scroll { overflow-x: auto; max-width: 100%; background: linear-gradient(to right, var(--paper) 30%, transparent) left,
  linear-gradient(to left, var(--paper) 30%, transparent) right,
  radial-gradient(farthest-side at 0 50%, rgba(128, 128, 128, .55), transparent) left,
  radial-gradient(farthest-side at 100% 50%, rgba(128, 128, 128, .55), transparent) right;
  background-repeat: no-repeat; background-size: 2.5rem 100%, 2.5rem 100%, 1rem 100%, 1rem 100%;
  background-attachment: local, local, scroll, scroll }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--one) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap }
td.cell { text-align: center; padding: .35rem .3rem; min-width: 2.4rem } .confusion { margin-top: .8rem }
.confusion th[scope=col] { text-align: center; padding: .25rem .3rem }
@media (max-width: 40rem) { th, td { padding-right: .6rem; font-size: .85rem }
  td.cell { padding: .25rem .1rem; min-width: 1.5rem } }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font: 12px system-ui, sans-serif }
svg text.strong { fill: var(--ink); font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem;
  margin-top: .8rem; max-width: 100% }
.grid > figure { max-width: 36rem } .grid + .scroll { margin-top: 1.2rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem;
  margin-top: .8rem }
.pictures img { width: 100%; height: auto; display: block; border-radius: 3px }
.pictures .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
pre { overflow-x: auto; background: var(--band); padding: .7rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
summary { cursor: pointer; margin: .4rem 0 }
@media print { body { max-width: none; padding: 0; font-size: 11px } nav { display: none } h2 { break-after: avoid }
  figure, tr { break-inside: avoid } .scroll { overflow: visible } pre { white-space: pre-wrap } }
"""

WIDTH = 460
HEIGHT = 224
LEFT = 46
RIGHT = 12
TOP = 12
BOTTOM = 36
ChartSeries = tuple[str, str, Sequence[float]]  # name, colour variable, values


def page(title: str, body: Sequence[str]) -> bytes:
    """A whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    ).encode()


def section(title: str, *parts: str) -> str:
    """A heading with what is below it; nothing when there is nothing."""
    if not any(parts):
        return ""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def anchor(title: str) -> str:
    """A heading's place: "By class" -> "by-class"."""
    return "-".join(
        "".join(letter if letter.isalnum() else " " for letter in title.lower()).split()
    )


def number(value: Any) -> str:
    """A cell's text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return short(value)
    return escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """Header and rows; numbers are set right; a cell that is already markup comes as a 1-tuple. It
    scrolls where it must, by keyboard too."""
    if not rows:
        return ""

    def numeric(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def cell(value: Any, right: bool) -> str:
        if isinstance(value, tuple):
            return f"<td>{value[0]}</td>"
        return f"<td{' class=n' if right else ''}>{number(value)}</td>"

    columns = [any(numeric(row[i]) for row in rows) for i in range(len(head))]
    top = "".join(
        f'<th{" class=n" if n else ""} scope="col">{escape(h)}</th>'
        for h, n in zip(head, columns, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row, columns))}</tr>" for row in rows)
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or " ".join(head[:2]))

    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}, table">'
        f"<table>{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


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


def figure(title: str, drawing: str, caption: str = "", height: int = HEIGHT) -> str:
    """A drawing of 460 x height with a title for eyes and for screen readers."""
    return (
        f'<figure><figcaption>{escape(title)}{caption and ": "}{caption}</figcaption><svg viewBox="0 0 {WIDTH} '
        f'{height}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )


def scales(
    xs: tuple[float, float], ys: tuple[float, float], height: int = HEIGHT
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """x and y in the data's units -> places in the drawing."""
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
    """Grid lines with their numbers, and the names of both axes."""
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
    """Names in their colours, and marks that tell them apart without colour."""
    return ", ".join(
        f'<span style="color:var({colour})">{"○●"[i % 2]} {escape(name)}</span>'
        for i, (name, colour, _) in enumerate(series)
    )


def lines(
    title: str,
    series: Sequence[ChartSeries],
    bands: Sequence[tuple[int, str]] = (),
    x_name: str = "epoch",
) -> str:
    """One value an epoch. bands: where each stage begins, with its name."""
    count = max(len(values) for _, _, values in series)
    finite = [value for _, _, values in series for value in values if math.isfinite(value)]
    if not finite:
        return ""

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
) -> str:
    """A histogram. ends: what its first and last edge are; marks: places (0..1 along it) with a
    name."""
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
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="{height - BOTTOM}" stroke="var(--two)" '
            f'stroke-dasharray="4 3"/><text x="{at + (4 if side == "start" else -4):.1f}" y="{11 + 14 * i}" '
            f'text-anchor="{side}">{escape(name)}</text>'
        )

    parts.append(
        f'<line x1="10" x2="{WIDTH - 10}" y1="{height - BOTTOM}" y2="{height - BOTTOM}" stroke="var(--line)"/>'
        f'<text x="10" y="{height - 18}">{escape(ends[0])}</text><text x="{WIDTH - 10}" y="{height - 18}" '
        f'text-anchor="end">{escape(ends[1])}</text>'
    )
    return figure(title, "".join(parts), escape(caption), height)


def lengths(title: str, rows: Sequence[tuple[str, float, str]], most: float = 1.0) -> str:
    """A bar a row, from 0 to `most`: (name, value, text)."""
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


def reliability_chart(title: str, found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Share right against mean probability, a dot a bin, its area the bin's images; found: name ->
    bins."""
    x, y = scales((0, 1), (0, 1))
    parts = [
        axes((0, 1), (0, 1), "probability given", "share right"),
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="var(--faint)" stroke-dasharray="4 4"/>',
    ]

    series: list[ChartSeries] = []
    for i, ((name, bins), colour) in enumerate(
        zip(found.items(), ("--two", "--one"), strict=False)
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
    title: str, found: Sequence[tuple[str, float, float, bool]], x_name: str, y_name: str
) -> str:
    """Numbered points: (name, x, y, whether it is the chosen one); their names stand in the
    caption."""
    across = [item[1] for item in found]
    up = [item[2] for item in found]
    room = (max(up) - min(up)) * 0.25 or 0.01
    xs = (0.0, max(across) * 1.1)
    ys = (min(up) - room, max(up) + room)
    x, y = scales(xs, ys)
    parts = [axes(xs, ys, x_name, y_name)]

    taken: list[tuple[float, float]] = []
    for i, (_, a, b, chosen) in enumerate(found, start=1):
        fill = "--good" if chosen else "--one"
        at = (x(a), y(b) - 8)
        while any(abs(at[0] - c) < 14 and abs(at[1] - d) < 12 for c, d in taken):
            at = (at[0] + 12, at[1])  # beside a number that is there already
        taken.append(at)
        parts.append(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" fill="var({fill})"/><text class="strong" '
            f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="middle">{i}</text>'
        )

    names = "; ".join(
        f"{i} {escape(name)}{' (chosen)' if chosen else ''}"
        for i, (name, _, _, chosen) in enumerate(found, 1)
    )
    return figure(title, "".join(parts), names)
