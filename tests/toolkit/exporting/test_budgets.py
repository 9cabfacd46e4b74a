"""Budgets: one check for export and bench, a stated frame size, suggestions when missed."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, ftkit, settings

from ftkit.benchmark.budgets import Budget, judge_budgets
from ftkit.evaluation.metrics import evaluate
from ftkit.evaluation.multilabel import evaluate_labels
from ftkit.exporting.evidence import Evidence, choose, judge_gates, would_meet
from ftkit.recipe import load_recipe
from ftkit_export.bundle.seal import Gate, overall
from ftkit_export.proof.decision import Row, paired
from ftkit_export.runtime.latency import Condition, Start, over_sizes
from ftkit_export.runtime.preprocess import Preprocess, parse_frame
from ftkit_export.runtime.readout import Labels
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import Precision
from ftkit_export.runtime.timing import feeds


def _row(name: Precision, verdict: str, p50: float, size: int) -> Row:
    return Row(
        name=name,
        precision=name,
        verdict=verdict,
        reason="",
        accuracy=0.9,
        p50_ms=p50,
        p95_ms=p50 + 1,
        size_bytes=size,
    )


def _judged(row: Row, spread: float = 0.0, **limits: float) -> list[Budget]:
    start = Start(
        import_ms=1,
        session_ms=1,
        first_run_ms=1,
        peak_rss_bytes=90_000_000,
        p95_ms=(row.p95_ms or 0) + spread,
    )
    return judge_budgets(
        limits, [start], p50_ms=row.p50_ms, p95_ms=row.p95_ms, size_bytes=row.size_bytes
    )


def test_the_fastest_that_meets_every_budget_wins_then_one_that_may_then_the_nearest() -> None:
    fp32, int8 = _row("fp32", "reference", 10, 13_000_000), _row("int8", "accepted", 6, 4_000_000)
    refused = _row("fp16", "refused", 1, 1)

    def chosen(rows: list[Row], spread: float = 0.0, **limits: float) -> str:
        return choose(rows, {row.name: _judged(row, spread, **limits) for row in rows}).name

    assert chosen([fp32, int8, refused]) == "int8"
    assert chosen([fp32, refused]) == "fp32"
    assert chosen([fp32, int8], p95_ms=12, size_mb=20, memory_mb=100) == "int8"
    assert chosen([fp32, int8], p95_ms=5, size_mb=3) == "int8", "nearest to both"
    assert chosen([_row("fp32", "reference", 3, 9), int8], spread=2, p95_ms=8) == "fp32", (
        "the other only may"
    )
    assert chosen([fp32, int8], spread=2, p95_ms=8) == "int8"


def test_a_budget_is_passed_failed_or_not_settled_by_all_its_processes() -> None:
    row = _row("fp32", "reference", 10, 13_000_000)
    assert [_judged(row, 2, p95_ms=limit)[0].verdict for limit in (13, 12, 10)] == [
        "passed",
        "inconclusive",
        "failed",
    ]
    (unmeasured,) = judge_budgets({"p95_ms": 5}, [], p50_ms=None, p95_ms=None, size_bytes=1)
    assert (unmeasured.verdict, unmeasured.excess) == ("inconclusive", float("inf"))

    def gate(**changes: float | str) -> Gate:
        return Gate(**{"name": "p95", "value": 11.0, "limit": 12.0, **changes})  # type: ignore[arg-type]

    assert gate().verdict == "passed"
    assert gate(low=10.5, high=12.5).verdict == "inconclusive"
    assert gate(value=13.0, low=12.5, high=14.0).verdict == "failed"
    assert gate(value=13.0, unsettled="int8 would").verdict == "inconclusive"
    assert gate(value=float("nan")).verdict == "failed"
    assert overall(["passed", "inconclusive"]) == "inconclusive"
    assert overall(["inconclusive", "failed"]) == "failed"


def test_a_larger_frame_takes_longer_and_is_named_everywhere(bundle: Path, run: Path) -> None:
    """Regression: a file took 3 ms at 60 x 60 and 37 at 4000 x 3000, and passed "limit 4"."""
    session = Session(bundle / "model.onnx")
    for frame, shape in (("60x40", (1, 40, 60, 3)), ("", (1, 300, 300, 3))):
        (fed,) = feeds(session, str(bundle / "golden" / "00.png"), 1, frame)
        assert fed.shape == shape
    condition = Condition(model=str(bundle / "model.onnx"), threads=1)
    listed = over_sizes(condition, bundle / "golden" / "00.png", ["60x40", "640x480"])
    assert [frame for frame, _, _ in listed] == ["60x40", "640x480"]
    assert all(0 < p50 <= p95 for _, p50, p95 in listed)

    manifest = json.loads((bundle / "manifest.json").read_text())
    own = json.loads((run / "run.json").read_text())["audit"]["frame"]
    assert manifest["frame"] == own == "300x300", "the photographs' own size"
    assert {item["frame"] for item in manifest["evidence"]["latency"]} == {own}
    over = {item["frame"]: item["p95_ms"] for item in manifest["evidence"]["latency_over_sizes"]}
    assert {own, "640x480"} <= set(over)
    assert "frames of 300 x 300, decoding apart" in (bundle.parent / "export.txt").read_text()
    assert "frames of 300 x 300" in (bundle / "MODEL_CARD.md").read_text()
    assert "frames of 300 x 300" in (bundle / "report.html").read_text()


def test_bench_runs_on_the_bundles_frames_and_on_those_it_is_told(
    bundle: Path, tmp_path: Path
) -> None:
    rows = []
    other = (bundle / "model.onnx", "--image", bundle / "golden" / "00.png")
    for model, frame in (((bundle,), ()), (other, ("--frame", "2000 x 1500"))):
        command = ("bench", *model, *frame, "--quick", "--threads", "1")
        done = ftkit(*command, "--json", tmp_path / "b.json")
        assert done.exit_code == 0, done.output
        rows.append(json.loads((tmp_path / "b.json").read_text()))
        assert f"frames of {rows[-1]['frame'].replace('x', ' x ')}, decoding apart" in done.stdout
    assert [found["frame"] for found in rows] == ["300x300", "2000x1500"]
    for found in rows:
        assert {row["frame"] for row in found["rows"]} == {found["frame"]}
    wrong = ftkit("bench", bundle, "--frame", "large")
    assert (wrong.exit_code, "frame large: expected WIDTHxHEIGHT" in wrong.stderr) == (2, True)
    for text in ("0x5", "640", "30000x1", "20000x20000"):
        with pytest.raises(Exception, match="expected WIDTHxHEIGHT"):
            parse_frame(text)


def test_a_missed_budget_says_all_that_is_missed_and_a_command_that_leads_on(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    limits = settings(
        "export.p95_ms=0.001", "export.size_mb=1", "export.frame=64x64", "export.variants=fp32"
    )
    done = ftkit("export", run, "--out", out, "--quick", *limits)
    assert done.exit_code == 1, done.output
    assert "missed: p95_ms" in done.stdout
    assert "missed: size_mb" in done.stdout
    assert "gate p95 ms, one thread, frames of 64 x 64 (fp32)" in done.stderr
    assert "size in MB (fp32): expected at most 1" in done.stderr
    manifest = json.loads((tmp_path / "bundle.failed" / "manifest.json").read_text())
    assert manifest["verdict"] == "failed"
    verified = ftkit("verify", tmp_path / "bundle.failed")
    assert (verified.exit_code, "sealed gate FAILED: size in MB (" in verified.stdout) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.failed"], "nothing half-built"

    table = re.findall(r"^(\d+) x \1\s+([\d.]+)/([\d.]+)", done.stdout, re.MULTILINE)
    assert table
    assert all(int(size) < 96 for size, _, _ in table)


def test_the_size_of_an_input_takes_its_canvas_along(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: with preprocess.size=112 alone, the network saw the middle half of an image."""
    from ftkit.overrides import override

    alone = override(load_recipe("lite0"), ["preprocess.size=112"]).preprocess
    both = override(
        load_recipe("lite0"), ["preprocess.size=112", "preprocess.resize=150"]
    ).preprocess
    assert alone and both
    assert (alone.size, alone.resize, both.resize) == (112, 112, 150)
    assert "preprocess.resize: 112" in capsys.readouterr().out
    assert Preprocess(size=224, resize=256).at(112).resize == 128


