"""Python API: one function for each command of the same name.

    import ftkit

    found = ftkit.search("photos", p95_ms=4.0)         # which network fits; recipe=found.folder trains it
    run = ftkit.train("photos", recipe="lite0", settings=["stages.1.lr=1e-4"])
    done = ftkit.export(run, providers=["cpu"])
    ftkit.verify(done.folder).passed
    ftkit.bench(done.folder)["rows"][0]["p50_ms"]
    ftkit.load(done.folder)("photo.jpg").label

Every function raises ftkit.FtkitError on failure; the message says where, what was expected, what
was found and what to try. In a notebook, runs and exports render as tables.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.options import BenchOptions, ExportOptions, SearchOptions, TrainOptions, by_keyword
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.benchmark.ssh import Device
    from ftkit.exporting.export import Exported
    from ftkit.recipe import Export, Recipe
    from ftkit.searching.result import Found
    from ftkit.training.run import Run
    from ftkit_export.runtime.predict import AnyModel
    from ftkit_export.runtime.verify import Verification


SEARCHED = "search.json"  # in the folder of a search


@by_keyword(TrainOptions)
def train(data: str | Path, options: TrainOptions) -> Run:
    """Fine-tune on labelled images and return the finished run.

    data: a class folder, split folders or a CSV. The fields of TrainOptions are keyword arguments.
    Raises FtkitError for bad data, recipe, weights or settings; Stopped (a KeyboardInterrupt) after
    Ctrl-C, with the run saved. Under torchrun only the first rank returns; the others exit.
    """
    from ftkit.overrides import override
    from ftkit.recipe import Recipe, load_recipe
    from ftkit.utils import console

    if options.resume and options.out is None:
        raise FtkitError("--resume: expected the run to go on with, found no --out. Try --out RUN")

    console.hush(options.quiet)
    recipe = options.recipe
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    named = {"weights": options.weights, "task": options.task, "folds": options.folds}
    settings = [f"{name}={value}" for name, value in named.items() if value is not None]
    plan = override(plan, [*settings, *options.settings])

    # Slow imports, only after typos have been reported
    from ftkit.training.run import claim, next_free, open_run
    from ftkit.training.train import train as run_training

    if not options.out and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise FtkitError(
            "--out: expected a folder, in which torchrun goes on after a failure, found none. Try --out RUN"
        )

    # The ranks of one run must agree on its folder
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    new_folder = claim if alone else next_free

    folder = Path(options.out) if options.out else new_folder(Path("runs") / plan.name)
    try:
        run_training(plan, data, folder, options)
    finally:
        if not options.out:
            with suppress(OSError):
                folder.rmdir()  # fails, and so keeps the folder, unless it is empty

    if not console.is_first():
        sys.exit(0)  # only the first rank returns the run

    return open_run(folder)


@by_keyword(SearchOptions)
def search(data: str | Path, options: SearchOptions) -> Found:
    """Find the network that fits: backbone, input size, depth and precision, on your images and time.

    Returns the candidates, the front and the pick, which `train` takes as recipe=FOLDER. The fields
    of SearchOptions are keyword arguments. Raises FtkitError for bad data, options or weights. Under
    torchrun only the first rank returns; the others exit.
    """
    from ftkit.utils import console

    console.hush(options.quiet)

    from ftkit.searching.search import search as run_search

    found = run_search(data, options)
    if found is None:
        sys.exit(0)
    return found


def _opened(folder: Path, data: str | Path | None) -> Run:
    """A finished run; of an interrupted one, what stands; of a search, the pick's."""
    from ftkit.training import checkpoint
    from ftkit.training.run import is_finished, open_run

    folder = _picked_run(folder)
    if is_finished(folder) or not checkpoint.exists(folder):
        return open_run(folder)

    from ftkit.training.train import write_so_far
    from ftkit.utils import console

    run = open_run(write_so_far(folder, data))
    console.warn(f"{folder}: not finished, {run.so_far}. What stands is exported, and says so")
    return run


def _picked_run(folder: Path) -> Path:
    """The run of a search's pick; other folders as they are."""
    found = folder / SEARCHED
    if not found.is_file():
        return folder

    run = json.loads(found.read_text())["pick"]["run"]
    if not run:
        raise FtkitError(
            f"{folder}: expected a search that trained its pick, found one without finalists. Try "
            f"`ftkit train DATA --recipe {folder}`"
        )
    return folder / str(run)


