"""Measure the finished files of an export, and judge its gates in one place.

on_test = file_accuracy(folder, run, context)
latency = latencies(paths, photograph, frame, providers, quick)
gates = judge(limits, Measured(parity=..., chosen=..., ...))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

import ftkit
from ftkit.benchmark.budgets import Budget, judge_budgets
from ftkit.evaluation.answers import require_numbers
from ftkit.evaluation.metrics import evaluate
from ftkit.evaluation.targets import logits_behind, metrics_of
from ftkit.exporting import variants
from ftkit.exporting.candidates import Context
from ftkit.recipe import Export
from ftkit.tasks.task import SINGLE_LABEL, Task, headline
from ftkit.training.run import Run
from ftkit.utils import console
from ftkit_export.bundle.seal import Gate
from ftkit_export.conversion.graph import IR_VERSION, OPSET
from ftkit_export.proof.decision import Comparison, Row, paired
from ftkit_export.proof.parity import Check, Parity
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.collect import Sighting
from ftkit_export.runtime.latency import Condition, Latency, Start, machine, measure
from ftkit_export.runtime.latency import over_sizes as latency_over_sizes
from ftkit_export.runtime.measure import QUICK_STARTS, STARTS, conditions, starts
from ftkit_export.runtime.predict import Classifier, load_model
from ftkit_export.runtime.preprocess import parse_frame, to_frame
from ftkit_export.runtime.readout import KEY
from ftkit_export.runtime.session import cores, form_of

SAME = 1e-4  # of a metric: the run keeps seven digits of its answers
GATED = ("p50_ms", "p95_ms", "size_mb", "memory_mb")  # budgets among the fields of recipe.Export


@dataclass(frozen=True, kw_only=True)
class OnTest:
    """The exported file on the test split: its metrics as JSON data, a comparison with the framework,
    and what it makes of each image. sightings: of a single-label file. probabilities: answers (N, K)
    float32. apart: of other tasks, how far the run's own metric is from that of its answers as read
    here, of one quantity in standard deviations."""

    metrics: Mapping[str, Any]
    against: Comparison
    sightings: Sequence[Sighting]
    probabilities: Array
    apart: float | None = None


def file_accuracy(folder: Path, run: Run, context: Context) -> OnTest:
    """Run the exported file on the test split.

    Each test image is decoded from its file and answered as on a device. The framework's answers are
    those stored in the run.
    """
    if run.task is not SINGLE_LABEL:
        return _file_targets(folder, run, context)

    classify = Classifier(folder)
    rows = context.canvases.rows("test")
    answers = []
    sightings = []
    labels = context.canvases.labels[rows]

    with console.bar("accuracy of the file") as progress:
        for number, row in enumerate(rows, start=1):
            image = classify.decode(context.canvases.images.images[row].path)
            sighting, probabilities = classify.sight(to_frame(image, classify.input_format))
            answers.append(probabilities)
            sightings.append(sighting)
            progress(number, len(rows))

    probabilities = np.stack(answers)
    require_numbers(probabilities, [context.canvases.images.images[row].path for row in rows])
    groups = context.canvases.groups(rows)
    framework = np.array(run.data["answers"])
    against = paired(framework == labels, probabilities.argmax(1) == labels, groups)

    return OnTest(
        metrics=asdict(evaluate(probabilities, labels, run.classes, groups)),
        against=against,
        sightings=sightings,
        probabilities=probabilities,
    )


def _file_targets(folder: Path, run: Run, context: Context) -> OnTest:
    """The same for labels and values."""
    model = load_model(folder)
    rows = context.canvases.rows("test")
    answers = []
    with console.bar(f"{run.task.metric} of the file") as progress:
        for number, row in enumerate(rows, start=1):
            image = model.decode(context.canvases.images.images[row].path)
            answers.append(model.answers(image))
            progress(number, len(rows))

    said = np.stack(answers)
    require_numbers(said, [context.canvases.images.images[row].path for row in rows])
    targets = run.task.targets(context.canvases).numpy()[rows]
    groups = context.canvases.groups(rows)
    # The order, and the size, of logits: what answers are made of
    logits = logits_behind(run.readout, said)
    framework = np.array(run.data["answers"])
    # In float32, as the file has them: probabilities near 1 are equal there
    rounded = logits_behind(run.readout, run.readout.answers(framework.astype(np.float32)))

    return OnTest(
        metrics=metrics_of(run.readout, logits, targets, run.classes, groups),
        against=run.task.compare(rounded, logits, targets, groups, looks=1),
        sightings=(),
        probabilities=said,
        apart=abs(run.task.figure(framework, targets) - headline(run.metrics["test"])[0])
        / run.task.size,
    )


def out_of_order(folder: Path, classes: Sequence[str]) -> int:
    """Number of labels out of place in the file's metadata or in labels.txt.

    labels.txt is for runners without a JSON reader.
    """
    # Not splitlines: a label may contain U+2028 and the like, which end no line for a runner.
    written = (folder / "labels.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    said = load_model(folder).labels

    return sum(
        said_here != list(classes)[place : place + 1]
        for place in range(max(len(classes), len(written), len(said)))
        for said_here in (written[place : place + 1], said[place : place + 1])
    )


def misread(folder: Path, run: Run) -> int:
    """Number of thresholds, scales and margins in the file's metadata that differ from the run's."""
    said = load_model(folder).readout.as_json()
    wanted = run.readout.as_json()
    return sum(
        here != there
        for name in wanted
        for here, there in zip_longest(_listed(said.get(name)), _listed(wanted[name]))
    )


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def latencies(
    paths: Mapping[str, tuple[Path, Path]],
    photograph: Path,
    frame: str,
    providers: Sequence[str],
    quick: bool,
) -> dict[str, list[Latency]]:
    """Measure p50, p95 and memory of each variant on a photograph at the size of `frame`.

    Returns variant -> measurements, each from a fresh process. The first is one thread on the CPU
    or, without the CPU, the first provider. On a GPU, with and without copies.
    """
    threads = sorted({1, cores()})
    measured: dict[str, list[Latency]] = {name: [] for name in paths}

    for name, forms in paths.items():
        for provider in sorted(providers, key=lambda provider: provider != "cpu"):
            path = form_of(provider, *forms)
            counts = threads if provider == "cpu" else [1]

            listed = conditions(path, [provider], counts, [0], frame)
            for condition in listed:
                if provider == "cpu" and not condition.spinning:
                    continue  # only `ftkit bench` measures this
                where = f"{name} on {console.condition(vars(condition))}"
                with console.bar(f"latency of {where}"):
                    last = measure(condition, photograph, quick=quick)
                measured[name].append(last)
                console.say(
                    f"latency of {where}: p50 {last.p50_ms:.1f} ms, p95 {last.p95_ms:.1f} ms"
                )

    return measured


def measure_budgets(
    row: Row, forms: tuple[Path, Path], context: Context, *, quick: bool
) -> list[Budget]:
    """Judge a shipped variant by the export's budgets, on its target.

    Measured in several processes, as `ftkit bench --budget` does. row: with the full measurement,
    where there is one.
    """
    limits = {
        name: getattr(context.limits, name)
        for name in GATED
        if getattr(context.limits, name) is not None
    }
    starts: Sequence[Start] = []
    if limits.keys() & {"p50_ms", "p95_ms", "memory_mb"}:
        with console.bar(f"budgets of {row.name}"):
            starts = _starts(row, forms, context, quick)
    return judge_budgets(
        limits, starts, p50_ms=row.p50_ms, p95_ms=row.p95_ms, size_bytes=row.size_bytes
    )


def _starts(row: Row, forms: tuple[Path, Path], context: Context, quick: bool) -> Sequence[Start]:
    """Measurements in fresh processes on the target.

    Empty when the target is neither this machine nor reachable, and has not measured this very
    file.
    """
    provider = context.target.provider
    path = form_of(provider, *forms)
    count = QUICK_STARTS if quick else STARTS

    if context.device:
        return context.device.starts(
            path, context.photograph, provider=provider, frame=context.frame, count=count
        )

    if context.here:
        condition = Condition(model=str(path), provider=provider, threads=1, frame=context.frame)
        return starts(condition, context.photograph, quick=quick)
    if row.p95_ms is not None:  # measured on the target, with this very file
        return [Start(**start) for start in context.measured.get("starts", {}).get(row.name, ())]
    return []


def choose(rows: Sequence[Row], judged: Mapping[str, Sequence[Budget]]) -> Row:
    """The variant to ship: the fastest shippable one that meets every budget.

    Of two equally fast ones, the smaller. If none meets every budget: the fastest that fails none
    (passed or inconclusive); else the one whose worst excess over a budget is smallest. judged: row
    name -> its budgets.
    """
    allowed = [row for row in rows if row.shippable]
    for verdicts in ({"passed"}, {"passed", "inconclusive"}):
        meeting = [
            row for row in allowed if {item.verdict for item in judged[row.name]} <= verdicts
        ]
        if meeting:
            return min(meeting, key=lambda row: (row.p50_ms or 0, row.size_bytes))

    return min(allowed, key=lambda row: max(item.excess for item in judged[row.name]))


def would_meet(rows: Sequence[Row], limits: Export) -> list[Row]:
    """Unproven variants that would meet the budgets by their figures in the decision table.

    Empty when memory has a budget: the table has no memory figures.
    """
    if limits.memory_mb is not None:
        return []
    return [
        row
        for row in rows
        if not row.shippable
        and row.verdict != "refused"
        and _within(row.p50_ms, limits.p50_ms)
        and _within(row.p95_ms, limits.p95_ms)
        and (limits.size_mb is None or row.size_bytes / 1e6 <= limits.size_mb)
    ]


def _within(found: float | None, limit: float | None) -> bool:
    return limit is None or (found is not None and found <= limit)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Measurements that the gates are judged on.

    metrics: of the file on test; against: compared with the framework on test. task: of the run.
    budgets: of the chosen
    variant. unproven: variants that would meet every budget if they were proven, which makes a
    missed budget inconclusive. frame: frame size of the latencies. out_of_order: number of labels
    that differ from the run's order. misread: as its function. apart: as OnTest.
    """

    parity: Sequence[Parity]
    chosen: Row
    metrics: Mapping[str, Any]
    against: Comparison
    out_of_order: int
    task: Task = SINGLE_LABEL
    misread: int = 0
    apart: float | None = None
    budgets: Sequence[Budget] = ()
    unproven: Sequence[Row] = ()
    frame: str = ""
    latency: Mapping[str, Sequence[Latency]] = field(default_factory=dict)
    sizes: Sequence[tuple[str, float, float]] = ()


