"""The command `bench`: latency, memory and size, alone and against a baseline."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.options import JSON, KEY, Command, echo_for, writable, write_json
from ftkit.options import BenchOptions
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.benchmark.budgets import Budget
    from ftkit_export.proof.attribution import Explanation, Profile
    from ftkit_export.proof.endurance import Course
    from ftkit_export.proof.regression import Comparison
    from ftkit_export.runtime.verify import Outcome


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
@click.option(
    "--profile",
    is_flag=True,
    help="Time every operator; with --against, say which are slower even if the gate passes.",
)
@click.option(
    "--sustained",
    metavar="TIME",
    help="Run without a pause for 30s, 10m or 1h: warm-up, throttling, sustained latency.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=writable,
    help="With --profile or --sustained: a page with the chart.",
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
    profile: bool,
    sustained: str | None,
    page: Path | None,
    key: Path | None,
    as_json: Path | None,
    **given: Any,
) -> None:
    """Latency, cold start, memory and size of MODEL: a bundle or any ONNX file.

    When --against finds it slower, the operators that make it so are named. Exit 1 when a budget or
    --against fails, 3 when the result is inconclusive.
    """
    from ftkit.benchmark import budgets as judging
    from ftkit.benchmark import history
    from ftkit.utils import console
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.session import parse_providers

    echo = echo_for(as_json)
    limits = judging.parse_budgets(budgets)
    options = BenchOptions(
        providers=parse_providers(providers),
        threads=_numbers("--threads", threads or ""),
        batches=_numbers("--batch", batch or "") or [0],
        **given,
    )
    if profile or sustained:
        table = bool(limits or save) and not sustained
    else:
        table = bool(host or limits or save or not options.against)
    _check(ctx, options, host, table)
    _check_courses(ctx, options, host, profile, sustained, page)

    with ExitStack() as stack:
        path = stack.enter_context(unpacked(model, key))
        say = stack.enter_context(console.note())
        if sustained:
            measured = _sustained(stack, path, options, host, limits, sustained, key, say)
        elif host:
            measured = _measure_there(host, path, options, say)
        elif profile and not options.against:
            measured = _profiled(path, options, table, say)
        elif not options.against:
            measured = BenchResult(figures=judging.measure_here(path, options, say=say))
        elif _is_stored(options.against):
            measured = _against_stored(path, options, table, say)
        else:
            baseline = stack.enter_context(unpacked(options.against, key))
            measured = _against_file(path, baseline, options, table, say, profile=profile)

    outcomes = _tell(echo, measured, limits)
    if measured.frame and not table:
        echo(f"{console.frames(measured.frame)}, decoding apart")
    if page:
        from ftkit.report.bench_page import write_bench_page

        remark = "" if measured.found else measured.text
        judged = [
            *measured.budgets,
            *(judging.judge_bench(measured.figures, limits) if "rows" in measured.figures else []),
        ]
        write_bench_page(page, model.name, measured.found, measured.verdicts, remark, judged)
        echo(f"report: {page}")
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
    verdicts: of the regression gate. frame: frame size that the gate compared at. found: what was
    profiled, explained or sustained; text: the same for people; outcomes: its own verdicts; budgets: of a course.
    """

    figures: dict[str, Any]
    verdicts: Sequence[Comparison] = ()
    frame: str = ""
    found: Profile | Explanation | Course | None = None
    text: str = ""
    outcomes: Sequence[Outcome] = ()
    budgets: Sequence[Budget] = ()


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
    path: Path,
    baseline: Path,
    options: BenchOptions,
    table: bool,
    say: Callable[[str], object],
    *,
    profile: bool,
) -> BenchResult:
    """Run the regression gate with candidate and baseline in the same processes.

    table: measure the full tables too. profile: explain the difference even if the gate passes.
    """
    from ftkit.benchmark.budgets import compare_in_turn
    from ftkit.benchmark.why import causes_text, explain_files
    from ftkit_export.runtime.measure import find

    figures = _figures(path, options, table, say)
    verdicts = compare_in_turn(path, baseline, options, say=say)
    measured = BenchResult(
        figures={**figures, **_fingerprints(path, find(baseline).fingerprint)},
        verdicts=verdicts,
        frame=find(path, options.image, options.frame).frame,
    )
    slower = verdicts[0].verdict == "failed" and options.providers[0] == "cpu"
    if not (profile or slower):
        return measured
    say("operators, in turn")
    try:
        found = explain_files(path, baseline, options)
    except FtkitError as error:
        if profile:
            raise
        # The verdict stands without it
        return dataclasses.replace(measured, text=f"why: not found out: {error}")
    return dataclasses.replace(
        measured,
        figures={**measured.figures, "why": dataclasses.asdict(found)},
        found=found,
        text=causes_text(found),
    )


