"""The result of a search: as data, as text, and on disk.

write(found, recipe)                 # search.json, recipe.json and .py, report.html
print(as_text(found))
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftkit.options import SearchOptions
from ftkit.recipe import Recipe, as_python, resolve
from ftkit.report.search_page import accepting, write_search
from ftkit.searching.front import Choice, Point, non_dominated, over
from ftkit.searching.score import Dropped
from ftkit.utils import console
from ftkit_export.proof.decision import Comparison
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.latency import machine

FOUND = "search.json"
RECIPE = "recipe.json"
READABLE = "recipe.py"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search. points: trained, timed and other ones; scored: number of candidates.
    target: the processor that they are for; timed_on: the machine that timed them, None for none; frame:
    size of the image it took. max_drop: what the pick may lose; metric, unit: of the figures."""

    folder: Path
    points: Sequence[Point]
    dropped: Sequence[Dropped]
    choice: Choice
    options: SearchOptions
    scored: int
    seconds: float
    target: str
    timed_on: Mapping[str, Any] | None
    frame: str
    max_drop: float
    metric: str
    unit: str

    @property
    def front(self) -> list[Point]:
        """The timed points that no other one beats, fastest first; of finalists, if there are any."""
        return non_dominated([point for point in self.points if point.trained] or self.points)


def budgets_of(options: SearchOptions) -> dict[str, float]:
    """Budgets that were asked for: name -> limit, in ms and MB, and max_drop as a share."""
    names = ("p50_ms", "p95_ms", "size_mb", "memory_mb", "max_drop")
    limits = {name: getattr(options, name) for name in names}
    return {name: limit for name, limit in limits.items() if limit is not None}


def write(found: Found, recipe: Recipe) -> None:
    """search.json, recipe.json, the same as recipe.py for people, and report.html; the recipe trains what
    was picked."""
    found.folder.mkdir(parents=True, exist_ok=True)
    told = as_json(found)
    write_atomically(found.folder / RECIPE, json.dumps(resolve(recipe), indent=1).encode())
    write_atomically(found.folder / READABLE, as_python(recipe).encode())
    write_atomically(found.folder / FOUND, json.dumps(told, indent=1).encode())
    write_search(found.folder / "report.html", told)


def as_json(found: Found) -> dict[str, Any]:
    """The search as plain data: what search.json holds."""
    front = found.front
    choice = found.choice
    figures = {
        name: limit for name, limit in budgets_of(found.options).items() if name != "max_drop"
    }
    return {
        "machine": machine(),
        "target": found.target,
        "timed_on": found.timed_on,
        "frame": found.frame,
        "seconds": round(found.seconds, 1),
        "scored": found.scored,
        "images": max(len(point.evidence) for point in found.points),
        "compared_on": len(choice.point.evidence),
        "metric": found.metric,
        "unit": found.unit,
        "rising": choice.point.rising,
        "budgets": budgets_of(found.options),
        "max_drop": found.max_drop,
        "points": [
            {
                **_point(point),
                "front": point in front,
                "pick": point is choice.point,
                "over": sorted(over(point, figures)) if point.p50_ms or point.size_bytes else [],
            }
            for point in found.points
        ],
        "pick": {
            **_point(choice.point),
            "best": choice.best.name,
            "against_best": choice.against and asdict(choice.against),
            "missed": {
                name: factor if math.isfinite(factor) else None
                for name, factor in choice.missed.items()
            },
        },
        "open": [
            {**_point(point), "against_best": asdict(compared)} for point, compared in choice.open
        ],
        "dropped": [asdict(each) for each in found.dropped],
    }


def _point(point: Point) -> dict[str, Any]:
    candidate = asdict(point.candidate)
    return {
        "name": point.name,
        **candidate,
        "precision": point.precision,
        "trained": point.trained,
        "run": point.run,
        "figure": point.figure if math.isfinite(point.figure) else None,
        "low": point.low,
        "high": point.high,
        "p50_ms": point.p50_ms,
        "p95_ms": point.p95_ms,
        "core_ms": point.core_ms,
        "size_bytes": point.size_bytes,
        "peak_rss_bytes": point.peak_rss_bytes,
        "cold_ms": point.cold_ms,
    }


def as_text(found: Found) -> str:
    """The front and the pick, within 80 columns."""
    choice = found.choice
    cost = "million mult." if choice.point.p50_ms is None else "p50 ms"
    lines = [("front", "oof", "[95 %]", cost, "MB")]
    for point in found.front:
        lines.append(
            (
                ("* " if point is choice.point else "  ") + point.name.replace(", trained", " +"),
                console.figure(point.figure),
                console.interval(point.low, point.high),
                f"{point.cost:.2f}",
                f"{(point.size_bytes or 0) / 1e6:.2f}",
            )
        )
    told = [console.table(lines), *_verdict(choice, found.max_drop)]
    if found.metric != "accuracy":
        unit = f" in {found.unit}" if found.unit else ""
        told.insert(1, f"oof: {found.metric}{unit}, out of fold")
    if choice.point.p50_ms is None:
        told.append(
            f"not timed: {found.target} is not here. On it: python time_candidates.py > times.json\n"
            f"in {found.folder / 'to-time'}; then this search again with --latency times.json"
        )
    if any(point.trained for point in found.front):
        told.insert(1, "+ trained in stages; the others: a linear head")
    return "\n".join(told)


def _verdict(choice: Choice, max_drop: float) -> list[str]:
    if "max_drop" in choice.missed and choice.against:
        return _wrapped(
            [
                f"nothing meets the budgets; the nearest, {choice.point.name}, loses more than {100 * max_drop:g} "
                f"against the most accurate, {choice.best.name}: {_lost(choice.against)}"
            ]
        )
    if choice.missed:
        over_by = ", ".join(
            f"{name} by {100 * (factor - 1):.0f} %" for name, factor in choice.missed.items()
        )
        return _wrapped(
            [f"nothing meets the budgets; the nearest, {choice.point.name}, exceeds {over_by}"]
        )

    told = [f"pick: {choice.point.name}"]
    if choice.against:
        told.append(f"against the most accurate, {choice.best.name}: {_lost(choice.against)}")
    for point, compared in choice.open[:3]:
        better = "smaller" if point.p50_ms is None else "faster"
        wider = accepting(compared.high)
        told.append(
            f"{better}, not settled at {100 * max_drop:g}: {point.name}, {_cost(point)}, {_lost(compared)}"
            + (f"; {wider} accepts it" if wider else "")
        )
    return _wrapped(told)


def _cost(point: Point) -> str:
    unit = "million multiplications" if point.p50_ms is None else "ms"
    return f"{point.cost:.2f} {unit}"


def _lost(compared: Comparison) -> str:
    low, drop, high = (
        f"{100 * value:+.1f}" for value in (compared.low, compared.drop, compared.high)
    )
    return f"{compared.name} {drop} [{low}, {high}] {compared.unit}"


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [textwrap.fill(line, 80, subsequent_indent="  ") for line in lines]
