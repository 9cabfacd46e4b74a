"""Commands that evaluate an exported model: eval and bench. Registered in main.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.options import MAX_PIXELS_OPTION, Command
from ftkit.options import BenchOptions
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.data.dataset import Labelled
    from ftkit_export.proof.regression import Comparison
    from ftkit_export.runtime.verify import Outcome


def _writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Check the output path before minutes of measurement, not after."""
    if path and path != Path("-") and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise FtkitError(
            f"{path}: expected a file in a folder that is there, found none. Try --json bench.json"
        )
    return path


JSON = click.option(
    "--json",
    "as_json",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=_writable,
    help="Write all figures to FILE as JSON; - prints them.",
)


KEY = click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="Public key that the bundle must be signed with.",
)


@click.command(
    "eval", cls=Command, short_help="Accuracy on labelled images; compare with a release."
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--against", "old", type=click.Path(path_type=Path), metavar="BUNDLE", help="An older release."
)
@click.option(
    "--max-drop",
    default=0.01,
    show_default=True,
    help="Largest accepted drop in accuracy, as a fraction.",
)
@click.option("--provider", default="cpu", show_default=True)
@click.option(
    "--group-by",
    default="",
    metavar="REGEX",
    help="Group related images by a pattern in their paths.",
)
@MAX_PIXELS_OPTION
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder that paths in a CSV are relative to. [default: the CSV's own]",
)
@KEY
@JSON
def evaluate(
    bundle: Path,
    data: Path,
    old: Path | None,
    max_drop: float,
    provider: str,
    group_by: str,
    root: Path | None,
    key: Path | None,
    as_json: Path | None,
) -> None:
    """Accuracy of BUNDLE's file on labelled images: the test split of DATA, or all of DATA.

    Images that the model was trained on are left out.

    With --against: exit 0 when the accuracy drop is at most --max-drop, 1 when it is larger, 3 when
    the result is inconclusive.
    """
    from ftkit.data.dataset import labelled
    from ftkit.evaluation.bundle import answers_of, compare_releases, comparison_text
    from ftkit.utils import console
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.predict import Classifier

    if not 0 < max_drop < 1:
        raise FtkitError(
            f"--max-drop: expected a share between 0 and 1, found {max_drop:g}. Try 0.01"
        )

    echo = _echo(as_json)
    bundles = [bundle, old] if old else [bundle]
    for each in bundles:
        with unpacked(each, key) as path:
            Classifier(path)  # a model of another task is refused before its images are
    images, left_out = _unseen_by_all(bundles, labelled(data, group_by, root), key, echo)
    if not images:
        raise FtkitError(
            f"{data}: expected images that neither bundle was trained on, found none. Try held-out images"
        )

    answered = []
    for each in bundles:
        title = f"{each.name} on {len(images)} images"
        with unpacked(each, key) as path, console.bar(title) as step:
            answered.append(answers_of(path, images, provider=provider, step=step))

    new = answered[0]
    if provider != "cpu":
        echo(f"{provider}: {new.placement}")
    for line in new.unreadable:
        click.echo(f"left out: {line}", err=True)

    told: dict[str, Any] = {
        "bundle": str(bundle),
        "metrics": dataclasses.asdict(new.metrics),
        "left_out": left_out,
    }
    if not old:
        echo(comparison_text(new))
        write_json(as_json, told)
        return

    before = answered[1]
    change = compare_releases(new, before, max_drop=max_drop)
    echo(comparison_text(new, before, change))
    told["against"] = {
        "bundle": str(old),
        "metrics": dataclasses.asdict(before.metrics),
        **dataclasses.asdict(change),
    }
    write_json(as_json, told)
    sys.exit({"accepted": 0, "refused": 1}.get(change.verdict, 3))


def _unseen_by_all(
    bundles: Sequence[Path], images: Sequence[Labelled], key: Path | None, echo: Callable[..., None]
) -> tuple[list[Labelled], dict[str, int | None]]:
    """Images that no bundle was trained on; and, by bundle, how many it was trained on.

    None for a bundle that does not tell.
    """
    from ftkit.evaluation.bundle import require_labels, unseen
    from ftkit_export.bundle.archive import unpacked

    kept = list(images)
    left_out: dict[str, int | None] = {}
    for bundle in bundles:
        with unpacked(bundle, key) as path:
            require_labels(path, images)
            left, seen = unseen(path, images)

        fresh = set(left)
        kept = [image for image in kept if image in fresh]
        left_out[str(bundle)] = seen

        if seen is None:
            click.echo(
                f"{bundle.name} does not tell what it was trained on: the training images may be among these",
                err=True,
            )
        elif seen:
            echo(f"left out: {seen} images that {bundle.name} was trained on")

    return kept, left_out


