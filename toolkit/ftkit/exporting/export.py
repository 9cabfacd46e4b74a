"""Export a run to a bundle: one sequence of steps built on ftkit_export.

verdict = export(open_run("runs/lite0-1"), Path("bundle"))
verdict.folder, verdict.passed
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

import ftkit
from ftkit.benchmark.budgets import Budget
from ftkit.benchmark.ssh import Device
from ftkit.data.canvas import Canvases, build_canvases
from ftkit.data.dataset import read_images
from ftkit.evaluation.bundle import SPLITS_CSV, TRAINED_ON
from ftkit.exporting import evidence, variants, web
from ftkit.exporting.budget_advice import budget_advice
from ftkit.exporting.candidates import Context, HeldOutPart, calibration_rows, logits_of
from ftkit.exporting.drift import write_reference
from ftkit.exporting.enrollment import write_kept_sample
from ftkit.recipe import Export
from ftkit.report.build import Picture, pictures, write_report
from ftkit.report.model_card import model_card
from ftkit.report.pages import Table, table_html
from ftkit.tasks.task import SINGLE_LABEL, Task, headline
from ftkit.training.run import Run, fold_models, read_metrics
from ftkit.utils import console
from ftkit.utils.console import short
from ftkit.utils.distributed import bound_threads
from ftkit.utils.malloc import keep_freed_memory
from ftkit_export.bundle import archive, handoff
from ftkit_export.bundle import seal as bundles
from ftkit_export.bundle.seal import Gate
from ftkit_export.bundle.write import add_runners
from ftkit_export.conversion import plain_c
from ftkit_export.conversion.class_activation import FILE as EXPLAIN
from ftkit_export.conversion.class_activation import Explainer, with_features
from ftkit_export.conversion.convert import Core, Trace, write_ort
from ftkit_export.proof.decision import Row
from ftkit_export.proof.golden import write_flat, write_golden
from ftkit_export.proof.parity import (
    FLOAT64_IMAGES,
    ExportedModel,
    Parity,
    Reference,
    last_values,
    measure_parity,
)
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Latency
from ftkit_export.runtime.measure import read_bench
from ftkit_export.runtime.preprocess import Preprocess, allowing
from ftkit_export.runtime.readout import KEY, NAMES, OneClass
from ftkit_export.runtime.session import PROVIDERS, form_of, require_provider
from ftkit_export.runtime.targets import TARGETS, unshippable
from ftkit_export.runtime.verify import Outcome, sha256

PARITY_IMAGES = 256  # held-out images in the parity check; float64 runs on the first 64
DECODED_BYTES = 500_000_000
GOLDEN_PIXELS = 40_000_000


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Optional inputs and outputs of an export.

    measured: benchmark results from the target device. device: the target, over ssh. c: plain C
    sources. ort: ONNX Runtime's own format. handoff: files for other compilers. zipped: also
    BUNDLE.zip. sign: an Ed25519 key. web: the files of ONNX Runtime Web, for device/web.
    """

    measured: Mapping[str, Any] = field(default_factory=dict)
    device: Device | None = None
    c: bool = False
    ort: bool = False
    handoff: bool = False
    zipped: bool = False
    sign: Path | None = None
    version: int | None = None
    web: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export.

    file_metrics: of the exported file on test, as JSON data. folder: BUNDLE; BUNDLE.failed when a gate
    failed; BUNDLE.inconclusive when none failed but one
    could not be settled. rows: the decision table.
    """

    folder: Path
    gates: tuple[Gate, ...]
    parity: tuple[Parity, ...]
    latency: tuple[Latency, ...]
    file_metrics: Mapping[str, Any]
    rows: tuple[Row, ...]
    chosen: str

    @property
    def passed(self) -> bool:
        """True when every gate passed."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Outcome:
        """passed, failed, or inconclusive where no gate failed and one could not be settled."""
        return bundles.overall(gate.verdict for gate in self.gates)

    def _repr_html_(self) -> str:
        gates = [(gate.name, gate.verdict, gate.value, gate.limit) for gate in self.gates]
        rows = [
            (
                f"chosen, {row.name}" if row.name == self.chosen else row.name,
                row.verdict,
                row.accuracy,
                row.p50_ms,
                row.size_bytes / 1e6,
            )
            for row in self.rows
        ]

        return "".join(
            [
                f"<p>{escape(str(self.folder))}: {'all gates passed' if self.passed else self.verdict}</p>",
                table_html(Table(("gate", "verdict", "value", "at most"), gates)),
                table_html(
                    Table(("variant", "verdict", "held-out accuracy", "p50 ms", "MB"), rows)
                ),
            ]
        )


