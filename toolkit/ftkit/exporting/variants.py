"""Build the variants of an exported model; decide by measurement which of them may ship.

    variants = make(core, context)                # fp32 first; then the target's int8 or fp16
    variants.rows, variants.shipped               # the decision table; what may go into the bundle

Each is compared with fp32 on held-out images and timed in turn with it, on the target.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from ftkit.exporting.candidates import (
    Candidate,
    Context,
    HeldOutPart,
    answers_there,
    compared,
    logits_of,
    ranges_of,
    refit_checks,
    times,
)
from ftkit.exporting.int8 import ladder
from ftkit.utils import console
from ftkit_export.conversion.quantize import half, heavy_nodes, quantized_nodes, sqnr
from ftkit_export.proof.decision import Row, judge_variant
from ftkit_export.proof.parity import FLOAT64_IMAGES, Check, agreement
from ftkit_export.runtime.arrays import spread_evenly
from ftkit_export.runtime.latency import Raced
from ftkit_export.runtime.targets import here


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variants of an export.

    rows: the decision table, fp32 first. shipped: variant name -> its row and core form, one per
    precision. checks: how closely a lower precision agrees, beside its accuracy.
    """

    rows: tuple[Row, ...]
    shipped: Mapping[str, tuple[Row, onnx.ModelProto]]
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)

    def is_shipped(self, row: Row, name: str) -> bool:
        """Whether a row of the table is what ships as the variant `name`."""
        return replace(row, name=name) == self.shipped[name][0]


def resolve_target(name: str, providers: Sequence[str]) -> str:
    """ "auto" -> cuda when its provider is asked for, else this machine's processor."""
    if name != "auto":
        return name
    return "cuda" if "cuda" in providers else here()


def make(core: onnx.ModelProto, context: Context) -> Variants:
    """Build fp32 and the other variants of the target, each with its verdict."""
    with console.bar("fp32 on held-out images"):
        parts = [logits_of(part.core, context, part.rows) for part in context.judged]
        logits = np.concatenate(parts)

    fp32 = Candidate(name="fp32", precision="fp32", core=core, logits=logits)
    candidates = [fp32]
    wanted = context.target.variants if context.limits.variants == "auto" else ()
    if "int8" in wanted:
        candidates += ladder(fp32, context)
    if "fp16" in wanted:
        candidates.append(_half(fp32, context))

    raced = times(candidates, context)
    judged = [(_row(item, fp32, raced.get(item.name), context), item) for item in candidates]
    shipped = {"fp32": (judged[0][0], core)}

    for precision in wanted:
        rivals = [pair for pair in judged[1:] if pair[0].precision == precision]
        row, best = min(rivals, key=lambda pair: _preference(pair[0]))
        if row.verdict != "refused":
            shipped[precision] = (replace(row, name=precision), best.core)

    return Variants(
        rows=tuple(row for row, _ in judged),
        shipped=shipped,
        checks={item.name: item.checks for item in candidates if item.checks},
    )


def _half(fp32: Candidate, context: Context) -> Candidate:
    """float16, run on the target's provider if available, else on the CPU.

    On the CPU its verdict is unproven.
    """
    logits = fp32.logits
    model, kept = half(fp32.core, ranges_of(fp32.core, context))
    provider = context.target.provider if context.here or context.device else "cpu"

    with console.bar("fp16 on held-out images"):

        def made(part: HeldOutPart) -> onnx.ModelProto:
            if part.core is fp32.core:
                return model
            return half(part.core, ranges_of(part.core, context, part.training))[0]

        halved = answers_there(made, context, provider)

    checks = refit_checks(fp32, model, logits, halved, context)
    if not context.folded:
        sample = context.pixels(spread_evenly(context.rows, FLOAT64_IMAGES))
        rounding = context.reference.rounding(sample, "fp16")
        checks = tuple(
            agreement(
                logits,
                halved,
                rounding,
                "fp16",
                f"val images on {provider}",
                context.readout,
            )
        )

    return Candidate(
        name="fp16",
        precision="fp16",
        core=model,
        logits=halved,
        sqnr_db=sqnr(logits, halved),
        kept=tuple(kept),
        checks=checks,
    )


def _row(item: Candidate, fp32: Candidate, raced: Raced | None, context: Context) -> Row:
    limit = context.limit
    against = None if item is fp32 else compared(fp32, item, context)

    verdict = "reference"
    reason = "what the others are compared with"
    if against:
        verdict, reason = judge_variant(against, limit, raced.ratio_high if raced else None)
        if not (context.here or context.device):
            reason += "; the answers are this machine's, not the target's (try --on)"
        failed = [check for check in item.checks if not check.passed]
        if failed:
            verdict = "refused"
            reason = f"{failed[0].name}: {failed[0].value:.3g}, limit {failed[0].limit:.3g}"

    return Row(
        name=item.name,
        precision=item.precision,
        verdict=verdict,
        reason=reason,
        accuracy=context.task.figure(item.logits, context.targets),
        paired=against,
        sqnr_db=item.sqnr_db,
        in_8_bits=quantized_nodes(item.core),
        heavy=len(heavy_nodes(item.core)),
        kept=item.kept,
        ratio=raced.ratio if raced else None,
        ratio_high=raced.ratio_high if raced else None,
        p50_ms=raced.p50_ms if raced else None,
        p95_ms=raced.p95_ms if raced else None,
        size_bytes=context.image_form(item.core).ByteSize(),
    )


def _preference(row: Row) -> tuple[int, float]:
    """Sort key: accepted ones by speed; then by upper bound of the accuracy drop, refused last."""
    if row.verdict == "accepted":
        return 0, row.ratio or 1.0
    return (2 if row.verdict == "refused" else 1), row.paired.high if row.paired else 1.0


def as_table(rows: Sequence[Row], held: str = "val") -> str:
    """The decision table within 80 columns, times in ms on one thread. held: what it was decided on.

    Below it, for each precision whose best variant may not ship, the reason.
    """
    unit = next((row.paired.unit for row in rows if row.paired), "points")
    lines = [("variant", held, f"drop, {unit} [95 %]", "time", "p50/p95", "MB", "verdict")]
    for row in rows:
        drop = row.paired
        lines.append(
            (
                row.name,
                f"{row.accuracy:.3f}",
                f"{drop.drop * 100:+.1f} [{drop.low * 100:+.1f},{drop.high * 100:+.1f}]"
                if drop
                else "",
                f"{row.ratio:.2f}x" if row.ratio else "",
                f"{row.p50_ms:.1f}/{row.p95_ms:.1f}" if row.p50_ms and row.p95_ms else "",
                f"{row.size_bytes / 1e6:.1f}",
                row.verdict.removesuffix(" on target"),
            )
        )

    best = [
        min((row for row in rows if row.precision == precision), key=_preference)
        for precision in dict.fromkeys(row.precision for row in rows[1:])
    ]
    wrapped = [
        textwrap.fill(f"{row.name}: {row.reason}", 80, subsequent_indent="  ")
        for row in best
        if not row.shippable
    ]
    return "\n".join([console.table(lines), *wrapped])
