"""How fast, how cold, how big: a model in one condition, measured in processes of its own.

    latency = measure(Condition(model="model.onnx", threads=1), image="photo.png")
    latency.p50_ms, latency.p95_ms
    start = begin(Condition(model="model.onnx", threads=1), image="photo.png")     # cold: a fresh process, once
    fp32, int8 = race(["model.onnx", "int8.onnx"], image="photo.png")              # in turn, in several processes

Warm-up: at least 20 runs and 1 s. Then at least 200 runs and 10 s (quick: 50 runs and 0.5 s after
0.25 s, and marked so). p99 only from 1000 runs on. Any ONNX file will do: what it is fed with
follows from its signature where it is none of ftkit's. timing.py is what the processes run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftkit_export.runtime import nvidia
from ftkit_export.runtime.errors import FtkitError

ROUNDS = 20  # of a race, in each of its processes
PROCESSES = 6
STUDENT_T = 2.571  # 0.975 quantile at PROCESSES - 1 degrees of freedom
RACE_SECONDS = 20.0  # the most that one process of a race may take
# Its default, which glibc raises as it goes unless it is set
EVEN_HEAP = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A model and the conditions it is measured in. threads: 0 = all cores. batch: 0 = what the
    file fixes, else 1. spinning: idle threads keep a core busy. copies: inputs and outputs pass
    through host memory; False: they stay on the device. optimised: ONNX Runtime may rewrite the
    graph. frame: "640x480", width and height of what an image form is fed: it resizes inside, so
    its time depends on them. "": the image as it is."""

    model: str
    provider: str = "cpu"
    threads: int = 0
    batch: int = 0
    spinning: bool = True
    copies: bool = True
    optimised: bool = True
    frame: str = ""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One measured condition. Times in milliseconds a run, sizes in bytes; p99_ms is None below
    1000 runs.

    gpu_bytes: GPU memory that came to be used between the process's beginning and its last run, on
    the whole first GPU: keep others off it. None without a GPU. placement: where the operators ran,
    in words (session.Session.placement). histogram: counts in 40 equal bins from low_ms to high_ms,
    the fastest run and the 99th percentile; slower runs are in the last bin. frame: width and
    height of what an image form was fed, "640x480"; "" for other files.
    """

    provider: str
    threads: int
    batch: int
    spinning: bool
    copies: bool
    runs: int
    quick: bool
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None
    import_ms: float
    session_ms: float
    first_run_ms: float
    peak_rss_bytes: int
    size_bytes: int
    low_ms: float
    high_ms: float
    histogram: tuple[int, ...]
    gpu_bytes: int | None = None
    placement: str = ""
    frame: str = ""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One fresh process: importing ONNX Runtime, opening the session, the first run; then p50 and
    p95 of a short steady stretch (50 runs), which budgets and stored baselines rest on."""

    import_ms: float
    session_ms: float
    first_run_ms: float
    peak_rss_bytes: int
    p50_ms: float = math.nan
    p95_ms: float = math.nan

    @property
    def cold_ms(self) -> float:
        """From an interpreter to the first answer."""
        return self.import_ms + self.open_ms

    @property
    def open_ms(self) -> float:
        """The model's own part of it: from a loaded ONNX Runtime to the first answer."""
        return self.session_ms + self.first_run_ms