def judge_gates(limits: Export, measured: Evidence) -> list[Gate]:
    """Evaluate every gate of the export."""
    chosen = measured.chosen
    gates = []
    for item in measured.parity:
        worst = item.worst
        label = f"parity on {item.provider} ({worst.name}, {input_group(worst)})"
        gates.append(Gate(name=label, value=worst.value, limit=worst.limit))

    gates.append(Gate(name="labels out of order", value=measured.out_of_order, limit=0))

    if measured.apart is not None:
        gates.append(Gate(name="thresholds and scales misread", value=measured.misread, limit=0))
        name = f"{measured.task.metric} of the run's answers, computed again"
        gates.append(Gate(name=name, value=measured.apart, limit=SAME))

    # Parity ties fp32 to the framework, and int8 was accepted on val with confidence. A drop on
    # test within chance, or of a single image, does not contradict that: the lower bound counts.
    name = f"{measured.against.name} of the file ({chosen.name}, lower 95 % bound)"
    gates.append(Gate(name=name, value=measured.against.low, limit=measured.task.limit(limits)))

    if limits.min_recall is not None:
        gates.append(_recall(measured.metrics, limits.min_recall))

    words = {
        "p50_ms": f"p50 ms, one thread, {console.frames(measured.frame)}",
        "p95_ms": f"p95 ms, one thread, {console.frames(measured.frame)}",
        "size_mb": "size in MB",
        "memory_mb": "memory in MB",
    }
    for budget in measured.budgets:
        several = len(budget.values) > 1
        where = chosen.name
        unsettled = ""
        if measured.unproven:
            unsettled = f"{measured.unproven[0].name} would meet it, but is not proven"
        if not budget.values:
            where += ", not measured on the target: try --latency"
            unsettled = "not measured on the target"

        gates.append(
            Gate(
                name=f"{words[budget.name]} ({where})",
                value=budget.values[0] if budget.values else math.nan,
                limit=budget.limit,
                low=min(budget.values) if several else None,
                high=max(budget.values) if several else None,
                unsettled=unsettled,
            )
        )

    return gates


