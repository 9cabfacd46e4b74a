"""How fast, how cold, how big: one model on one provider, measured in a process of its own.

    latency = measure("model.onnx", image="photo.png", provider="cpu", threads=1)
    latency.p50_ms, latency.p95_ms
    fp32, int8 = race(["model.onnx", "int8.onnx"], image="photo.png")      # interleaved, in one process
    int8.ratio, int8.ratio_high

Warm-up: at least 20 runs and 1 s. Then at least 200 runs and 10 s (quick: 50 runs and 1 s, and marked so). p99 only
from 1000 runs on. `python -m ftkit_export.latency IMAGE MODEL...` is the child process; it prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftkit_export.errors import FtkitError

WARM_UP_RUNS, WARM_UP_S = 20, 1.0
RUNS, SECONDS = 200, 10.0
QUICK_RUNS, QUICK_SECONDS = 50, 1.0
ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One measured condition. Times in milliseconds, sizes in bytes; p99_ms is None below 1000 runs."""

    provider: str
    threads: int
    batch: int
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


@dataclass(frozen=True, kw_only=True)
class Raced:
    """One of several models run in turn. ratio: median over the rounds of its time over the first model's, with a
    95 % interval of that median (order statistics)."""

    p50_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(
    model: str | Path, image: str | Path, *, provider: str = "cpu", threads: int = 0, quick: bool = False
) -> Latency:
    """Latency of `model` (image form) on one image file, batch 1, in a fresh process.

    threads: 0 = all cores. Raises FtkitError with the child's own words when it fails.
    """
    (found,) = _in_child([model], image, provider, threads, ["--quick"] if quick else [])
    return Latency(**found)


def race(
    models: Sequence[str | Path], image: str | Path, *, provider: str = "cpu", threads: int = 1, rounds: int = ROUNDS
) -> list[Raced]:
    """Models (of one form) run in turn on one image file in one fresh process, so that noise meets all alike.

    The order turns from round to round. Raises FtkitError with the child's own words when it fails.
    """
    return [Raced(**item) for item in _in_child(models, image, provider, threads, ["--rounds", str(rounds)])]


def _in_child(
    models: Sequence[str | Path], image: str | Path, provider: str, threads: int, more: Sequence[str]
) -> list[dict[str, Any]]:
    package_root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-B", "-m", "ftkit_export.latency", str(image), *map(str, models)]
    command += ["--provider", provider, "--threads", str(threads), *more]
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise FtkitError(
            done.stderr.strip().removeprefix("error: ") or f"latency of {models[0]}: the process ended early"
        )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def machine() -> dict[str, object]:
    """What the evidence was measured on: processor, cores, system, Python, ONNX Runtime; fingerprint: of all these."""
    import onnxruntime

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    facts: dict[str, object] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    return {**facts, "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, in bytes (0 where the system does not tell)."""
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which on Linux a child inherits from the process that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _batch(session: Any, image: str) -> Any:
    """The image as the file wants it: a frame for the image form, normalised pixels for the core form."""
    from ftkit_export.preprocess import Preprocess, decode, to_frame

    if session.input_names[0] != "pixels":
        return to_frame(decode(image), session.metadata.get("input_format", "rgb"))[None]
    preprocess = Preprocess(**json.loads(session.metadata["preprocess"]))
    return preprocess.pixels(preprocess.canvas(decode(image))[None])


def _measure_here(model: str, image: str, provider: str, threads: int, quick: bool) -> Latency:
    started = time.perf_counter()
    import numpy as np

    from ftkit_export.session import Session, offered

    offered()  # imports ONNX Runtime
    imported = time.perf_counter()
    session = Session(model, provider=provider, threads=threads)
    opened = time.perf_counter()
    batch = _batch(session, image)
    before = time.perf_counter()
    session.run(batch)
    first = time.perf_counter()
    count = 0
    while count < WARM_UP_RUNS or time.perf_counter() - first < WARM_UP_S:
        session.run(batch)
        count += 1
    runs, seconds = (QUICK_RUNS, QUICK_SECONDS) if quick else (RUNS, SECONDS)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < runs or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        session.run(batch)
        times.append((time.perf_counter() - start) * 1e3)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times, (50, 90, 95, 99)))
    return Latency(
        provider=provider, threads=session.threads, batch=1, runs=len(times), quick=quick,
        p50_ms=p50, p90_ms=p90, p95_ms=p95, p99_ms=p99 if len(times) >= 1000 else None,
        import_ms=(imported - started) * 1e3, session_ms=(opened - imported) * 1e3,
        first_run_ms=(first - before) * 1e3, peak_rss_bytes=peak_rss_bytes(), size_bytes=Path(model).stat().st_size,
    )  # fmt: skip


def _race_here(models: Sequence[str], image: str, provider: str, threads: int, rounds: int) -> list[Raced]:
    import numpy as np

    from ftkit_export.session import Session

    sessions = [Session(model, provider=provider, threads=threads) for model in models]
    batch = _batch(sessions[0], image)
    begun = time.perf_counter()
    count = 0
    while count < WARM_UP_RUNS or time.perf_counter() - begun < WARM_UP_S:
        for session in sessions:
            session.run(batch)
        count += 1
    times = np.zeros((rounds, len(sessions)))
    for number in range(rounds):
        for place in range(len(sessions)):
            which = (place + number) % len(sessions)
            start = time.perf_counter()
            sessions[which].run(batch)
            times[number, which] = time.perf_counter() - start
    ratios = np.sort(times / times[:, :1], axis=0)
    spare = max(0, round(rounds / 2 - 0.98 * rounds**0.5))  # ranks of a 95 % interval of a median
    return [
        Raced(
            p50_ms=float(np.percentile(times[:, i], 50) * 1e3), p95_ms=float(np.percentile(times[:, i], 95) * 1e3),
            ratio=float(np.median(ratios[:, i])), ratio_low=float(ratios[spare, i]),
            ratio_high=float(ratios[rounds - 1 - spare, i]),
        )
        for i in range(len(sessions))
    ]  # fmt: skip


def _main() -> int:
    parser = argparse.ArgumentParser(prog="ftkit_export.latency")
    parser.add_argument("image")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0, help="run the models in turn")
    options = parser.parse_args()
    try:
        found: Sequence[Latency | Raced]
        if options.rounds:
            found = _race_here(options.models, options.image, options.provider, options.threads, options.rounds)
        else:
            found = [_measure_here(options.models[0], options.image, options.provider, options.threads, options.quick)]
    except FtkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps([asdict(item) for item in found]))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
