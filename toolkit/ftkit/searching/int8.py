"""What the folds' models of a finalist answer in 8 bits, each on the images it has not seen.

rows, answers = int8_answers(run, canvases, plan.export, "x86-vnni", photograph, frame)

As an export makes them, with the first operators in float that its timing assumes. An export may move
more operators to float, which costs time; so a finalist that does not hold its accuracy here would be
slower than what was timed.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from ftkit.data.canvas import Canvases
from ftkit.exporting.candidates import (
    Context,
    HeldOutPart,
    answers_there,
    calibration_rows,
    ranges_of,
)
from ftkit.exporting.export import judged_parts
from ftkit.exporting.int8 import CORRECTION_IMAGES
from ftkit.recipe import Export
from ftkit.training.run import Run
from ftkit_export.conversion.convert import Trace
from ftkit_export.conversion.quantize import heavy_nodes, int8
from ftkit_export.proof.parity import Reference
from ftkit_export.runtime.arrays import Array

FIRST_IN_FLOAT = 3  # operators: the fastest on lite0; an export measures it anew


def int8_answers(
    run: Run,
    canvases: Canvases,
    limits: Export,
    target: str,
    photograph: Path,
    frame: str,
) -> tuple[Array, Array]:
    """(rows, logits (n, K)) of the images that a fold's model answered in 8 bits, on this machine, which
    must be the target."""
    model = run.backbone().model
    trace = Trace(model, run.preprocess.size)
    context = Context.of(
        run,
        Reference(model),
        canvases,
        limits=limits,
        photograph=photograph,
        frame=frame,
        target_name=target,
        measured={},
        metadata={},
        judged=judged_parts(run, trace, trace.core(model), canvases),
        folded=True,
    )

    def quantized(part: HeldOutPart) -> onnx.ModelProto:
        rows = calibration_rows(context, part.training)
        return int8(
            part.core,
            ranges_of(part.core, context, part.training),
            context.target,
            keep=heavy_nodes(part.core)[:FIRST_IN_FLOAT],
            correct_on=context.pixels(rows[:CORRECTION_IMAGES]),
        )

    return context.rows, answers_there(quantized, context)
