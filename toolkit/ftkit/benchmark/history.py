"""Latency over time: one line of JSON per measurement, kept in the user's own repository.

    path = append(measured, folder)   # what bench measured; ftkit-bench.jsonl at the repository's root
    lines = read(path)

Figures of different machines are never plotted as one series. A change point is marked where the
median of the next three figures differs from that of up to eight before by more than 5 %, and by
more than three times their deviation: a plain rolling comparison, to find the commit, not to judge
it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftkit.utils import console
from ftkit_export.runtime.errors import FtkitError

NAME = "ftkit-bench.jsonl"
BEFORE = 8
AFTER = 3
LEAST_CHANGE = 0.05


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def place(folder: Path) -> Path:
    """Path of the history: at the root of the repository around `folder`, else in `folder`."""
    return Path(_git(folder, "rev-parse", "--show-toplevel") or folder) / NAME


def append_measurement(figures: Mapping[str, Any], folder: Path) -> Path:
    """Append one measurement of ftkit_export.runtime.measure with its commit; return the file."""
    path = place(folder)
    keys = ("variant", "provider", "threads", "batch", "spinning", "copies", "p50_ms", "p95_ms")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git(folder, "rev-parse", "--short=12", "HEAD"),
        "modified": bool(
            _git(
                folder,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ":(top)",
                f":(top,exclude){NAME}",
            )
        ),
        "name": figures["name"],
        "fingerprint": figures["fingerprint"],
        "machine": figures["machine"],
        "quick": figures["quick"],
        "frame": figures["frame"],
        "rows": [{key: row[key] for key in keys} for row in figures["rows"]],
        "cold_ms": {
            name: statistics.median(
                s["import_ms"] + s["session_ms"] + s["first_run_ms"] for s in starts
            )
            for name, starts in figures["starts"].items()
        },
        "size_bytes": {row["variant"]: row["size_bytes"] for row in figures["rows"]},
    }

    # One write, so that parallel jobs do not mix lines
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

    return path


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history, oldest line first; raises FtkitError naming the first invalid line."""
    if not path.is_file():
        raise FtkitError(f"{path}: expected a history, found none. Try `ftkit bench MODEL --save`")

    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            datetime.fromisoformat(line["time"])
            lines.append(
                {
                    **line,
                    "commit": str(line["commit"]),
                    "modified": bool(line["modified"]),
                    "series": _series(line),
                }
            )

            if not all(0 < value < math.inf for value in lines[-1]["series"].values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FtkitError(
                f"{path} line {number}: expected a measurement, found something else. Remove it"
            ) from None

    return sorted(lines, key=lambda line: str(line["time"]))


@dataclass(frozen=True, order=True)
class Series:
    """What one plot shows. machine: for people; fingerprint: the machine's; title: model and
    condition."""

    machine: str
    fingerprint: str
    title: str


def _series(line: Mapping[str, Any]) -> dict[Series, float]:
    """Each plotted series -> its value in one measurement."""
    machine = line["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores ({machine['fingerprint']})"
    quick = ", quick" if line["quick"] else ""
    frame = line.get("frame", "")  # not in older lines: there the golden image's own
    frames = f", {console.frames(frame)}" if frame else ""

    def named(title: str) -> Series:
        return Series(where, machine["fingerprint"], f"{line['name']}: {title}{quick}")

    values = {}
    for row in line["rows"]:
        more = (
            f"{'' if row['spinning'] else ', no spinning'}{'' if row['copies'] else ', no copies'}"
        )
        condition = f"{row['variant']} on {row['provider']}, {_threads(row)}, batch {row['batch']}"
        values[named(f"p50 of {condition}{more}{frames}")] = float(row["p50_ms"])

    for name, value in line["cold_ms"].items():
        how = ""
        for row in line["rows"]:
            if row["variant"] == name:  # the first, as the starts were
                how = f" on {row['provider']}, {_threads(row)}{frames}"
                break
        values[named(f"cold start of {name}{how}")] = float(value)
    return values


def _threads(row: Mapping[str, Any]) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def changes(values: Sequence[float]) -> list[int]:
    """Change points: the index of the first figure at each new level."""
    places: list[int] = []
    logs = [math.log(value) for value in values]

    start = 0
    for i in range(1, len(logs) - AFTER + 1):
        before = logs[max(start, i - BEFORE) : i]
        after = logs[i : i + AFTER]

        if len(before) < AFTER:
            continue

        middle = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in before)
        beyond = max(math.log1p(LEAST_CHANGE), 3 * deviation)

        step = statistics.median(after) - middle
        # It begins here, not at the next one
        if abs(step) > beyond and abs(logs[i] - middle) > beyond:
            places.append(i)
            start = i

    return places
