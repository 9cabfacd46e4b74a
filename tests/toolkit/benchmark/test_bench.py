"""`ftkit bench`, its history and the pytest plugin, on the shared bundle."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import ftkit

from ftkit.benchmark.budgets import Budget, as_gate, exit_code, judge_budgets
from ftkit.benchmark.history import Series, append_measurement, changes, read_history
from ftkit.report.latency_history import write_history
from ftkit_export.proof.regression import Comparison
from ftkit_export.runtime.latency import Start


def _git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One complete quick bench inside a git repository, with budgets, saved as JSON and history."""
    repository = tmp_path_factory.mktemp("their repository")
    (repository / "sub").mkdir()
    _git(repository, "init", "-q")
    _git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository / "sub")
        result = ftkit(
            "bench",
            bundle,
            "--quick",
            "--threads",
            "1",
            "--save",
            "--json",
            repository / "bench.json",
            "--budget",
            "p95_ms=10000",
            "--budget",
            "size_mb=0.1",
        )
    return result, repository


def test_the_tables_fit_80_columns_and_a_missed_budget_is_exit_1(
    measured: tuple[Result, Path],
) -> None:
    result, _ = measured
    assert result.exit_code == 1, result.output
    assert (
        max(
            map(
                len, [line for line in result.stdout.splitlines() if not line.startswith("saved: ")]
            )
        )
        <= 80
    )
    for part in (
        "p50 ms",
        "cold start",
        "preprocess",
        "of fp32's time",
        "quick: short runs, not for comparisons",
    ):
        assert part in result.stdout
    assert "ok      p95_ms" in result.stdout
    assert "FAILED  size_mb" in result.stdout