def input_group(check: Check) -> str:
    """Display name of the input group of a parity check.

    Bundles call the user's images "photographs"; the display name is "images".
    """
    return "images" if check.group == "photographs" else check.group


def _recall(metrics: Mapping[str, Any], least: float) -> Gate:
    """Gate on the recall of every class or label: the miss rate of the one with the lowest lower bound.

    One without test images comes first, and is inconclusive.
    """
    kind = "label" if "labels" in metrics else "class"
    fields = ("recall", "recall_low", "recall_high")
    if kind == "label":
        each = [(item["name"], *map(item.get, fields)) for item in metrics["labels"]]
    else:
        each = list(zip(metrics["classes"], *map(metrics.get, fields), strict=True))
    label, recall, low, high = min(each, key=lambda item: (item[1] is not None, item[2] or 0.0))

    name = f"share missed of {kind} {label}"
    if recall is None or low is None or high is None:
        return Gate(
            name=f"{name}, of which test has no image",
            value=math.nan,
            limit=1 - least,
            unsettled=f"no test image of that {kind}",
        )

    return Gate(name=name, value=1 - recall, limit=1 - least, low=1 - high, high=1 - low)


SIZES = ("320x240", "640x480", "1280x720", "1920x1080", "4000x3000")


def times_by_size(
    row: Row, forms: tuple[Path, Path], context: Context
) -> list[tuple[str, float, float]]:
    """Latency of the chosen image form over frame sizes, on one thread of the target's CPU.

    Returns (frame, p50 ms, p95 ms), smallest frame first. Empty when the target is neither this
    machine nor reachable, or does not run on the CPU.
    """
    if not (context.here or context.device) or context.target.provider != "cpu":
        return []

    area = {frame: math.prod(parse_frame(frame)) for frame in {*SIZES, context.frame}}
    listed = sorted(area, key=lambda frame: area[frame])

    with console.bar("latency over frame sizes"):
        if context.device:
            return context.device.over_sizes(forms[0], context.photograph, listed)
        return latency_over_sizes(
            Condition(model=str(forms[0]), threads=1), context.photograph, listed
        )


