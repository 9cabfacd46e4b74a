"""run -> bundle: the export as one straight function over ftkit_export's pieces.

verdict = export(open_run("runs/lite0-1"), Path("bundle"))
verdict.folder, verdict.passed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import ftkit
from ftkit import checkpoint, terminal
from ftkit.canvas import Canvases
from ftkit.canvas import build as build_canvases
from ftkit.checkpoint import Run
from ftkit.evaluate import Metrics, evaluate
from ftkit.intake import Image, read
from ftkit.memory import keep_freed_memory
from ftkit.recipe import Export
from ftkit.report import write_report
from ftkit_export import bundle as bundles
from ftkit_export.bundle import OLDEST_ONNXRUNTIME, Gate
from ftkit_export.convert import export_core, write
from ftkit_export.errors import FtkitError
from ftkit_export.golden import write_golden
from ftkit_export.graph import IR_VERSION, OPSET, image_form
from ftkit_export.latency import Latency, measure
from ftkit_export.parity import FLOAT64_IMAGES, Parity, Reference, compare
from ftkit_export.predict import Classifier
from ftkit_export.preprocess import decode
from ftkit_export.session import cores, require

Array = np.ndarray[Any, Any]

PARITY_IMAGES = 256  # held-out photographs that parity sees; float64 sees the first 64
DECODED_BYTES = 500_000_000
CORE = "variants/fp32-core.onnx"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export came to. folder: BUNDLE, or BUNDLE.failed when a gate failed."""

    folder: Path
    gates: tuple[Gate, ...]
    parity: tuple[Parity, ...]
    latency: tuple[Latency, ...]
    file_metrics: Metrics

    @property
    def passed(self) -> bool:
        """True when every gate passed."""
        return all(gate.passed for gate in self.gates)


def held_out(run: Run, data: str | Path | None) -> Canvases:
    """The run's images again, from where they were or from `data`.

    Raises FtkitError when they are gone, or no longer those the run was trained on.
    """
    where = data or run.data["data"]
    if not Path(where).exists():
        raise FtkitError(f"{where}: expected the images this run was trained on, found nothing. Try --data FOLDER")
    with terminal.bar("decoding") as progress:
        canvases = build_canvases(read(where, run.data["seed"]), run.preprocess, progress)
    if canvases.fingerprint != run.data["data_fingerprint"]:
        raise FtkitError(
            f"{where}: expected the images this run was trained on, found others (changed, added or removed since). "
            "Try the original folder with --data, or train again"
        )
    return canvases


def metadata(run: Run) -> dict[str, str]:
    """What the file says of itself: labels in order, preprocess, temperature, recipe, and the run's fingerprint."""
    recipe = {key: value for key, value in run.data["recipe"].items() if key != "weights"}  # may be a local path
    recipe["stages"] = [{**stage, "teacher": bool(stage["teacher"])} for stage in recipe["stages"]]  # so may this be
    threshold = run.data["abstention"]["threshold"]
    return {
        "labels": json.dumps(list(run.classes), ensure_ascii=False),
        "preprocess": json.dumps(asdict(run.preprocess)),
        "temperature": repr(run.temperature),
        "abstain_threshold": repr(1.0 if threshold is None else threshold),
        "out_of_domain": run.data["foreign"],
        "recipe": json.dumps(recipe),
        "run": run.data["model_fingerprint"],
        "ftkit": ftkit.__version__,
    }


def export(
    run: Run, out: Path, *, settings: Export | None = None, providers: Sequence[str] = ("cpu",),
    data: str | Path | None = None, quick: bool = False,
) -> Exported:  # fmt: skip
    """Export `run`, prove the file on each provider, judge the gates, seal the bundle.

    settings: gates and budgets, the recipe's by default. quick: shorter latency runs, marked so in the evidence.
    Raises ProviderError when a provider is not here, FtkitError when `out` exists or the images have changed.
    """
    for name in providers:
        require(name)
    keep_freed_memory()
    canvases = held_out(run, data)
    backbone = run.backbone()
    folder = bundles.begin(out)
    try:
        return _build(run, backbone.model, canvases, folder, out, settings or run.recipe.export, providers, quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # moved away when sealed; a half-built one when not


def _build(
    run: Run, model: nn.Module, canvases: Canvases, folder: Path, out: Path, limits: Export,
    providers: Sequence[str], quick: bool,
) -> Exported:  # fmt: skip
    with terminal.bar("converting to ONNX"):
        core = export_core(model, run.preprocess.size)
    (folder / "variants").mkdir()
    labelled = metadata(run)
    write(core.model, folder / CORE, labelled)
    write(image_form(core.model, run.preprocess, run.temperature), folder / "model.onnx", labelled)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in run.classes), encoding="utf-8")

    test = canvases.images.of("test")
    rows = _spread(canvases.rows("test"), PARITY_IMAGES)
    photographs = _decoded([canvases.images.images[row].path for row in rows])
    reference = Reference(model)
    parity = []
    for provider in providers:
        with terminal.bar(f"parity on {provider}"):
            parity.append(compare(reference, folder / CORE, folder / "model.onnx", canvases.array(rows), photographs,
                                  run.preprocess, run.temperature, core.layers, provider))  # fmt: skip
        _say_parity(parity[-1], len(rows))
    write_golden(folder, reference, photographs, run.preprocess, run.temperature)
    bundles.add_runner(folder)

    file_metrics = _file_accuracy(folder, test, run.classes)
    terminal.say(f"accuracy of the file on {len(test)} held-out photographs: {file_metrics.accuracy:.4f} "
                 f"(framework {run.data['metrics']['test']['accuracy']:.4f})")  # fmt: skip
    latency = _latencies(folder, providers, quick)
    gates = _judge(limits, run, parity, file_metrics, latency)
    manifest = _manifest(run, parity, file_metrics, latency, limits)
    write_report(folder / "report.html", run.data, {**manifest, "gates": [gate.as_dict() for gate in gates]},
                 checkpoint.read_metrics(run.folder))  # fmt: skip
    final = bundles.seal(folder, out, manifest, gates)
    return Exported(
        folder=final, gates=tuple(gates), parity=tuple(parity), latency=tuple(latency), file_metrics=file_metrics
    )


