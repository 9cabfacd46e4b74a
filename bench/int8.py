"""What each step towards 8 bits brings, and whether heads trained on 8-bit activations pay.

    ftkit train photos --out RUN
    python bench/int8.py steps RUN [RUN ...]     # 2 minutes each on 2 cores
    python bench/int8.py operators RUN           # SQNR of every operator's output, step by step
    python bench/int8.py quantize RUN            # seconds, against ONNX Runtime's own quantizer
    python bench/int8.py heads photos            # heads on a frozen lite0; 2 minutes a seed
    python bench/int8.py heads photos --group-by 'module[0-9]+' --seeds 3

Steps: answers of held-out images (out of fold, of a run with folds), paired with fp32's, at one look;
time of the core form and of the whole file against fp32's, one thread, interleaved over processes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.exporting.candidates import (
    Context,
    HeldOutPart,
    answers_there,
    calibration_rows,
    ranges_of,
)
from ftkit.exporting.export import held_out, is_folded, judged_parts, metadata
from ftkit.exporting.int8 import CORRECTION_IMAGES
from ftkit.models.backbones import build
from ftkit.recipe import Export
from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training.closed_form import default_folds, fit_head
from ftkit.training.run import open_run
from ftkit_export.conversion.compat import quantize_qdq
from ftkit_export.conversion.convert import Core, Trace, export_core
from ftkit_export.conversion.quantize import RANK_IMAGES, heavy_nodes, int8, rank, sqnr
from ftkit_export.proof.decision import paired
from ftkit_export.proof.parity import Reference
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.readout import OneClass
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import here

QUANTIZED = 9  # times each


def context_of(run_folder: str) -> tuple[Context, Core]:
    """What `ftkit export` decides on, of a run."""
    run = open_run(run_folder)
    canvases = held_out(run, None)
    model = run.backbone().model
    trace = Trace(model, run.preprocess.size)
    core = trace.core(model)
    parts = judged_parts(run, trace, core, canvases)
    context = Context.of(
        run,
        Reference(model),
        canvases,
        limits=Export(),
        target_name=here(),
        photograph=canvases.images.images[canvases.rows("test")[0]].path,
        frame=run.data["audit"]["frame"],
        metadata=metadata(run),
        measured={},
        judged=parts,
        folded=is_folded(parts, core),
    )
    return context, core


def _plans(core: onnx.ModelProto, ranked: Sequence[str]) -> dict[str, tuple[list[str], bool]]:
    """Step -> (operators in float, whether the biases are corrected)."""
    first = heavy_nodes(core)
    others = [name for name in ranked if name not in first[:3]]
    return {
        "rounded to nearest": ([], False),
        "biases corrected": ([], True),
        "and the first 1 in float": (first[:1], True),
        "and the first 2": (first[:2], True),
        "and the first 3": (first[:3], True),
        "and the first 4": (first[:4], True),
        "the first 3 and the 4 most sensitive": ([*first[:3], *others[:4]], True),
        "the first 3 and the 8 most sensitive": ([*first[:3], *others[:8]], True),
        "the first 3, biases as they are": (first[:3], False),
    }


def steps(run_folder: str) -> None:
    """Print a row for every step."""
    context, core = context_of(run_folder)
    model = core.model
    labels = context.canvases.labels[context.rows]
    groups = context.canvases.groups(context.rows)
    rows = calibration_rows(context)
    shipped = ranges_of(model, context)
    known = {id(part): ranges_of(part.core, context, part.training) for part in context.judged}
    sample = context.pixels(rows[:RANK_IMAGES])
    plans = _plans(model, [name for name, _ in rank(model, shipped, context.target, sample)])
    logits = answers_there(lambda part: part.core, context)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        forms = {"fp32": model}
        found = {}
        for name, (keep, corrects) in plans.items():

            def made(
                part: HeldOutPart, keep: Sequence[str] = keep, corrects: bool = corrects
            ) -> onnx.ModelProto:
                own = calibration_rows(context, part.training)[:CORRECTION_IMAGES]
                return int8(
                    part.core,
                    known[id(part)],
                    context.target,
                    keep=keep,
                    correct_on=context.pixels(own) if corrects else None,
                )

            found[name] = answers_there(made, context)
            pixels = context.pixels(rows[:CORRECTION_IMAGES]) if corrects else None
            forms[name] = int8(model, shipped, context.target, keep=keep, correct_on=pixels)

        files = {}
        for plain in (True, False):
            files[plain] = [folder / f"{number}-{plain}.onnx" for number in range(len(forms))]
            for path, form in zip(files[plain], forms.values(), strict=True):
                context.write(form, path, "", (), plain=plain)
        raced = {plain: race(files[plain], context.photograph) for plain in (True, False)}

        right = logits.argmax(1) == labels
        whole = files[False][0].stat().st_size
        p50 = raced[True][0].p50_ms, raced[False][0].p50_ms
        print(
            f"\n{run_folder}: fp32 {right.mean():.4f} of {len(right)}, core {p50[0]:.2f} ms, ",
            end="",
        )
        print(f"whole {p50[1]:.2f} ms ({context.frame})")
        print(
            "| step | SQNR, dB | answers changed | drop, points [one-sided 95 %] | core | whole | size |"
        )
        print("|---|---|---|---|---|---|---|")
        for place, (name, answers) in enumerate(found.items(), start=1):
            against = paired(right, answers.argmax(1) == labels, groups)
            core_time, whole_time = (raced[plain][place] for plain in (True, False))
            print(
                f"| {name} | {sqnr(logits, answers):.1f} "
                f"| {100 * (answers.argmax(1) != logits.argmax(1)).mean():.1f} % "
                f"| {against.drop * 100:+.2f} [{against.low * 100:+.2f}, {against.high * 100:+.2f}] "
                f"| {core_time.ratio:.3f} | {whole_time.ratio:.3f} "
                f"| {files[False][place].stat().st_size / whole:.2f} |",
                flush=True,
            )


def operators(run_folder: str) -> None:
    """Print the SQNR of every heavy operator's output on test images, after each step."""
    context, core = context_of(run_folder)
    model = core.model
    ranges = ranges_of(model, context)
    rows = calibration_rows(context)[:CORRECTION_IMAGES]
    pixels = context.pixels(context.canvases.rows("test")[:32])
    names = heavy_nodes(model)
    expected = _outputs(model, names, pixels)
    columns = {}
    for name, (keep, corrects) in list(_plans(model, names).items())[:5]:
        corrected = context.pixels(rows) if corrects else None
        form = int8(model, ranges, context.target, keep=keep, correct_on=corrected)
        columns[name] = _outputs(form, names, pixels)

    outputs = {node.name: node.output[0] for node in model.graph.node}
    print("| operator | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for place, name in enumerate(names):
        layer = core.layers.get(outputs[name]) or name
        figures = [f"{sqnr(expected[place], each[place]):.1f}" for each in columns.values()]
        print(f"| {layer} | " + " | ".join(figures) + " |")


def quantize(run_folder: str) -> None:
    """Print the seconds that ONNX Runtime's quantizer takes, and ftkit's with weights on whole arrays."""
    context, core = context_of(run_folder)
    ranges, target = ranges_of(core.model, context), context.target
    inferred = shape_inference.infer_shapes(core.model)

    def reference() -> onnx.ModelProto:
        kind = QuantType.QUInt8 if target.activations == "uint8" else QuantType.QInt8
        return QDQQuantizer(
            copy.deepcopy(inferred),
            True,
            target.reduce_range,
            QuantType.QInt8,
            kind,
            copy.deepcopy(ranges),
            [],
            [],
            list(QDQRegistry),
            {},
        ).quantize_model()

    def ours() -> onnx.ModelProto:
        return quantize_qdq(
            copy.deepcopy(inferred),
            copy.deepcopy(ranges),
            reduce_range=target.reduce_range,
            unsigned_activations=target.activations == "uint8",
            only=(),
            keep=(),
        )

    spent: dict[str, list[float]] = {"ONNX Runtime": [], "ftkit": []}
    for _ in range(QUANTIZED):
        for name, make in (("ONNX Runtime", reference), ("ftkit", ours)):
            begun = time.perf_counter()
            make()
            spent[name].append(time.perf_counter() - begun)
    for name, seconds in spent.items():
        print(f"{name}: median {statistics.median(seconds):.2f} s")


def _outputs(model: onnx.ModelProto, names: Sequence[str], pixels: Array) -> list[Array]:
    """Outputs of these nodes, of the graph as written."""
    probed = copy.deepcopy(model)
    outputs = {node.name: node.output[0] for node in model.graph.node}
    del probed.graph.output[:]
    probed.graph.output.extend(
        helper.make_tensor_value_info(outputs[name], TensorProto.FLOAT, None) for name in names
    )
    return Session(probed.SerializeToString(), optimised=False).run(pixels)


def heads(data: str, seed: int, group_by: str) -> None:
    """Heads on a frozen lite0: trained on its float activations, or on its 8-bit ones."""
    backbone = build("efficientnet_lite0", 1000)
    images = read_images(data, seed, group_by, cut_val=False)
    canvases = build_canvases(images, backbone.preprocess)
    rows = canvases.rows("train")
    labels = canvases.labels[rows]
    groups = canvases.groups(rows)
    classes = len(images.classes)
    core = export_core(backbone.model, backbone.preprocess.size).model
    context = Context(
        reference=Reference(backbone.model),
        canvases=canvases,
        preprocess=backbone.preprocess,
        readout=OneClass(),
        task=SINGLE_LABEL,
        limits=Export(),
        target_name=here(),
        photograph=images.images[0].path,
        frame="",
        metadata={},
        measured={},
        judged=[HeldOutPart(core, rows, rows)],
    )
    ranges = ranges_of(core, context)
    correct_on = context.pixels(calibration_rows(context)[:CORRECTION_IMAGES])
    first = heavy_nodes(core)[:3]
    forms = {
        "rounded to nearest": int8(core, ranges, context.target),
        "corrected": int8(core, ranges, context.target, correct_on=correct_on),
        "corrected, the first 3 in float": int8(
            core, ranges, context.target, keep=first, correct_on=correct_on
        ),
    }
    float_embedding = _embedded(core, context, rows)
    masks = default_folds(labels, groups)
    float_head = fit_head(float_embedding, labels, masks, classes)
    right = float_head.logits.argmax(1) == labels
    print(f"{data}, seed {seed}: float {right.mean():.4f} of {len(rows)} out of fold")
    print("| body | SQNR of the embedding, dB | head trained on | drop, points [one-sided 95 %] |")
    print("|---|---|---|---|")
    for name, form in forms.items():
        embedding = _embedded(form, context, rows)
        own = fit_head(embedding, labels, masks, classes)
        carried = np.zeros_like(own.logits)
        for mask, (weight, bias) in zip(masks, float_head.by_fold, strict=True):
            carried[mask] = embedding[mask] @ weight.T + bias
        for trained_on, logits in (("float", carried), ("8 bits", own.logits)):
            against = paired(right, logits.argmax(1) == labels, groups)
            print(
                f"| {name} | {sqnr(float_embedding, embedding):.1f} | {trained_on} "
                f"| {against.drop * 100:+.2f} [{against.low * 100:+.2f}, {against.high * 100:+.2f}] |",
                flush=True,
            )


def _embedded(model: onnx.ModelProto, context: Context, rows: Array) -> Array:
    session = Session(model.SerializeToString())
    return np.concatenate(
        [session.run(context.pixels(rows[i : i + 8]))[1] for i in range(0, len(rows), 8)]
    )


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("steps", "operators", "quantize", "heads"))
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--group-by", default="", help="for heads: groups in file names")
    parser.add_argument("--seeds", type=int, default=1, help="for heads: test splits")
    options = parser.parse_args()
    print(machine())
    for folder in options.folders:
        if options.what == "heads":
            for seed in range(options.seeds):
                heads(folder, seed, options.group_by)
        else:
            {"steps": steps, "operators": operators, "quantize": quantize}[options.what](folder)


if __name__ == "__main__":
    main()
