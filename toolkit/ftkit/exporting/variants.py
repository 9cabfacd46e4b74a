"""The variants of one exported model, and the measured decision which of them may ship.

    variants = make(core, context)                # fp32 first; int8 or fp16 as the target has it
    variants.rows, variants.shipped               # the decision table; what may go into the bundle

int8 climbs a ladder: everything in 8 bits, then the operators that suffer most back in float, until
the accuracy on val is held with confidence. A form that is not faster than fp32 is refused before
any of that.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ftkit.benchmark.ssh import Device
from ftkit.data.canvas import Canvases
from ftkit.recipe import Export
from ftkit.utils import console
from ftkit_export.conversion.convert import write
from ftkit_export.conversion.graph import image_form
from ftkit_export.conversion.probe import does_not_open
from ftkit_export.conversion.quantize import (
    RANK_IMAGES,
    calibrate,
    half,
    heavy_nodes,
    int8,
    quantized_nodes,
    rank,
    sqnr,
)
from ftkit_export.proof.decision import Paired, Row, judge_variant, paired
from ftkit_export.proof.parity import FLOAT64_IMAGES, Check, Reference, agreement
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.latency import Raced, race
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import PROVIDERS, Session
from ftkit_export.runtime.targets import TARGETS, Precision, Target, here
from ftkit_export.runtime.verify import sha256

RUNGS = (0, 4, 8, 16)  # operators put back into float, the most damaged first
INFERENCE_BATCH = 8  # 16 calibrates half as fast: every value of every image of it is kept


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of the decision. photograph: a real image file for the latency, frame: the size that
    it is brought to, "640x480"; metadata: what every file carries; measured: for a target that is
    not this machine, what `device/classify.py --bench` printed there, or nothing. device: the
    target itself, reached over ssh. reference: the framework's own answers."""

    reference: Reference
    canvases: Canvases
    preprocess: Preprocess
    temperature: float
    limits: Export
    target_name: str
    photograph: Path
    frame: str
    metadata: Mapping[str, str]
    measured: Mapping[str, Any]
    device: Device | None = None

    @property
    def target(self) -> Target:
        """The target's facts."""
        return TARGETS[self.target_name]

    @cached_property
    def here(self) -> bool:
        """Whether this machine is the target, so that its latencies count."""
        if self.device:
            return False
        provider = self.target.provider
        return self.target_name == here() if provider == "cpu" else not does_not_open(provider)

    def race(self, files: Sequence[Path]) -> list[Raced] | None:
        """Files run in turn on the target, one thread; None where it is neither this machine nor
        reached."""
        if self.device:
            return self.device.race(
                files, self.photograph, provider=self.target.provider, frame=self.frame
            )
        if not self.here:
            return None
        return race(files, self.photograph, provider=self.target.provider, frame=self.frame)

    def image_form(self, core: onnx.ModelProto) -> onnx.ModelProto:
        """The file a device gets, of a core form."""
        return image_form(core, self.preprocess, self.temperature, self.limits.input_format)

    def write(
        self, core: onnx.ModelProto, path: Path, precision: str, kept: Sequence[str], *, plain: bool
    ) -> None:
        """Write a variant's image form, or (plain) its core form, with its metadata."""
        labelled = {**self.metadata, "precision": precision, "kept_in_float": json.dumps(kept)}
        write(core if plain else self.image_form(core), path, labelled)

    def pixels(self, rows: Array) -> Array:
        """(n,) rows -> (n, 3, S, S) float32, the core form's input."""
        return self.preprocess.pixels(self.canvases.array(rows))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A core form to be judged. right: whether each val image is answered right; kept: operators
    left in float; checks: of its own, beside accuracy (float16)."""

    name: str
    precision: Precision
    core: onnx.ModelProto
    right: Array
    sqnr_db: float | None = None
    kept: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variants:
    """rows: the decision table, fp32 first. shipped: variant name -> its row and core form, one a
    precision. checks: how far a lower precision agrees, beside its accuracy."""

    rows: tuple[Row, ...]
    shipped: Mapping[str, tuple[Row, onnx.ModelProto]]
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)


def resolve_target(name: str, providers: Sequence[str]) -> str:
    """ "auto" -> cuda when its provider is asked for, else this machine's processor."""
    if name != "auto":
        return name
    return "cuda" if "cuda" in providers else here()