@dataclass(frozen=True, kw_only=True)
class Raced:
    """One of several models run in turn. ratio: its time over the first model's, the mean over
    processes of their medians (of the logarithm), with a 95 % interval. spread: standard deviation
    over processes of the logarithm of the first model's time over its own, in another session of
    the same process: the A/A control. processes: that were started; 0 stands for figures of one
    process alone, which say nothing of another."""

    p50_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float = 0.0
    processes: int = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the time from file bytes to probabilities goes, medians in ms, runs in turn in one
    process.

    decode_ms: file bytes to pixels; pillow_ms: preprocessing in Pillow and numpy, as a program
    without the image form would do it; network_ms: core form; together_ms: image form;
    preprocess_ms: median of together - network.
    """

    decode_ms: float
    pillow_ms: float
    network_ms: float
    together_ms: float
    preprocess_ms: float


def measure(
    condition: Condition, image: str | Path | None = None, *, quick: bool = False
) -> Latency:
    """Latency in a fresh process. image: what ftkit's own files are fed with; without one, noise of
    224 x 224.

    Raises FtkitError with the child's own words when it fails.
    """
    measured = in_child("measure", [condition], image, quick=quick)
    return Latency(**{**measured, "histogram": tuple(measured["histogram"])})


def measure_start(
    condition: Condition,
    image: str | Path | None = None,
    *,
    steady: bool = True,
    even_heap: bool = False,
) -> Start:
    """One cold start, in a fresh process. steady: then p50 and p95 too. Raises as measure.

    even_heap: every large buffer is mapped, and given back when freed. Peak memory of one model
    then varies by 0.5 %; otherwise the length of its path alone moves it by 7 % (lite0: 106 or 114
    MB). Opening takes 1.3 times as long. glibc only.
    """
    return Start(
        **in_child("begin", [condition], image, EVEN_HEAP if even_heap else None, steady=steady)
    )


def race(
    models: Sequence[str | Path],
    image: str | Path,
    *,
    provider: str = "cpu",
    threads: int = 1,
    rounds: int = ROUNDS,
    frame: str = "",
) -> list[Raced]:
    """Models (of one form) run in turn on one image file, so that noise meets all alike. Raises as
    measure.

    In each of several fresh processes the first model is opened twice, the others once, in another
    order each time: a session's place in memory has a speed of its own, which no number of runs
    averages out. The interval is Student's t over the processes, and no narrower than the same of
    the A/A control.
    """
    conditions = [
        Condition(model=str(model), provider=provider, threads=threads, frame=frame)
        for model in models
    ]
    entrants = [conditions[0], *conditions]

    tables = []
    for number in range(PROCESSES):
        shift = number % len(entrants)
        order = [*range(shift, len(entrants)), *range(shift)]

        if number % 2:
            order.reverse()

        times = in_child(
            "pairs",
            [entrants[place] for place in order],
            image,
            rounds=rounds,
            seconds=RACE_SECONDS,
        )
        tables.append(
            [[row[order.index(place)] for place in range(len(entrants))] for row in times]
        )

    return compared(tables)


def compared(tables: Sequence[Sequence[Sequence[float]]]) -> list[Raced]:
    """processes x rounds x (the first model twice, then the others) in ms -> a Raced a model."""
    import numpy as np

    logs = [np.log(np.array(table)) for table in tables]
    control = np.array([np.median(log[:, 1] - log[:, 0]) for log in logs])
    spread = float(control.std(ddof=1))
    # The control compares one session with one; a candidate is compared with the mean of two.
    least = spread * math.sqrt(0.75)

    raced = []
    for place in range(1, logs[0].shape[1]):
        pooled = np.exp(np.concatenate([log[:, place] for log in logs]))
        middle = half = 0.0
        if place > 1:
            medians = np.array([np.median(log[:, place] - log[:, :2].mean(1)) for log in logs])
            middle = float(medians.mean())
            half = STUDENT_T * max(float(medians.std(ddof=1)), least) / math.sqrt(len(logs))

        raced.append(
            Raced(
                p50_ms=float(np.percentile(pooled, 50)),
                p95_ms=float(np.percentile(pooled, 95)),
                ratio=math.exp(middle),
                ratio_low=math.exp(middle - half),
                ratio_high=math.exp(middle + half),
                spread=spread,
                processes=len(logs),
            )
        )

    return raced


def parts(image_form: Condition, core_form: str | Path, image: str | Path) -> Parts:
    """Split the time for one image into decoding, preprocessing and network. Raises as measure."""
    core = replace(image_form, model=str(core_form))
    return Parts(**in_child("parts", [image_form, core], image))


def over_sizes(
    condition: Condition, image: str | Path, frames: Sequence[str]
) -> list[tuple[str, float, float]]:
    """(frame, p50 ms, p95 ms) of an image form fed with each of these sizes, in one process. Raises
    as measure."""
    times = in_child("sizes", [replace(condition, frame=frame) for frame in frames], image)
    return [(frame, p50, p95) for frame, (p50, p95) in zip(frames, times, strict=True)]


def in_child(
    what: str,
    conditions: Sequence[Condition],
    image: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    **more: object,
) -> Any:
    """Run one of timing's measurements in a fresh process and return what it prints."""
    job = {
        "what": what,
        "conditions": [asdict(item) for item in conditions],
        "image": image and str(image),
        **more,
    }

    path = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-B", "-m", "ftkit_export.runtime.timing", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ")
        raise FtkitError(
            said or f"latency of {conditions[0].model}: the process ended early ({done.returncode})"
        )

    # A provider may have printed before it
    return json.loads(done.stdout.rstrip().rpartition("\n")[2])


def machine() -> dict[str, object]:
    """Facts about this machine: GPU and driver where there are, processor, cores that may be used,
    system, Python, ONNX Runtime; fingerprint: of all these."""
    import onnxruntime

    from ftkit_export.runtime.session import cores

    cpu = platform.processor() or platform.machine()

    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu

    board = Path("/proc/device-tree/model")  # an ARM board's own name, where processors have none
    if board.is_file() and cpu in ("", platform.machine()):
        cpu = board.read_text().rstrip("\0\n")

    facts: dict[str, object] = {
        **nvidia.facts(),
        "cpu": cpu,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    return {**facts, "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}