def _profiled(
    path: Path, options: BenchOptions, table: bool, say: Callable[[str], object]
) -> BenchResult:
    """Time each operator of a file. table: measure the full tables too."""
    from ftkit.benchmark.why import profile_file, profile_text

    figures = _figures(path, options, table, say)
    say("operators")
    found = profile_file(path, options)
    told = {**figures, "profile": dataclasses.asdict(found)}
    return BenchResult(figures=told, found=found, text=profile_text(found))


def _sustained(
    stack: ExitStack,
    path: Path,
    options: BenchOptions,
    host: str | None,
    limits: Mapping[str, float],
    duration: str,
    key: Path | None,
    say: Callable[[str], object],
) -> BenchResult:
    """Run a file without a pause, and judge what it settles at."""
    from ftkit.benchmark import endurance
    from ftkit.benchmark.budgets import as_budgets
    from ftkit_export.bundle.archive import unpacked

    seconds = endurance.parse_duration(duration)
    if options.against:
        baseline = stack.enter_context(unpacked(options.against, key))
        options = dataclasses.replace(options, against=baseline)
    endurance.require_judged(limits)
    say(f"without a pause for {duration}")
    course, machine = endurance.sustained(path, options, seconds, host=host)
    judged = endurance.judge_course(course, limits)
    text = [endurance.course_text(course), *[as_budgets(judged)] * bool(judged)]
    return BenchResult(
        figures={"machine": machine, "sustained": endurance.as_json(course)},
        found=course,
        text="\n".join(text),
        budgets=judged,
        outcomes=[
            *(item.verdict for item in judged),
            *([course.verdict] if course.verdict else []),
        ],
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

    if measured.text:
        echo(measured.text)
    return [*outcomes, *measured.outcomes]


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
    if not options.against and (given := _given(ctx, *gate)):
        raise FtkitError(
            f"--{given[0].replace('_', '-')}: expected --against with it, found none. Try --against BASELINE"
        )
    _refuse(ctx, "--ssh", bool(host), "batch", "image", "frame", *gate)
    measured_before = ("threads", "providers", "batch", "frame", *gate)
    _refuse(ctx, "--against FILE.json", stored and not host, *measured_before)
    gate_only = bool(options.against) and not table
    _refuse(ctx, "--against without --budget or --save", gate_only, "quick")
    if (host or options.against) and options.several:
        raise FtkitError(
            "--ssh, --against: expected one provider, number of threads and batch, found several. Try one"
        )

    if stored and options.against:
        read_bench(options.against)


def _refuse(ctx: click.Context, why: str, there: bool, *names: str) -> None:
    """Raise FtkitError for an option of `names` that was given but would be ignored."""
    given = _given(ctx, *names)
    if there and given:
        option = f"--{given[0].replace('_', '-')}"
        raise FtkitError(f"{option}: expected no such option with {why}, found one. Leave it out")


def _check_courses(
    ctx: click.Context,
    options: BenchOptions,
    host: str | None,
    profile: bool,
    sustained: str | None,
    page: Path | None,
) -> None:
    """The same for --profile, --sustained and --report."""
    from ftkit_export.proof.attribution import require_cpu
    from ftkit_export.proof.endurance import SAME_PROCESS

    stored = bool(options.against) and _is_stored(options.against or "")
    _refuse(ctx, "--sustained", bool(sustained), "profile", "quick", "save", "seconds")
    _refuse(ctx, "--profile without --budget or --save", profile and not options.against, "quick")
    if profile and (host or stored):
        raise FtkitError(
            "--profile: expected a file here, and with --against another file, found --ssh or the JSON of an earlier "
            "bench. Leave out one of them"
        )
    if sustained and (stored or (host and options.against)):
        raise FtkitError(
            "--sustained: expected with --against a file to run in turn here, found the JSON of an earlier bench, or "
            "--ssh. Leave out one of them"
        )
    if page and not (profile or sustained or options.against):
        raise FtkitError(
            "--report: expected --profile or --sustained with it, found neither. Try --profile"
        )
    if (
        sustained
        and options.against
        and _given(ctx, "max_slowdown")
        and options.max_slowdown < SAME_PROCESS
    ):
        raise FtkitError(
            f"--max-slowdown: expected {SAME_PROCESS:g} or more with --sustained, since two sessions of one model in a "
            f"process may differ by that, found {options.max_slowdown:g}. Try it without --sustained"
        )
    if profile:
        require_cpu(options.providers[0])
    if (profile or sustained) and options.several:
        raise FtkitError(
            "--profile, --sustained: expected one provider, number of threads and batch, found several. Try one"
        )


def _given(ctx: click.Context, *names: str) -> list[str]:
    """Options that stand on the command line."""
    return [
        name
        for name in names
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