def held_out(run: Run, data: str | Path | None) -> Canvases:
    """Load the run's images again, from their original place or from `data`.

    Raises FtkitError when they are missing, or are not those the run was trained on.
    """
    where = data or run.data["data"]
    if not Path(where).exists():
        raise FtkitError(
            f"{where}: expected the images this run was trained on, found nothing. Try --data FOLDER"
        )

    with console.bar("decoding") as progress:
        images = read_images(
            where,
            run.data["seed"],
            run.data["group_by"],
            None if data else run.data["root"],
            cut_val=not run.data["folds"],
            add=run.data.get("add"),
            task=run.recipe.task,
        )
        canvases = build_canvases(images, run.preprocess, progress)

    if canvases.fingerprint != run.data["data_fingerprint"]:
        raise FtkitError(
            f"{where}: expected the images this run was trained on, found others (changed, added or removed since). "
            "Try the original folder with --data, or train again"
        )

    return canvases


def metadata(run: Run) -> dict[str, str]:
    """ONNX metadata of a run's exported files.

    Labels in order, preprocessing, temperature and abstain threshold (or the readout of another
    task), out-of-distribution statistics, recipe, and the run's fingerprint.
    """
    # The weights may be a local path
    recipe = {key: value for key, value in run.data["recipe"].items() if key != "weights"}
    # A teacher may be one too
    recipe["stages"] = [{**stage, "teacher": bool(stage["teacher"])} for stage in recipe["stages"]]
    # Under "labels", an older ftkit would take them for classes
    names = "labels" if run.task is SINGLE_LABEL else NAMES
    return {
        names: json.dumps(list(run.classes), ensure_ascii=False),
        "preprocess": json.dumps(asdict(run.preprocess)),
        **_readout_metadata(run),
        "out_of_domain": run.data["foreign"],
        "recipe": json.dumps(recipe),
        "run": run.data["model_fingerprint"],
        "ftkit": ftkit.__version__,
    }


def _readout_metadata(run: Run) -> dict[str, str]:
    if not isinstance(run.readout, OneClass):
        return {KEY: json.dumps(run.readout.as_json(), ensure_ascii=False)}
    threshold = run.data["abstention"]["threshold"]
    return {
        "temperature": repr(run.temperature),
        "abstain_threshold": repr(1.0 if threshold is None else threshold),
    }


def read_measured(path: Path, run: Run, target: str, frame: str) -> dict[str, Any]:
    """Read the output of `device/classify.py --bench` from the target.

    Raises FtkitError when the file is not such output, is of another run, was not measured on this
    target with one thread, or is for frames of another size.
    """
    try:
        data = read_bench(path)
    except FtkitError:
        raise FtkitError(
            f"{path}: expected what `device/classify.py --bench` prints, found something else. "
            "Run it on the device and keep its output"
        ) from None

    provider = TARGETS[target].provider
    where = (data["provider"], data["threads"], data["target"])

    wanted = (provider, 1, target)
    if where[:2] != wanted[:2] or (provider == "cpu" and where[2] != target):
        raise FtkitError(
            f"{path}: expected latencies of {wanted}, found those of {where} (provider, threads, target). "
            "Run `device/classify.py --bench` on the target, on one thread"
        )
    if data["run"] != run.data["model_fingerprint"]:
        raise FtkitError(
            f"{path}: expected latencies of this run, found those of another. Measure its own bundle"
        )
    if data["frame"] != frame and PROVIDERS[provider].form != "core":
        raise FtkitError(
            f"{path}: expected latencies on {console.frames(frame)}, found {data['frame'] or 'none'}. "
            f"Try --set export.frame={data['frame'] or frame}, or measure again"
        )

    return data


def frame_of(limits: Export, run: Run) -> str:
    """Frame size at which latencies are measured and judged, such as "640x480"."""
    frame: str = limits.frame or run.data["audit"]["frame"]
    return frame


