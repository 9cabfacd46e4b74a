"""Run models without a pause, and note how long they take and what the system says of its processors.

    windows([Condition(model="model.onnx")], image, 600.0)

Run by timing.py in a process of its own; `proof/endurance.py` reads the course.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.latency import Condition
from ftkit_export.runtime.session import processors
from ftkit_export.runtime.timing import bound_call, feeds, open_session, pin

MOST_WINDOWS = 240
SHORTEST_S = 0.25  # of a window
FEWEST_ROUNDS = 5  # in a window
CPUS = Path("/sys/devices/system/cpu")
ZONES = Path("/sys/class/thermal")
CGROUP = Path("/sys/fs/cgroup")


def windows(conditions: Sequence[Condition], image: str | None, seconds: float) -> dict[str, Any]:
    """Run the models in turn for `seconds`; a list of windows, each some seconds long.

    A window: until_s; mean_ms, p50_ms and p95_ms, one of each per condition; and of the system, None
    where it does not tell: mhz (mean clock), celsius (hottest zone), capped (share of the time in which
    a CPU quota stopped this process), stolen (share that a virtual machine's host took), ousted (how
    often a second another process took the processor).
    """
    calls: list[Callable[[], object]] = []
    alone = len(conditions) == 1
    for condition in conditions:
        session = open_session(condition, shared=not alone)
        fed = feeds(session, image, condition.batch, condition.frame)
        calls.append(bound_call(session, condition, fed))
    system = _System()
    if not alone:
        pin(conditions)
    gc.disable()

    length = max(SHORTEST_S, seconds / MOST_WINDOWS)
    begun = time.perf_counter()
    found = []
    system.since_last()
    while (now := time.perf_counter()) - begun < seconds:
        times: list[list[float]] = []
        while len(times) < FEWEST_ROUNDS or time.perf_counter() - now < length:
            times.append([_timed(call) for call in calls])
        own = np.array(times)
        found.append(
            {
                "until_s": time.perf_counter() - begun,
                "mean_ms": own.mean(0).tolist(),
                "p50_ms": np.percentile(own, 50, axis=0).tolist(),
                "p95_ms": np.percentile(own, 95, axis=0).tolist(),
                **system.since_last(),
            }
        )
    return {"windows": found}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class _System:
    """What the system says of its processors, from one call to the next."""

    def __init__(self) -> None:
        self._own = processors()  # before this process is bound to some of them
        self._before = self._counters()

    def since_last(self) -> dict[str, float | None]:
        """As in `windows`, since the last call."""
        before, self._before = self._before, self._counters()
        passed = {
            name: None if before[name] is None or now is None else now - before[name]
            for name, now in self._before.items()
        }
        spent = passed["clock"] or 1.0
        return {
            "mhz": _mean(_clocks(self._own)),
            "celsius": max(_temperatures(), default=None),
            "capped": None if passed["capped"] is None else passed["capped"] / spent,
            "stolen": None if passed["stolen"] is None else passed["stolen"] / spent,
            "ousted": None if passed["ousted"] is None else passed["ousted"] / spent,
        }

    def _counters(self) -> dict[str, Any]:
        return {
            "clock": time.perf_counter(),
            "capped": _capped_seconds(),
            "stolen": _stolen_seconds(),
            "ousted": _ousted(),
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _numbers(paths: Iterable[Path]) -> list[float]:
    """The number in each file that can be read and holds one."""
    found = []
    for path in paths:
        try:
            found.append(float(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def _clocks(own: Sequence[int]) -> list[float]:
    """Clock of each of these processors in MHz (Linux, cpufreq; else /proc/cpuinfo)."""
    named = [CPUS / f"cpu{number}" / "cpufreq" / "scaling_cur_freq" for number in own]
    if found := _numbers(named):
        return [value / 1e3 for value in found]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        every = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError, IndexError):
        return []
    return [every[number] for number in own if number < len(every)] or every


def _temperatures() -> list[float]:
    """Degrees Celsius of every thermal zone (Linux)."""
    return [value / 1e3 for value in _numbers(ZONES.glob("thermal_zone*/temp")) if value > 0]


def _capped_seconds() -> float | None:
    """Seconds for which a CPU quota has stopped this container (cgroup v2, else v1)."""
    for path, name, scale in (
        (_own_cgroup() / "cpu.stat", "throttled_usec", 1e-6),
        (CGROUP / "cpu.stat", "throttled_usec", 1e-6),
        (CGROUP / "cpu" / "cpu.stat", "throttled_time", 1e-9),
    ):
        try:
            pairs = [line.split() for line in path.read_text().splitlines()]
            return next(float(value) * scale for key, value in pairs if key == name)
        except (OSError, ValueError, StopIteration):
            continue
    return None


def _own_cgroup() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return CGROUP
    own = next((line.split("::")[1] for line in lines if line.startswith("0::")), "/")
    return CGROUP / own.lstrip("/")


def _stolen_seconds() -> float | None:
    """Seconds that the host of a virtual machine took, over all processors (Linux)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return float(fields[8]) / 100 / (os.cpu_count() or 1)
    except (OSError, ValueError, IndexError):
        return None


def _ousted() -> float | None:
    """How often another process has taken the processor from this one."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