def make(core: onnx.ModelProto, context: Context) -> Variants:
    """fp32, then what the target has beside it, each with its verdict."""
    rows = context.canvases.rows("val")
    labels = context.canvases.labels[rows]

    with console.bar("fp32 on val"):
        logits = logits_of(core, context, rows)

    fp32 = Candidate(name="fp32", precision="fp32", core=core, right=logits.argmax(1) == labels)
    found = [fp32]
    wanted = context.target.variants if context.limits.variants == "auto" else ()
    if context.device and wanted:
        context.device.put_canvases(context.canvases.array(rows))
    if "int8" in wanted:
        found += _ladder(fp32, context, logits, labels)
    if "fp16" in wanted:
        found.append(_half(fp32, context, logits, labels))

    times = _times(found, context)
    judged = [(_row(item, fp32, times.get(item.name), context), item) for item in found]
    shipped = {"fp32": (judged[0][0], core)}

    for precision in wanted:
        rivals = [pair for pair in judged[1:] if pair[0].precision == precision]
        row, best = min(rivals, key=lambda pair: _preference(pair[0]))
        if row.verdict != "refused":
            shipped[precision] = (replace(row, name=precision), best.core)

    return Variants(
        rows=tuple(row for row, _ in judged),
        shipped=shipped,
        checks={item.name: item.checks for item in found if item.checks},
    )


def logits_of(core: onnx.ModelProto, context: Context, rows: Array, provider: str = "cpu") -> Array:
    """Logits (N, classes) of a core form over these rows of the canvases."""
    session = Session(core.SerializeToString(), provider=provider)
    return np.concatenate(
        [
            session.run(context.pixels(rows[i : i + INFERENCE_BATCH]))[0]
            for i in range(0, len(rows), INFERENCE_BATCH)
        ]
    )


def _answers_there(core: onnx.ModelProto, context: Context, provider: str = "cpu") -> Array:
    """Logits of the val images where the file will run: on the device, where there is one. Another
    processor's 8-bit kernels saturate, round and accumulate in their own way. The device has the
    images already (`make`)."""
    if not context.device:
        return logits_of(core, context, context.canvases.rows("val"), provider)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "core.onnx"
        context.write(core, path, "", (), plain=True)
        return context.device.answers(path, provider=provider)


def calibration_rows(context: Context) -> Array:
    """Training rows, spread over the set (rows lie in order of class), mixed."""
    rows = context.canvases.rows("train")
    picked = spread_evenly(rows, context.limits.calibration_images)
    return np.random.default_rng(0).permutation(picked)


def _ranges(core: onnx.ModelProto, context: Context) -> Any:
    rows = calibration_rows(context)
    batches = (
        context.pixels(rows[start : start + INFERENCE_BATCH])
        for start in range(0, len(rows), INFERENCE_BATCH)
    )
    with console.bar("calibrating"):
        return calibrate(core, batches, context.preprocess, context.limits.calibration)


def _ladder(fp32: Candidate, context: Context, logits: Array, labels: Array) -> Iterator[Candidate]:
    """Rungs until one is accepted for its accuracy, or none is left; the first only, when 8 bits
    are no faster."""
    ranges = _ranges(fp32.core, context)
    order = list[str]()
    for count in RUNGS:
        if count and not order:
            with console.bar("ranking operators"):
                sample = context.pixels(calibration_rows(context)[:RANK_IMAGES])
                order = [name for name, _ in rank(fp32.core, ranges, context.target, sample)]
        if count and count >= len(order):
            break

        name = f"int8, {count} float" if count else "int8"
        with console.bar(name):
            model = int8(fp32.core, ranges, context.target, keep=order[:count])
            found = _answers_there(model, context)

        rung = Candidate(
            name=name,
            precision="int8",
            core=model,
            right=found.argmax(1) == labels,
            sqnr_db=sqnr(logits, found),
            kept=tuple(order[:count]),
        )

        yield rung
        if _held(fp32, rung, context):
            return

        if (
            not count
            and (context.here or context.device)
            and _times([fp32, rung], context)[name].ratio_low >= 1
        ):
            return

    if context.limits.qat_epochs:
        yield _trained(fp32, ranges, context, logits, labels)


def _held(fp32: Candidate, rung: Candidate, context: Context) -> bool:
    return _compared(fp32, rung, context).verdict(context.limits.max_accuracy_drop) == "accepted"


