"""The command `search`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit import api
from ftkit.cli.data import ADD, GROUP_BY, ROOT, TASK
from ftkit.cli.gpus import DEVICE, GPUS, launch_again, require_gpus
from ftkit.cli.options import MAX_PIXELS_OPTION, Command
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.searching.result import Found


@click.command(cls=Command, short_help="Find the network that fits the images and the device.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("search"),
    show_default=True,
    metavar="SEARCH",
    help="Folder of the search; an interrupted one goes on in it.",
)
@click.option(
    "--p95-ms",
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Budget: 95 % of the images.",
)
@click.option(
    "--p50-ms", type=click.FloatRange(0, min_open=True), metavar="MS", help="Budget: the median."
)
@click.option(
    "--size-mb", type=click.FloatRange(0, min_open=True), metavar="MB", help="Budget: the file."
)
@click.option(
    "--memory-mb",
    type=click.FloatRange(0, min_open=True),
    metavar="MB",
    help="Budget: peak memory of a process that runs it.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Budget: what may be lost against the most accurate network.  [default: 0.01; of an error, 0.02; the most "
    "accurate within the other budgets where none is as good]",
)
@click.option("--backbones", metavar="A,B", help="[default: those whose weights are installed]")
@click.option(
    "--sizes",
    metavar="A,B",
    help="Input sizes in pixels. [default: 96 to one above the backbone's own]",
)
@click.option(
    "--timed",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Time at most N.",
)
@click.option(
    "--finalists",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Train at most N, and choose among them.",
)
@click.option(
    "--minutes", type=click.FloatRange(0), metavar="N", help="For each finalist's training."
)
@click.option(
    "--recipe",
    default="lite0",
    show_default=True,
    metavar="NAME|FILE.py",
    help="Its stages train the finalists.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=C",
    help="Change a field of the recipe. Repeatable.",
)
@click.option(
    "--frame",
    metavar="WxH",
    help="Size of the timed image. [default: as large as 95 % of the images]",
)
@click.option("--on", metavar="USER@HOST", help="Time candidates there, over ssh.")
@click.option(
    "--target",
    type=click.Choice(["auto", "x86-vnni", "x86", "arm64"]),
    default="auto",
    show_default=True,
    help="Processor to search for. One that is not here: SEARCH/to-time times them there.",
)
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Times from there: what SEARCH/to-time printed.",
)
@DEVICE
@GPUS
@click.option("--seed", default=0, show_default=True)
@GROUP_BY
@ROOT
@ADD
@TASK
@MAX_PIXELS_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@click.pass_context
def search(
    ctx: click.Context,
    /,
    data: Path,
    backbones: str | None,
    sizes: str | None,
    gpus: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the network, its input size and its depth that fit DATA and a device.

    Exit code 1: nothing meets the budgets; the nearest is named.
    """
    options["backbones"] = [name.strip() for name in backbones.split(",")] if backbones else ()
    options["sizes"] = _whole_numbers(sizes) if sizes else ()
    if gpus:
        require_gpus(ctx, gpus)
        ctx.exit(launch_again(ctx, gpus))

    options["quiet"] = options["quiet"] or as_json
    found = api.search(data, **options)

    from ftkit.searching.result import as_json as found_as_json
    from ftkit.searching.result import as_text

    if as_json:
        click.echo(json.dumps(found_as_json(found), indent=1))
    elif not options["quiet"]:
        click.echo("\n" + as_text(found))
        click.echo(f"report: {found.folder / 'report.html'}")
        click.echo(f"next: {_next(found, data)}")
    ctx.exit(1 if found.choice.missed else 0)


def _next(found: Found, data: Path) -> str:
    """The command that goes on with the pick, on the same images and the same device."""
    asked = found.options
    if found.choice.point.run:
        words = ["ftkit", "export", str(found.folder)]
        words += ["--on", asked.on] if asked.on else []
        return shlex.join(words)
    words = ["ftkit", "train", str(data), "--recipe", str(found.folder)]
    for option, value in (
        ("--group-by", asked.group_by),
        ("--root", asked.root),
        ("--add", asked.add),
        ("--seed", asked.seed),
    ):
        words += [option, str(value)] if value else []
    return shlex.join(words)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise FtkitError(
            f"--sizes: expected whole numbers with commas between, found {text!r}. Try 128,224"
        ) from None