def export(
    run: Run,
    out: Path,
    *,
    settings: Export | None = None,
    providers: Sequence[str] = ("cpu",),
    data: str | Path | None = None,
    quick: bool = False,
    extras: Extras | None = None,
) -> Exported:
    """Export `run` to a bundle that is checked on each provider, judged by the gates, and sealed.

    settings: gates and budgets, by default the recipe's. quick: shorter latency runs, marked so in
    the evidence. Raises ProviderError when a provider is not available here, FtkitError when `out`
    exists or the images have changed.
    """
    for name in providers:
        require_provider(name)
        if PROVIDERS[name].captured:
            raise FtkitError(
                f"--providers {name}: expected one that parity can be measured on, found one for "
                "`ftkit bench` alone. Try cuda"
            )

    limits = settings or run.recipe.export
    extras = extras or Extras()
    _require_extras(extras, limits, run.task)
    keep_freed_memory()
    bound_threads()

    with allowing(run.data["max_pixels"]):
        canvases = held_out(run, data)
        model = run.backbone().model

        folder = bundles.begin_bundle(out)
        try:
            job = _prepare(run, model, canvases, folder, limits, providers, quick, extras)
            made, paths = _make_variants(job)
            parity = _prove(job, paths)
            measured = _measure(job, made, paths)
            paths = _finish_files(job, measured.chosen, paths)
            return _seal(job, out, made, paths, parity, measured)
        finally:
            # Sealing moves the folder away; one that is still here is unfinished.
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Inputs shared by all steps of an export.

    folder: where the bundle is built. rows: the canvases' rows that the parity check uses, all held
    out; files: their paths; photographs: the first of them, decoded.
    """

    run: Run
    core: Core
    context: Context
    folder: Path
    rows: Array
    files: Sequence[Path]
    photographs: Sequence[Array]
    providers: Sequence[str]
    quick: bool
    extras: Extras

    @property
    def limits(self) -> Export:
        """Gates and budgets."""
        return self.context.limits

    @property
    def canvases(self) -> Canvases:
        """The run's images."""
        return self.context.canvases


Forms = dict[str, tuple[Path, Path]]  # variant -> (image form, core form)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Latency and budgets of the variants of an export.

    latency: of each shipped variant; budgets: of the chosen one; unproven: variants that would meet
    them; sizes: (frame, p50 ms, p95 ms) of the chosen file.
    """

    latency: Mapping[str, Sequence[Latency]]
    chosen: Row
    budgets: Sequence[Budget]
    unproven: Sequence[Row]
    sizes: Sequence[tuple[str, float, float]]


def _prepare(
    run: Run,
    model: nn.Module,
    canvases: Canvases,
    folder: Path,
    limits: Export,
    providers: Sequence[str],
    quick: bool,
    extras: Extras,
) -> Job:
    """Convert the model, and choose the images for the parity check."""
    with console.bar("converting to ONNX"):
        trace = Trace(model, run.preprocess.size)
        core = trace.core(model)

    picked = spread_evenly(canvases.rows("test"), PARITY_IMAGES)
    rows = np.random.default_rng(0).permutation(picked)
    files = [canvases.images.images[row].path for row in rows]
    parts = judged_parts(run, trace, core, canvases)
    context = Context.of(
        run,
        Reference(model),
        canvases,
        limits=limits,
        photograph=files[0],
        frame=frame_of(limits, run),
        target_name=variants.resolve_target(limits.target, providers),
        measured=extras.measured,
        judged=parts,
        folded=is_folded(parts, core),
        device=extras.device,
        metadata={**metadata(run), "input_format": limits.input_format},
    )

    return Job(
        run=run,
        core=core,
        context=context,
        folder=folder,
        rows=rows,
        files=files,
        photographs=_decoded(files, run.preprocess),
        providers=providers,
        quick=quick,
        extras=extras,
    )


def judged_parts(run: Run, trace: Trace, core: Core, canvases: Canvases) -> list[HeldOutPart]:
    """What variants are judged on: the model itself on val, or each fold's on its own images."""
    folds = fold_models(run)
    if not folds:
        return [HeldOutPart(core.model, canvases.rows("val"), canvases.rows("train"))]

    parts = []
    with console.bar("converting the folds' models") as progress:
        for model, held, seen in folds:
            parts.append(HeldOutPart(trace.core(model).model, held, seen))
            progress(len(parts), len(folds))
    return parts


