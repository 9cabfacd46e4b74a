"""False alarms and misses of the regression gate, compared with three simpler rules.

    python bench/gate.py --what aa --trials 100          the same model twice; a noisy neighbour in every second trial
    python bench/gate.py --what slow --trials 40         the candidate slowed by 3, 5, 10, 20 %
    python bench/gate.py --what slow --trials 20 --threads 2 --percent 10
    python bench/gate.py --what real                     realistic regressions
    python bench/gate.py --what starts --trials 20       cold start and memory; paths vary in length
    python bench/gate.py --what cost                     ftkit's latency against a bare loop
    python bench/gate.py --what table                    write the log's table into bench/README.md

Other rules: pytest-benchmark's, min-of-N and a Mann-Whitney test. Model: efficientnet_lite0 (random
weights), core form, 128 pixels, CPU. Noisy neighbour: a busy loop pinned to the first core, on and
off for 0.1 to 1 s. Slowdown: a busy wait after each of the candidate's runs, of the given
percentage of their median. The other rules get what pytest-benchmark collects by default: runs for
one second, in a fresh process per side, one after the other; all three judge the same samples. Each
trial is a line of JSON in --log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tables

from ftkit_export.proof.regression import (
    FIRST_LOOK,
    GATE_ROUNDS,
    SECONDS,
    Comparison,
    Sample,
    compare_latency,
    compare_starts,
    decide,
    sample,
)
from ftkit_export.runtime.latency import Condition, machine
from ftkit_export.runtime.timing import bound_call, feeds, in_turn, open_session, pin

LIMIT = 0.05
LATENCY_S = SECONDS * 2 / 3  # share of the time that `ftkit bench --against` spends on latency
THEIRS_S = 1.0  # pytest-benchmark's --benchmark-max-time


def build(folder: Path, size: int, quantized: bool = False) -> Path:
    """Export efficientnet_lite0 as a core form, in 8 bits if requested."""
    import torch

    from ftkit.models.backbones import build as backbone
    from ftkit_export.conversion.convert import export_core, write
    from ftkit_export.conversion.quantize import calibrate, int8
    from ftkit_export.runtime.targets import TARGETS, here

    torch.manual_seed(0)
    made = backbone("efficientnet_lite0", 4, "none")
    core, path = (
        export_core(made.model, size).model,
        folder / f"{size}{'-int8' if quantized else ''}.onnx",
    )

    if quantized:
        pixels = np.random.default_rng(0).standard_normal((8, 3, size, size), np.float32)
        core = int8(core, calibrate(core, iter([pixels]), made.preprocess), TARGETS[here()])

    write(core, path, {})
    return path


def _neighbour(seed: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = random.Random(seed)
    while True:
        end = time.perf_counter() + rng.uniform(0.1, 1)
        while time.perf_counter() < end:
            pass
        time.sleep(rng.uniform(0.1, 1))


@contextmanager
def neighbour(seed: int, there: bool) -> Iterator[None]:
    """Run a busy loop on the first core, on and off, while the block runs."""
    if not there:
        yield
        return

    process = multiprocessing.get_context("spawn").Process(
        target=_neighbour, args=(seed,), daemon=True
    )
    process.start()

    try:
        yield
    finally:
        process.kill()
        process.join()


def slowed(condition: Condition, percent: float) -> Callable[[], object]:
    """The model's call plus a busy wait of `percent` of the median of its last nine runs."""
    session, last = open_session(condition, shared=True), deque[float](maxlen=9)
    call = bound_call(session, condition, feeds(session, None, 1))

    def run() -> None:
        start = time.perf_counter()
        call()
        last.append(time.perf_counter() - start)
        end = start + last[-1] + statistics.median(last) * percent / 100
        while time.perf_counter() < end:
            pass

    return run if percent else call


def child(job: dict[str, Any]) -> list[list[float]]:
    """In a separate process: pairs for ftkit's gate, or one side's runs for the others."""
    condition, percent = Condition(**job["condition"]), job["percent"]
    if job["what"] == "pairs":
        calls = [slowed(condition, percent if place == job["place"] else 0) for place in range(3)]
        pin([condition])
        return [
            list(map(float, row))
            for row in in_turn(calls, GATE_ROUNDS, warm_up=(10, 0), seconds=10)
        ]

    call, times, begun = slowed(condition, percent), [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < THEIRS_S:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)

    return [times]