@click.command(cls=Command, short_help="Latency, memory, size; compare with a baseline.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BASELINE",
    help="Baseline: a bundle or ONNX file to run alternately with MODEL, or an earlier bench's JSON.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="NAME=LIMIT",
    help="p50_ms, p95_ms, cold_ms, memory_mb or size_mb. Repeatable.",
)
@click.option("--providers", default="cpu", show_default=True, metavar="A,B")
@click.option(
    "--threads", metavar="N,M", help="CPU threads. [default: 1 and all cores; 1 with --against]"
)
@click.option("--batch", metavar="N,M", help="[default: the file's fixed batch size, else 1]")
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True),
    help="Input image for files exported by ftkit. [default: a golden image; noise for other files]",
)
@click.option(
    "--frame",
    metavar="WxH",
    help="Frame size that the image is resized to. [default: the bundle's own]",
)
@click.option(
    "--max-slowdown",
    default=0.05,
    show_default=True,
    help="Slowdown that --against tolerates, as a fraction.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Time limit for --against.")
@click.option("--quick", is_flag=True, help="Shorter runs, marked as such.")
@click.option(
    "--save", is_flag=True, help="Append to ftkit-bench.jsonl at the root of this repository."
)
@click.option(
    "--ssh",
    "host",
    metavar="USER@HOST",
    help="Measure on this host; USER@HOST:PYTHON names its Python interpreter.",
)
@KEY
@JSON
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    model: Path,
    budgets: tuple[str, ...],
    providers: str,
    threads: str | None,
    batch: str | None,
    save: bool,
    host: str | None,
    key: Path | None,
    as_json: Path | None,
    **given: Any,
) -> None:
    """Latency, cold start, memory and size of MODEL: a bundle or any ONNX file.

    Exit 1 when a budget or --against fails, 3 when the result is inconclusive.
    """
    from ftkit.benchmark import budgets as judging
    from ftkit.benchmark import history
    from ftkit.utils import console
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.session import parse_providers

    echo = _echo(as_json)
    limits = judging.parse_budgets(budgets)
    options = BenchOptions(
        providers=parse_providers(providers),
        threads=_numbers("--threads", threads or ""),
        batches=_numbers("--batch", batch or "") or [0],
        **given,
    )
    table = bool(host or limits or save or not options.against)
    _check(ctx, options, host, table)

    with ExitStack() as stack:
        path = stack.enter_context(unpacked(model, key))
        say = stack.enter_context(console.note())
        if host:
            measured = _measure_there(host, path, options, say)
        elif not options.against:
            measured = BenchResult(figures=judging.measure_here(path, options, say=say))
        elif _is_stored(options.against):
            measured = _against_stored(path, options, table, say)
        else:
            baseline = stack.enter_context(unpacked(options.against, key))
            measured = _against_file(path, baseline, options, table, say)

    outcomes = _tell(echo, measured, limits)
    if measured.frame and not table:
        echo(f"{console.frames(measured.frame)}, decoding apart")
    if save:
        echo(f"saved: {history.append_measurement(measured.figures, Path.cwd())}")

    write_json(as_json, measured.figures)
    code = judging.exit_code(outcomes)

    if outcomes:
        echo({0: "passed", 1: "FAILED", 3: "inconclusive"}[code])

    sys.exit(code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Result of one `ftkit bench` call.

    figures: output of --json; without the tables' figures when only the gate was requested.
    verdicts: of the regression gate. frame: frame size that the gate compared at.
    """

    figures: dict[str, Any]
    verdicts: Sequence[Comparison] = ()
    frame: str = ""


def _measure_there(
    host: str, path: Path, options: BenchOptions, say: Callable[[str], object]
) -> BenchResult:
    """Measure a bundle on another machine, and run the gate against stored figures from there."""
    from ftkit.benchmark import ssh
    from ftkit.benchmark.budgets import compare_there
    from ftkit_export.runtime.measure import read_bench

    say(f"measuring on {host}")
    threads = options.threads[0] if options.threads else 0
    measure = partial(
        ssh.bench_there,
        host,
        path,
        provider=options.providers[0],
        threads=threads,
        quick=options.quick,
    )
    stored = read_bench(options.against) if options.against else None
    figures = measure()
    if not stored:
        return BenchResult(figures=figures)

    verdicts = compare_there(measure, figures, stored)
    fingerprints = _fingerprints(path, stored["fingerprint"])
    return BenchResult(
        figures={**figures, **fingerprints}, verdicts=verdicts, frame=stored.get("frame", "")
    )


def _against_stored(
    path: Path, options: BenchOptions, table: bool, say: Callable[[str], object]
) -> BenchResult:
    """Run the regression gate against the JSON of an earlier bench.

    table: measure the full tables too.
    """
    from ftkit.benchmark.budgets import compare_with_stored
    from ftkit_export.runtime.measure import find, read_bench

    assert options.against
    stored = read_bench(options.against)
    figures = _figures(path, options, table, say)
    verdicts = compare_with_stored(path, stored, image=options.image)
    frame = stored.get("frame") or find(path, options.image, options.frame).frame

    return BenchResult(
        figures={**figures, **_fingerprints(path, stored.get("fingerprint"))},
        verdicts=verdicts,
        frame=frame,
    )


def _against_file(
    path: Path, baseline: Path, options: BenchOptions, table: bool, say: Callable[[str], object]
) -> BenchResult:
    """Run the regression gate with candidate and baseline in the same processes.

    table: measure the full tables too.
    """
    from ftkit.benchmark.budgets import compare_in_turn
    from ftkit_export.runtime.measure import find

    figures = _figures(path, options, table, say)
    verdicts = compare_in_turn(path, baseline, options, say=say)

    return BenchResult(
        figures={**figures, **_fingerprints(path, find(baseline).fingerprint)},
        verdicts=verdicts,
        frame=find(path, options.image, options.frame).frame,
    )


def _figures(
    path: Path, options: BenchOptions, table: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Figures to report beside the gate's verdicts.

    The machine; with `table` also the full tables, on one thread unless `options` names others.
    """
    from ftkit.benchmark.budgets import measure_here
    from ftkit_export.runtime.latency import machine

    if not table:
        return {"machine": machine()}

    return measure_here(path, dataclasses.replace(options, threads=options.threads or [1]), say=say)


def _fingerprints(path: Path, baseline: str | None) -> dict[str, Any]:
    from ftkit_export.runtime.measure import find

    return {"fingerprints": {"model": find(path).fingerprint, "baseline": baseline}}


def _is_stored(baseline: str | Path) -> bool:
    """Whether `baseline` is the JSON of an earlier bench rather than a model."""
    return Path(baseline).suffix == ".json"


def _tell(
    echo: Callable[..., None],
    measured: BenchResult,
    limits: Mapping[str, float],
) -> list[Outcome]:
    """Print tables, budgets and gate; add the verdicts to the figures; return the outcomes."""
    from ftkit.benchmark import budgets as judging

    told = measured.figures
    outcomes: list[Outcome] = []
    if "rows" in told:
        echo(judging.as_tables(told))
        budgeted = judging.judge_bench(told, limits)
        outcomes += [item.verdict for item in budgeted]
        echo(judging.as_budgets(budgeted), nl=bool(budgeted))
        told["budgets"] = [
            {**dataclasses.asdict(item), "verdict": item.verdict} for item in budgeted
        ]

    if measured.verdicts:
        echo(judging.as_gate(measured.verdicts))
        outcomes += [item.verdict for item in measured.verdicts]
        told["against"] = [dataclasses.asdict(item) for item in measured.verdicts]

    return outcomes


def _numbers(option: str, text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) < 10_000 for part in parts) or (
        not parts and text
    ):
        raise FtkitError(
            f"{option} {text}: expected numbers above 0, found another form. Try {option} 1,4"
        )
    return [int(part) for part in dict.fromkeys(parts)]