def is_folded(parts: Sequence[HeldOutPart], core: Core) -> bool:
    """Whether variants are judged on other models than the one that ships."""
    return any(part.core is not core.model for part in parts)


def _make_variants(job: Job) -> tuple[variants.Variants, Forms]:
    """Decide which variants may ship; write them with labels, splits and activation model."""
    made = variants.make(job.core.model, job.context)
    console.say(variants.as_table(made.rows, "oof" if job.context.folded else "val"))
    console.say(f"times: one thread, {console.frames(job.context.frame)}, decoding apart")

    paths = _write_variants(job.folder, made, job.context)

    if explained := with_features(job.core.model):
        job.context.write(explained, job.folder / EXPLAIN, "fp32", (), plain=True)
    for name in (TRAINED_ON, SPLITS_CSV):
        shutil.copyfile(job.run.folder / name, job.folder / name)

    labels = "".join(f"{label}\n" for label in job.run.classes)
    (job.folder / "labels.txt").write_text(labels, encoding="utf-8")
    return made, paths


def _prove(job: Job, paths: Forms) -> list[Parity]:
    """Check parity of fp32 with the framework on each provider."""
    results = []
    image_form, core_form = paths["fp32"]
    model = ExportedModel(
        core=core_form,
        image=image_form,
        preprocess=job.run.preprocess,
        readout=job.run.readout,
        layers=job.core.layers,
        input_format=job.limits.input_format,
    )

    for provider in job.providers:
        with console.bar(f"parity on {provider}"):
            parity = measure_parity(
                job.context.reference,
                model,
                job.canvases.array(job.rows),
                job.photographs,
                provider,
            )

        _say_parity(parity, len(job.rows))
        results.append(parity)

    return results


def _measure(job: Job, made: variants.Variants, paths: Forms) -> Measurements:
    """Measure the shipped variants and choose one; print advice when it misses a budget."""
    context = job.context
    latency = evidence.latencies(paths, job.files[0], context.frame, job.providers, job.quick)
    shipped = [
        _measured(row, latency[name], paths[name], context)
        for name, (row, _) in made.shipped.items()
    ]
    budgets = {
        row.name: evidence.measure_budgets(row, paths[row.name], context, quick=job.quick)
        for row in shipped
    }
    chosen = evidence.choose(shipped, budgets)

    missed = [item for item in budgets[chosen.name] if item.verdict != "passed"]
    unproven = evidence.would_meet(made.rows, job.limits) if missed else []
    console.say(f"chosen: {chosen.name}{', the nearest to its budgets' if missed else ''}")

    if missed:
        for line in budget_advice(job.run, missed, unproven, made.rows, context):
            console.say(line)

    return Measurements(
        latency=latency,
        chosen=chosen,
        budgets=budgets[chosen.name],
        unproven=unproven,
        sizes=evidence.times_by_size(chosen, paths[chosen.name], context),
    )


def _finish_files(job: Job, chosen: Row, paths: Forms) -> Forms:
    """Write golden vectors, model.onnx, runners and extras; return the variants' final paths."""
    folder = job.folder
    preprocess = job.run.preprocess
    input_format = job.limits.input_format
    golden = []
    if job.limits.golden == "images":  # small enough for any device to decode
        golden = [image for image in job.photographs if image[..., 0].size <= GOLDEN_PIXELS]

    with console.bar("golden vectors"):
        reference = job.context.reference
        readout = job.run.readout
        write_golden(folder, reference, golden, preprocess, readout, paths, input_format)
        paths[chosen.name][0].rename(folder / "model.onnx")
        write_flat(folder, chosen.name, preprocess, readout, input_format)

    if golden:
        for licence in job.canvases.images.root.glob("LICEN[CS]E*"):  # travels with the images
            shutil.copyfile(licence, folder / "golden" / licence.name)

    add_runners(folder)
    _add_extras(folder, job.core.model, job.context, job.run.classes, job.extras)
    return {**paths, chosen.name: (folder / "model.onnx", paths[chosen.name][1])}


