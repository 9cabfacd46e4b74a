"""The regression gate neither raises false alarms nor misses slowdowns.

Tested on simulated machines with a known slowdown, and on a real model.
"""

import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import CORES

from ftkit_export.conversion.convert import write
from ftkit_export.conversion.graph import pixel_model
from ftkit_export.proof import regression
from ftkit_export.proof.regression import (
    FIRST_LOOK,
    GATE_ROUNDS,
    Comparison,
    Sample,
    compare_latency,
    compare_sizes,
    compare_starts,
    compare_stored,
    decide,
    sample,
)
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, Start, in_child, measure_start
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import cores


def machine(slower: float, between: float, within: float, seed: int) -> Callable[[], Sample]:
    """Simulated processes whose session speeds vary by `between`; runs with heavy-tailed noise."""
    rng = np.random.default_rng(seed)

    def draw() -> Sample:
        level = rng.normal(0, between, 3)
        times = np.exp(level + within * np.abs(rng.standard_t(2, (GATE_ROUNDS, 3)))) * [
            1 + slower,
            1,
            1,
        ]
        return sample(*times.T)

    return draw


def outcomes(slower: float, between: float, trials: int = 200) -> dict[str, int]:
    found = [
        decide("latency", machine(slower, between, 0.02, seed), seconds=math.inf)
        for seed in range(trials)
    ]
    return {
        name: sum(item.verdict == name for item in found)
        for name in ("passed", "failed", "inconclusive")
    }


def test_the_same_model_hardly_ever_fails_and_ten_per_cent_hardly_ever_passes() -> None:
    same, slower = outcomes(0.0, 0.01), outcomes(0.10, 0.01)
    assert same["failed"] == 0
    assert same["passed"] >= 190
    assert slower["passed"] == 0
    assert slower["failed"] >= 190


def test_a_machine_too_noisy_for_the_question_says_so_and_passes_nothing_slow() -> None:
    """With A/A deviations of 8 % the margin is near 24 %, so a 10 % slowdown is inconclusive."""
    slower = outcomes(0.10, 0.08, 40)
    assert slower["passed"] <= 1
    assert slower["inconclusive"] >= 38
    found = decide("latency", machine(0.10, 0.08, 0.02, 0), seconds=math.inf)
    assert found.reason.startswith("too noisy to tell 5%")


def test_a_failure_needs_a_second_round_of_fresh_processes() -> None:
    late, drawn = machine(0.0, 0.005, 0.01, 0), 0
    early = machine(0.2, 0.005, 0.01, 1)

    def draw() -> Sample:
        nonlocal drawn
        drawn += 1
        return early() if drawn <= FIRST_LOOK else late()

    found = decide("latency", draw, seconds=math.inf)
    assert found.verdict == "inconclusive"
    assert "in a second round; the first said" in found.reason
    assert (
        decide("latency", machine(0.2, 0.005, 0.01, 1), seconds=math.inf).processes
        == 2 * FIRST_LOOK
    )


def test_what_no_time_can_settle_ends_early() -> None:
    """For a slowdown between the tolerance and a margin of 9 %, more processes do not help."""
    found = decide("latency", machine(0.07, 0.03, 0.01, 3), seconds=math.inf)
    assert found.verdict == "inconclusive"
    assert found.processes < 30


def clocked(
    draw: Callable[[], Sample], cost: float
) -> tuple[Callable[[], Sample], Callable[[], float]]:
    """Draws that take `cost` seconds each on a simulated clock."""
    now = 0.0

    def take() -> Sample:
        nonlocal now
        now += cost
        return draw()

    return take, lambda: now


def test_time_is_kept_whatever_a_process_costs() -> None:
    def take(slower: float, cost: float) -> Comparison:
        draw, clock = clocked(machine(slower, 0.005, 0.01, 1), cost)
        return decide("latency", draw, seconds=80, clock=clock)

    two_rounds, one = take(0.2, 7), take(0.2, 10)
    assert (two_rounds.verdict, two_rounds.seconds) == ("failed", 70)
    assert (one.verdict, one.seconds) == ("inconclusive", 50)
    assert "no time was left for a second round, try more --seconds" in one.reason
    assert take(0.05, 2).seconds <= 80, "at the limit all the time may go, and no more"
    with pytest.raises(
        FtkitError,
        match=r"--seconds: expected time for 10 processes, found 20.0 s for one and 80 s",
    ):
        take(0.0, 20)


def test_sizes_are_exact() -> None:
    assert compare_sizes(104, 100).verdict == "passed"
    assert compare_sizes(106, 100).verdict == "failed"


