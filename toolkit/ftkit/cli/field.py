"""Commands for what devices have collected: drift."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ftkit.cli.bench import JSON, KEY, write_json
from ftkit.cli.options import Command


@click.command(cls=Command, short_help="Has what a device sees moved from the training images?")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("collected", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Page with the course over time. [default: COLLECTED/drift.html]",
)
@JSON
@KEY
@click.pass_context
def drift(
    ctx: click.Context,
    /,
    bundle: Path,
    collected: Path,
    out: Path | None,
    as_json: Path | None,
    key: Path | None,
) -> None:
    """Test the log that `classify.py --keep` wrote into COLLECTED against BUNDLE's held-out images.

    The test may be run at any time, as often as you like. Exit code 0: no drift found; 1: drift; 3:
    too little to say.
    """
    from ftkit.field.drift import as_text, find_drift
    from ftkit.report.drift_page import write_drift
    from ftkit_export.bundle.archive import unpacked

    with unpacked(bundle, key) as folder:
        found = find_drift(folder, collected)

    page = out or collected / "drift.html"
    told = {**dataclasses.asdict(found), "folder": str(found.folder)}
    write_drift(page, {**told, "folder_uri": found.folder.resolve().as_uri()})
    write_json(as_json, told)
    if as_json != Path("-"):
        click.echo(as_text(found))
        click.echo(f"page: {page}")
    ctx.exit(found.verdict)
