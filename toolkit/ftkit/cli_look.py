"""The commands that show: data. Part of the command line in cli.py."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from ftkit.cli_measure import JSON, write_json

GROUP_BY = click.option(
    "--group-by", default="", metavar="REGEX",
    help="Images whose paths below DATA match alike (its first group) stay on one side of a split.",
)  # fmt: skip


@click.command("data")
@click.argument("folder", metavar="DATA", type=click.Path(path_type=Path))
@GROUP_BY
@click.option("--recipe", default="lite0", show_default=True, metavar="NAME|FILE.py", help="Whose image size.")
@click.option(
    "--sheets", type=click.Path(path_type=Path), metavar="FOLDER", help="Contact sheets: classes, duplicates."
)
@click.option("--fix", type=click.Path(path_type=Path), metavar="OUT", help="A cleaned copy, or OUT.csv. DATA stays.")
@JSON
def audit_data(
    folder: Path, group_by: str, recipe: str, sheets: Path | None, fix: Path | None, as_json: Path | None
) -> None:  # fmt: skip
    """Audit DATA: counts, bad files, duplicates, leakage, contradicting labels, sizes, imbalance.

    Exit 1 when splits share an image or a group, or an image has two labels. What is decoded here is not decoded again
    by `ftkit train`.
    """
    from ftkit import curate, terminal
    from ftkit.audit import audit, named
    from ftkit.backbones import build
    from ftkit.canvas import build as build_canvases
    from ftkit.intake import read
    from ftkit.recipe import load

    plan, images = load(recipe), read(folder, group_by=group_by)
    if fix:
        curate.require_new(fix, images)
    preprocess = plan.preprocess or build(plan.backbone, 2, "none").preprocess
    with terminal.bar("decoding") as step:
        canvases = build_canvases(images, preprocess, step)
    with terminal.bar("comparing") as step:
        found = audit(images, canvases, step)
    echo = partial(click.echo, err=as_json == Path("-"))
    echo(curate.as_text(found, canvases))
    for path in curate.write_sheets(sheets, found, canvases) if sheets else ():
        echo(f"sheet: {path}")
    if fix:
        kept, gone = curate.clean(found, canvases)
        with terminal.bar("copying") as step:
            table = curate.write_clean(fix, kept, images, step)
        echo(f"{len(kept)} images in {table}; left out: {', '.join(f'{n} {why}' for why, n in gone.items())}")
        echo(f"next: ftkit train {table}")
    write_json(as_json, named(found, canvases))
    sys.exit(0 if found.passed else 1)