def _compared(fp32: Candidate, rung: Candidate, context: Context) -> Paired:
    """Bounds that hold for every rung there may be: the ladder is climbed until one is accepted."""
    looks = len(RUNGS) + bool(context.limits.qat_epochs) if rung.precision == "int8" else 1
    groups = context.canvases.groups(context.canvases.rows("val"))
    return paired(fp32.right, rung.right, groups, looks)


def _trained(
    fp32: Candidate, ranges: Any, context: Context, logits: Array, labels: Array
) -> Candidate:
    """Everything in 8 bits, after a quantization-aware stage on the training images."""
    from ftkit.exporting.qat import fine_tune

    rows = context.canvases.rows("train")
    core = fine_tune(
        fp32.core,
        int8(fp32.core, ranges, context.target),
        lambda picks: context.pixels(rows[picks]),
        context.canvases.labels[rows],
        logits_of(fp32.core, context, rows),
        epochs=context.limits.qat_epochs,
    )

    model = int8(core, ranges, context.target)
    found = _answers_there(model, context)

    return Candidate(
        name="int8, trained",
        precision="int8",
        core=model,
        right=found.argmax(1) == labels,
        sqnr_db=sqnr(logits, found),
    )


def _half(fp32: Candidate, context: Context, logits: Array, labels: Array) -> Candidate:
    """float16 on the target's provider where it is to be had, else on the CPU, whose verdict is
    then unproven."""
    model, kept = half(fp32.core, _ranges(fp32.core, context))
    rows = context.canvases.rows("val")
    provider = context.target.provider if context.here or context.device else "cpu"

    with console.bar("fp16 on val"):
        found = _answers_there(model, context, provider)

    sample = context.pixels(spread_evenly(rows, FLOAT64_IMAGES))
    rounding = context.reference.rounding(sample, "fp16")
    checks = agreement(logits, found, rounding, "fp16", f"val images on {provider}")

    return Candidate(
        name="fp16",
        precision="fp16",
        core=model,
        right=found.argmax(1) == labels,
        sqnr_db=sqnr(logits, found),
        kept=tuple(kept),
        checks=tuple(checks),
    )


def _times(candidates: Sequence[Candidate], context: Context) -> dict[str, Raced]:
    """All in the form that the target's provider runs, in turn on one thread on a real photograph;
    what the target measured when not here."""
    reached = context.here or context.device
    if (context.here and len(candidates) == 1) or not (reached or context.measured):
        return {}

    with (
        tempfile.TemporaryDirectory() as scratch,
        console.bar(f"latency of {len(candidates)} variants"),
    ):
        files = [Path(scratch) / f"{number}.onnx" for number in range(len(candidates))]
        plain = PROVIDERS[context.target.provider].form == "core"

        for path, item in zip(files, candidates, strict=True):
            context.write(item.core, path, item.precision, item.kept, plain=plain)
        if found := context.race(files):
            return {item.name: times for item, times in zip(candidates, found, strict=True)}

        known = context.measured["sha256"]  # of the very files that ran there

        return {
            item.name: Raced(**context.measured["raced"][item.precision])
            for path, item in zip(files, candidates, strict=True)
            if known.get(item.precision) == sha256(path)
        }


def _row(item: Candidate, fp32: Candidate, times: Raced | None, context: Context) -> Row:
    limit = context.limits.max_accuracy_drop
    compared = None if item is fp32 else _compared(fp32, item, context)

    verdict = "reference"
    reason = "what the others are compared with"
    if compared:
        verdict, reason = judge_variant(compared, limit, times.ratio_high if times else None)
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
        accuracy=float(item.right.mean()),
        paired=compared,
        sqnr_db=item.sqnr_db,
        in_8_bits=quantized_nodes(item.core),
        heavy=len(heavy_nodes(item.core)),
        kept=item.kept,
        ratio=times.ratio if times else None,
        ratio_high=times.ratio_high if times else None,
        p50_ms=times.p50_ms if times else None,
        p95_ms=times.p95_ms if times else None,
        size_bytes=context.image_form(item.core).ByteSize(),
    )


def _preference(row: Row) -> tuple[int, float]:
    """Accepted first, the fastest of them; then the least that the accuracy may have dropped."""
    if row.verdict == "accepted":
        return 0, row.ratio or 1.0
    return (2 if row.verdict == "refused" else 1), row.paired.high if row.paired else 1.0


def as_table(rows: Sequence[Row]) -> str:
    """The decision table within 80 columns, times in ms on one thread; below it why a precision's
    best may not ship."""
    lines = [("variant", "val", "drop, points [95 %]", "time", "p50/p95", "MB", "verdict")]
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
