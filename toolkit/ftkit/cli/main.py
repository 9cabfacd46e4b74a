"""Command line: each command parses its options, calls one function and prints the result.

Heavy imports are deferred until a command needs them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit import __version__, api
from ftkit.cli.bench import bench
from ftkit.cli.data import (
    ADD,
    GROUP_BY,
    ROOT,
    RUNTIME,
    TASK,
    audit_data,
    cache,
    report,
    try_bundle,
)
from ftkit.cli.evaluate import evaluate
from ftkit.cli.field import delta, drift, enroll, review, shadow
from ftkit.cli.gpus import DEVICE, GPUS, launch_again, require_gpus
from ftkit.cli.options import KEY, MAX_PIXELS_OPTION, SIGN, Command
from ftkit.cli.search import search
from ftkit.utils import console
from ftkit.utils.ending import leave, when_asked_to_end
from ftkit.utils.errors import ToldElsewhereError
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.recipe import Recipe
    from ftkit_export.bundle.seal import Gate
    from ftkit_export.runtime.verify import Verification


class _Group(click.Group):
    """Report FtkitError as one line on standard error, and exit with its code.

    FTKIT_DEBUG=1 shows the traceback.
    """

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with when_asked_to_end(leave):
                return super().invoke(ctx)
        except FtkitError as error:
            if os.environ.get("FTKIT_DEBUG") == "1":
                raise
            if str(error) and not isinstance(error, ToldElsewhereError):
                click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stopped:
            if console.is_first():
                click.echo(str(stopped) or "stopped: nothing that was finished is lost", err=True)
            ctx.exit(getattr(stopped, "exit_code", 130))
        except OSError as error:
            if os.environ.get("FTKIT_DEBUG") == "1" or isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            click.echo(
                f"error: {where}expected to read and write, found: {error.strerror or error}. "
                "Check the path and the free disk",
                err=True,
            )
            ctx.exit(2)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="ftkit")
def main() -> None:
    """Turn a folder of images into a model file that is proven to work on a device."""


SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=C",
    help="Change a field of the recipe. Repeatable.",
)
PROVIDERS_OPTION = click.option(
    "--providers", default="cpu", show_default=True, metavar="A,B", help="e.g. cpu,cuda"
)


@main.command(short_help="Fine-tune on a folder of images or a CSV.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", default="lite0", show_default=True, metavar="NAME|FILE.py")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder. [default: runs/NAME-1, -2, ...]",
)
@SET
@click.option(
    "--weights", metavar="FILE", help="Backbone weights: .safetensors or .pth; none = untrained."
)
@TASK
@click.option(
    "--folds",
    metavar="auto|K|0",
    help="Where DATA has no val split, decide on out-of-fold predictions; 0: cut a val split. [default: the "
    "recipe's, auto]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    metavar="N",
    help="End with what stands after N minutes.",
)
@DEVICE
@GPUS
@click.option("--seed", default=0, show_default=True)
@click.option("--deterministic", is_flag=True, help="Reproducible weights on a GPU too; slower.")
@click.option(
    "--resume", is_flag=True, help="Resume the run in --out, with its own recipe and seed."
)
@GROUP_BY
@ROOT
@ADD
@MAX_PIXELS_OPTION
@click.option("--allow-leakage", is_flag=True, help="Train even if `ftkit data` says NOT ok.")
@click.option(
    "--tensorboard", is_flag=True, help="Also write TensorBoard events to RUN/tensorboard."
)
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@click.pass_context
def train(ctx: click.Context, /, data: Path, gpus: int | None, **options: Any) -> None:
    """Fine-tune on DATA, a folder of images or a CSV.

    Layouts: DATA/CLASS/*.jpg, DATA/{train,val,test}/CLASS/*, or a CSV path,label[,split][,group];
    for several labels an image path,labels with a|b, for numbers path,value with --task regression.
    """
    if gpus:
        sys.exit(_launched(ctx, gpus))

    plan = ("recipe", "settings", "weights", "task", "folds", "seed", "group_by")
    known = all(
        ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT for name in plan
    )
    run = api.train(data, **options, known=known)

    if not options["quiet"]:
        click.echo(f"run: {run.folder}\nnext: ftkit export {shlex.quote(str(run.folder))}")


def _launched(ctx: click.Context, gpus: int) -> int:
    """Run the same command with one process per GPU; return the exit code."""
    from ftkit.recipe import load_recipe
    from ftkit.training.run import claim

    require_gpus(ctx, gpus)
    if ctx.params["out"]:
        return launch_again(ctx, gpus)
    if ctx.params["resume"]:
        raise FtkitError("--resume: expected the run to go on with, found no --out. Try --out RUN")

    folder = claim(Path("runs") / load_recipe(ctx.params["recipe"]).name)
    try:
        return launch_again(ctx, gpus, ["--out", str(folder)])
    finally:
        with suppress(OSError):
            folder.rmdir()  # succeeds only if no run was started


@main.command(short_help="Export a run to ONNX, prove the file, seal a bundle.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Bundle folder. [default: RUN-bundle]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="export.B=C",
    help="Change a gate or budget. Repeatable.",
)
@PROVIDERS_OPTION
@click.option(
    "--data", type=click.Path(path_type=Path), help="Where the run's images are now, if they moved."
)
@click.option("--quick", is_flag=True, help="Shorter latency runs, marked as such in the evidence.")
@click.option(
    "--target",
    help="Target platform: auto, x86-vnni, x86, arm64, cuda, web. [default: auto]",
)
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Output of `device/classify.py --bench` on the target.",
)
@click.option(
    "--on",
    metavar="USER@HOST",
    help="Let that device's own latency choose the variant (ssh).",
)
@click.option(
    "--input-format",
    help="Pixel format of the device's frames: rgb, bgr, grey, nv12. [default: rgb]",
)
@click.option("--c", "c", is_flag=True, help="Also write plain C sources to device/c.")
@click.option("--ort", is_flag=True, help="Also write ONNX Runtime's own format to device/ort.")
@click.option(
    "--handoff",
    is_flag=True,
    help="Also write what TensorRT, OpenVINO, Hailo and RKNN compilers need to handoff/.",
)
@click.option("--zip", "zipped", is_flag=True, help="Also write BUNDLE.zip.")
@click.option(
    "--web", is_flag=True, help="Also write a page that runs the file in a browser to device/web."
)
@RUNTIME
@click.option(
    "--bundle-version",
    type=click.IntRange(0),
    metavar="N",
    help="Counter: a device takes no older one. [default: the time]",
)
@SIGN
@MAX_PIXELS_OPTION
@click.option("-q", "--quiet", is_flag=True, help="Print gates, warnings and errors only.")
def export(run: Path, providers: str, **options: Any) -> None:
    """Export RUN to ONNX, prove the file, and seal a bundle.

    Exit 1 when a gate fails, 3 when none fails but one is inconclusive.
    """
    done = api.export(run, providers=[providers], **options)
    for gate in done.gates:
        click.echo(f"{console.MARKS[gate.verdict]}  {gate}")
        if gate.unsettled and not gate.passed:
            click.echo(f"        {gate.unsettled}")

    click.echo(f"bundle: {done.folder}")
    if not done.passed:
        open_ = [gate for gate in done.gates if gate.verdict == done.verdict]
        click.echo(
            f"error: {'; '.join(map(_missed, open_))}. Read {done.folder}/report.html",
            err=True,
        )
        sys.exit(3 if done.verdict == "inconclusive" else 1)

    click.echo(f"next: ftkit verify {shlex.quote(str(done.folder))}")


def _missed(gate: Gate) -> str:
    return f"gate {gate.name}: expected at most {gate.limit:.4g}, found {gate.value:.4g}"


@main.command(short_help="Check a bundle on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@PROVIDERS_OPTION
@KEY
@click.option(
    "--outputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Another compiler's outputs for handoff/inputs.npy: `logits`.",
)
@click.option(
    "--add-to",
    type=click.Path(path_type=Path),
    metavar="COPY",
    help="Copy of BUNDLE to add the evidence to; made if missing.",
)
def verify(
    bundle: Path, providers: str, key: Path | None, outputs: Path | None, add_to: Path | None
) -> None:
    """Check hashes, golden vectors and sealed evidence of BUNDLE (folder or zip) on this machine.

    Exit 1 when a check fails, 3 when --outputs is inconclusive.
    """
    from ftkit_export.bundle import archive
    from ftkit_export.runtime.session import parse_providers

    code = 0
    with archive.opened(bundle, key) as folder:
        if key:
            click.echo(f"signed with {key.name}")

        for provider in parse_providers(providers):
            result = api.verify(folder, provider=provider)
            _tell_verification(provider, result)
            code = code if result.passed else 1
            if add_to:
                click.echo(f"evidence: {_add_evidence(folder, add_to, provider, result)}")

        if outputs:
            code = code or _judge_outputs(folder, outputs)

    click.echo({0: "verified", 3: "inconclusive"}.get(code, "NOT verified"))
    sys.exit(code)


def _tell_verification(provider: str, result: Verification) -> None:
    click.echo(f"{provider}: {result.files} files unchanged")
    for placement in result.placement:
        click.echo(f"{provider}: {placement}")

    for check in result.checks:
        verdict = "ok" if check.passed else "FAILED"
        click.echo(
            f"{provider}: {check.name} of {check.images} golden images: {verdict}, "
            f"worst {check.file} at {check.value:.2f} of its tolerance"
        )

    for gate in result.failed_gates:
        click.echo(f"sealed gate FAILED: {gate}")


def _add_evidence(folder: Path, copy: Path, provider: str, result: Verification) -> Path:
    """Write the result into a copy of the bundle; returns the file."""
    from ftkit_export.bundle import archive
    from ftkit_export.runtime.latency import machine

    here = machine()
    evidence = {"machine": here, "passed": result.passed, **dataclasses.asdict(result)}
    name = f"{provider}-{here['fingerprint']}"
    return archive.add_evidence(folder, copy, name, json.dumps(evidence, indent=1))


def _judge_outputs(folder: Path, outputs: Path) -> int:
    """Judge and print what another compiler made of handoff/inputs.npy; the exit code."""
    from ftkit_export.bundle.handoff import judge_outputs
    from ftkit_export.runtime.verify import read_manifest

    judged = judge_outputs(folder, outputs, read_manifest(folder)["limits"]["max_accuracy_drop"])
    drop = judged.paired
    click.echo(
        f"outputs: accuracy {judged.accuracy:.4f}, fp32 {judged.accuracy_fp32:.4f} on {drop.images} val "
        f"images; drop {drop.drop * 100:+.2f} points [{drop.low * 100:+.2f}, {drop.high * 100:+.2f}]; "
        f"least cosine {judged.cosine:.5f}, top-1 changed {judged.top1_changed}\n"
        f"outputs: {judged.verdict}"
    )
    return {"accepted": 0, "refused": 1}.get(judged.verdict, 3)


STANDARD_INPUT = Path("-")


@main.command(short_help="Classify images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True))
@click.option("--provider", default="cpu", show_default=True)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per line, with all probabilities."
)
@click.option(
    "--trace",
    "traced",
    is_flag=True,
    help="Print the steps to each answer: shapes, parameters, times.",
)
@click.option(
    "--explain", is_flag=True, help="Write a class activation map of each answer into --out."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("explained"),
    show_default=True,
    metavar="FOLDER",
)
@MAX_PIXELS_OPTION
@KEY
def predict(
    bundle: Path,
    images: tuple[Path, ...],
    provider: str,
    as_json: bool,
    traced: bool,
    explain: bool,
    out: Path,
    key: Path | None,
) -> None:
    """Classify IMAGES: files, folders, or - for one image on standard input."""
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.conversion.class_activation import Explainer
    from ftkit_export.runtime.errors import ImageError
    from ftkit_export.runtime.predict import image_files

    for path in images:
        if re.match(r"\w+:/", str(path)):
            raise FtkitError(
                f"{path}: expected a file or a folder, found a web address. Try curl -s URL | ftkit predict BUNDLE -"
            )

    files: list[Path] = []
    for path in images:
        files += [path] if path == STANDARD_INPUT else image_files([path])

    if traced:
        _refuse_with_trace(as_json, explain, provider)
        sys.exit(_trace(bundle, files, key))

    bad = 0
    with unpacked(bundle, key) as folder:
        classify = api.load(folder, provider=provider)
        single = classify.task == "single-label"
        explainer = Explainer(folder) if explain else None
    if provider != "cpu":
        click.echo(f"{provider}: {classify.session.placement}", err=True)

    for path in files:
        try:
            content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path
            answer = classify(content)
            maps: dict[str, Path] = {}
            if explainer:
                place = Path("stdin") if path == STANDARD_INPUT else path
                for name in answer.explained:
                    label = classify.labels.index(name)
                    named = "" if single else name
                    maps[name] = explainer.write(place, label, out, content, named)
        except ImageError as error:
            bad += 1
            click.echo(f"error: {error}", err=True)
            continue

        if as_json:
            paths = {name: str(heat) for name, heat in maps.items()}
            more = {"explained": next(iter(paths.values())) if single else paths} if paths else {}
            click.echo(json.dumps({"image": str(path), **dataclasses.asdict(answer), **more}))
        else:
            line = f"{path}  {answer.text}"
            click.echo("  ".join([line, *map(str, maps.values())]))

    sys.exit(2 if bad else 0)


def _refuse_with_trace(as_json: bool, explain: bool, provider: str) -> None:
    for name, given in (
        ("--json", as_json),
        ("--explain", explain),
        ("--provider", provider != "cpu"),
    ):
        if given:
            raise FtkitError(
                f"{name}: expected no such option with --trace, found one. Leave it out"
            )


def _trace(bundle: Path, files: list[Path], key: Path | None) -> int:
    """Print the steps to each answer; the exit code."""
    from ftkit.evaluation.trace import trace_image
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.errors import ImageError

    bad = 0
    with unpacked(bundle, key) as folder:
        for path in files:
            try:
                content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path
                click.echo(f"{path}\n{trace_image(folder, content)}")
            except ImageError as error:
                bad += 1
                click.echo(f"error: {error}", err=True)

    return 2 if bad else 0


@main.command(short_help="List the recipes, or show one.")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or print one fully resolved, with the blocks of its backbone."""
    from ftkit import recipe as recipes_

    if name is None:
        for each in recipes_.names():
            doc = (recipes_.load_module(each).__doc__ or "").strip().partition("\n")[0]
            click.echo(f"{each:<20} {doc}".rstrip())
        return

    from ftkit.models.backbones import blocks, build

    loaded = recipes_.load_recipe(name)
    click.echo((recipes_.load_module(name).__doc__ or "").strip() + "\n")
    backbone = build(loaded.backbone, 2, "none", cut=loaded.cut, pooling=loaded.pooling)
    whole = dataclasses.replace(loaded, preprocess=loaded.preprocess or backbone.preprocess)
    click.echo(json.dumps(recipes_.resolve(whole), indent=1))
    listed = blocks(backbone)
    click.echo(f"\nlast:1 to last:{len(listed)} count these blocks from the end; cut names one:")
    click.echo("  " + " ".join(listed))


@main.command(short_help="Check which ONNX Runtime providers work here.")
def doctor() -> None:
    """Check which providers can open a session here, and say why the others cannot."""
    from ftkit.cli.doctor import examine

    for line in examine():
        click.echo(line)


@main.command(short_help="The whole story on real photographs, offline.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def demo(out: Path) -> None:
    """Run the whole workflow on real photographs, offline: train, export, verify, predict."""
    from ftkit.cli.demo import run_demo

    run_demo(out)


for command in (
    search,
    drift,
    enroll,
    review,
    shadow,
    delta,
    audit_data,
    evaluate,
    bench,
    report,
    try_bundle,
    cache,
):
    main.add_command(command)


def run_recipe(recipe: Recipe) -> None:
    """Train, export and validate one recipe: what `python -m ftkit_recipes.NAME DATA` does."""

    @click.command(help=f"Train {recipe.name} on DATA, export it, verify the bundle.")
    @click.argument("data", type=click.Path(path_type=Path))
    @click.option(
        "--out", type=click.Path(path_type=Path), help="Run folder; the bundle is OUT-bundle."
    )
    @SET
    @click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
    @click.option("--seed", default=0)
    @PROVIDERS_OPTION
    @click.option("--quick", is_flag=True, help="Shorter latency runs.")
    def whole(
        data: Path,
        out: Path | None,
        settings: tuple[str, ...],
        device: str,
        seed: int,
        providers: str,
        quick: bool,
    ) -> None:
        run = api.train(
            data, out=out, recipe=recipe, settings=settings, seed=seed, device=device
        ).folder
        bundle = run.resolve().with_name(run.resolve().name + "-bundle")
        context = click.get_current_context()
        context.invoke(
            export, run=run, out=bundle, settings=(), providers=providers, data=None, quick=quick
        )
        context.invoke(
            verify, bundle=bundle, providers=providers, key=None, outputs=None, add_to=None
        )

    _Group(commands={"whole": whole}).main(
        ["whole", *sys.argv[1:]], prog_name=f"python -m ftkit_recipes.{recipe.name}"
    )