def manifest(
    run: Run, context: Context, made: variants.Variants, evidence: Evidence
) -> dict[str, Any]:
    """What the bundle tells of its file, as JSON data, but for the gates and the files."""
    chosen = evidence.chosen

    return {
        "ftkit": ftkit.__version__,
        "name": run.recipe.name,
        "backbone": run.recipe.backbone,
        "labels": list(run.classes),
        "preprocess": asdict(run.preprocess),
        "input_format": context.limits.input_format,
        "temperature": run.temperature,
        **({} if run.task is SINGLE_LABEL else {KEY: run.readout.as_json()}),
        "target": context.target_name,
        "chosen": chosen.name,
        "frame": context.frame,
        "figures": {
            "p50_ms": chosen.p50_ms,
            "p95_ms": chosen.p95_ms,
            "size_bytes": chosen.size_bytes,
            "peak_rss_bytes": chosen.peak_rss_bytes,
        },
        "opset": OPSET,
        "ir": IR_VERSION,
        "oldest_onnxruntime": context.target.oldest,
        "run": run.data["model_fingerprint"],
        "not_trained": run.data.get("not_trained", []),
        "data_fingerprint": run.data["data_fingerprint"],
        "limits": asdict(context.limits),
        "evidence": _as_json(run, context, made, evidence),
        "machine": machine(),
    }


def _as_json(
    run: Run, context: Context, made: variants.Variants, evidence: Evidence
) -> dict[str, Any]:
    decided_on = context.device.machine if context.device else context.measured.get("machine")

    return {
        "judged": "out of fold" if context.folded else "on val",
        "decision": [
            {
                **asdict(row),
                "shippable": row.shippable,
                "chosen": made.is_shipped(row, evidence.chosen.name),
            }
            for row in made.rows
        ],
        "agreement": {name: _checks(checks) for name, checks in made.checks.items()},
        "parity": [
            {
                "provider": item.provider,
                "passed": item.passed,
                "first_divergence": item.first_divergence,
                "placement": item.placement,
                "errors": item.errors,
                "checks": _checks(item.checks),
            }
            for item in evidence.parity
        ],
        "accuracy": {
            "framework": run.data["metrics"]["test"],
            "file": evidence.metrics,
            "against_framework": asdict(evidence.against),
        },
        "decided_on": decided_on or machine(),
        "latency_over_sizes": [
            {"frame": frame, "p50_ms": p50, "p95_ms": p95} for frame, p50, p95 in evidence.sizes
        ],
        "latency": [
            {"variant": name, **asdict(item)}
            for name, items in evidence.latency.items()
            for item in items
        ],
    }


def _checks(checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [{**asdict(check), "passed": check.passed} for check in checks]
