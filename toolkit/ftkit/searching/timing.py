"""Time candidates as whole files, with a head that is not trained, in fp32 and int8.

    timed = timed_points(points, job)

The files are made by the quick exporter, which a training's own files are not; their times agree.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ftkit.benchmark.ssh import Device
from ftkit.models.backbones import build
from ftkit.models.inference import WithEmbedding
from ftkit.searching.candidates import Candidate
from ftkit.searching.front import Point, non_dominated
from ftkit.searching.int8 import FIRST_IN_FLOAT
from ftkit.utils import console
from ftkit_export.bundle.write import PACKAGE, runtime_files
from ftkit_export.conversion.convert import core_for_timing, write
from ftkit_export.conversion.graph import image_form
from ftkit_export.conversion.quantize import calibrate, heavy_nodes, int8
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import folder_beside
from ftkit_export.runtime.latency import Condition, Raced, Start, measure_start, race, race_in_parts
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import Readout
from ftkit_export.runtime.targets import TARGETS

SCRIPT = "time_candidates.py"


@dataclass(frozen=True)
class Timing:
    """Where and on what candidates are timed.

    pixels: (preprocess) -> (n, 3, S, S), images to calibrate 8 bits on. photograph, frame: the image
    that is timed, and its size. readout: behind a head with so many outputs. device: another
    machine, or None for this one.
    """

    target: str
    photograph: Path
    frame: str
    readout: Readout
    outputs: int
    weights: str
    preprocess: Callable[[str, int], Preprocess]
    pixels: Callable[[Preprocess], Array]
    device: Device | None = None
    for_device: Path | None = None
    brought: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    digest: str = ""


def timed_points(points: Sequence[Point], job: Timing) -> list[Point]:
    """Each point twice, in fp32 and in int8 (where the target has it), with its times and size; those of
    the front also without preprocessing. A candidate that cannot be exported is left out, and said.

    int8 has fp32's answers here: a candidate's own are judged when it is trained and exported. Where
    the target is not at hand, the times are those that were brought (`brought`), and None for
    files of which none were; the files then stay in the folder `for_device`, ready to be timed there.
    """
    precisions = ["fp32", *(["int8"] if "int8" in TARGETS[job.target].variants else [])]
    with tempfile.TemporaryDirectory() as scratch, console.bar("timing candidates") as progress:
        folder = Path(scratch)
        files: dict[str, Path] = {}
        made: list[Point] = []
        cores: dict[str, Path] = {}
        for number, point in enumerate(points):
            candidate = point.candidate
            preprocess = job.preprocess(candidate.backbone, candidate.size)
            # By which the timing knows what to feed
            metadata = {"preprocess": json.dumps(asdict(preprocess))}
            try:
                forms = _forms(candidate, preprocess, precisions, job)
            except FtkitError as error:
                console.warn(f"{candidate.name}: not timed: {error}")
                continue
            for precision, (form, core) in forms.items():
                made.append(replace(point, precision=precision))
                path = folder / f"{number}-{precision}.onnx"
                files[made[-1].name] = path
                cores[made[-1].name] = path.with_suffix(".core.onnx")
                write(form, path, metadata)
                write(core, cores[made[-1].name], metadata)
                made[-1] = replace(made[-1], size_bytes=path.stat().st_size)
            progress(number + 1, 2 * len(points))
        if not made:
            raise FtkitError(
                "search: expected a candidate that can be exported, found none. Try other --backbones"
            )

        if job.for_device:
            _leave_for_device(job.for_device, files, job)
            return [replace(point, **job.brought.get(point.name, {})) for point in made]

        times = _times(files, job, progress)
        timed = [replace(point, **times[point.name]) for point in made]
        front = [point.name for point in non_dominated(timed)]
        raced = _raced([cores[name] for name in front], job)
        alone = {name: raced[cores[name]].p50_ms for name in front}
        return [replace(point, core_ms=alone.get(point.name)) for point in timed]


def _times(
    files: Mapping[str, Path], job: Timing, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Times and memory of every file, here or over ssh."""
    count = len(files)
    raced = _raced(list(files.values()), job, lambda done, _: progress(count + done, 2 * count))
    found = {}
    for name, path in files.items():
        start = _started(path, job)
        found[name] = {
            "p50_ms": raced[path].p50_ms,
            "p95_ms": raced[path].p95_ms,
            "peak_rss_bytes": start.peak_rss_bytes,
            "cold_ms": start.cold_ms,
        }
    return found


def _raced(
    files: Sequence[Path],
    job: Timing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Path, Raced]:
    return race_in_parts(
        files,
        job.photograph,
        provider=TARGETS[job.target].provider,
        frame=job.frame,
        run=job.device.race if job.device else race,
        progress=progress,
    )


def _leave_for_device(folder: Path, files: Mapping[str, Path], job: Timing) -> None:
    """Write a folder that times the files on a device: they, one image, and the script."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder_beside(folder)
    for path in files.values():
        shutil.copyfile(path, beside / path.name)
    image = f"image{job.photograph.suffix}"
    shutil.copyfile(job.photograph, beside / image)
    for name in runtime_files():
        (beside / "ftkit_export" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, beside / "ftkit_export" / name)
    shutil.copyfile(PACKAGE / "device" / SCRIPT, beside / SCRIPT)
    told = {
        "target": job.target,
        "frame": job.frame,
        "image": image,
        "files": {name: path.name for name, path in files.items()},
        "search": job.digest,
    }
    (beside / "candidates.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.chmod(0o755)
    beside.rename(folder)


def read_times(path: Path, target: str, digest: str) -> dict[str, dict[str, Any]]:
    """What the script printed on the device, by the name of a point.

    Raises FtkitError for anything else, for times of another target, and for those of another
    search.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        fields = ("p50_ms", "p95_ms", "peak_rss_bytes", "cold_ms")
        times = {
            name: {field: float(each[field]) for field in fields}
            for name, each in told["times"].items()
        }
        where = (told["target"], told["search"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FtkitError(
            f"{path}: expected what `python {SCRIPT}` prints, found something else. Run it on the device and keep its "
            "output"
        ) from None
    if where != (target, digest):
        what = f"times of {told['target']}" if where[0] != target else "those of another search"
        raise FtkitError(
            f"{path}: expected times of this search on {target}, found {what}. Time the folder that this search left"
        )
    return times


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
) -> dict[str, tuple[onnx.ModelProto, onnx.ModelProto]]:
    """The image form and the core form of a candidate in each precision."""
    backbone = build(
        candidate.backbone,
        job.outputs,
        job.weights,
        cut=candidate.cut,
        pooling=candidate.pooling,
    )
    core = core_for_timing(WithEmbedding(backbone), candidate.size)
    forms = {"fp32": (image_form(core, preprocess, job.readout), core)}
    if "int8" in precisions:
        pixels = job.pixels(preprocess)
        ranges = calibrate(core, np.array_split(pixels, max(1, len(pixels) // 8)), preprocess)
        keep = heavy_nodes(core)[:FIRST_IN_FLOAT]
        quantized = int8(core, ranges, TARGETS[job.target], keep=keep)
        forms["int8"] = (image_form(quantized, preprocess, job.readout), quantized)
    return forms
