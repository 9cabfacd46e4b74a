"""Latency, cold start and memory of a model under one condition, measured in fresh processes.

    latency = measure(Condition(model="model.onnx", threads=1), image="photo.png")
    latency.p50_ms, latency.p95_ms
    start = measure_start(Condition(model="model.onnx"), image="photo.png")   # one cold start
    fp32, int8 = race(["model.onnx", "int8.onnx"], image="photo.png")         # interleaved runs

Warm-up: at least 20 runs and 1 s; then at least 200 runs and 10 s (quick: 50 runs and 0.5 s after
0.25 s, and marked as quick). p99 only from 1000 runs on. Any ONNX file can be measured: inputs of
files not made by ftkit are generated from their signature. The processes run timing.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftkit_export.runtime import nvidia
from ftkit_export.runtime.errors import FtkitError

ROUNDS = 20  # of a race, in each of its processes
PROCESSES = 6
AT_ONCE = 12  # models in one race: its processes hold all of them in memory
STUDENT_T = 2.571  # 0.975 quantile at PROCESSES - 1 degrees of freedom
RACE_SECONDS = 20.0  # limit for one process of a race
# glibc's default; setting it stops glibc from raising it while the process runs
EVEN_HEAP = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A model and the conditions it is measured under.

    threads: 0 = all cores. batch: 0 = as fixed in the file, else 1. spinning: idle threads spin and
    keep a core busy. copies: inputs and outputs are copied through host memory; False: they stay on
    the device. optimised: ONNX Runtime may optimise the graph. frame: "640x480", width and height
    of the input of an image form, whose latency depends on them, since it resizes in the graph; "":
    the image's own size.
    """

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
    """Latency and memory under one condition: times in ms per run, sizes in bytes.

    p99_ms: None below 1000 runs. gpu_bytes: increase of the memory in use on the first GPU between
    the start of the process and its last run, over all processes, so keep others off it; None
    without a GPU. placement: where the operators ran, as text (session.Session.placement).
    histogram: counts in 40 equal bins from low_ms (fastest run) to high_ms (99th percentile);
    slower runs count in the last bin. frame: width and height of an image form's input, "640x480";
    "" for other files.
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
    """Timings of one fresh process: importing ONNX Runtime, opening the session, first run.

    p50_ms, p95_ms: of a short steady phase (50 runs), for budgets and stored baselines.
    """

    import_ms: float
    session_ms: float
    first_run_ms: float
    peak_rss_bytes: int
    p50_ms: float = math.nan
    p95_ms: float = math.nan

    @property
    def cold_ms(self) -> float:
        """From a running interpreter to the first answer."""
        return self.import_ms + self.open_ms

    @property
    def open_ms(self) -> float:
        """The model's share of it: from ONNX Runtime loaded to the first answer."""
        return self.session_ms + self.first_run_ms


@dataclass(frozen=True, kw_only=True)
class Raced:
    """Timing of one of several models whose runs were interleaved.

    ratio: its time relative to the first model's, from the mean over processes of the median log
    ratio, with a 95 % interval. spread: standard deviation over processes of the log ratio between
    two sessions of the first model in one process: the A/A control. processes: number started; 0:
    figures of a single process, which do not carry over to another.
    """

    p50_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float = 0.0
    processes: int = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Breakdown of the time from file bytes to probabilities: medians in ms of interleaved runs.

    All in one process. decode_ms: file bytes to pixels; pillow_ms: preprocessing in Pillow and
    numpy, as a program without the image form would do it; network_ms: core form; together_ms:
    image form; preprocess_ms: median of together - network.
    """

    decode_ms: float
    pillow_ms: float
    network_ms: float
    together_ms: float
    preprocess_ms: float


def measure(
    condition: Condition, image: str | Path | None = None, *, quick: bool = False
) -> Latency:
    """Measure latency in a fresh process.

    image: input for files exported by ftkit; without one, noise of 224 x 224. Raises FtkitError
    with the child process's error message when it fails.
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
    """Measure one cold start in a fresh process; `steady`: then p50 and p95 too. Raises as measure.

    even_heap: every large buffer is mapped, and unmapped when freed. Peak memory of one model then
    varies by 0.5 %; otherwise the length of its path alone changes it by 7 % (lite0: 106 or 114
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
    """Compare models (of one form) in interleaved runs on one image file. Raises as measure.

    Interleaving exposes all of them to the same noise. In each of several fresh processes the first
    model is opened twice and the others once, in a different order each time: a session's speed
    depends on where its memory lies, which no number of runs averages out. The interval is
    Student's t over the processes, and at least as wide as that of the A/A control.
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