def _seal(
    job: Job,
    out: Path,
    made: variants.Variants,
    paths: Forms,
    parity: Sequence[Parity],
    measured: Measurements,
) -> Exported:
    """Judge the gates on the finished file; write report, model card and manifest."""
    run = job.run
    folder = job.folder
    on_test = evidence.file_accuracy(folder, run, job.context)
    metrics = on_test.metrics
    if job.run.task is SINGLE_LABEL:
        write_reference(folder, run, job.canvases, on_test.sightings, job.limits.input_format)
    if job.run.task is SINGLE_LABEL and job.limits.golden == "images":
        rows = job.canvases.rows("test")
        labels = job.canvases.labels[rows]
        write_kept_sample(folder, on_test, labels, job.canvases.groups(rows))

    here, there = (headline(each)[0] for each in (metrics, run.metrics["test"]))
    console.say(
        f"{run.task.metric} of the file on {metrics['images']} held-out images: {here:.4f} (framework {there:.4f})"
    )
    found_evidence = evidence.Evidence(
        parity=parity,
        chosen=measured.chosen,
        metrics=metrics,
        against=on_test.against,
        task=run.task,
        out_of_order=evidence.out_of_order(folder, run.classes),
        misread=evidence.misread(folder, run),
        apart=on_test.apart,
        budgets=measured.budgets,
        unproven=measured.unproven,
        frame=job.context.frame,
        latency=measured.latency,
        sizes=measured.sizes,
    )
    gates = evidence.judge_gates(job.limits, found_evidence)

    manifest = {
        **evidence.manifest(run, job.context, made, found_evidence),
        "version": int(time.time()) if job.extras.version is None else job.extras.version,
        "pipeline": _pipeline(job),
        "variants": {
            name: {
                "file": image_form.relative_to(folder).as_posix(),
                "core": core_form.relative_to(folder).as_posix(),
            }
            for name, (image_form, core_form) in paths.items()
        },
    }

    _describe(job, manifest, gates)
    sealed = bundles.seal(folder, out, manifest, gates, job.extras.sign)

    if job.extras.zipped:
        archive.pack(sealed, sealed.with_name(sealed.name + ".zip"))

    return Exported(
        folder=sealed,
        gates=tuple(gates),
        parity=tuple(parity),
        latency=tuple(measured.latency[measured.chosen.name]),
        file_metrics=metrics,
        rows=made.rows,
        chosen=measured.chosen.name,
    )


def _pipeline(job: Job) -> list[dict[str, Any]]:
    """The steps of the model as the run has them, each with its last value in the core form."""
    parts: list[dict[str, Any]] = job.run.data.get("pipeline", [])  # not in older runs
    ends = {part["blocks"][-1]: part for part in parts}
    values = last_values(job.core.model, job.core.layers, set(ends))
    by_block = {block: value for value, block in values.items()}
    return [{**part, "value": by_block.get(part["blocks"][-1])} for part in parts]


def _describe(job: Job, manifest: dict[str, Any], gates: Sequence[Gate]) -> None:
    """Write the report and the model card."""
    run = job.run
    folder = job.folder
    shown = {
        **manifest,
        "gates": [gate.as_dict() for gate in gates],
        "model_sha256": sha256(folder / "model.onnx"),
    }
    mistakes = _pictures(folder, job.canvases, run, job.limits)
    epochs = read_metrics(run.folder)

    write_report(folder / "report.html", run.data, epochs, mistakes, shown)
    (folder / "MODEL_CARD.md").write_text(model_card(run.data, manifest), encoding="utf-8")


def _write_variants(
    folder: Path, made: variants.Variants, context: Context
) -> dict[str, tuple[Path, Path]]:
    """Write the shipped variants; return variant -> (image form, core form).

    Raises FtkitError for a file that the target's oldest ONNX Runtime cannot load.
    """
    (folder / "variants").mkdir()
    paths = {}
    for name, (row, core) in made.shipped.items():
        image = folder / "variants" / f"{name}.onnx"
        plain = folder / "variants" / f"{name}-core.onnx"
        context.write(core, image, name, row.kept, plain=False)
        context.write(core, plain, name, row.kept, plain=True)
        for path in (image, plain):
            if why := unshippable(path, context.target):
                raise FtkitError(
                    f"{path.name}: {why}, for target {context.target_name}. Try another backbone"
                )
        paths[name] = (image, plain)

    return paths


