"""Latency over time: a line of JSON a measurement, kept in the user's own repository, and one page that plots it.

    path = append(found, folder)                   # what bench measured; ftkit-bench.jsonl at the repository's root
    write_history(read(path), Path("ftkit-bench.html"))

Figures of two machines are never joined by a line: what the machine changed, nobody changed. A change point is marked
where the median of the next three figures leaves that of up to eight before by more than 5 %, and by more than three
times their own deviation: a plain rolling comparison, for finding the commit, not for judging it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ftkit.report.html import page
from ftkit.utils import console
from ftkit.utils.files import write_atomically
from ftkit_export.runtime.errors import FtkitError

NAME = "ftkit-bench.jsonl"
BEFORE, AFTER, LEAST = 8, 3, 0.05


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def place(folder: Path) -> Path:
    """Where the history is kept: at the root of the repository that `folder` is in, else in `folder` itself."""
    return Path(_git(folder, "rev-parse", "--show-toplevel") or folder) / NAME


def append(found: Mapping[str, Any], folder: Path) -> Path:
    """Add one measurement (ftkit_export.runtime.measure's) with the commit it was taken at, and return the file."""
    path, keys = place(folder), ("variant", "provider", "threads", "batch", "spinning", "copies", "p50_ms", "p95_ms")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git(folder, "rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":(top)",
                              f":(top,exclude){NAME}")),
        "name": found["name"], "fingerprint": found["fingerprint"], "machine": found["machine"],
        "quick": found["quick"],
        "rows": [{key: row[key] for key in keys} for row in found["rows"]],
        "cold_ms": {
            name: statistics.median(s["import_ms"] + s["session_ms"] + s["first_run_ms"] for s in starts)
            for name, starts in found["starts"].items()
        },
        "size_bytes": {row["variant"]: row["size_bytes"] for row in found["rows"]},
    }  # fmt: skip
    with path.open("a", encoding="utf-8") as file:  # one write: two jobs at once do not mix their lines
        file.write(json.dumps(line) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a history, oldest first. Raises FtkitError naming the line that is none."""
    if not path.is_file():
        raise FtkitError(f"{path}: expected a history, found none. Try `ftkit bench MODEL --save`")
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            datetime.fromisoformat(line["time"])
            found.append({**line, "commit": str(line["commit"]), "modified": bool(line["modified"]),
                          "series": _series(line)})  # fmt: skip
            if not all(0 < value < math.inf for value in found[-1]["series"].values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FtkitError(f"{path} line {number}: expected a measurement, found something else. Remove it") from None
    return sorted(found, key=lambda line: str(line["time"]))


def _series(line: Mapping[str, Any]) -> dict[str, float]:
    """What each plotted line gets of one measurement."""
    where = f"{line['machine']['cpu']}, {line['machine']['cores']} cores ({line['machine']['fingerprint']})"
    where, quick = f"{where}|{line['name']}", ", quick" if line["quick"] else ""
    frame = line.get("frame", "")  # of older lines the golden image's own, which they do not tell
    frames = f", {console.frames(frame)}" if frame else ""
    found = {}
    for row in line["rows"]:
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        more = f"{'' if row['spinning'] else ', no spinning'}{'' if row['copies'] else ', no copies'}"
        condition = f"{row['variant']} on {row['provider']}, {threads}, batch {row['batch']}{more}{frames}{quick}"
        found[f"{where}: p50 of {condition}"] = float(row["p50_ms"])
    for name, value in line["cold_ms"].items():
        found[f"{where}: cold start of {name}{quick}"] = float(value)
    return found


def changes(values: Sequence[float]) -> list[int]:
    """Places where the level changes, each the first figure of its new level."""
    found: list[int] = []
    logs = [math.log(value) for value in values]
    start = 0
    for i in range(1, len(logs) - AFTER + 1):
        before, after = logs[max(start, i - BEFORE) : i], logs[i : i + AFTER]
        if len(before) < AFTER:
            continue
        middle = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in before)
        beyond = max(math.log1p(LEAST), 3 * deviation)
        step = statistics.median(after) - middle
        if abs(step) > beyond and abs(logs[i] - middle) > beyond:  # it begins here, not at the next one
            found.append(i)
            start = i
    return found


def plot(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """One series as SVG, with a table of its change points below."""
    values, title = [float(line["series"][name]) for line in lines], name.partition("|")[2]
    width, height, left = 860, 170, 60
    low, high = min(values) * 0.97, max(values) * 1.03
    marked = changes(values)

    def x(index: int) -> float:
        return left + (width - left - 20) * (index + 0.5) / len(values)

    def y(value: float) -> float:
        return 14 + (height - 40) * (high - value) / (high - low)

    parts = [f'<text x="0" y="{y(value) + 4:.1f}">{value:.3g} ms</text>' for value in (min(values), max(values))]
    for i in marked:
        parts.append(f'<line x1="{(x(i) + x(i - 1)) / 2:.1f}" x2="{(x(i) + x(i - 1)) / 2:.1f}" y1="4" '
                     f'y2="{height - 20}" stroke="var(--two)" stroke-dasharray="4 4"/>')  # fmt: skip
    points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline points="{points}" fill="none" stroke="var(--one)" stroke-width="2"/>')
    for i, (line, value) in enumerate(zip(lines, values, strict=True)):
        said = f"{line['time'][:10]} {line['commit'] or 'no commit'}{' modified' if line['modified'] else ''}"
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" fill="var(--one)">'
                     f"<title>{escape(said)}: {value:.4g} ms</title></circle>")  # fmt: skip
    for i in sorted({0, len(values) - 1}):
        anchor = "start" if i == 0 else "end"
        parts.append(f'<text x="{x(i):.1f}" y="{height - 4}" text-anchor="{anchor}">'
                     f"{escape(lines[i]['time'][:10])} {escape(lines[i]['commit'][:7])}</text>")  # fmt: skip
    said = ""
    for i in marked:
        was, now = (statistics.median(values[a:b]) for a, b in ((max(0, i - BEFORE), i), (i, i + AFTER)))
        commit = escape(lines[i]["commit"] or "unknown")
        said += f"<li>{escape(lines[i]['time'][:10])}, commit {commit}: {was:.4g} to {now:.4g} ms</li>"
    return (f'<figure><figcaption>{escape(title)}, last {values[-1]:.4g} ms</figcaption><svg viewBox="0 0 {width} '
            f'{height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
            f"{f'<ul>{said}</ul>' if said else ''}</figure>")  # fmt: skip


def write_history(lines: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the page: a heading a machine, a plot a condition. lines: as read."""
    if not lines:
        raise FtkitError(f"{out}: expected at least one measurement, found none. Try `ftkit bench MODEL --save`")
    names = sorted({name for line in lines for name in line["series"]})
    body, machine = ["<h1>Latency over time</h1>"], ""
    if len({name.partition("|")[0] for name in names}) > 1:
        body.append("<p>Several machines: each has plots of its own, and a difference between them is advisory.</p>")
    for name in names:
        where = name.partition("|")[0]
        if where != machine:
            machine = where
            body.append(f"<h2>{escape(where)}</h2>")
        there = [line for line in lines if name in line["series"]]
        body.append(plot(name, there))
    write_atomically(out, page("ftkit: latency over time", body))