def _check(ctx: click.Context, options: BenchOptions, host: str | None, table: bool) -> None:
    """Raise FtkitError for options that conflict, rather than ignore one."""
    from ftkit_export.runtime.measure import read_bench
    from ftkit_export.runtime.preprocess import parse_frame

    if options.frame:
        parse_frame(options.frame)
    if not 0 < options.max_slowdown < 1 or not 1 <= options.seconds < 1e5:
        raise FtkitError(
            "--max-slowdown, --seconds: expected a share below 1 and at least 1 s, found "
            f"{options.max_slowdown:g} and {options.seconds:g}. Try 0.05 and 120"
        )

    stored = bool(options.against) and _is_stored(options.against or "")
    if host and options.against and not stored:
        raise FtkitError(
            f"--against {options.against}: expected the JSON of an earlier bench with --ssh, found another. "
            "Try --ssh HOST --json FILE for the baseline first"
        )

    gate = ("max_slowdown", "seconds")
    _refuse(ctx, "--ssh", bool(host), "batch", "image", "frame", *gate)
    measured_before = ("threads", "providers", "batch", "frame", *gate)
    _refuse(ctx, "--against FILE.json", stored and not host, *measured_before)
    _refuse(ctx, "--against without --budget or --save", not table, "quick")
    if (host or options.against) and options.several:
        raise FtkitError(
            "--ssh, --against: expected one provider, number of threads and batch, found several. Try one"
        )

    if stored and options.against:
        read_bench(options.against)


def _refuse(ctx: click.Context, why: str, there: bool, *names: str) -> None:
    """Raise FtkitError for an option of `names` that was given but would be ignored."""
    given = [
        name
        for name in names
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if there and given:
        option = f"--{given[0].replace('_', '-')}"
        raise FtkitError(f"{option}: expected no such option with {why}, found one. Leave it out")


def _echo(as_json: Path | None) -> Callable[..., None]:
    """Print to standard output, or to standard error when the JSON goes to standard output."""
    return partial(click.echo, err=as_json == Path("-"))


def write_json(path: Path | None, told: object) -> None:
    text = json.dumps(told, indent=1, default=str) + "\n"
    if path == Path("-"):
        click.echo(text, nl=False)
    elif path:
        from ftkit_export.runtime.files import write_atomically

        write_atomically(path, text.encode())
