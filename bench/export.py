"""Benchmarks of the exported file: plain torch.onnx export, preprocessing in the graph.

    ftkit train photos --out RUN && python bench/export.py RUN            (about a minute on 2 cores)

Runs are interleaved, on one thread and on two. bench/int8.py is about 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from int8 import context_of
from PIL import Image
from sklearn.datasets import load_sample_image

from ftkit.data.canvas import Canvases
from ftkit.exporting.candidates import Context
from ftkit.training.run import Run, open_run
from ftkit_export.conversion.convert import quiet, write
from ftkit_export.conversion.graph import pixel_model
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import TARGETS, here


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
    options = parser.parse_args()
    run = open_run(options.run)
    context, exported = context_of(options.run)
    core = exported.model

    assert TARGETS[here()].provider == "cpu"
    print(machine())

    with tempfile.TemporaryDirectory() as scratch:
        plain(run, context, core, Path(scratch))

    pixels(context, context.canvases, run, core)


if __name__ == "__main__":
    main()
