"""Benchmarks of the exported file: int8, plain torch.onnx export, preprocessing in the graph.

    ftkit train photos --out RUN && python bench/export.py RUN            (about 2 minutes on 2 cores)
    python bench/export.py RUN --qat 1                                    (and a quantization-aware stage of 1 epoch)

int8 variants: core form, one thread, runs interleaved, accuracy paired with fp32 on val and test
together (not used for any decision; `ftkit export` decides on val alone).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ftkit.data.canvas import Canvases
from ftkit.exporting.candidates import Context, HeldOutPart, calibration_rows, logits_of
from ftkit.exporting.export import held_out, metadata
from ftkit.exporting.qat import fine_tune
from ftkit.recipe import Export
from ftkit.training.run import Run, open_run
from ftkit_export.conversion.convert import export_core, quiet, write
from ftkit_export.conversion.graph import pixel_model
from ftkit_export.conversion.quantize import RANK_IMAGES, calibrate, int8, quantized_nodes, rank
from ftkit_export.proof.decision import paired
from ftkit_export.proof.parity import Reference
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import TARGETS, here

KEPT = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16)


def trained(context: Context, core: onnx.ModelProto, ranges: Any, epochs: int) -> onnx.ModelProto:
    """All operators in 8 bits, after the given number of quantization-aware epochs."""
    rows, begun = context.canvases.rows("train"), time.perf_counter()
    adapted = fine_tune(
        core,
        int8(core, ranges, context.target),
        lambda picks: context.pixels(rows[picks]),
        context.canvases.labels[rows],
        logits_of(core, context, rows),
        epochs=epochs,
    )

    print(
        f"quantization-aware stage: {len(rows)} images, {epochs} epochs, {time.perf_counter() - begun:.0f} s"
    )
    return int8(adapted, ranges, context.target)


def front(context: Context, core: onnx.ModelProto, folder: Path, epochs: int) -> None:
    """int8 variants with the most damaged operators kept in float, one row each."""
    canvases = context.canvases
    rows = np.concatenate([canvases.rows("val"), canvases.rows("test")])
    labels, calibration = canvases.labels[rows], calibration_rows(context)
    batches = (context.pixels(calibration[i : i + 8]) for i in range(0, len(calibration), 8))
    ranges = calibrate(core, batches, context.preprocess)
    order = [
        name
        for name, _ in rank(core, ranges, context.target, context.pixels(calibration[:RANK_IMAGES]))
    ]
    forms = {str(count): int8(core, ranges, context.target, keep=order[:count]) for count in KEPT}

    if epochs:
        forms["0, trained"] = trained(context, core, ranges, epochs)

    files = [folder / "fp32.onnx", *(folder / f"{name}.onnx" for name in forms)]
    for path, form in zip(files, [core, *forms.values()], strict=True):
        write(form, path, context.metadata)

    times = race(files, context.photograph)
    right = logits_of(core, context, rows).argmax(1) == labels
    print(
        "| kept in float | in 8 bits | time of fp32's [95 %] | drop, points [one-sided 95 %] | size | verdict |"
    )
    print("|---|---|---|---|---|---|")
    print(
        f"| fp32 | 0 | 1, p50 {times[0].p50_ms:.2f} ms | accuracy {right.mean():.4f} of {len(rows)} | 1 | |"
    )
    whole = files[0].stat().st_size

    for (count, form), raced, path in zip(forms.items(), times[1:], files[1:], strict=True):
        found = paired(
            right, logits_of(form, context, rows).argmax(1) == labels, context.canvases.groups(rows)
        )
        share = path.stat().st_size / whole
        print(
            f"| {count} | {quantized_nodes(form)} "
            f"| {raced.ratio:.3f} [{raced.ratio_low:.3f}, {raced.ratio_high:.3f}] "
            f"| {found.drop * 100:+.2f} [{found.low * 100:+.2f}, {found.high * 100:+.2f}] "
            f"| {share:.2f} | {found.verdict(0.01)} |",
            flush=True,
        )


def plain(run: Run, context: Context, core: onnx.ModelProto, folder: Path) -> None:
    """Compare `torch.onnx.export(model, example, file)` with the core form."""
    model = run.backbone().model
    with quiet():
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, run.preprocess.size, run.preprocess.size),),
            str(folder / "plain.onnx"),
            verbose=False,
        )

    plain_model = onnx.load(folder / "plain.onnx")
    plain_model.graph.input[0].name, old = "pixels", plain_model.graph.input[0].name

    for node in plain_model.graph.node:
        node.input[:] = ["pixels" if name == old else name for name in node.input]

    write(plain_model, folder / "plain.onnx", context.metadata)
    write(core, folder / "core.onnx", context.metadata)

    for threads in (1, 2):
        ours, other = race(
            [folder / "core.onnx", folder / "plain.onnx"], context.photograph, threads=threads
        )
        print(
            f"plain torch.onnx.export, {threads} threads: p50 {other.p50_ms:.2f} ms, core form {ours.p50_ms:.2f} ms, "
            f"ratio {other.ratio:.3f} [{other.ratio_low:.3f}, {other.ratio_high:.3f}]",
            flush=True,
        )


def _median_ratio(
    one: Callable[[], object], other: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """(ms of one, ms of other, median of the paired ratios), runs interleaved."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 3):
        pair = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            begun = time.perf_counter()
            (one, other)[which]()
            pair[which] = (time.perf_counter() - begun) * 1e3
        times.append((pair[0], pair[1]))

    kept = times[3:]

    return (
        statistics.median(a for a, _ in kept),
        statistics.median(b for _, b in kept),
        statistics.median(a / b for a, b in kept),
    )