def test_the_json_says_everything_and_parts_add_up(
    measured: tuple[Result, Path], bundle: Path
) -> None:
    found = json.loads((measured[1] / "bench.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert set(found["sha256"].values()) <= set(manifest["files"].values())
    assert (
        list(found["starts"]) == list(found["parts"]) == [row["variant"] for row in found["rows"]]
    )
    assert found["rows"][0]["variant"] == manifest["chosen"], "budgets are about the shipped file"
    parts = found["parts"]["fp32"]
    assert parts["preprocess_ms"] + parts["network_ms"] == pytest.approx(
        parts["together_ms"], rel=0.5
    )
    assert [item["verdict"] for item in found["budgets"]] == ["passed", "failed"]
    assert len(found["budgets"][0]["values"]) == 4


def test_against_its_own_json_it_is_no_slower_and_elsewhere_only_advised(
    measured: tuple[Result, Path], bundle: Path, tmp_path: Path
) -> None:
    stored = measured[1] / "bench.json"
    result = ftkit("bench", bundle, "--against", stored)
    assert "15% is the least that can be told" in " ".join(result.stdout.split())
    assert result.exit_code in (0, 1, 3), "this machine may be slower now than a minute ago"
    assert result.exit_code != 1 or "in a second round" not in result.stdout
    elsewhere = json.loads(stored.read_text())
    elsewhere["machine"]["fingerprint"] = "another"
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    result = ftkit("bench", bundle, "--against", tmp_path / "elsewhere.json")
    assert result.exit_code == 3
    assert "advisory: the baseline is from another machine" in result.stdout


def test_the_gate_prints_ratio_interval_control_margin_and_verdict(bundle: Path) -> None:
    result = ftkit("bench", bundle, "--against", bundle, "--seconds", "60", "--json", "-")
    assert result.exit_code in (0, 3), result.output
    found = {item["what"]: item for item in json.loads(result.stdout)["against"]}
    assert list(found) == ["latency", "cold start", "memory", "size"]
    assert found["size"]["ratio"] == 1
    assert found["latency"]["low"] <= found["latency"]["ratio"] <= found["latency"]["high"]
    assert found["latency"]["margin"] >= 0.05
    assert "A/A" in result.stderr, "the table steps aside for the JSON"
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_bad_input_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    found = {
        "schema": 1,
        "machine": {"fingerprint": "x"},
        "provider": "cpu",
        "threads": 1,
        "sha256": {},
        "parts": {},
        "raced": {},
        "quick": True,
        "rows": [],
        "starts": {},
    }
    (tmp_path / "empty.json").write_text(json.dumps(found))
    for words, said in (
        (
            (bundle, "--against", tmp_path / "empty.json"),
            "empty.json: expected what `ftkit bench --json` writes",
        ),
        (
            (bundle, "--json", tmp_path / "none" / "x.json"),
            "expected a file in a folder that is there",
        ),
        (
            (bundle, "--against", bundle, "--quick"),
            "--quick: expected no such option with --against without",
        ),
        (
            (bundle, "--against", bundle, "--threads", "1,2"),
            "expected one provider, number of threads and batch",
        ),
        (("none",), "none: expected a bundle or an ONNX file, found nothing there"),
        ((bundle, "--budget", "p95=3"), "--budget p95=3: expected a known budget"),
        ((bundle, "--budget", "p95_ms=fast"), "expected a limit above 0, found 'fast'"),
        ((bundle, "--threads", "0"), "--threads 0: expected numbers above 0"),
        (
            (bundle, "--against", tmp_path / "other.json"),
            "other.json: expected what `ftkit bench --json` writes",
        ),
        ((bundle, "--ssh", "-oProxyCommand=x"), "expected USER@HOST or USER@HOST:PYTHON"),
        ((tmp_path, "--quick"), "expected a bundle"),
    ):
        result = ftkit("bench", *words)
        assert (result.exit_code, said in result.stderr) == (2, True), (words, result.output)
        assert len(result.stderr.splitlines()) == 1
    assert ftkit("report", tmp_path / "none.jsonl").exit_code == 2


def test_processes_that_disagree_settle_no_budget() -> None:
    assert Budget(name="p95_ms", limit=8, values=(7.0, 7.5)).verdict == "passed"
    assert Budget(name="p95_ms", limit=8, values=(9.0, 8.5)).verdict == "failed"
    assert Budget(name="p95_ms", limit=8, values=(7.0, 8.5)).verdict == "inconclusive"


def test_memory_that_the_system_does_not_tell_keeps_no_budget() -> None:
    start = Start(import_ms=1, session_ms=1, first_run_ms=1, peak_rss_bytes=0)
    (told,) = judge_budgets({"memory_mb": 50}, [start], p50_ms=None, p95_ms=None, size_bytes=1)
    assert (told.verdict, str(told)) == ("inconclusive", "memory_mb not measured, limit 50")


def test_the_gates_table_fits_80_columns_also_on_a_wild_machine() -> None:
    wild = Comparison(
        what="cold start",
        verdict="inconclusive",
        reason="too noisy " * 12,
        ratio=10.5,
        low=0.123,
        high=123.4,
        spread=1.234,
        margin=39.5,
        tolerance=0.2,
        processes=160,
        seconds=120.4,
    )
    assert max(map(len, as_gate([wild]).splitlines())) <= 80


def test_one_failure_outweighs_what_is_unsure() -> None:
    assert exit_code(["passed", "passed"]) == 0
    assert exit_code(["passed", "inconclusive"]) == 3
    assert exit_code(["inconclusive", "failed", "passed"]) == 1


def test_the_history_knows_commit_machine_and_bundle_and_is_plotted(
    measured: tuple[Result, Path],
) -> None:
    _, repository = measured
    path = repository / "ftkit-bench.jsonl"
    (line,) = read_history(path)
    head = subprocess.run(
        ["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert head.stdout.startswith(line["commit"]) and len(line["commit"]) == 12
    found = json.loads((repository / "bench.json").read_text())
    assert (line["fingerprint"], line["machine"]) == (found["fingerprint"], found["machine"])
    elsewhere = {**found, "machine": {**found["machine"], "fingerprint": "another"}}
    assert append_measurement(elsewhere, repository) == path
    result = ftkit("report", path)
    assert result.exit_code == 0, result.output
    page = path.with_suffix(".html").read_text()
    assert page.count("<h2>") == 2, "machines are kept apart"
    assert "advisory" in page
    assert line["frame"] == found["frame"] == "300x300"
    larger = {**found, "frame": "4000x3000"}
    series = set(line["series"])
    append_measurement(larger, repository)
    assert not series & {
        item for item in read_history(path)[-1]["series"] if "p50" in item.title
    }, "other frames, another line"
    path.write_text(path.read_text() + "{}\n")
    assert "line 4: expected a measurement" in ftkit("report", path).stderr


def test_cold_starts_under_other_conditions_are_other_series(
    measured: tuple[Result, Path], tmp_path: Path
) -> None:
    _, repository = measured
    before = json.loads((repository / "ftkit-bench.jsonl").read_text().splitlines()[0])
    line, path = copy.deepcopy(before), tmp_path / "history.jsonl"
    for row in line["rows"]:
        row["provider"] = "cuda"
    path.write_text(json.dumps(before) + "\n" + json.dumps(line) + "\n")
    here, other = (set(each["series"]) for each in read_history(path))
    assert len(here) == len(other)
    assert not here & other


def test_sigterm_ends_the_process_that_measures(bundle: Path) -> None:
    """Regression: it went on for as long as it was asked to, beside the next measurement."""
    command = [sys.executable, "-m", "ftkit", "bench", str(bundle), "--sustained", "120s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        deadline = time.monotonic() + 60
        children = Path(f"/proc/{asked.pid}/task/{asked.pid}/children")
        while not children.read_text().split():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child = int(children.read_text().split()[0])
        asked.send_signal(signal.SIGTERM)
        asked.communicate(timeout=60)
    assert asked.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


def test_a_change_point_is_where_the_level_changes_and_nowhere_else() -> None:
    level = [10.0, 10.1, 9.9, 10.0, 10.05, 9.95, 10.0, 10.1]
    assert changes(level) == []
    assert changes([*level, 11.5, 11.4, 11.6, 11.5]) == [8]
    assert changes([*level, 11.5, 10.0, 10.0, 10.1]) == [], "one slow day is no new level"
    assert changes([*level, *[12.0] * 6, *[9.0] * 4]) == [8, 14]
    noisy = [10.0, 13.0, 8.0, 11.0, 9.0, 12.0, 10.5, 8.5, 12.5, 9.5, 11.5]
    assert changes(noisy) == []


def test_a_changed_level_is_marked_on_the_page_with_its_commit(tmp_path: Path) -> None:
    def line(number: int, ms: float) -> dict[str, Any]:
        return {
            "time": f"2026-01-{number:02d}T00:00:00+00:00",
            "commit": f"c{number:011d}",
            "modified": False,
            "series": {Series("a machine", "f", "p50 of fp32"): ms},
        }

    write_history([line(i + 1, 10.0 if i < 6 else 12.0) for i in range(12)], tmp_path / "page.html")
    assert "2026-01-07, commit c00000000007: 10 to 12 ms" in (tmp_path / "page.html").read_text()


SUITE = """
import pytest

pytestmark = pytest.mark.latency_budget(size_mb=1_000)  # a test's own counts before it

@pytest.mark.latency_budget(p95_ms=10_000)
def test_within(latency):
    assert latency(MODEL)["p50_ms"] > 0

@pytest.mark.latency_budget(size_mb=0.001)
def test_too_large(latency):
    latency(MODEL)

@pytest.mark.latency_budget(p95_ms=10_000)
def test_forgets_to_measure(latency):
    pass
"""


def _pytest(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, words)]
    # A worker's child is none: pytest-benchmark measures nothing in one
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        command, cwd=folder, env=alone, capture_output=True, text=True, check=False
    )


def test_the_plugin_fails_what_misses_its_budget_and_what_measures_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    model = bundle / "variants" / "fp32-core.onnx"
    (tmp_path / "test_theirs.py").write_text(SUITE.replace("MODEL", repr(str(model))))
    done = _pytest(tmp_path, "-ra", "test_theirs.py")
    assert done.returncode == 1, done.stdout
    assert "1 failed, 2 passed, 1 error" in done.stdout, done.stdout
    assert "size_mb" in done.stdout
    assert "latency_budget: expected a measurement, found none" in done.stdout
    (tmp_path / "test_theirs.py").write_text(SUITE.replace("p95_ms", "p95"))
    assert "expected a known budget" in _pytest(tmp_path, "test_theirs.py").stderr
    (tmp_path / "test_theirs.py").write_text(SUITE.replace("(latency)", "()", 1))
    assert "expected the fixture latency" in _pytest(tmp_path, "test_theirs.py").stderr


def test_the_suite_runs_under_pytest_benchmark_with_our_figures_beside_its_own(
    bundle: Path, tmp_path: Path
) -> None:
    root, out = Path(__file__).parents[3], tmp_path / "out.json"
    model = bundle / "variants" / "fp32-core.onnx"
    done = _pytest(
        root,
        "bench/test_latency.py",
        "-k",
        "model-1]",
        "--bundle",
        model,
        f"--benchmark-json={out}",
    )
    assert done.returncode == 0, done.stdout
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["extra_info"]["p95_ms"] > 0
    assert found["stats"]["rounds"] == 200