def test_the_command_of_the_budget_advice_trains(run: Path, tmp_path: Path) -> None:
    from ftkit.exporting.budget_advice import _command
    from ftkit.training.run import open_run

    opened = open_run(run)
    told = replace(opened, data={**opened.data, "seed": 3, "add": "/x/review.csv"})
    assert _command(told, 64).endswith("--add /x/review.csv --seed 3"), (
        "the same images, and splits"
    )
    words = shlex.split(_command(opened, 64))
    words[words.index("--out") + 1] = str(tmp_path / "smaller")
    done = ftkit(*words[1:], *settings("stages.0.epochs=1", "stages.1.epochs=1"))
    assert done.exit_code == 0, done.output
    assert open_run(tmp_path / "smaller").preprocess.size == 64
    assert "preprocess.size=96" in TINY


@pytest.mark.parametrize(
    ("right", "verdict"), [([50, 50], "passed"), ([50, 38], "inconclusive"), ([50, 10], "failed")]
)
def test_a_class_that_is_seldom_found_fails_the_gate_that_was_asked_for(
    right: list[int], verdict: str
) -> None:
    labels = np.repeat([0, 1], 50)
    answers = np.concatenate(
        [np.where(np.arange(50) < count, label, 1 - label) for label, count in enumerate(right)]
    )
    metrics = asdict(evaluate(np.eye(2)[answers], labels, ("a", "b")))
    row = _row("fp32", "reference", 1, 1)
    same = paired(answers == labels, answers == labels)
    measured = Evidence(parity=[], chosen=row, metrics=metrics, against=same, out_of_order=0)
    gates = judge_gates(replace(load_recipe("lite0").export, min_recall=0.8), measured)
    assert [gate.verdict for gate in gates if "missed of class" in gate.name] == [verdict]
    assert len(judge_gates(load_recipe("lite0").export, measured)) == len(gates) - 1
    unseen = asdict(evaluate(np.eye(3)[answers], labels, ("a", "b", "c")))
    gate = judge_gates(
        replace(load_recipe("lite0").export, min_recall=0.8), replace(measured, metrics=unseen)
    )[-1]
    assert (gate.verdict, "class c" in gate.name) == ("inconclusive", True)