@by_keyword(ExportOptions)
def export(run: Run | str | Path, options: ExportOptions) -> Exported:
    """Export a run to ONNX, check the file against the gates, and seal the bundle.

    If a gate fails, `passed` is False and the folder is named BUNDLE.failed. run: as returned by
    `train`, or its folder. The fields of ExportOptions are keyword arguments.
    """
    _check_settings(options)
    if options.runtime and not options.web:
        raise FtkitError("--runtime: expected --web with it, found none. Try --web")

    from ftkit.benchmark.ssh import Device
    from ftkit.exporting.export import Extras
    from ftkit.exporting.export import export as run_export
    from ftkit.exporting.web import runtime as web_runtime
    from ftkit.recipe import load_recipe
    from ftkit.training.run import Run
    from ftkit.utils import console
    from ftkit_export.runtime.session import parse_providers

    console.hush(options.quiet)
    providers = parse_providers(",".join(options.providers))
    opened = run if isinstance(run, Run) else _opened(Path(run), options.data)
    folder = (opened.folder.parent if opened.so_far else opened.folder).resolve()
    searched = None if isinstance(run, Run) or not (Path(run) / SEARCHED).is_file() else Path(run)
    if searched:
        folder = searched.resolve()
    out = Path(options.out) if options.out else folder.with_name(f"{folder.name}-bundle")
    files = web_runtime(Path(options.runtime) if options.runtime else None) if options.web else None

    plan = opened.recipe
    if searched:
        # Its budgets; the run may have been trained by an earlier search, with others
        plan = replace(plan, export=load_recipe(str(searched)).export)
    with Device.reached(options.on) if options.on else nullcontext() as device:
        limits = _limits(options, plan, device)
        extras = Extras(
            measured=_latency_of_target(options, opened, limits, providers),
            device=device,
            c=options.c,
            ort=options.ort,
            handoff=options.handoff,
            zipped=options.zipped,
            sign=Path(options.sign) if options.sign else None,
            version=options.bundle_version,
            web=files,
        )

        return run_export(
            opened,
            out,
            settings=limits,
            providers=providers,
            data=options.data,
            quick=options.quick,
            extras=extras,
        )


def _check_settings(options: ExportOptions) -> None:
    """Reject invalid settings before the slow imports."""
    from ftkit.overrides import override
    from ftkit.recipe import Recipe, Stage

    for setting in options.settings:
        if not setting.startswith("export."):
            raise FtkitError(
                f"--set {setting}: expected a field of export, found another. Try --set export.{setting}"
            )

    override(Recipe(name="", backbone="", stages=(Stage(),)), options.settings)

    if options.on and options.latency:
        raise FtkitError(
            "--on, --latency: expected one source of the device's times, found two. Leave out --latency"
        )


def _limits(options: ExportOptions, plan: Recipe, device: Device | None) -> Export:
    """Gates and budgets: the recipe's, with the settings and the device applied."""
    from ftkit.overrides import override

    if device and options.target not in (None, "auto", "cuda", "web", device.target):
        raise FtkitError(
            f"--target {options.target}: expected what {options.on} is, {device.target}, found another. "
            "Leave it out"
        )

    named = {
        "target": options.target or (device.target if device else None),
        "input_format": options.input_format,
    }
    settings = [f"export.{key}={value}" for key, value in named.items() if value]
    return override(plan, [*options.settings, *settings]).export


def _latency_of_target(
    options: ExportOptions, run: Run, limits: Export, providers: Sequence[str]
) -> dict[str, Any]:
    """Latency measured on the target itself; empty without --latency."""
    from ftkit.exporting.export import frame_of, read_measured
    from ftkit.exporting.variants import resolve_target

    if not options.latency:
        return {}

    target = resolve_target(limits.target, providers)
    return read_measured(Path(options.latency), run, target, frame_of(limits, run))


def verify(
    bundle: str | Path, *, provider: str = "cpu", key: str | Path | None = None
) -> Verification:
    """Verify a bundle (a folder or a zip) here: hashes, golden vectors and sealed gates.

    key: the public key that must have signed it. Raises BundleError if the bundle was altered, is
    incomplete, or is signed by another key.
    """
    from ftkit_export.bundle import archive
    from ftkit_export.runtime.verify import verify as run_verify

    with archive.opened(Path(bundle), Path(key) if key else None) as folder:
        return run_verify(folder, provider)


@by_keyword(BenchOptions)
def bench(model: str | Path, options: BenchOptions) -> Mapping[str, Any]:
    """Measure latency, cold start, memory and size of a bundle or any ONNX file, in ms and bytes.

    Returns what `ftkit bench --json` writes. The fields of BenchOptions are keyword arguments. With
    `against`, the result's "against" holds the verdicts of the regression gate.
    """
    from dataclasses import asdict

    from ftkit.benchmark.budgets import compare_in_turn, measure_here
    from ftkit_export.bundle.archive import unpacked

    if options.against and options.several:
        raise FtkitError(
            "against: expected one provider, number of threads and batch, found several. Try one"
        )

    with unpacked(model) as path:
        told = measure_here(path, options)
        if options.against:
            with unpacked(options.against) as old:
                told["against"] = [asdict(item) for item in compare_in_turn(path, old, options)]

    return told


def load(
    bundle: str | Path, *, provider: str = "cpu", threads: int = 0, key: str | Path | None = None
) -> AnyModel:
    """Load an exported model as a function from an image to a prediction.

    load("bundle")("photo.jpg") -> Prediction (label, probability, probabilities, doubtful,
    foreign), MultiLabelPrediction or RegressionPrediction, by the bundle's task. The
    image is a path, the bytes of an image file, or an RGB array (H, W, 3) uint8.
    threads: 0 = all. key: the public key that must have signed the bundle; its hashes are then
    checked too.
    """
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.predict import load_model

    with unpacked(bundle, Path(key) if key else None) as path:
        return load_model(path, provider=provider, threads=threads)