def starts(ms: float, count: int = 5, peak: int = 60_000_000) -> list[Start]:
    return [
        Start(
            import_ms=50,
            session_ms=20,
            first_run_ms=5,
            peak_rss_bytes=peak,
            p50_ms=ms * (1 + i / 500),
            p95_ms=ms * 1.1,
        )
        for i in range(count)
    ]


def test_a_stored_baseline_judges_on_its_own_machine_with_a_wide_margin_and_elsewhere_advises() -> (
    None
):
    def latency(*now: float, elsewhere: str = "") -> Comparison:
        measured = iter(now)
        return compare_stored(lambda: starts(next(measured)), starts(10.0), elsewhere=elsewhere)[0]

    assert latency(11.0).verdict == "passed"
    assert "so 15% is the least that can be told" in latency(11.0).reason
    assert latency(13.0, 13.0).verdict == "failed"
    assert latency(13.0, 10.0).verdict == "inconclusive", "a second round must say so too"
    for now in (10.0, 30.0):
        found = latency(now, elsewhere="cores: 4 before, 2 now")
        assert (found.verdict, found.reason) == (
            "inconclusive",
            "advisory: the baseline is from another machine (cores: 4 before, 2 now)",
        )
    memory = [
        compare_stored(partial(starts, 1, peak=peak), starts(1))[2].verdict
        for peak in (65_000_000, 69_000_000)
    ]
    assert memory == ["passed", "failed"], "8 % may be a path's doing"
    assert [item.what for item in compare_stored(lambda: starts(1), starts(1))] == [
        "latency",
        "cold start",
        "memory",
    ]


@pytest.fixture(scope="module")
def resize(tmp_path_factory: pytest.TempPathFactory) -> Condition:
    """A small real model: preprocessing only, run on noise."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write(pixel_model(Preprocess(size=96, resize=128)), path, {})
    return Condition(model=str(path), threads=1)


def test_a_real_regression_is_caught_and_the_same_model_is_not(resize: Condition) -> None:
    slower = compare_latency(replace(resize, batch=2), resize, seconds=60)
    assert slower.verdict == "failed", slower
    assert slower.ratio > 1.5
    assert slower.processes >= 2 * FIRST_LOOK
    assert compare_latency(resize, resize, seconds=60).verdict != "failed"


@pytest.mark.skipif(max(len(CORES), cores()) < 2, reason="needs two cores")
@pytest.mark.usefixtures("every_core")
def test_sessions_of_several_threads_take_turns_on_processors_of_their_own(
    resize: Condition,
) -> None:
    times = in_child("pairs", [replace(resize, threads=2)] * 3, rounds=12, seconds=10)
    assert len(times) == 12
    assert all(len(row) == 3 and min(row) > 0 for row in times)


@pytest.mark.parametrize(
    ("slower", "heavier", "expected"),
    [(1, 1, "passed passed"), (2, 1, "failed passed"), (1, 2, "passed failed")],
)
def test_cold_starts_and_memory_are_of_processes_of_their_own(
    slower: int, heavier: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated processes: one kind gives only the time, the other only the memory."""
    rng = np.random.default_rng(0)

    def made(condition: Condition, image: object, *, steady: bool, even_heap: bool) -> Start:
        noise = 1 + 0.01 * rng.standard_normal(2)
        new = condition.model == "new"
        ms, peak = 20 * noise[0] * (slower if new else 1), 1e8 * noise[1] * (heavier if new else 1)
        return Start(
            import_ms=50,
            session_ms=1 if even_heap else ms,
            first_run_ms=1,
            peak_rss_bytes=int(peak) if even_heap else 1,
        )

    monkeypatch.setattr(regression, "measure_start", made)
    cold, memory = compare_starts(Condition(model="new"), Condition(model="old"))
    assert (cold.what, memory.what) == ("cold start", "memory")
    assert f"{cold.verdict} {memory.verdict}" == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_one_model_at_paths_of_other_lengths_takes_the_same_memory(
    bundle: Path, tmp_path: Path
) -> None:
    """The path length shifts the heap: 106 or 114 MB, unless `even_heap` is set."""
    peaks = []
    for length in (1, 20, 40, 60):
        path = tmp_path / ("x" * length) / "model.onnx"
        path.parent.mkdir()
        shutil.copy(bundle / "model.onnx", path)
        start = measure_start(
            Condition(model=str(path), threads=1),
            bundle / "golden" / "00.png",
            steady=False,
            even_heap=True,
        )
        peaks.append(start.peak_rss_bytes)
    assert max(peaks) < 1.02 * min(peaks)


def test_a_model_that_is_not_there_is_one_sentence(resize: Condition) -> None:
    with pytest.raises(FtkitError, match=r"none.onnx: expected an ONNX file, found none"):
        compare_latency(replace(resize, model="none.onnx"), resize)
    assert Path(resize.model).is_file()