def test_the_label_with_the_lowest_recall_is_gated() -> None:
    targets = np.ones((100, 3), np.float32)
    targets[:50, 2] = np.nan  # not known
    logits = np.full((100, 3), 5.0)
    logits[:9, 1] = -5.0  # 91 of 100 found
    logits[::2, 2] = -5.0  # 25 of the 50 that are known
    limits = replace(load_recipe("lite0").export, min_recall=0.8)

    def gate(count: int) -> Gate:
        names = ("a", "b", "c")[:count]
        own = Labels(temperatures=(1.0,) * count, thresholds=(0.5,) * count)
        metrics = asdict(
            evaluate_labels(own, logits[:, :count], targets[:, :count], names, [""] * 100)
        )
        against = paired(np.ones(100, bool), np.ones(100, bool))
        row = _row("fp32", "reference", 1, 1)
        evidence = Evidence(parity=[], chosen=row, metrics=metrics, against=against, out_of_order=0)
        return next(
            each for each in judge_gates(limits, evidence) if "missed of label" in each.name
        )

    assert (gate(3).name, gate(3).verdict, gate(3).value) == (
        "share missed of label c",
        "failed",
        0.5,
    )
    assert (gate(2).name, gate(2).verdict) == ("share missed of label b", "passed")


def test_the_header_and_the_gate_show_one_p95_and_the_worst_class(
    bundle: Path, run: Path, tmp_path: Path
) -> None:
    """Regression: "all gates passed" hid a class with recall 0.23."""
    out = tmp_path / "bundle"
    done = ftkit(
        "export",
        run,
        "--out",
        out,
        "--quick",
        *settings("export.p95_ms=9999", "export.variants=fp32"),
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "manifest.json").read_text())
    page = (out / "report.html").read_text()
    (gate,) = (gate for gate in manifest["gates"] if gate["name"].startswith("p95"))
    assert gate["value"] == manifest["figures"]["p95_ms"]
    assert gate["low"] <= gate["value"] <= gate["high"] < 9999
    header = page.split("<nav")[0]
    assert f"p95 {gate['value']:.1f} ms" in header
    metrics = manifest["evidence"]["accuracy"]["file"]
    recall, name = min(zip(metrics["recall"], metrics["classes"], strict=True))
    assert f"worst class {name}</dt><dd" in header
    assert f">{recall:.1%}</dd>" in header
    assert f"balanced {metrics['balanced_accuracy']:.1%}" in header

    again = ftkit("bench", out, "--quick", "--budget", "p95_ms=9999", "--threads", "1")
    assert (again.exit_code, "in 4 processes" in again.stdout) == (0, True), (
        "one judge: as many processes"
    )


def test_no_unproven_variant_answers_for_memory_that_nobody_measured() -> None:
    """The variant would be faster and smaller, but its memory was not measured."""
    limits = replace(load_recipe("lite0").export, p95_ms=8.0)
    open_row = replace(_row("int8", "inconclusive", 3, 4), size_bytes=4)
    assert would_meet([open_row], limits) == [open_row]
    assert would_meet([open_row], replace(limits, memory_mb=50.0)) == []


def test_latencies_of_another_frame_are_refused(
    benched: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path
) -> None:
    """A file measured at 300 x 300 would otherwise pass a budget at 4000 x 3000."""
    latency = tmp_path / "device.json"
    measured = benched[1]
    latency.write_text(json.dumps(measured))
    told = ["--latency", latency, "--target", measured["target"], "--quick"]
    frame = settings("export.frame=4000x3000")
    wrong = ftkit("export", run, "--out", tmp_path / "bundle", *told, *frame)
    assert (wrong.exit_code, "frames of 4000 x 3000, found" in wrong.stderr) == (2, True)
    latency.write_text(json.dumps({**measured, "starts": {"fp32": [{"import_ms": "soon"}] * 3}}))
    damaged = ftkit("export", run, "--out", tmp_path / "bundle", *told)
    assert (damaged.exit_code, "Traceback" in damaged.stderr) == (2, False)
    assert "found something else" in damaged.stderr
