"""Commands for bundles that have shipped: drift, delta."""

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


@click.command(cls=Command, short_help="A zip of what differs between two bundles.")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.zip",
    help="[default: NEW.delta.zip]",
)
def delta(old: Path, new: Path, out: Path | None) -> None:
    """Write a zip of NEW without the files that OLD has too.

    A device that runs OLD installs it with `device/update.py`, which checks every file as always.
    """
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.bundle.update import delta as write_delta

    path = out or new.with_name(f"{new.name.removesuffix('.zip')}.delta.zip")
    with unpacked(old) as before, unpacked(new) as after:
        left_out = write_delta(before, after, path)
    click.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; {left_out / 1e6:.1f} MB are on the device"
    )
