"""Warm-up, throttling and regressions told apart: simulated courses, and one real run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ftkit

from ftkit_export.proof import endurance
from ftkit_export.proof.endurance import judged
from ftkit_export.runtime.errors import FtkitError

WINDOWS = 120


def _course(
    rng: np.random.Generator,
    speed: np.ndarray[Any, Any],
    ratio: float | None = None,
    noise: float = 0.02,
    **system: np.ndarray[Any, Any],
) -> list[dict[str, Any]]:
    """Windows of one second; speed: of the machine, as a factor on times. Noise that wanders, as real
    machines' does."""
    wander = np.zeros(len(speed))
    for place in range(1, len(speed)):
        wander[place] = 0.7 * wander[place - 1] + rng.normal(0, noise)
    windows = []
    for place, factor in enumerate(speed):
        base = 4.0 * factor * np.exp(wander[place])
        times = [base] if ratio is None else [base * ratio, base, base * 1.01]
        own = [time * np.exp(rng.normal(0, noise / 2)) for time in times]
        told = dict.fromkeys(("mhz", "celsius", "capped", "stolen", "ousted"))
        windows.append(
            {
                "until_s": place + 1.0,
                "mean_ms": own,
                "p50_ms": own,
                "p95_ms": [1.2 * time for time in own],
                **told,
                **{name: float(values[place]) for name, values in system.items()},
            }
        )
    return windows


def test_even_courses_are_hardly_ever_called_throttled() -> None:
    rng = np.random.default_rng(0)
    courses = [judged(_course(rng, np.ones(WINDOWS), noise=0.03)) for _ in range(200)]
    assert sum(course.throttled_s is not None for course in courses) <= 4, "2 % at most"


def test_throttling_is_found_where_it_begins_and_warm_up_is_apart() -> None:
    rng = np.random.default_rng(1)
    found = warmed = 0
    for _ in range(100):
        start = int(rng.integers(20, 90))
        speed = np.ones(WINDOWS)
        speed[:6] = 1.4
        speed[start:] = rng.uniform(1.25, 2.0)
        clock = 2400 / speed
        course = judged(_course(rng, speed, mhz=clock))
        warmed += abs(course.warm_up_s - 6) <= 4
        found += course.throttled_s is not None and abs(course.throttled_s - start) <= 4
        if course.throttled_s is not None:
            assert course.slowdown == pytest.approx(speed[-1], rel=0.15)
            assert course.sustained.mean_ms == pytest.approx(4 * speed[-1], rel=0.15)
            assert "the clock fell" in course.why[0]
    assert found >= 95
    assert warmed >= 90


def test_a_regression_is_no_throttling_and_throttling_is_no_regression() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        throttles = np.where(np.arange(WINDOWS) < 60, 1.0, 1.6)
        course = judged(_course(rng, throttles, ratio=1.0))
        assert (course.verdict, course.throttled_s is None) == ("passed", False)
        course = judged(_course(rng, np.ones(WINDOWS), ratio=1.3))
        assert (course.verdict, course.throttled_s) == ("failed", None)


def test_pauses_that_fall_on_one_of_the_two_do_not_blur_the_ratio() -> None:
    rng = np.random.default_rng(3)
    passed = 0
    for _ in range(50):
        course = _course(rng, np.ones(WINDOWS), ratio=1.0)
        for window in course[50:]:  # a CPU quota: 10 pauses of 50 ms a window of 100 runs of each
            hits = rng.multinomial(10, [1 / 3] * 3)
            window["mean_ms"] = [
                time + 50.0 * hit / 100 for time, hit in zip(window["mean_ms"], hits, strict=True)
            ]
        told = judged(course)
        assert told.throttled_s == pytest.approx(50, abs=4)
        passed += told.verdict == "passed"
    assert passed >= 48


def test_a_slower_model_does_not_pass_where_the_baselines_sessions_differ() -> None:
    rng = np.random.default_rng(4)
    course = _course(rng, np.ones(WINDOWS), ratio=1.3)
    for window in course:
        mean = window["mean_ms"]
        window["mean_ms"] = window["p50_ms"] = [mean[0], mean[1], 1.2 * mean[2]]
    assert judged(course).verdict == "inconclusive"


def test_a_device_that_throttles_on_and_off_is_told_and_judged_by_all_its_runs() -> None:
    rng = np.random.default_rng(5)
    for begins, recovers in ((40, WINDOWS), (40, 110)):
        speed = np.ones(WINDOWS)
        for place in range(begins, recovers):
            speed[place] = 2.0 if place % 30 >= 15 else 1.0
        if recovers < WINDOWS:
            speed[begins:recovers] = 2.0  # and it recovers in the end
        course = judged(_course(rng, speed, mhz=2400 / speed))
        assert course.throttled_s is not None
        slow = (speed > 1.5)[int(course.throttled_s) :].mean()
        assert course.throttled_share == pytest.approx(slow, abs=0.1)
        assert course.slowdown == pytest.approx(2, rel=0.1)
        assert "the clock fell" in course.why[0]
        assert course.sustained.p95_ms > 8, "a third and more of the runs take 8 ms"
        fast = judged(_course(rng, np.ones(WINDOWS)))
        assert fast.sustained.p95_ms == pytest.approx(4.8, rel=0.1)


def test_a_course_of_a_few_slow_runs_tells_nothing_and_says_so() -> None:
    with pytest.raises(FtkitError, match=r"found 3 in 3 s\. Try 16s"):
        judged(_course(np.random.default_rng(0), np.ones(3), ratio=1.0))


def test_a_model_without_a_pause(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = ftkit("bench", bundle, "--sustained", "5s")
    assert (short.exit_code, "expected at least 20 s" in short.stderr) == (2, True)
    monkeypatch.setattr(endurance, "SHORTEST_S", 3.0)
    page = tmp_path / "course.html"
    options = ("--budget", "p50_ms=0.001", "--report", page, "--json", tmp_path / "course.json")
    result = ftkit("bench", bundle, "--sustained", "4s", *options)
    assert result.exit_code == 1, "the budget is missed"
    assert max(map(len, result.stdout.partition("report: ")[0].splitlines())) <= 80
    told = json.loads((tmp_path / "course.json").read_text())["sustained"]
    assert told["seconds"] == pytest.approx(4, abs=1.5)
    assert told["sustained"]["p50_ms"] > 0
    assert "<svg" in page.read_text()
    for wrong in (("--sustained", "soon"), ("--sustained", "30s", "--budget", "size_mb=5")):
        refused = ftkit("bench", bundle, *wrong)
        assert (refused.exit_code, refused.stderr.count("error: ")) == (2, 1), refused.stderr
