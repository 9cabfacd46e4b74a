"""What variants are decided on: their answers to held-out images, and their latency on the target.

logits = answers_there(lambda part: part.core, context)     # of every held-out image, by a model that has not seen it
raced = times([fp32, candidate], context)                   # name -> latency, interleaved
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scipy import stats

from ftkit.benchmark.ssh import Device
from ftkit.data.canvas import Canvases
from ftkit.recipe import Export
from ftkit.tasks.task import Task
from ftkit.training.run import Run
from ftkit.utils import console
from ftkit_export.conversion.convert import write
from ftkit_export.conversion.graph import image_form
from ftkit_export.conversion.probe import does_not_open
from ftkit_export.conversion.quantize import calibrate, sqnr
from ftkit_export.proof.decision import Comparison
from ftkit_export.proof.parity import Check, Reference
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.latency import Raced, race
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import Readout
from ftkit_export.runtime.session import PROVIDERS, Session
from ftkit_export.runtime.targets import TARGETS, Precision, Target, here
from ftkit_export.runtime.verify import sha256

UNLIKELY = 0.01  # probability below which more changed answers are no chance
OPTIMISER_IMAGES = 32
OPTIMISER_DB = 3.0
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
    folded: whether the models that are judged are not the one that ships, also where one fold settled
    all. reference: the framework's own answers. raced: what `times` found, by the candidates' names.
    """

    reference: Reference
    canvases: Canvases
    preprocess: Preprocess
    readout: Readout
    task: Task
    limits: Export
    target_name: str
    photograph: Path
    frame: str
    metadata: Mapping[str, str]
    measured: Mapping[str, Any]
    judged: Sequence[HeldOutPart]
    folded: bool = False
    device: Device | None = None
    raced: dict[tuple[str, ...], dict[str, Raced]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, reference: Reference, canvases: Canvases, **given: Any) -> Context:
        """Of a run, with its preprocessing, readout and task. given: the other fields."""
        return cls(
            reference=reference,
            canvases=canvases,
            preprocess=run.preprocess,
            readout=run.readout,
            task=run.task,
            **given,
        )

    @property
    def rows(self) -> Array:
        """Rows of the canvases that variants are judged on."""
        return np.concatenate([part.rows for part in self.judged])

    @cached_property
    def targets(self) -> Array:
        """The task's targets of those rows."""
        targets: Array = self.task.targets(self.canvases).numpy()[self.rows]
        return targets

    @property
    def limit(self) -> float:
        """What a variant may lose, as a fraction."""
        return self.task.limit(self.limits)

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
        return image_form(core, self.preprocess, self.readout, self.limits.input_format)

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

    logits: of each held-out image (n, K); kept: operators left in float; checks: further checks beside
    the task's metric; looks: comparisons that its bounds hold for jointly.
    """

    name: str
    precision: Precision
    core: onnx.ModelProto
    logits: Array
    sqnr_db: float | None = None
    kept: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    looks: int = 1


def logits_of(core: onnx.ModelProto, context: Context, rows: Array, provider: str = "cpu") -> Array:
    """Logits (N, classes) of a core form over these rows of the canvases."""
    session = Session(core.SerializeToString(), provider=provider)
    return np.concatenate(
        [
            session.run(context.pixels(rows[i : i + INFERENCE_BATCH]))[0]
            for i in range(0, len(rows), INFERENCE_BATCH)
        ]
    )


def answers_there(
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


def ranges_of(core: onnx.ModelProto, context: Context, training: Array | None = None) -> Any:
    rows = calibration_rows(context, training)
    batches = (
        context.pixels(rows[start : start + INFERENCE_BATCH])
        for start in range(0, len(rows), INFERENCE_BATCH)
    )
    with console.bar("calibrating"):
        return calibrate(core, batches, context.preprocess, context.limits.calibration)


def compared(fp32: Candidate, candidate: Candidate, context: Context) -> Comparison:
    """Comparison with fp32 on the same images, by the task's metric."""
    groups = context.canvases.groups(context.rows)
    return context.task.compare(
        fp32.logits, candidate.logits, context.targets, groups, candidate.looks
    )


def optimiser_check(fp32: onnx.ModelProto, model: onnx.ModelProto, context: Context) -> Check:
    """Whether ONNX Runtime's optimiser leaves an 8-bit model's answers as they are.

    It fuses 8-bit operators, and may thereby change what they compute. The noise of the optimised
    model, against fp32, may be 3 dB over that of the model as written: what rounding differently
    does stays below 1 dB.
    """
    rows = spread_evenly(context.canvases.rows("test"), OPTIMISER_IMAGES)
    pixels = context.pixels(rows)
    expected = Session(fp32.SerializeToString()).run(pixels)[0]
    optimised, written = (
        sqnr(expected, Session(model.SerializeToString(), optimised=optimised).run(pixels)[0])
        for optimised in (True, False)
    )
    return Check(
        name="dB lost to ONNX Runtime's optimiser",
        group="test images",
        value=_lost(written, optimised),
        limit=OPTIMISER_DB,
        inputs=len(rows),
    )


def _lost(written: float, optimised: float) -> float:
    """dB lost; infinite where the optimised model's answers are not finite."""
    if optimised == -math.inf:
        return math.inf
    return written - optimised if written > optimised else 0.0


def refit_checks(
    fp32: Candidate, model: onnx.ModelProto, before: Array, after: Array, context: Context
) -> tuple[Check, ...]:
    """With folds: whether the shipped file changes as few answers as the folds' files did.

    Out-of-fold answers judge how a file is made, not this file. So its own answers on the test
    images, without their labels, are compared with fp32's: more changed ones (Readout.moved) than
    chance allows (Fisher's exact test, 1 %) refuse it. before, after: logits (n, K) of the folds'
    files.
    """
    if not context.folded:
        return ()

    test = context.canvases.rows("test")
    shipped = context.readout.moved(
        logits_of(fp32.core, context, test), logits_of(model, context, test)
    )
    changed = int(context.readout.moved(before, after).sum())

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


def times(candidates: Sequence[Candidate], context: Context) -> dict[str, Raced]:
    """Time the candidates alternately on one thread and a real photograph, on the target.

    In the form that the target's provider runs, and once: the same candidates have the same times.
    If the target is not available: what it measured before, for the same files.
    """
    names = tuple(item.name for item in candidates)
    if names not in context.raced:
        context.raced[names] = _times(candidates, context)
    return context.raced[names]


def _times(candidates: Sequence[Candidate], context: Context) -> dict[str, Raced]:
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