def pixels(context: Context, canvases: Canvases, run: Run, core: onnx.ModelProto) -> None:
    """Compare preprocessing in the graph with Pillow and numpy: time and effect of rounding."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for name, preprocess in (
        ("this run's", run.preprocess),
        ("ImageNet's 256 to 224", Preprocess()),
    ):
        session = Session(pixel_model(preprocess).SerializeToString(), threads=1)
        for size in ((640, 427), (4000, 3000)):
            image = np.asarray(photograph.resize(size))
            ours, pillow, ratio = _median_ratio(
                lambda session=session, image=image: session.run(image[None]),
                lambda preprocess=preprocess, image=image: preprocess.pixels(
                    preprocess.canvas(image)[None]
                ),
                60,
            )
            print(
                f"pixels of {size[0]}x{size[1]}, {name}: graph {ours:.2f} ms, Pillow + numpy {pillow:.2f} ms, "
                f"ratio {ratio:.2f}",
                flush=True,
            )

    images = [canvases.images.images[row].path for row in canvases.rows("test")]
    session = Session(pixel_model(run.preprocess).SerializeToString())
    start = (run.preprocess.resize - run.preprocess.size) // 2
    inside = slice(start, start + run.preprocess.size)
    core_session, off, same = Session(core.SerializeToString()), [], 0

    for path in images:
        image = np.asarray(Image.open(path).convert("RGB"))
        canvas = run.preprocess.canvas(image)
        levels, graph_pixels = session.run(image[None])
        off.append(float((np.abs(levels[0].astype(int) - canvas[inside, inside]) > 1).mean()))
        pair = [
            core_session.run(item)[0][0].argmax()
            for item in (graph_pixels, run.preprocess.pixels(canvas[None]))
        ]
        same += int(pair[0] == pair[1])

    print(
        f"test split: {100 * (1 - statistics.mean(off)):.4f} % of values within 1 grey level, "
        f"top-1 equal on {same} of {len(images)}"
    )


def main() -> None:
    """Run all benchmarks for one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--qat", type=int, default=0, metavar="EPOCHS")
    options = parser.parse_args()
    run = open_run(options.run)
    canvases = held_out(run, None)
    core = export_core(run.backbone().model, run.preprocess.size).model
    photograph = canvases.images.images[canvases.rows("test")[0]].path
    context = Context(
        reference=Reference(run.backbone().model),
        canvases=canvases,
        preprocess=run.preprocess,
        temperature=run.temperature,
        limits=Export(),
        target_name=here(),
        photograph=photograph,
        frame=run.data["audit"]["frame"],
        metadata=metadata(run),
        measured={},
        judged=[HeldOutPart(core, canvases.rows("val"), canvases.rows("train"))],
    )

    assert TARGETS[here()].provider == "cpu"
    print(machine())

    with tempfile.TemporaryDirectory() as scratch:
        front(context, core, Path(scratch), options.qat)
        plain(run, context, core, Path(scratch))

    pixels(context, canvases, run, core)


if __name__ == "__main__":
    main()