def _spread(rows: Array, count: int) -> Array:
    """At most `count`, from all over the set and mixed: rows lie in order of class."""
    picks = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return np.random.default_rng(0).permutation(rows[picks])


def _decoded(paths: Sequence[Path]) -> list[Array]:
    """The first images, as the device will decode them: as many as float64 sees, within a bound on memory."""
    found: list[Array] = []
    for path in paths[:FLOAT64_IMAGES]:
        found.append(decode(path))
        if sum(image.nbytes for image in found) > DECODED_BYTES:
            break
    return found


def _say_parity(parity: Parity, photographs: int) -> None:
    worst = parity.worst
    terminal.say(f"parity on {parity.provider} over {photographs} held-out photographs, noise and odd sizes: "
                 f"{'passed' if parity.passed else 'FAILED'}")  # fmt: skip
    terminal.say(f"  nearest to its limit: {worst.name}, {worst.group}: {worst.value:.2g} of {worst.limit:.2g}")
    if parity.first_divergence:
        terminal.say(f"first diverging layer: {parity.first_divergence}")


def _file_accuracy(folder: Path, images: Sequence[Image], classes: Sequence[str]) -> Metrics:
    """File bytes -> probabilities on every held-out photograph, as a device would."""
    classify = Classifier(folder)
    found = []
    with terminal.bar("accuracy of the file") as progress:
        for number, image in enumerate(images, start=1):
            found.append(classify.probabilities(decode(image.path)))
            progress(number, len(images))
    return evaluate(np.stack(found), np.array([image.label for image in images]), classes)


def _latencies(folder: Path, providers: Sequence[str], quick: bool) -> list[Latency]:
    """p50 and p95 on the first golden photograph, one thread and all, each in a fresh process."""
    threads = sorted({1, cores()})
    latencies = []
    for provider in providers:
        for count in threads if provider == "cpu" else threads[:1]:
            where = f"{provider}, {count} thread{'s' if count > 1 else ''}"
            with terminal.bar(f"latency on {where}"):
                latencies.append(measure(folder / "model.onnx", folder / "golden" / "00.png", provider=provider,
                                         threads=count, quick=quick))  # fmt: skip
            last = latencies[-1]
            terminal.say(f"latency on {where}: p50 {last.p50_ms:.1f} ms, p95 {last.p95_ms:.1f} ms")
    return latencies


def _judge(
    limits: Export, run: Run, parity: Sequence[Parity], file_metrics: Metrics, latency: Sequence[Latency]
) -> list[Gate]:
    """Every gate of the export, in one place."""
    gates = []
    for item in parity:
        worst = item.worst
        label = f"parity on {item.provider} ({worst.name}, {worst.group})"
        gates.append(Gate(name=label, value=worst.value, limit=worst.limit))
    drop = run.data["metrics"]["test"]["accuracy"] - file_metrics.accuracy
    gates.append(Gate(name="accuracy drop of the file", value=drop, limit=limits.max_accuracy_drop))
    if limits.p95_ms is not None:
        gates.append(Gate(name="p95 ms, one thread", value=latency[0].p95_ms, limit=limits.p95_ms))
    if limits.size_mb is not None:
        gates.append(Gate(name="size in MB", value=latency[0].size_bytes / 1e6, limit=limits.size_mb))
    return gates


def _manifest(
    run: Run, parity: Sequence[Parity], file_metrics: Metrics, latency: Sequence[Latency], limits: Export
) -> dict[str, Any]:
    return {
        "ftkit": ftkit.__version__,
        "name": run.recipe.name,
        "backbone": run.recipe.backbone,
        "labels": list(run.classes),
        "preprocess": asdict(run.preprocess),
        "temperature": run.temperature,
        "chosen": "fp32",
        "core": CORE,
        "opset": OPSET,
        "ir": IR_VERSION,
        "oldest_onnxruntime": OLDEST_ONNXRUNTIME,
        "run": run.data["model_fingerprint"],
        "data_fingerprint": run.data["data_fingerprint"],
        "limits": asdict(limits),
        "evidence": {
            "parity": [
                {
                    "provider": item.provider, "passed": item.passed, "first_divergence": item.first_divergence,
                    "checks": [{**asdict(check), "passed": check.passed} for check in item.checks],
                }
                for item in parity
            ],
            "accuracy": {"framework": run.data["metrics"]["test"], "file": asdict(file_metrics)},
            "latency": [asdict(item) for item in latency],
        },
        "machine": bundles.machine(),
    }  # fmt: skip
