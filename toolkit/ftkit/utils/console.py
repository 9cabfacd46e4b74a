"""Console output: lines on standard output, progress bars on standard error.

with bar("decoding") as step:      # draws nothing unless standard error is a terminal
    step(done, total)
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

Step = Callable[[int, int], None]

# Seconds by label of the bar, for benchmarks
spent: defaultdict[str, float] = defaultdict(float)


_muted = False
_quiet = False


def hush(wanted: bool) -> None:
    """Set whether this process prints only warnings and errors (--quiet)."""
    global _quiet
    _quiet = wanted


def mute(wanted: bool) -> None:
    """Set whether this process prints nothing: only one of several ranks prints."""
    global _muted
    _muted = wanted


def is_first() -> bool:
    """Whether this process is the first of its ranks, or the only one."""
    return not os.environ.get("WORLD_SIZE") or os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print one or more lines on standard output, flushed."""
    if not (_muted or _quiet):
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    if not _muted:
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, under: Callable[[], str] = str) -> Iterator[Step]:
    """A progress bar that disappears when done: `step(done, total)` moves it.

    under: returns a line to show below it; called at most once a second, and only if the bar is
    visible.
    """
    begun = time.perf_counter()
    seen = sys.stderr.isatty() and not (_muted or _quiet)
    with _drawn(label, under) if seen else nullcontext(lambda done, total: None) as step:
        yield step
    spent[label] += time.perf_counter() - begun


@contextmanager
def _drawn(label: str, under: Callable[[], str]) -> Iterator[Step]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Clock(ProgressColumn):
        """Progress column: count, elapsed time and remaining time, as far as known."""

        def render(self, task: Task) -> Text:
            amount = f"{task.completed:.0f}/{task.total:.0f} " if task.total else ""
            left = f", {clock(task.time_remaining)} left" if task.time_remaining is not None else ""
            return Text(f"{amount}{clock(task.elapsed or 0)}{left}")

    console = Console(stderr=True)
    told = 0.0
    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), Clock(), console=console
    )
    below = Text(under(), style="dim", overflow="fold")

    task = progress.add_task(label, total=None)

    def step(done: int, total: int) -> None:
        nonlocal told
        progress.update(task, completed=done, total=total)
        if time.perf_counter() - told >= 1:
            told = time.perf_counter()
            below.plain = under()

    with Live(
        Group(progress, below) if below.plain else progress,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    ):
        yield step


@contextmanager
def note() -> Iterator[Callable[[str], None]]:
    """A transient status line on standard error; nothing if that is not a terminal."""
    if not sys.stderr.isatty() or _muted or _quiet:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def short(value: float) -> str:
    """A short figure for display: 0.02679 -> "0.02679", 0.0000065 -> "6.5e-6"."""
    if value == 0 or abs(value) >= 1e-3 or not math.isfinite(value):
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def figure(value: float) -> str:
    """Three decimals, as of an accuracy; as many digits of a smaller value, four of a large one."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def with_bounds(value: float | None, low: float | None, high: float | None) -> str:
    """A figure with its interval: "0.842 [0.542, 1.000]"; without one that is not known."""
    if value is None:
        return "not known"
    if low is None or high is None:
        return figure(value)
    return f"{figure(value)} {interval(low, high)}"


def with_unit(value: float | None, unit: str) -> str:
    """A figure with its unit, if it has one: "3.250 mm"; "none" where there is no figure."""
    if value is None:
        return "none"
    return f"{figure(value)} {unit}".rstrip()


def interval(low: float | None, high: float | None) -> str:
    """An interval: "[0.542, 1.000]"; "" for one that is not known."""
    return "" if low is None or high is None else f"[{figure(low)}, {figure(high)}]"


MARKS = {"passed": "ok    ", "failed": "FAILED", "inconclusive": "unsure"}  # before a verdict


def frames(frame: str) -> str:
    """ "640x480" -> "frames of 640 x 480"."""
    return f"frames of {frame.replace('x', ' x ')}"


def condition(item: Mapping[str, Any]) -> str:
    """Fields of a Condition or Latency -> "cpu, 2 threads", "cuda, without copies"."""
    if item["provider"] != "cpu":
        return f"{item['provider']}, {'with' if item['copies'] else 'without'} copies"
    return f"cpu, {item['threads']} thread{'s' if item['threads'] > 1 else ''}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length as a text table, left-aligned; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
