"""Options of training, export and benchmark: one dataclass each, for Python and the command line.

@by_keyword(TrainOptions)
def train(data: str | Path, options: TrainOptions) -> Run: ...

train("photos", seed=1)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.recipe import Recipe

SMALLEST_SIZE = 32  # side of a network's input in pixels

P = ParamSpec("P")
Subject = TypeVar("Subject")
Options = TypeVar("Options")
Result = TypeVar("Result")


def by_keyword(
    options: Callable[P, Options],
) -> Callable[[Callable[[Subject, Options], Result]], Callable[Concatenate[Subject, P], Result]]:
    """Decorator: pass the fields of a function's second argument, a dataclass, as keywords."""

    def decorate(
        function: Callable[[Subject, Options], Result],
    ) -> Callable[Concatenate[Subject, P], Result]:
        subject, _ = inspect.signature(function).parameters.values()
        signature = inspect.Signature(
            [subject, *inspect.signature(options).parameters.values()],
            return_annotation=function.__annotations__["return"],
        )

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            return function(given.pop(subject.name), options(**given))  # type: ignore[call-arg]

        called.__signature__ = signature  # type: ignore[attr-defined]
        return called

    return decorate


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `ftkit train` and ftkit.train.

    - out: run folder, by default runs/RECIPE-N.
    - recipe: a name, FILE.py, the recipe.json of a report, or a Recipe.
    - settings: overrides of recipe fields, such as "stages.1.lr=1e-4".
    - weights: a file of backbone weights; "none" starts untrained.
    - task: "single-label", "multi-label" or "regression"; the recipe's by default, and in the end the
      data's.
    - folds: "auto", a number, or 0; the recipe's by default.
    - minutes: for the whole training. What stands when they are over is the result; a stage that
      would take longer is left out.
    - device: auto, cpu or cuda.
    - resume: continue the interrupted run in `out`, or start one if there is none; does nothing if
      the run is finished.
    - known: a resumed run keeps its own recipe and seed, whatever is given here.
    - deterministic: reproduce the same weights on a GPU too, at lower speed; a CPU always does,
      given the same number of threads.
    - group_by, root, add: as in dataset.read_images.
    - allow_leakage: train even if train, val and test share images or groups, or identical files
      have two labels.
    - tensorboard: also write TensorBoard events to `out`/tensorboard.
    """

    out: str | Path | None = None
    recipe: str | Path | Recipe = "lite0"
    settings: Sequence[str] = ()
    weights: str | None = None
    task: str | None = None
    folds: str | int | None = None
    minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    deterministic: bool = False
    group_by: str = ""
    root: str | Path | None = None
    add: str | Path | None = None
    allow_leakage: bool = False
    tensorboard: bool = False
    quiet: bool = False
    known: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of `ftkit search` and ftkit.search.

    - out: folder of the search, by default "search". An interrupted search goes on in it.
    - recipe: its stages train the finalists; settings: overrides of its fields.
    - backbones: by default those whose weights are installed. sizes: of the input in pixels, by
      default from 96 to the backbone's own and one above.
    - p50_ms, p95_ms, size_mb, memory_mb: budgets of the whole file, on one thread.
    - max_drop: what may be lost against the most accurate network, as a share: of accuracy, of
      macro-AP, or by how much the error may rise. A budget where it is given; by default the recipe's
      export.max_accuracy_drop, or export.max_error_rise, and the most accurate within the budgets where
      none is as good.
    - timed: at most so many candidates are timed. finalists: at most so many are trained, each
      within `minutes`; 0: none.
    - frame: size of the image that is timed, "640x480"; by default no more than one image in twenty is larger.
    - on: user@host (ssh), where candidates are timed. target: the processor they are for, if it is
      not this machine's: a folder is then left to time them there, and latency is what it printed.
    - device: auto, cpu or cuda, where features are computed and finalists trained.
    - seed, group_by, root, add, task: as for training.
    """

    out: str | Path | None = None
    recipe: str | Path = "lite0"
    settings: Sequence[str] = ()
    backbones: Sequence[str] = ()
    sizes: Sequence[int] = ()
    p50_ms: float | None = None
    p95_ms: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    max_drop: float | None = None
    timed: int = 16
    finalists: int = 3
    minutes: float | None = None
    frame: str | None = None
    on: str | None = None
    target: str = "auto"
    latency: str | Path | None = None
    device: str = "auto"
    seed: int = 0
    group_by: str = ""
    root: str | Path | None = None
    add: str | Path | None = None
    task: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("sizes", min(self.sizes, default=SMALLEST_SIZE), SMALLEST_SIZE, 10_000),
            ("timed", self.timed, 1, 1000),
            ("finalists", self.finalists, 0, 1000),
            ("max_drop", self.max_drop or 0, 0, 1),
        ):
            if not least <= value <= most:
                raise FtkitError(
                    f"search.{name}: expected {least} to {most}, found {value}. Try a value in that range"
                )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `ftkit export` and ftkit.export.

    - out: bundle folder, by default RUN-bundle.
    - settings: overrides such as "export.p95_ms=8".
    - providers: execution providers on which parity and latency are measured.
    - data: where the run's images are now, if they were moved.
    - quick: shorter latency runs, marked as such in the evidence.
    - target: auto, x86-vnni, x86, arm64, cuda or web.
    - latency: output of `device/classify.py --bench` on the target.
    - on: user@host (ssh) whose latency decides.
    - input_format: rgb, bgr, grey or nv12.
    - c, ort, handoff, web: also write plain C sources, ONNX Runtime's own format, the files for
      other compilers, a page for browsers.
    - runtime: onnxruntime-web's .tgz, for web.
    - zipped: also write BUNDLE.zip.
    - sign: an Ed25519 private key (PEM).
    - bundle_version: counter that a device compares at an update; by default the time, in seconds.
    """

    out: str | Path | None = None
    settings: Sequence[str] = ()
    providers: Sequence[str] = ("cpu",)
    data: str | Path | None = None
    quick: bool = False
    target: str | None = None
    latency: str | Path | None = None
    on: str | None = None
    input_format: str | None = None
    c: bool = False
    ort: bool = False
    handoff: bool = False
    web: bool = False
    runtime: str | Path | None = None
    zipped: bool = False
    sign: str | Path | None = None
    bundle_version: int | None = None
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `ftkit bench` and ftkit.bench.

    - against: a bundle or ONNX file to compare with, in alternating runs.
    - threads: CPU threads; by default 1 and all cores, with `against` only 1.
    - batches: batch sizes; 0 means the size fixed in the file, else 1.
    - image: input for an ftkit model, by default a golden image.
    - frame: size the image is resized to, e.g. "640x480"; by default the one the bundle names.
    - max_slowdown: tolerated slowdown with `against`, as a share of the latency.
    - seconds: time limit with `against`.
    """

    against: str | Path | None = None
    providers: Sequence[str] = ("cpu",)
    threads: Sequence[int] = ()
    batches: Sequence[int] = (0,)
    image: str | Path | None = None
    frame: str | None = None
    quick: bool = False
    max_slowdown: float = 0.05
    seconds: float = 120.0

    @property
    def several(self) -> bool:
        """Whether more than one condition is requested."""
        return max(len(self.providers), len(self.threads), len(self.batches)) > 1
