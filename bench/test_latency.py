"""Latency of an exported model under pytest-benchmark, and the regression gate against a baseline.

    pytest bench/test_latency.py --bundle BUNDLE --benchmark-json out.json
    pytest bench/test_latency.py --bundle NEW --against OLD

pytest-benchmark's own table is for runs in this process; extra_info has ftkit's figures from fresh
processes.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ftkit.benchmark.pytest_plugin import LatencyFixture
from ftkit_export.runtime.latency import Condition
from ftkit_export.runtime.measure import conditions, find
from ftkit_export.runtime.session import cores
from ftkit_export.runtime.timing import bound_call, feeds, open_session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Generate one test for each variant and number of threads."""
    if "condition" in metafunc.fixturenames:
        where = metafunc.config.getoption("--bundle")
        files = find(where).files if where else {}
        cases = {
            f"{name}-{item.threads}{'' if item.spinning else '-nospin'}": item
            for name, path in files.items()
            for item in conditions(path, ["cpu"], sorted({1, cores()}), [1])
        }
        metafunc.parametrize("condition", list(cases.values()), ids=list(cases))


def test_latency(
    benchmark: BenchmarkFixture,
    latency: LatencyFixture,
    condition: Condition,
    pytestconfig: pytest.Config,
) -> None:
    """Time with pytest-benchmark, and record ftkit's p50 and p95 from a fresh process."""
    image = find(pytestconfig.getoption("--bundle")).image
    session = open_session(condition)
    call = bound_call(session, condition, feeds(session, image and str(image), condition.batch))
    benchmark.pedantic(call, rounds=200, warmup_rounds=20)
    found = latency(
        condition.model, image=image, threads=condition.threads, spinning=condition.spinning
    )
    assert found["p50_ms"] > 0


def test_no_slower(
    benchmark: BenchmarkFixture, latency: LatencyFixture, pytestconfig: pytest.Config
) -> None:
    """Run the regression gate and record its verdicts in extra_info."""
    candidate, baseline = pytestconfig.getoption("--bundle"), pytestconfig.getoption("--against")
    if not (candidate and baseline):
        pytest.skip("give --bundle and --against")
    benchmark.pedantic(latency.against, args=(candidate, baseline), rounds=1)
