"""Export as plain C: sources, weights, Makefile, and a header with labels and preprocessing.

    write_c(bundle / "device" / "c", core, preprocess, labels, readout, threshold=0.9, input_format="rgb")

emx-onnx-cgen turns the network into C (float32, batch 1); decoding, resizing and what becomes of the
logits are in device/c/classify.c. For Linux-class processors where no runtime can be installed; bench/README.md
compares its speed with ONNX Runtime's.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import shape_inference

import ftkit_export
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import FITS, INPUT_FORMATS, Preprocess
from ftkit_export.runtime.readout import Labels, OneClass, Readout, Values

SOURCES = Path(ftkit_export.__file__).parent / "device" / "c"


def static(core: onnx.ModelProto) -> onnx.ModelProto:
    """The core form with batch size 1, without metadata, for compilers that need static shapes."""
    fixed = copy.deepcopy(core)
    del fixed.metadata_props[:]
    for item in (*fixed.graph.input, *fixed.graph.output):
        item.type.tensor_type.shape.dim[0].Clear()
        item.type.tensor_type.shape.dim[0].dim_value = 1
    return shape_inference.infer_shapes(fixed)


def require_emitter() -> None:
    """Raises FtkitError when emx-onnx-cgen is missing."""
    if importlib.util.find_spec("emx_onnx_cgen") is None:
        raise FtkitError(
            "--c: expected the package emx-onnx-cgen, found none. Try `pip install 'ftkit[c]'`"
        )


def write_c(
    folder: Path,
    core: onnx.ModelProto,
    preprocess: Preprocess,
    labels: Sequence[str],
    readout: Readout,
    *,
    threshold: float,
    input_format: str,
) -> None:
    """Write the C sources to `folder`. threshold: of one class, below which it is doubtful.

    Raises FtkitError when emx-onnx-cgen is missing, or does not support the model.
    """
    require_emitter()
    folder.mkdir(parents=True)

    with tempfile.TemporaryDirectory() as scratch:
        onnx.save(static(core), Path(scratch) / "model.onnx")
        command = [
            sys.executable,
            "-m",
            "emx_onnx_cgen",
            "compile",
            "--model-name",
            "model",
            "--emit-data-file",
            str(Path(scratch) / "model.onnx"),
            "model.c",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise FtkitError(
            f"--c: expected a model that emx-onnx-cgen can follow, found: {''.join(last)}. Leave out --c"
        )

    features = core.graph.output[1].type.tensor_type.shape.dim[1].dim_value
    (folder / "model.h").write_text(
        _header(preprocess, labels, features, readout, threshold, input_format),
        encoding="utf-8",
    )

    for name in ("classify.c", "Makefile"):
        shutil.copyfile(SOURCES / name, folder / name)


def _header(
    preprocess: Preprocess,
    labels: Sequence[str],
    features: int,
    readout: Readout,
    threshold: float,
    input_format: str,
) -> str:
    """C header: sizes, labels in order, preprocessing, and what the logits mean."""
    kinds = {"FIT": (FITS, preprocess.fit), "FORMAT": (INPUT_FORMATS, input_format)}
    lines = [
        f"enum {{ {', '.join(name.upper() for name in names)} }};\n#define {key} {value.upper()}"
        for key, (names, value) in kinds.items()
    ]
    numbers = {
        "SIZE": preprocess.size,
        "RESIZE": preprocess.resize,
        "CLASSES": len(labels),
        "FEATURES": features,
    }

    lines += [f"#define {key} {value}" for key, value in numbers.items()]
    lines += _readout_lines(readout, threshold)
    for key, values in (("MEAN", preprocess.mean), ("STD", preprocess.std)):
        lines.append(
            f"static const float {key}[3] = {{{', '.join(f'{float(v)!r}f' for v in values)}}};"
        )

    lines.append(_names("LABELS", labels))

    return (
        "/* Written by ftkit: labels, preprocessing and calibration of this model. */\n"
        + "\n".join(lines)
        + "\n"
    )


def _readout_lines(readout: Readout, threshold: float) -> list[str]:
    kinds = {"single-label": "ONE_CLASS", "multi-label": "SEVERAL_LABELS", "regression": "VALUES"}
    lines = [f"#define {kind} {number}" for number, kind in enumerate(kinds.values(), start=1)]
    lines.append(f"#define TASK {kinds[readout.task]}")
    if isinstance(readout, OneClass):
        temperature = f"#define TEMPERATURE {readout.temperature!r}"
        return [*lines, temperature, f"#define THRESHOLD {threshold!r}"]
    if isinstance(readout, Labels):
        lines.append(_numbers("TEMPERATURES", readout.temperatures))
        return [*lines, _numbers("THRESHOLDS", readout.thresholds)]
    assert isinstance(readout, Values)
    lines += [
        _numbers("MEANS", readout.means),
        _numbers("SPREADS", readout.spreads),
        _numbers("MARGINS", readout.margins),
    ]
    return [*lines, _names("UNITS", readout.units)]


def _numbers(name: str, values: Sequence[float]) -> str:
    return f"static const double {name}[CLASSES] = {{{', '.join(map(repr, values))}}};"


def _names(name: str, values: Sequence[str]) -> str:
    quoted = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return f"static const char *const {name}[CLASSES] = {{{quoted}}};"
