"""Build the variants of an exported model; decide by measurement which of them may ship.

    variants = make(core, context)                # fp32 first; then the target's int8 or fp16
    variants.rows, variants.shipped               # the decision table; what may go into the bundle

int8, its biases corrected, is tried in steps: all operators in 8 bits, then the most sensitive ones
back in float, until the accuracy on val holds with confidence. If the first step is no faster than fp32, it is refused
and the others are skipped.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scipy import stats

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

UNLIKELY = 0.01  # probability below which more changed answers are no chance
RUNGS = (0, 4, 8, 16)  # operators kept in float at each step, the most sensitive first
CORRECTION_IMAGES = 64  # whose mean outputs correct the biases; 128 gain nothing (28.0 and 27.8 dB)
INFERENCE_BATCH = 8  # calibration keeps all activations of a batch: 16 is half as fast


@dataclass(frozen=True)
class HeldOutPart:
    """A model, and images that it was not trained on: its variants are judged on them.

    The shipped model and val; or, of a run with folds, each fold's model and its own images. core:
    the model's core form. rows, training: of the canvases, held out and trained on.
    """

    core: onnx.ModelProto
    rows: Array
    training: Array


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of the decision on variants.

    photograph: an image file for the latency; frame: the size it is resized to, "640x480".
    metadata: written into every file. measured: for a target that is not this machine, the output
    of `device/classify.py --bench` there, or empty. device: the target itself, reached over ssh.
    reference: the framework's own answers.
    """

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
    judged: Sequence[HeldOutPart]
    device: Device | None = None

    @property
    def rows(self) -> Array:
        """Rows of the canvases that variants are judged on."""
        return np.concatenate([part.rows for part in self.judged])

    @property
    def folded(self) -> bool:
        """Whether the models that are judged are not the one that ships."""
        return len(self.judged) > 1

    @property
    def target(self) -> Target:
        """Properties of the target."""
        return TARGETS[self.target_name]

    @cached_property
    def here(self) -> bool:
        """Whether this machine is the target, so that its latencies count."""
        if self.device:
            return False
        provider = self.target.provider
        return self.target_name == here() if provider == "cpu" else not does_not_open(provider)

    def race(self, files: Sequence[Path]) -> list[Raced] | None:
        """Time files alternately on the target, one thread; None if the target is not available."""
        if self.device:
            return self.device.race(
                files, self.photograph, provider=self.target.provider, frame=self.frame
            )
        if not self.here:
            return None
        return race(files, self.photograph, provider=self.target.provider, frame=self.frame)

    def image_form(self, core: onnx.ModelProto) -> onnx.ModelProto:
        """The image form of a core form: the file that a device gets."""
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
    """A core form to be judged.

    right: whether each val image is classified correctly; kept: operators left in float; checks:
    further checks beside accuracy (float16).
    """

    name: str
    precision: Precision
    core: onnx.ModelProto
    right: Array
    sqnr_db: float | None = None
    kept: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variants of an export.

    rows: the decision table, fp32 first. shipped: variant name -> its row and core form, one per
    precision. checks: how closely a lower precision agrees, beside its accuracy.
    """

    rows: tuple[Row, ...]
    shipped: Mapping[str, tuple[Row, onnx.ModelProto]]
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)


def resolve_target(name: str, providers: Sequence[str]) -> str:
    """ "auto" -> cuda when its provider is asked for, else this machine's processor."""
    if name != "auto":
        return name
    return "cuda" if "cuda" in providers else here()


def make(core: onnx.ModelProto, context: Context) -> Variants:
    """Build fp32 and the other variants of the target, each with its verdict."""
    labels = context.canvases.labels[context.rows]

    with console.bar("fp32 on held-out images"):
        parts = [logits_of(part.core, context, part.rows) for part in context.judged]
        logits = np.concatenate(parts)

    fp32 = Candidate(name="fp32", precision="fp32", core=core, right=logits.argmax(1) == labels)
    candidates = [fp32]
    wanted = context.target.variants if context.limits.variants == "auto" else ()
    if "int8" in wanted:
        candidates += _ladder(fp32, context, logits, labels)
    if "fp16" in wanted:
        candidates.append(_half(fp32, context, logits, labels))

    times = _times(candidates, context)
    judged = [(_row(item, fp32, times.get(item.name), context), item) for item in candidates]
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