def ask(what: str, condition: Condition, percent: float, place: int = 0) -> list[list[float]]:
    """Run child() in a fresh process."""
    job = json.dumps(
        {"what": what, "condition": asdict(condition), "percent": percent, "place": place}
    )
    done = subprocess.run(
        [sys.executable, __file__, "--child", job], capture_output=True, text=True, check=True
    )
    found: list[list[float]] = json.loads(done.stdout)
    return found


def others(condition: Condition, percent: float) -> dict[str, bool]:
    """Whether each of the other rules reports a regression."""
    from scipy.stats import mannwhitneyu

    (then,), (now,) = ask("runs", condition, 0), ask("runs", condition, percent)

    return {
        "pytest-benchmark median:5%": statistics.median(now) / statistics.median(then) > 1 + LIMIT,
        "min-of-N, 5%": min(now) / min(then) > 1 + LIMIT,
        "Mann-Whitney, p < 0.05": float(mannwhitneyu(now, then, alternative="greater").pvalue)
        < 0.05,
    }


def trial(condition: Condition, percent: float, number: int, log: Path) -> None:
    """Make one comparison with every rule, with the noisy neighbour in every second trial."""
    noisy, turns = number % 2 == 1, itertools.cycle(range(3))

    def draw() -> Sample:
        place = next(turns)
        times = np.array(ask("pairs", condition, percent, place))
        return sample(times[:, place], *np.delete(times, place, axis=1).T)

    with neighbour(number, noisy):
        found = decide("latency", draw, seconds=LATENCY_S)
        line = {
            "percent": percent,
            "threads": condition.threads,
            "noisy": noisy,
            **asdict(found),
            "others": others(condition, percent),
        }

    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")

    print(
        f"{percent:g} %, {'noise' if noisy else 'quiet'}: {found.verdict} {found.ratio:.3f} "
        f"[{found.low:.3f}, {found.high:.3f}], margin {found.margin:.3f}, {found.processes} processes, "
        f"{found.seconds:.0f} s; {line['others']}",
        flush=True,
    )


