"""Make 8-bit candidates, from the fastest to the most careful, until one holds its accuracy.

    candidates = list(ladder(fp32, context))

The biases of every candidate are corrected. The first operators of a network stay in float as long
as that is no slower: they cost little there, and their rounding costs most. Then the most sensitive
of the others follow, as a last resort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from ftkit.exporting.candidates import (
    Candidate,
    Context,
    HeldOutPart,
    answers_there,
    calibration_rows,
    compared,
    logits_of,
    optimiser_check,
    ranges_of,
    refit_checks,
    times,
)
from ftkit.utils import console
from ftkit_export.conversion.quantize import RANK_IMAGES, heavy_nodes, int8, rank, sqnr
from ftkit_export.runtime.arrays import Array

RUNGS = (0, 4, 8, 16)  # operators more in float at each step, the most sensitive first
ENTRIES = (0, 1, 3, 6)  # first operators that may stay in float for speed
AS_FAST = 1.02  # times the fastest choice: about what such measurements differ by
CORRECTION_IMAGES = 64  # whose mean outputs correct the biases; 128 gain nothing (28.0 and 27.8 dB)


class _Calibrated:
    """Ranges of the shipped model, and of every model that is judged, each calibrated once on
    images that it was trained on."""

    def __init__(self, core: onnx.ModelProto, context: Context):
        self.shipped = ranges_of(core, context)
        self._core = core
        self._context = context
        self._known: dict[int, Any] = {}

    def of(self, part: HeldOutPart) -> Any:
        """The ranges of a part's model."""
        if part.core is self._core:
            return self.shipped
        if id(part) not in self._known:
            self._known[id(part)] = ranges_of(part.core, self._context, part.training)
        return self._known[id(part)]

    def int8(
        self,
        core: onnx.ModelProto,
        part: HeldOutPart | None = None,
        *,
        keep: Sequence[str] = (),
    ) -> onnx.ModelProto:
        """A core form in 8 bits, its biases corrected on images that it was trained on.

        part: whose model it is; None: the shipped one.
        """
        rows = calibration_rows(self._context, part.training if part else None)
        return int8(
            core,
            self.of(part) if part else self.shipped,
            self._context.target,
            keep=keep,
            correct_on=self._context.pixels(rows[:CORRECTION_IMAGES]),
        )


def ladder(fp32: Candidate, context: Context) -> Iterator[Candidate]:
    """Int8 candidates with more and more float operators, until one holds its accuracy.

    Only the first when 8 bits are no faster, or when the images could not settle a candidate even
    if it changed no answer. If none holds its accuracy, the quantization-aware one follows, if
    requested.
    """
    ranges = _Calibrated(fp32.core, context)
    first = _first_in_float(fp32.core, ranges, context)
    order = list[str]()
    for number, count in enumerate(RUNGS):
        if count and not order:
            with console.bar("ranking operators"):
                sample = context.pixels(calibration_rows(context)[:RANK_IMAGES])
                ranked = rank(fp32.core, ranges.shipped, context.target, sample)
                order = [name for name, _ in ranked if name not in first]
        if count and count >= len(order):
            break

        keep = [*first, *order[:count]]
        rung = _candidate(fp32, ranges, keep, _looks(number, context), context)
        yield rung
        if compared(fp32, rung, context).verdict(context.limit) == "accepted":
            return

        reached = context.here or context.device
        if not count and reached and times([fp32, rung], context)[rung.name].ratio_low >= 1:
            return
        if not _could_settle(fp32, context):
            break

    if context.limits.qat_epochs:
        yield _trained(fp32, ranges, first, context)


def _could_settle(fp32: Candidate, context: Context) -> bool:
    """Whether the held-out images could accept a later candidate.

    One that changes no answer is the best to hope for: rounding does not make a network better.
    """
    same = replace(fp32, looks=_looks(1, context))
    return compared(fp32, same, context).verdict(context.limit) == "accepted"


def _looks(number: int, context: Context) -> int:
    """Number of comparisons that the bounds of a rung hold for jointly.

    Rungs are tried until one is accepted, so they share the error rate: the first takes half of it,
    since it decides most often, and the later ones share the rest.
    """
    later = len(RUNGS) - 1 + bool(context.limits.qat_epochs)
    return 2 * later if number else 2


def _first_in_float(core: onnx.ModelProto, ranges: _Calibrated, context: Context) -> list[str]:
    """The first operators that stay in float, by measured time on the target.

    The most of them that take no more than 2 % longer than the fastest choice; none where the target is out
    of reach. On lite0, with three of them, 8 bits take 0.47 of fp32's time instead of 0.54: the
    stem and the first depthwise convolution have few channels, for which 8-bit kernels are slow.
    """
    if not (context.here or context.device):
        return []

    names = heavy_nodes(core)
    counts = [count for count in ENTRIES if count < len(names) // 2]
    entrants = [
        Candidate(
            name=str(count),
            precision="int8",
            core=int8(core, ranges.shipped, context.target, keep=names[:count]),
            logits=np.zeros((0, 1), np.float32),
        )
        for count in counts
    ]
    raced = times(entrants, context)
    if not raced:
        return []
    fastest = min(raced.values(), key=lambda item: item.ratio)
    as_fast = [count for count in counts if raced[str(count)].ratio <= fastest.ratio * AS_FAST]
    return names[: max(as_fast)]


def _candidate(
    fp32: Candidate,
    ranges: _Calibrated,
    keep: Sequence[str],
    looks: int,
    context: Context,
) -> Candidate:
    """The 8-bit model with these operators in float, and its answers on the held-out images."""
    name = f"int8, {len(keep)} float" if keep else "int8"
    with console.bar(name):
        model = ranges.int8(fp32.core, keep=keep)

        def made(part: HeldOutPart) -> onnx.ModelProto:
            return model if part.core is fp32.core else ranges.int8(part.core, part, keep=keep)

        quantized = answers_there(made, context)

    return Candidate(
        name=name,
        precision="int8",
        core=model,
        logits=quantized,
        sqnr_db=sqnr(fp32.logits, quantized),
        kept=tuple(keep),
        checks=(
            *refit_checks(fp32, model, fp32.logits, quantized, context),
            optimiser_check(fp32.core, model, context),
        ),
        looks=looks,
    )


def _trained(
    fp32: Candidate,
    ranges: _Calibrated,
    keep: Sequence[str],
    context: Context,
) -> Candidate:
    """All but these operators in 8 bits, after quantization-aware training on the training images."""
    from ftkit.exporting.qat import fine_tune

    def tuned(core: onnx.ModelProto, rows: Array, part: HeldOutPart | None) -> onnx.ModelProto:
        trained = fine_tune(
            core,
            ranges.int8(core, part, keep=keep),
            lambda picks: context.pixels(rows[picks]),
            context.canvases.labels[rows],
            logits_of(core, context, rows),
            epochs=context.limits.qat_epochs,
        )
        return ranges.int8(trained, part, keep=keep)

    model = tuned(fp32.core, context.canvases.rows("train"), None)

    def made(part: HeldOutPart) -> onnx.ModelProto:
        if part.core is fp32.core:
            return model
        return tuned(part.core, part.training, part)

    quantized = answers_there(made, context)

    return Candidate(
        name="int8, trained",
        precision="int8",
        core=model,
        logits=quantized,
        sqnr_db=sqnr(fp32.logits, quantized),
        kept=tuple(keep),
        checks=(
            *refit_checks(fp32, model, fp32.logits, quantized, context),
            optimiser_check(fp32.core, model, context),
        ),
        looks=_looks(len(RUNGS), context),
    )
