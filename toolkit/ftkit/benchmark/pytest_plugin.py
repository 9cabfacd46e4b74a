"""pytest plugin to test exported models: fixture `latency` and marker `latency_budget`.

    @pytest.mark.latency_budget(p95_ms=8, size_mb=5)
    def test_the_model_is_fast_enough(latency):
        latency("bundle")                              # a bundle, or any ONNX file

    def test_the_model_is_no_slower_than_the_last_release(latency):
        latency.against("bundle", "released/bundle")

A missed budget, or a model that is slower with confidence, fails the test. An inconclusive result
skips it, with the reason. If the test also uses pytest-benchmark's fixture `benchmark`, the figures
are added to its extra_info.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # ONNX Runtime is imported by the test that needs it, not by every pytest
    from ftkit_export.proof.regression import Comparison

MARKER = "latency_budget"
CALLED = pytest.StashKey[bool]()  # whether the test itself ran to its end


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(p50_ms, p95_ms, cold_ms, memory_mb, size_mb): limits for what the fixture latency measures",
    )


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Reject a budget marker without the fixture `latency`, or without valid limits.

    A budget that nothing is measured against must not look like one that is met.
    """
    for item in items:
        for marker in item.iter_markers(MARKER):
            if "latency" not in getattr(item, "fixturenames", ()):
                raise pytest.UsageError(
                    f"{item.nodeid}: expected the fixture latency beside {MARKER}, found none. "
                    "Add it to the test's arguments"
                )
            if marker.args or not marker.kwargs:
                raise pytest.UsageError(
                    f"{item.nodeid}: expected {MARKER} with names, found "
                    f"{marker.args or 'nothing'}. Try p95_ms=10"
                )
            _limits(marker, item.nodeid)


def _limits(marker: pytest.Mark, where: str) -> dict[str, float]:
    # Imported here: most test runs do not need it
    from ftkit.benchmark.budgets import (
        parse_budgets,
    )
    from ftkit_export.runtime.errors import FtkitError

    try:
        return parse_budgets([f"{name}={value}" for name, value in marker.kwargs.items()])
    except FtkitError as error:
        raise pytest.UsageError(f"{where}: {error}") from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Record that the test ran to its end: a skipped one need not have measured."""
    done = yield
    item.stash[CALLED] = True
    return done


class LatencyFixture:
    """The fixture `latency`: call it with a model, or ask for `against`."""

    def __init__(self, request: pytest.FixtureRequest):
        self._request = request
        self.calls = 0

    def __call__(
        self,
        model: str | Path,
        *,
        image: str | Path | None = None,
        provider: str = "cpu",
        threads: int = 1,
        batch: int = 0,
        spinning: bool = True,
        quick: bool = True,
    ) -> dict[str, Any]:
        """Measure a bundle or any ONNX file, check the test's budgets, return the figures.

        Fails the test when a budget is missed in every process, skips it when the processes do not
        agree.
        """
        from ftkit.benchmark.budgets import judge_bench
        from ftkit_export.runtime.latency import Condition, measure
        from ftkit_export.runtime.measure import find, starts

        self.calls += 1
        subject = find(model, image)
        condition = Condition(
            model=str(subject.shipped(provider)),
            provider=provider,
            threads=threads,
            batch=batch,
            spinning=spinning,
            frame=subject.frame,
        )

        row = {"variant": "shipped", **asdict(measure(condition, subject.image, quick=quick))}
        cold = [asdict(start) for start in starts(condition, subject.image, quick=quick)]
        self._tell(row)
        limits: dict[str, float] = {}
        for marker in self._request.node.iter_markers(MARKER):
            limits = {**_limits(marker, self._request.node.nodeid), **limits}  # the closest first

        kept = judge_bench({"rows": [row], "starts": {"shipped": cold}}, limits)
        for item in kept:
            if item.verdict == "failed":
                pytest.fail(f"{model}: {item}", pytrace=False)
        for item in kept:
            if item.verdict == "inconclusive":
                pytest.skip(f"inconclusive: {model}: {item}")

        return row

    def against(
        self,
        candidate: str | Path,
        baseline: str | Path,
        *,
        provider: str = "cpu",
        threads: int = 1,
        max_slowdown: float = 0.05,
        seconds: float = 120,
    ) -> list[Comparison]:
        """Run the regression gate: latency, cold start, memory, size.

        Fails or skips the test as __call__ does; where latency fails on the CPU, the operators that make it
        slower are named.
        """
        from ftkit.benchmark.budgets import compare_in_turn
        from ftkit.benchmark.why import causes_text, explain_files
        from ftkit.options import BenchOptions
        from ftkit_export.runtime.errors import FtkitError

        options = BenchOptions(
            providers=[provider], threads=[threads], max_slowdown=max_slowdown, seconds=seconds
        )
        verdicts = compare_in_turn(candidate, baseline, options)

        self._tell({item.what: asdict(item) for item in verdicts})
        for outcome, then in (("failed", pytest.fail), ("inconclusive", pytest.skip)):
            for item in verdicts:
                if item.verdict == outcome:
                    why = ""
                    if (item.what, outcome, provider) == ("latency", "failed", "cpu"):
                        with suppress(FtkitError):  # the verdict stands without it
                            why = "\n" + causes_text(explain_files(candidate, baseline, options))
                    then(
                        f"{item.what} {outcome}: {item.reason} (ratio {item.ratio:.3f} "
                        f"[{item.low:.3f}, {item.high:.3f}], margin {item.margin:.1%}){why}"
                    )

        return verdicts

    def _tell(self, figures: dict[str, Any]) -> None:
        if "benchmark" in self._request.fixturenames:
            self._request.getfixturevalue("benchmark").extra_info.update(figures)


@pytest.fixture
def latency(request: pytest.FixtureRequest) -> Iterable[LatencyFixture]:
    """Measure exported models in fresh processes, and check the marker latency_budget."""
    measured = LatencyFixture(request)
    yield measured
    called = request.node.stash.get(CALLED, False)
    if called and not measured.calls and request.node.get_closest_marker(MARKER):
        pytest.fail(
            f"{MARKER}: expected a measurement, found none. Call latency(MODEL) in the test",
            pytrace=False,
        )