def logits_of(core: onnx.ModelProto, context: Context, rows: Array, provider: str = "cpu") -> Array:
    """Logits (N, classes) of a core form over these rows of the canvases."""
    session = Session(core.SerializeToString(), provider=provider)
    return np.concatenate(
        [
            session.run(context.pixels(rows[i : i + INFERENCE_BATCH]))[0]
            for i in range(0, len(rows), INFERENCE_BATCH)
        ]
    )


def _answers_there(
    made: Callable[[HeldOutPart], onnx.ModelProto], context: Context, provider: str = "cpu"
) -> Array:
    """Logits of the held-out images where the file will run: on the device, if there is one.

    made: part -> the variant of its model. 8-bit kernels of another processor saturate, round and
    accumulate differently.
    """
    answers = []
    for part in context.judged:
        core = made(part)
        if not context.device:
            answers.append(logits_of(core, context, part.rows, provider))
            continue

        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "core.onnx"
            context.write(core, path, "", (), plain=True)
            context.device.put_canvases(context.canvases.array(part.rows))
            answers.append(context.device.answers(path, provider=provider))

    return np.concatenate(answers)


def calibration_rows(context: Context, training: Array | None = None) -> Array:
    """Training rows, spread over the set (rows are ordered by class), then shuffled."""
    rows = context.canvases.rows("train") if training is None else training
    picked = spread_evenly(rows, context.limits.calibration_images)
    return np.random.default_rng(0).permutation(picked)


def _ranges(core: onnx.ModelProto, context: Context, training: Array | None = None) -> Any:
    rows = calibration_rows(context, training)
    batches = (
        context.pixels(rows[start : start + INFERENCE_BATCH])
        for start in range(0, len(rows), INFERENCE_BATCH)
    )
    with console.bar("calibrating"):
        return calibrate(core, batches, context.preprocess, context.limits.calibration)


class _Calibrated:
    """Ranges of the shipped model, and of every model that is judged, each calibrated once on
    images that it was trained on."""

    def __init__(self, core: onnx.ModelProto, context: Context):
        self.shipped = _ranges(core, context)
        self._core = core
        self._context = context
        self._known: dict[int, Any] = {}

    def of(self, part: HeldOutPart) -> Any:
        """The ranges of a part's model."""
        if part.core is self._core:
            return self.shipped
        if id(part) not in self._known:
            self._known[id(part)] = _ranges(part.core, self._context, part.training)
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


