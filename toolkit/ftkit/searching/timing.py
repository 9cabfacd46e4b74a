"""Time candidates as whole files, with a head that is not trained, in fp32 and int8.

    timed = timed_points(points, job)

The files are made by the quick exporter, which a training's own files are not; their times agree.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from ftkit.benchmark.ssh import Device
from ftkit.models.backbones import build
from ftkit.models.inference import WithEmbedding
from ftkit.searching.candidates import Candidate
from ftkit.searching.front import Point
from ftkit.utils import console
from ftkit_export.conversion.convert import quiet, write
from ftkit_export.conversion.graph import IR_VERSION, OPSET, image_form
from ftkit_export.conversion.quantize import calibrate, heavy_nodes, int8
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.latency import Condition, Raced, Start, measure_start, race
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.targets import TARGETS

FIRST_IN_FLOAT = 3  # operators: the fastest on lite0; an export measures it anew
AT_ONCE = 12  # files in one race: their processes hold all of them in memory


@dataclass(frozen=True)
class Timing:
    """Where and on what candidates are timed.

    pixels: (preprocess) -> (n, 3, S, S), images to calibrate 8 bits on. photograph, frame: the image
    that is timed, and its size. classes: of the head. device: another machine, or None for this one.
    """

    target: str
    photograph: Path
    frame: str
    classes: int
    weights: str
    preprocess: Callable[[str, int], Preprocess]
    pixels: Callable[[Preprocess], Array]
    device: Device | None = None


def timed_points(points: Sequence[Point], job: Timing) -> list[Point]:
    """Each point twice, in fp32 and in int8 (where the target has it), with its times and size.

    int8 has fp32's answers here: a candidate's own are judged when it is trained and exported.
    """
    precisions = ["fp32", *(["int8"] if "int8" in TARGETS[job.target].variants else [])]
    found: list[Point] = []
    with tempfile.TemporaryDirectory() as scratch, console.bar("timing candidates") as progress:
        folder = Path(scratch)
        files: dict[tuple[int, str], Path] = {}
        for number, point in enumerate(points):
            candidate = point.candidate
            preprocess = job.preprocess(candidate.backbone, candidate.size)
            # By which the timing knows what to feed
            metadata = {"preprocess": json.dumps(asdict(preprocess))}
            for precision, form in _forms(candidate, preprocess, precisions, job).items():
                files[number, precision] = folder / f"{number}-{precision}.onnx"
                write(form, files[number, precision], metadata)
            progress(number + 1, 2 * len(points))

        times = _raced(list(files.values()), job, progress)
        started = {path: _started(path, job) for path in files.values()}
        for (number, precision), path in files.items():
            found.append(
                replace(
                    points[number],
                    precision=precision,
                    p50_ms=times[path].p50_ms,
                    p95_ms=times[path].p95_ms,
                    size_bytes=path.stat().st_size,
                    peak_rss_bytes=started[path].peak_rss_bytes,
                    cold_ms=started[path].cold_ms,
                )
            )
    return found


def _raced(
    files: Sequence[Path], job: Timing, progress: Callable[[int, int], None]
) -> Mapping[Path, Raced]:
    """Times of every file: in races of a few, each with the first file as the common measure.

    Times of a race are scaled so that the first file takes as long as in the first race.
    """
    first = files[0]
    found: dict[Path, Raced] = {}
    for start in range(1, max(2, len(files)), AT_ONCE - 1):
        entrants = [first, *files[start : start + AT_ONCE - 1]]
        provider = TARGETS[job.target].provider
        if job.device:
            raced = job.device.race(entrants, job.photograph, provider=provider, frame=job.frame)
        else:
            raced = race(entrants, job.photograph, provider=provider, frame=job.frame)

        scale = found[first].p50_ms / raced[0].p50_ms if first in found else 1.0
        for path, item in zip(entrants, raced, strict=True):
            found.setdefault(
                path, replace(item, p50_ms=item.p50_ms * scale, p95_ms=item.p95_ms * scale)
            )
        progress(len(files) + start, 2 * len(files))
    return found


def _started(path: Path, job: Timing) -> Start:
    """One process that opens the file and runs it, for memory and the time to the first answer."""
    provider = TARGETS[job.target].provider
    if job.device:
        (start,) = job.device.starts(
            path, job.photograph, provider=provider, frame=job.frame, count=1
        )
        return start
    condition = Condition(model=str(path), provider=provider, threads=1, frame=job.frame)
    return measure_start(condition, job.photograph, steady=False)


def _forms(
    candidate: Candidate, preprocess: Preprocess, precisions: Sequence[str], job: Timing
) -> dict[str, onnx.ModelProto]:
    """The image form of a candidate in each precision."""
    backbone = build(
        candidate.backbone,
        job.classes,
        job.weights,
        cut=candidate.cut,
        pooling=candidate.pooling,
    )
    core = _core(WithEmbedding(backbone), candidate.size, job.classes)
    forms = {"fp32": image_form(core, preprocess, 1.0)}
    if "int8" in precisions:
        pixels = job.pixels(preprocess)
        ranges = calibrate(core, np.array_split(pixels, max(1, len(pixels) // 8)), preprocess)
        keep = heavy_nodes(core)[:FIRST_IN_FLOAT]
        quantized = int8(core, ranges, TARGETS[job.target], keep=keep)
        forms["int8"] = image_form(quantized, preprocess, 1.0)
    return forms


def _core(net: nn.Module, size: int, classes: int) -> onnx.ModelProto:
    """A core form from the TorchScript exporter, in a second instead of ten."""
    buffer = io.BytesIO()
    with quiet():
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, 3, size, size),),
            buffer,  # type: ignore[arg-type]  # a buffer works; the stub knows paths only
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits", "embedding"],
            dynamic_axes={name: {0: "batch"} for name in ("pixels", "logits", "embedding")},
        )
    model = onnx.load_from_string(buffer.getvalue())
    model.ir_version = IR_VERSION
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = classes
    return model
