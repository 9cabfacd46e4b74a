"""What an export measures on the finished files, and the one place where its gates are judged.

metrics, against = file_accuracy(folder, chosen, core, context, classes)
found = latencies(paths, photograph, providers, quick)
gates = judge(limits, run, parity, chosen, metrics, against, out_of_order(folder, classes))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import ftkit
from ftkit import terminal, variants
from ftkit.checkpoint import Run
from ftkit.evaluate import Metrics, evaluate
from ftkit.recipe import Export
from ftkit_export.bench import conditions
from ftkit_export.bundle import Gate
from ftkit_export.decision import Paired, Row, paired
from ftkit_export.graph import IR_VERSION, OPSET
from ftkit_export.latency import Latency, machine, measure
from ftkit_export.parity import Parity
from ftkit_export.predict import Classifier
from ftkit_export.session import cores, form_of


def file_accuracy(
    folder: Path, run: Run, context: variants.Context, classes: Sequence[str]
) -> tuple[Metrics, Paired]:  # fmt: skip
    """File bytes -> probabilities on every held-out photograph, as a device would; and paired with the answers of the
    framework, which the run has kept."""
    classify, rows = Classifier(folder), context.canvases.rows("test")
    found, labels = [], context.canvases.labels[rows]
    with terminal.bar("accuracy of the file") as progress:
        for number, row in enumerate(rows, start=1):
            found.append(classify.probabilities(classify.decode(context.canvases.images.images[row].path)))
            progress(number, len(rows))
    probabilities = np.stack(found)
    groups = context.canvases.groups(rows)
    framework = np.array(run.data["answers"])
    against = paired(framework == labels, probabilities.argmax(1) == labels, groups)
    return evaluate(probabilities, labels, classes, groups), against


def out_of_order(folder: Path, classes: Sequence[str]) -> int:
    """Classes that the file's metadata or labels.txt (which runners without a JSON reader use) has elsewhere."""
    # Not splitlines: U+2028 and the like are characters of a label, and end no line for a runner.
    written = (folder / "labels.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    said = Classifier(folder).labels
    return sum(
        found != list(classes)[place : place + 1]
        for place in range(max(len(classes), len(written), len(said)))
        for found in (written[place : place + 1], said[place : place + 1])
    )


def latencies(
    paths: Mapping[str, tuple[Path, Path]], photograph: Path, providers: Sequence[str], quick: bool
) -> dict[str, list[Latency]]:
    """Variant -> p50, p95, memory on a photograph, each in a fresh process; the first is one thread on the CPU or, for
    want of it, the first provider. On a GPU with and without copies."""
    threads = sorted({1, cores()})
    found: dict[str, list[Latency]] = {name: [] for name in paths}
    for name, forms in paths.items():
        for provider in sorted(providers, key=lambda provider: provider != "cpu"):
            listed = conditions(form_of(provider, *forms), [provider], threads if provider == "cpu" else [1], [0])
            for condition in listed:
                if provider == "cpu" and not condition.spinning:
                    continue  # `ftkit bench` has it
                where = f"{name} on {terminal.condition(vars(condition))}"
                with terminal.bar(f"latency of {where}"):
                    last = measure(condition, photograph, quick=quick)
                found[name].append(last)
                terminal.say(f"latency of {where}: p50 {last.p50_ms:.1f} ms, p95 {last.p95_ms:.1f} ms")
    return found


def judge(
    limits: Export, parity: Sequence[Parity], chosen: Row, against: Paired,
    out_of_order: int,
) -> list[Gate]:  # fmt: skip
    """Every gate of the export, in one place."""
    gates = []
    for item in parity:
        worst = item.worst
        label = f"parity on {item.provider} ({worst.name}, {worst.group})"
        gates.append(Gate(name=label, value=worst.value, limit=worst.limit))
    gates.append(Gate(name="labels out of order", value=out_of_order, limit=0))
    # fp32 is held to the framework by parity, and int8 was accepted on val with confidence: on test, a drop within what
    # chance allows is no contradiction, and one image more or less is none either.
    gates.append(Gate(name=f"accuracy drop of the file ({chosen.name}, lower 95 % bound)", value=against.low,
                      limit=limits.max_accuracy_drop))  # fmt: skip
    for name, value, limit in (
        ("p95 ms, one thread", chosen.p95_ms, limits.p95_ms),
        ("size in MB", chosen.size_bytes / 1e6, limits.size_mb),
        ("memory in MB", (chosen.peak_rss_bytes or math.nan) / 1e6, limits.memory_mb),
    ):
        if limit is not None:
            where = chosen.name if value is not None else f"{chosen.name}, not measured on the target: try --latency"
            gates.append(Gate(name=f"{name} ({where})", value=math.nan if value is None else value, limit=limit))
    return gates


def manifest(
    run: Run, parity: Sequence[Parity], file_metrics: Metrics, against: Paired,
    latency: Mapping[str, Sequence[Latency]], context: variants.Context, made: variants.Variants, chosen: Row,
) -> dict[str, Any]:  # fmt: skip
    target = context.target
    return {
        "ftkit": ftkit.__version__,
        "name": run.recipe.name,
        "backbone": run.recipe.backbone,
        "labels": list(run.classes),
        "preprocess": asdict(run.preprocess),
        "input_format": context.limits.input_format,
        "temperature": run.temperature,
        "target": context.target_name,
        "chosen": chosen.name,
        "opset": OPSET,
        "ir": IR_VERSION,
        "oldest_onnxruntime": target.oldest,
        "run": run.data["model_fingerprint"],
        "data_fingerprint": run.data["data_fingerprint"],
        "limits": asdict(context.limits),
        "evidence": {
            "decision": [{**asdict(row), "shippable": row.shippable} for row in made.rows],
            "agreement": {name: [{**asdict(check), "passed": check.passed} for check in checks]
                          for name, checks in made.checks.items()},
            "parity": [
                {
                    "provider": item.provider, "passed": item.passed, "first_divergence": item.first_divergence,
                    "placement": item.placement,
                    "errors": item.errors,
                    "checks": [{**asdict(check), "passed": check.passed} for check in item.checks],
                }
                for item in parity
            ],
            "accuracy": {"framework": run.data["metrics"]["test"], "file": asdict(file_metrics),
                         "against_framework": asdict(against)},
            "decided_on": context.device.machine if context.device else context.measured.get("machine", machine()),
            "latency": [{"variant": name, **asdict(item)} for name, items in latency.items() for item in items],
        },
        "machine": machine(),
    }  # fmt: skip
