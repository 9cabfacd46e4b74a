"""ftkit from Python: what the commands of the same names do.

    import ftkit

    run = ftkit.train("photos", recipe="lite0", settings=["stages.1.lr=1e-4"])
    done = ftkit.export(run, providers=["cpu"])
    ftkit.verify(done.folder).passed
    ftkit.bench(done.folder)["rows"][0]["p50_ms"]
    ftkit.load(done.folder)("photo.jpg").label

Every one raises ftkit.FtkitError, whose message says where, what was expected, what was found and
what to try. In a notebook a run and an export show themselves as tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.exporting.export import Exported
    from ftkit.recipe import Recipe
    from ftkit.training.run import Run
    from ftkit_export.runtime.predict import Classifier
    from ftkit_export.runtime.verify import Verification


def train(
    data: str | Path,
    *,
    out: str | Path | None = None,
    recipe: str | Path | Recipe = "lite0",
    settings: Sequence[str] = (),
    weights: str | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    deterministic: bool = False,
    group_by: str = "",
    root: str | Path | None = None,
    allow_leakage: bool = False,
    tensorboard: bool = False,
    quiet: bool = False,
    known: bool = False,
) -> Run:
    """Fine-tune on labelled images and return the finished run.

    data: a class folder, split folders or a CSV. out: the run folder, by default runs/RECIPE-N.
    recipe: a name, FILE.py, the recipe.json of a report, or a Recipe. settings: "stages.1.lr=1e-4"
    and the like. device: auto, cpu, cuda. resume: go on with the run in `out`; known: with its own
    recipe and seed. The rest is as `ftkit train` has it. Raises FtkitError for bad data, recipe,
    weights or settings; Stopped (a KeyboardInterrupt) after Ctrl-C, saved. Under torchrun the first
    rank returns; the others end here.
    """
    from ftkit.overrides import override
    from ftkit.recipe import Recipe
    from ftkit.recipe import load as load_recipe
    from ftkit.utils import console

    if resume and out is None:
        raise FtkitError("--resume: expected the run to go on with, found no --out. Try --out RUN")

    console.hush(quiet)
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    plan = override(plan, [*([f"weights={weights}"] if weights else []), *settings])

    # They take seconds to import: a typo has been told by now.
    from ftkit.training.run import claim, next_free, open_run
    from ftkit.training.train import train as run_training

    # The ranks of one run must agree on its folder
    alone = os.environ.get("WORLD_SIZE", "1") == "1"

    folder = Path(out) if out else (claim if alone else next_free)(Path("runs") / plan.name)
    try:
        run_training(
            plan,
            data,
            folder,
            seed=seed,
            device=device,
            resume=resume,
            deterministic=deterministic,
            known=known,
            group_by=group_by,
            root=root,
            allow_leakage=allow_leakage,
            tensorboard=tensorboard,
        )
    finally:
        if not out:
            with suppress(OSError):
                folder.rmdir()  # where nothing began

    if not console.is_first():
        sys.exit(0)  # of several ranks one has the run; this one's work is done

    return open_run(folder)


def export(
    run: Run | str | Path,
    *,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    providers: Sequence[str] = ("cpu",),
    data: str | Path | None = None,
    quick: bool = False,
    target: str | None = None,
    latency: str | Path | None = None,
    on: str | None = None,
    input_format: str | None = None,
    c: bool = False,
    ort: bool = False,
    handoff: bool = False,
    web: bool = False,
    runtime: str | Path | None = None,
    zipped: bool = False,
    sign: str | Path | None = None,
    quiet: bool = False,
) -> Exported:
    """Export a run to ONNX, prove the file, seal the bundle; `passed` is False, and the folder
    BUNDLE.failed, when a gate failed.

    run: as `train` returned it, or its folder. out: by default RUN-bundle. settings:
    "export.p95_ms=8" and the like. data: where the run's images are now, if they moved. on:
    user@host whose latency decides (ssh); latency: a file of it. runtime: onnxruntime-web's .tgz
    for web. The other arguments are those of `ftkit export`.
    """
    from ftkit.overrides import override
    from ftkit.recipe import Recipe, Stage
    from ftkit.utils import console

    for setting in settings:
        if not setting.startswith("export."):
            raise FtkitError(
                f"--set {setting}: expected a field of export, found another. Try --set export.{setting}"
            )

    # A typo is told before seconds of imports
    override(Recipe(name="", backbone="", stages=(Stage(),)), settings)

    from ftkit.benchmark.ssh import Device
    from ftkit.exporting.export import Extras, frame_of, read_measured
    from ftkit.exporting.export import export as run_export
    from ftkit.exporting.variants import resolve_target
    from ftkit.exporting.web import runtime as web_runtime
    from ftkit.training.run import Run, open_run
    from ftkit_export.runtime.session import parse_providers

    console.hush(quiet)
    names = parse_providers(",".join(providers))
    opened = run if isinstance(run, Run) else open_run(run)

    if on and latency:
        raise FtkitError(
            "--on, --latency: expected one source of the device's times, found two. Leave out --latency"
        )

    where = (
        Path(out)
        if out
        else opened.folder.resolve().with_name(opened.folder.resolve().name + "-bundle")
    )
    files = web_runtime(Path(runtime) if runtime else None) if web else None

    with Device.reached(on) if on else nullcontext() as reached:
        if reached and target not in (None, "auto", "cuda", "web", reached.target):
            raise FtkitError(
                f"--target {target}: expected what {on} is, {reached.target}, found another. Leave it out"
            )

        named = {
            "target": target or (reached.target if reached else None),
            "input_format": input_format,
        }
        settings = [*settings, *(f"export.{key}={value}" for key, value in named.items() if value)]
        limits = override(opened.recipe, settings).export
        measured = (
            read_measured(
                Path(latency),
                opened,
                resolve_target(limits.target, names),
                frame_of(limits, opened),
            )
            if latency
            else {}
        )

        extras = Extras(
            measured=measured,
            device=reached,
            c=c,
            ort=ort,
            handoff=handoff,
            zipped=zipped,
            sign=Path(sign) if sign else None,
            web=files,
        )
        return run_export(
            opened, where, settings=limits, providers=names, data=data, quick=quick, extras=extras
        )


def verify(
    bundle: str | Path, *, provider: str = "cpu", key: str | Path | None = None
) -> Verification:
    """Hashes, golden vectors and sealed gates of a bundle (a folder or a zip) on this machine. key:
    the public key that must have signed it. Raises BundleError for one that is altered, incomplete,
    or signed by another."""
    from ftkit_export.bundle import archive
    from ftkit_export.runtime.verify import verify as run_verify

    with archive.opened(Path(bundle), Path(key) if key else None) as folder:
        return run_verify(folder, provider)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    providers: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (0,),
    image: str | Path | None = None,
    frame: str | None = None,
    quick: bool = False,
) -> Mapping[str, Any]:
    """Latency, cold start, memory and size of a bundle or any ONNX file, in ms and bytes: what
    `ftkit bench --json` writes. frame: "640x480", the size of the frames, by default what the
    bundle names. against: also run in turn with that bundle or file; `against` then holds the
    verdicts."""
    from dataclasses import asdict

    from ftkit.benchmark.budgets import against as run_against
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.measure import bench as measure

    if against and max(len(providers), len(threads), len(batches)) > 1:
        raise FtkitError(
            "against: expected one provider, number of threads and batch, found several. Try one"
        )

    with unpacked(model) as path:
        told = measure(
            path,
            providers=providers,
            threads=threads,
            batches=batches,
            image=image,
            frame=frame,
            quick=quick,
        )
        if against:
            with unpacked(against) as old:
                found = run_against(
                    path,
                    old,
                    provider=providers[0],
                    threads=(*threads, 1)[0],
                    batch=batches[0],
                    image=image and Path(image),
                    frame=frame,
                )
            told["against"] = [asdict(item) for item in found]

    return told


def load(
    bundle: str | Path, *, provider: str = "cpu", threads: int = 0, key: str | Path | None = None
) -> Classifier:
    """The exported file as a function: load("bundle")("photo.jpg") -> Prediction (label,
    probability, probabilities, doubtful, foreign). It takes a path, an image file's bytes, or an
    RGB array (H, W, 3) uint8. threads: 0 = all. key: the public key that must have signed the
    bundle, whose hashes are then checked too."""
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.predict import Classifier

    with unpacked(bundle, Path(key) if key else None) as path:
        return Classifier(path, provider=provider, threads=threads)