def _ladder(fp32: Candidate, context: Context, logits: Array, labels: Array) -> Iterator[Candidate]:
    """Int8 candidates with more and more float operators, until one holds its accuracy.

    Only the first when 8 bits are no faster. If none holds it, the quantization-aware one follows,
    if requested.
    """
    ranges = _Calibrated(fp32.core, context)
    order = list[str]()
    for count in RUNGS:
        if count and not order:
            with console.bar("ranking operators"):
                sample = context.pixels(calibration_rows(context)[:RANK_IMAGES])
                order = [
                    name for name, _ in rank(fp32.core, ranges.shipped, context.target, sample)
                ]
        if count and count >= len(order):
            break

        name = f"int8, {count} float" if count else "int8"
        with console.bar(name):
            keep = order[:count]

            def made(part: HeldOutPart, keep: Sequence[str] = keep) -> onnx.ModelProto:
                return ranges.int8(part.core, part, keep=keep)

            model = ranges.int8(fp32.core, keep=keep)
            quantized = _answers_there(made, context)

        rung = Candidate(
            name=name,
            precision="int8",
            core=model,
            right=quantized.argmax(1) == labels,
            sqnr_db=sqnr(logits, quantized),
            kept=tuple(keep),
            checks=_refit_checks(fp32, model, logits, quantized, context),
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
    """Paired comparison with fp32.

    Its bounds hold for all int8 candidates together, since they are tried until one is accepted.
    """
    looks = len(RUNGS) + bool(context.limits.qat_epochs) if rung.precision == "int8" else 1
    groups = context.canvases.groups(context.rows)
    return paired(fp32.right, rung.right, groups, looks)


def _refit_checks(
    fp32: Candidate, model: onnx.ModelProto, before: Array, after: Array, context: Context
) -> tuple[Check, ...]:
    """With folds: whether the shipped file changes as few answers as the folds' files did.

    Out-of-fold answers judge how a file is made, not this file. So its own answers on the test
    images, without their labels, are compared with fp32's: more changed ones than chance allows
    (Fisher's exact test, 1 %) refuse it. before, after: logits (n, classes) of the folds' files.
    """
    if not context.folded:
        return ()

    test = context.canvases.rows("test")
    shipped = logits_of(model, context, test).argmax(1) != logits_of(
        fp32.core, context, test
    ).argmax(1)
    changed = int((before.argmax(1) != after.argmax(1)).sum())

    def likely(count: int) -> bool:
        table = [[count, len(test) - count], [changed, len(before) - changed]]
        return bool(stats.fisher_exact(table, alternative="greater").pvalue >= UNLIKELY)

    most = max(count for count in range(len(test) + 1) if likely(count))
    return (
        Check(
            name="answers changed by the shipped file",
            group="test images",
            value=int(shipped.sum()) / len(test),
            limit=most / len(test),
            floor=changed / len(before),
            inputs=len(test),
        ),
    )


def _trained(
    fp32: Candidate, ranges: _Calibrated, context: Context, logits: Array, labels: Array
) -> Candidate:
    """All operators in 8 bits, after quantization-aware training on the training images."""
    from ftkit.exporting.qat import fine_tune

    def tuned(core: onnx.ModelProto, rows: Array, part: HeldOutPart | None) -> onnx.ModelProto:
        trained = fine_tune(
            core,
            ranges.int8(core, part),
            lambda picks: context.pixels(rows[picks]),
            context.canvases.labels[rows],
            logits_of(core, context, rows),
            epochs=context.limits.qat_epochs,
        )
        return ranges.int8(trained, part)

    model = tuned(fp32.core, context.canvases.rows("train"), None)

    def made(part: HeldOutPart) -> onnx.ModelProto:
        if part.core is fp32.core:
            return model
        return tuned(part.core, part.training, part)

    quantized = _answers_there(made, context)

    return Candidate(
        name="int8, trained",
        precision="int8",
        core=model,
        right=quantized.argmax(1) == labels,
        sqnr_db=sqnr(logits, quantized),
        checks=_refit_checks(fp32, model, logits, quantized, context),
    )


def _half(fp32: Candidate, context: Context, logits: Array, labels: Array) -> Candidate:
    """float16, run on the target's provider if available, else on the CPU.

    On the CPU its verdict is unproven.
    """
    ranges = _Calibrated(fp32.core, context)
    model, kept = half(fp32.core, ranges.shipped)
    provider = context.target.provider if context.here or context.device else "cpu"

    with console.bar("fp16 on held-out images"):
        halved = _answers_there(lambda part: half(part.core, ranges.of(part))[0], context, provider)

    checks = _refit_checks(fp32, model, logits, halved, context)
    if not context.folded:
        sample = context.pixels(spread_evenly(context.rows, FLOAT64_IMAGES))
        rounding = context.reference.rounding(sample, "fp16")
        checks = tuple(
            agreement(
                logits,
                halved,
                rounding,
                "fp16",
                f"{'fold' if context.folded else 'val'} images on {provider}",
            )
        )

    return Candidate(
        name="fp16",
        precision="fp16",
        core=model,
        right=halved.argmax(1) == labels,
        sqnr_db=sqnr(logits, halved),
        kept=tuple(kept),
        checks=checks,
    )


def _times(candidates: Sequence[Candidate], context: Context) -> dict[str, Raced]:
    """Time the candidates alternately on one thread and a real photograph, on the target.

    In the form that the target's provider runs. If the target is not available: what it measured
    before, for the same files.
    """
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
        if raced := context.race(files):
            return {item.name: times for item, times in zip(candidates, raced, strict=True)}

        known = context.measured["sha256"]  # hashes of the files that were measured there

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
    """Sort key: accepted ones by speed; then by upper bound of the accuracy drop, refused last."""
    if row.verdict == "accepted":
        return 0, row.ratio or 1.0
    return (2 if row.verdict == "refused" else 1), row.paired.high if row.paired else 1.0


def as_table(rows: Sequence[Row], held: str = "val") -> str:
    """The decision table within 80 columns, times in ms on one thread. held: what it was decided on.

    Below it, for each precision whose best variant may not ship, the reason.
    """
    lines = [("variant", held, "drop, points [95 %]", "time", "p50/p95", "MB", "verdict")]
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