def _measured(
    row: Row, latency: Sequence[Latency], forms: tuple[Path, Path], context: Context
) -> Row:
    """The row with the file's size and memory and, on the target, its full measurement.

    The full measurement is that of one thread on the target's provider. Where this machine is not
    the target, the times of the race, or the target's own, are kept.
    """
    row = replace(row, size_bytes=latency[0].size_bytes, peak_rss_bytes=latency[0].peak_rss_bytes)
    if context.device:
        provider = context.target.provider
        (start,) = context.device.starts(
            form_of(provider, *forms),
            context.photograph,
            provider=provider,
            frame=context.frame,
            count=1,
        )
        return replace(row, peak_rss_bytes=start.peak_rss_bytes)

    for item in latency:
        if context.here and item.provider == context.target.provider and item.threads == 1:
            return replace(row, p50_ms=item.p50_ms, p95_ms=item.p95_ms)
    return row


def _require_extras(extras: Extras, limits: Export, task: Task) -> None:
    """Raise FtkitError early for options that would otherwise fail only at the end."""
    task.require_export(limits)
    if extras.handoff and task is not SINGLE_LABEL:
        raise FtkitError(
            f"--handoff: expected a single-label run, found a {task.name} one, for which it is not made. Leave it out"
        )
    if extras.sign:
        archive.require_key(extras.sign)
    if extras.c:
        plain_c.require_emitter()
    if extras.handoff and limits.golden == "synthetic":
        raise FtkitError(
            "--handoff: expected that images may leave, found golden=synthetic. Leave out one of them"
        )


def _add_extras(
    folder: Path,
    core: onnx.ModelProto,
    context: Context,
    classes: Sequence[str],
    extras: Extras,
) -> None:
    if extras.c:
        with console.bar("plain C"):
            plain_c.write_c(
                folder / "device" / "c",
                core,
                context.preprocess,
                classes,
                context.readout,
                threshold=float(context.metadata.get("abstain_threshold", 0)),
                input_format=context.limits.input_format,
            )

    if extras.web:
        web.add_page(folder, extras.web)
    if extras.ort:
        with console.bar("ORT format"):
            write_ort(folder / "model.onnx", folder / "device" / "ort", context.target)

    if extras.handoff:
        # With folds the shipped model has seen every other image
        held_out = context.canvases.rows("test" if context.folded else "val")
        rows = held_out[:: max(1, -(-len(held_out) // handoff.IMAGES))]
        with console.bar("hand-off"):
            handoff.write_handoff(
                folder / "handoff",
                plain_c.static(core),
                context.pixels(calibration_rows(context)[:32]),
                context.pixels(rows),
                logits_of(core, context, rows),
                context.canvases.labels[rows],
                context.canvases.groups(rows),
            )


def _pictures(folder: Path, canvases: Canvases, run: Run, limits: Export) -> list[Picture]:
    """The worst mistakes with class activation maps; none when photographs must not be included."""
    if limits.golden == "synthetic":
        return []
    explain = Explainer(folder) if (folder / EXPLAIN).is_file() else None
    return pictures(canvases, run.data["mistakes"], explain)


def _decoded(paths: Sequence[Path], preprocess: Preprocess) -> list[Array]:
    """The first images, decoded as on the device.

    At most FLOAT64_IMAGES, and no more once they exceed DECODED_BYTES.
    """
    decoded: list[Array] = []
    for path in paths[:FLOAT64_IMAGES]:
        decoded.append(preprocess.decode(path))
        if sum(image.nbytes for image in decoded) > DECODED_BYTES:
            break
    return decoded


def _say_parity(parity: Parity, photographs: int) -> None:
    worst = parity.worst
    group = evidence.input_group
    console.say(
        f"parity on {parity.provider} over {photographs} held-out images, noise and odd sizes: "
        f"{'passed' if parity.passed else 'FAILED'}"
    )
    console.say(
        f"  nearest to its limit: {worst.name}, {group(worst)}: {short(worst.value)} of {short(worst.limit)} allowed"
    )

    if parity.first_divergence:
        console.say(f"first diverging layer: {parity.first_divergence}")
