"""Options of a training, an export and a benchmark: one dataclass each, for Python and the command
line.

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

if TYPE_CHECKING:
    from ftkit.recipe import Recipe

P = ParamSpec("P")
Subject = TypeVar("Subject")
Options = TypeVar("Options")
Result = TypeVar("Result")


def by_keyword(
    options: Callable[P, Options],
) -> Callable[[Callable[[Subject, Options], Result]], Callable[Concatenate[Subject, P], Result]]:
    """Let callers give the fields of a function's second argument, a dataclass, as keywords."""

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

    out: the run folder, by default runs/RECIPE-N. recipe: a name, FILE.py, the recipe.json of a
    report, or a Recipe. settings: "stages.1.lr=1e-4" and the like. weights: a file of backbone
    weights, "none" for untrained. device: auto, cpu or cuda. resume: go on where an interrupted run
    in `out` stands; begin when there is none; nothing to do when it is finished. known: a resumed
    run keeps its own recipe and seed, whatever is given here. deterministic: the same weights twice
    on a GPU too, slower; a CPU gives them anyway, with as many threads. group_by, root: as
    dataset.read's. allow_leakage: also when train, val and test share images or groups, or
    identical files have two labels. tensorboard: events in `out`/tensorboard too.
    """

    out: str | Path | None = None
    recipe: str | Path | Recipe = "lite0"
    settings: Sequence[str] = ()
    weights: str | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    deterministic: bool = False
    group_by: str = ""
    root: str | Path | None = None
    allow_leakage: bool = False
    tensorboard: bool = False
    quiet: bool = False
    known: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `ftkit export` and ftkit.export.

    out: the bundle, by default RUN-bundle. settings: "export.p95_ms=8" and the like. providers:
    those that parity and latency are measured on. data: where the run's images are now, if they
    moved. quick: shorter latency runs, marked so in the evidence. target: auto, x86-vnni, x86,
    arm64, cuda or web. latency: what `device/classify.py --bench` printed on the target. on:
    user@host whose latency decides (ssh). input_format: rgb, bgr, grey or nv12. c, ort, handoff,
    web: plain C sources, ONNX Runtime's own format, the files for other compilers, a page for
    browsers. runtime: onnxruntime-web's .tgz for web. zipped: BUNDLE.zip too. sign: an Ed25519
    private key (PEM).
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
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `ftkit bench` and ftkit.bench.

    against: a bundle or ONNX file to run in turn with. threads: CPU threads, by default 1 and all
    cores, and 1 with `against`. batches: 0 is what the file fixes, else 1. image: what a file of
    ftkit's runs on, by default a golden image. frame: the size that the image is brought to,
    "640x480", by default what the bundle names. max_slowdown: the share of latency that `against`
    tolerates. seconds: the most that `against` may take.
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
        """Whether more than one condition is asked for."""
        return max(len(self.providers), len(self.threads), len(self.batches)) > 1