def table(log: Path) -> str:
    """Table of the log, one row per slowdown.

    Columns: failed, inconclusive and passed by ftkit, and the number of trials that each other rule
    calls slower.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = list(lines[0]["others"])
    head = [
        "slower by",
        "threads",
        "neighbour",
        "trials",
        "ftkit: failed",
        "inconclusive",
        "passed",
        "seconds each",
        *names,
    ]

    rows = [head, ["---"] * len(head)]
    for threads, percent, noisy in sorted(
        {(line["threads"], line["percent"], line["noisy"]) for line in lines}
    ):
        there = [
            line
            for line in lines
            if (line["threads"], line["percent"], line["noisy"]) == (threads, percent, noisy)
        ]
        seconds = sorted(line["seconds"] for line in there)
        rows.append(
            [
                f"{percent:g} %",
                threads,
                "on and off" if noisy else "none",
                len(there),
                *(
                    sum(line["verdict"] == verdict for line in there)
                    for verdict in ("failed", "inconclusive", "passed")
                ),
                f"{statistics.mean(seconds):.0f} (at most {seconds[-1]:.0f})",
                *(sum(line["others"][name] for line in there) for name in names),
            ]
        )

    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def real(folder: Path) -> None:
    """Run the gate, as a user calls it, on realistic regressions."""
    plain = Condition(model=str(build(folder, 224)), threads=1)
    cases: dict[str, tuple[Condition, Condition]] = {
        "int8 to fp32": (plain, replace(plain, model=str(build(folder, 224, quantized=True)))),
        "2 threads to 1": (plain, replace(plain, threads=2)),
        "graph optimisation off": (replace(plain, optimised=False), plain),
        "224 to 256 pixels": (replace(plain, model=str(build(folder, 256))), plain),
        "nothing": (plain, plain),
    }

    print(
        "| change | verdict | ratio | 95 % interval | A/A spread | seconds |\n|---|---|---|---|---|---|"
    )
    for name, (candidate, baseline) in cases.items():
        found: Comparison = compare_latency(candidate, baseline, seconds=LATENCY_S)
        print(
            f"| {name} | {found.verdict} | {found.ratio:.3f} | {found.low:.3f} to {found.high:.3f} | "
            f"{found.spread:.1%} | {found.seconds:.0f} |",
            flush=True,
        )


def heavier(model: Path, megabytes: int, path: Path) -> Path:
    """Write `model` with `megabytes` more of weights, one value of which is an output."""
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.load(model)
    weights = np.random.default_rng(0).standard_normal((megabytes * 250_000,), np.float32)
    made.graph.initializer.append(numpy_helper.from_array(weights, "more"))
    made.graph.node.append(
        helper.make_node("ArgMax", [made.graph.output[0].name], ["which"], axis=1, keepdims=0)
    )
    made.graph.node.append(helper.make_node("Gather", ["more", "which"], ["said"]))
    made.graph.output.append(helper.make_tensor_value_info("said", onnx.TensorProto.FLOAT, None))
    onnx.save(made, path)

    return path


def starts(folder: Path, trials: int) -> None:
    """Compare cold start and memory; the lengths of both file names are random in each trial."""
    plain, rng = build(folder, 224), random.Random(0)
    cases = {"nothing": plain, "10 MB more weights": heavier(plain, 10, folder / "more.onnx")}
    print(
        "| change | trials | what | failed | inconclusive | passed | ratio | seconds each |\n|"
        + "---|" * 8
    )

    for name, candidate in cases.items():
        found = []
        for _ in range(trials):
            files = [folder / f"{'x' * length}.onnx" for length in rng.sample(range(1, 100), 2)]
            for source, file in zip((candidate, plain), files, strict=True):
                shutil.copy(source, file)
            found.append(
                compare_starts(
                    *(Condition(model=str(file), threads=1) for file in files), seconds=SECONDS / 3
                )
            )

        for verdicts in zip(*found, strict=True):
            counts = (
                sum(item.verdict == word for item in verdicts)
                for word in ("failed", "inconclusive", "passed")
            )
            ratios = [item.ratio for item in verdicts]
            seconds = statistics.mean(item.seconds for item in verdicts)
            print(
                f"| {name} | {trials} | {verdicts[0].what} | {' | '.join(map(str, counts))} | {min(ratios):.3f} to "
                f"{max(ratios):.3f} | {seconds:.0f} |",
                flush=True,
            )


def cost(folder: Path) -> None:
    """Time ftkit's call and a bare onnxruntime loop, interleaved; median of paired ratios."""
    import onnxruntime

    for size in (128, 224):
        condition = Condition(model=str(build(folder, size)), threads=1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        bare = onnxruntime.InferenceSession(
            condition.model, options, providers=["CPUExecutionProvider"]
        )
        feed = {
            "pixels": np.random.default_rng(0)
            .standard_normal((1, 3, size, size))
            .astype(np.float32)
        }
        session = open_session(condition)
        call = bound_call(session, condition, feeds(session, None, 1))
        times = in_turn(
            [lambda bare=bare, feed=feed: bare.run(None, feed), call],
            600,
            warm_up=(50, 1),
            seconds=60,
        )

        p50 = np.median(times, axis=0)
        ratios = times[:, 1] / times[:, 0]
        print(
            f"{size} px: bare {p50[0]:.3f} ms, ftkit {p50[1]:.3f} ms, paired ratio {np.median(ratios):.4f}"
        )


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--what", choices=["aa", "slow", "real", "starts", "cost", "table"], default="aa"
    )
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--percent", type=float, nargs="*", default=[3, 5, 10, 20])
    parser.add_argument("--log", type=Path, default=Path("gate.jsonl"))
    parser.add_argument("--child", help=argparse.SUPPRESS)

    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return
    if options.what == "table":
        tables.write("gate", table(options.log))
        return

    print(f"{machine()}; at least {FIRST_LOOK} processes of {GATE_ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        if options.what in ("real", "cost"):
            {"real": real, "cost": cost}[options.what](Path(scratch))
            return
        if options.what == "starts":
            starts(Path(scratch), options.trials)
            return
        condition = Condition(model=str(build(Path(scratch), 128)), threads=options.threads)
        for percent in [0] if options.what == "aa" else options.percent:
            for number in range(options.trials):
                trial(condition, percent, number, options.log)

    print(table(options.log))


if __name__ == "__main__":
    main()