def race_in_parts(
    models: Sequence[Path],
    image: Path,
    *,
    provider: str = "cpu",
    frame: str = "",
    run: Callable[..., list[Raced]] = race,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[Path, Raced]:
    """Race many models, AT_ONCE at a time, each time with the first model as the common measure.

    Times of a race are scaled so that the first model takes as long as in the first race. run: races
    some of them; by default on this machine.
    """
    first = models[0]
    found: dict[Path, Raced] = {}
    for start in range(1, max(2, len(models)), AT_ONCE - 1):
        entrants = [first, *models[start : start + AT_ONCE - 1]]
        raced = run(entrants, image, provider=provider, frame=frame)
        scale = found[first].p50_ms / raced[0].p50_ms if first in found else 1.0
        for path, item in zip(entrants, raced, strict=True):
            scaled = replace(item, p50_ms=item.p50_ms * scale, p95_ms=item.p95_ms * scale)
            found.setdefault(path, scaled)
        progress(start, len(models))
    return found


def compared(tables: Sequence[Sequence[Sequence[float]]]) -> list[Raced]:
    """Processes x rounds x (first model twice, then the others) in ms -> one Raced per model."""
    import numpy as np

    logs = [np.log(np.array(table)) for table in tables]
    control = np.array([np.median(log[:, 1] - log[:, 0]) for log in logs])
    spread = float(control.std(ddof=1))
    # The control compares two single sessions; a candidate is compared with the mean of two.
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
    """Time an image form at each of these frame sizes, in one process. Raises as measure.

    Returns (frame, p50 ms, p95 ms) for each.
    """
    times = in_child("sizes", [replace(condition, frame=frame) for frame in frames], image)
    return [(frame, p50, p95) for frame, (p50, p95) in zip(frames, times, strict=True)]


def in_child(
    what: str,
    conditions: Sequence[Condition],
    image: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    **more: object,
) -> Any:
    """Run one of timing.WORK in a fresh process and return its JSON result."""
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

    # The last line; a provider may have printed before it
    return json.loads(done.stdout.rstrip().rpartition("\n")[2])


CPU_MODEL = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")


def _model_of_cpu(info: Path) -> dict[str, str]:
    """What /proc/cpuinfo has of the processors' models, also where they have no name (ARM), or one that
    many have ("Intel(R) Xeon(R) Processor")."""
    if not info.is_file():
        return {}
    kinds = set()
    for block in info.read_text().split("\n\n"):
        fields = [line.partition(":") for line in block.splitlines()]
        kinds.add(" ".join(value.strip() for name, _, value in fields if name.strip() in CPU_MODEL))
    found = ", ".join(filter(None, sorted(kinds)))
    return {"cpu_model": found} if found else {}


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def end_with_children() -> None:
    """Let SIGTERM end this process as an exception, so that the child which measures for it ends too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def machine() -> dict[str, object]:
    """Describe this machine: GPU, driver, CPU, usable cores, system, Python, ONNX Runtime.

    fingerprint: a hash of all these.
    """
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
    elif platform.system() == "Darwin":
        cpu = _said("sysctl", "-n", "machdep.cpu.brand_string") or cpu

    board = Path("/proc/device-tree/model")  # an ARM board's model name, where the CPU has none
    if board.is_file() and cpu in ("", platform.machine()):
        cpu = board.read_text().rstrip("\0\n")

    facts: dict[str, object] = {
        **nvidia.facts(),
        "cpu": cpu,
        **_model_of_cpu(info),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    return {**facts, "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}
