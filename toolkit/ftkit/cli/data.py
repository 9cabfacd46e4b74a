"""Commands data, cache, report and try. Registered in main.py."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from functools import partial
from pathlib import Path

import click

from ftkit.cli.options import JSON, KEY, MAX_PIXELS_OPTION, Command, write_json
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically

GROUP_BY = click.option(
    "--group-by",
    default="",
    metavar="REGEX",
    help="Images with the same match (its first group) in their path below DATA stay in one split.",
)


ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder that paths in a CSV are relative to. [default: the CSV's own]",
)


ADD = click.option(
    "--add",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Further labelled images, such as `ftkit review` writes; the test split stays as it is.",
)


TASK = click.option(
    "--task",
    type=click.Choice(["single-label", "multi-label", "regression"]),
    help="What a CSV's columns mean, where they do not tell it.",
)


RUNTIME = click.option(
    "--runtime",
    type=click.Path(path_type=Path),
    metavar="FILE.tgz",
    help="onnxruntime-web package written by `npm pack`, for use offline.",
)


@click.command("data", cls=Command, short_help="Audit a data set; write a cleaned copy.")
@click.argument("folder", metavar="DATA", type=click.Path(path_type=Path))
@GROUP_BY
@ROOT
@ADD
@TASK
@MAX_PIXELS_OPTION
@click.option(
    "--recipe",
    default="lite0",
    show_default=True,
    metavar="NAME|FILE.py",
    help="Recipe that sets the image size.",
)
@click.option(
    "--sheets",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write contact sheets of classes and duplicates.",
)
@click.option(
    "--fix",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write a cleaned copy, or OUT.csv. DATA is not changed.",
)
@JSON
def audit_data(
    folder: Path,
    group_by: str,
    root: Path | None,
    add: Path | None,
    task: str | None,
    recipe: str,
    sheets: Path | None,
    fix: Path | None,
    as_json: Path | None,
) -> None:
    """Audit DATA: counts, bad files, duplicates, leakage, contradicting labels, sizes, imbalance.

    Exit 1 when splits share an image or a group, or an image has two labels. Decoded images
    are cached for `ftkit train`.
    """
    from ftkit.data import clean
    from ftkit.data.audit import audit, named
    from ftkit.data.canvas import build_canvases
    from ftkit.models.backbones import build
    from ftkit.recipe import load_recipe
    from ftkit.training.folds import read_with_folds
    from ftkit.utils import console

    plan = load_recipe(recipe)
    if task:
        plan = dataclasses.replace(plan, task=task)
    images = read_with_folds(plan, folder, 0, group_by, root, add)

    if fix:
        clean.require_new(fix, images)
    if sheets:
        clean.require_outside(sheets, images, "--sheets")

    preprocess = plan.preprocess or build(plan.backbone, 2, "none").preprocess
    with console.bar("decoding") as step:
        canvases = build_canvases(images, preprocess, step)
    with console.bar("comparing") as step:
        result = audit(images, canvases, step, preprocess.fit)

    echo = partial(click.echo, err=as_json == Path("-"))
    echo(clean.audit_text(result, canvases))

    for path in clean.write_sheets(sheets, result, canvases) if sheets else ():
        echo(f"sheet: {path}")

    if fix:
        cleaned = clean.clean(result, canvases)
        with console.bar("copying") as step:
            table = clean.write_clean(fix, cleaned.images, images, step)
        echo(f"{len(cleaned.images)} images in {table}\n{cleaned}")
        more = " --task regression" if images.task == "regression" else ""
        echo(f"next: ftkit train {shlex.quote(str(table))}{more}")

    write_json(as_json, named(result, canvases))
    sys.exit(0 if result.passed else 1)


@click.command(cls=Command, short_help="List or clear the cache.")
@click.option("--clear", is_flag=True, help="Remove all of it.")
@click.option(
    "--unused",
    type=click.IntRange(0),
    metavar="DAYS",
    help="Remove entries not used for DAYS days.",
)
def cache(clear: bool, unused: int | None) -> None:
    """List the cache kept between runs: decoded images and activations of frozen layers.

    All of it can be recomputed. FTKIT_CACHE sets its folder, FTKIT_CACHE_GB its limit (20): the
    least recently used entries are removed first.
    """
    from ftkit.utils import cache_folder, console

    if clear and unused is not None:
        raise FtkitError(
            f"--clear: expected one of --clear and --unused, found both. Try --unused {unused}"
        )
    held = cache_folder.entries()
    if clear or unused is not None:
        gone = [entry for entry in held if clear or entry.used_s >= (unused or 0) * 86_400]
        for entry in gone:
            cache_folder.put_away(entry.folder)
        click.echo(
            f"removed: {sum(entry.size_bytes for entry in gone) / 1e9:.2f} GB in {len(gone)} entries"
        )
        held = cache_folder.entries()

    rows = [("kind", "entries", "GB", "last used")]
    for kind, words in (
        ("canvases", "decoded images"),
        ("prefix", "frozen activations"),
        ("features", "features of searches"),
    ):
        own = [entry for entry in held if entry.kind == kind]
        used = f"{min(entry.used_s for entry in own) / 86_400:.0f} days ago" if own else ""
        rows.append(
            (words, str(len(own)), f"{sum(entry.size_bytes for entry in own) / 1e9:.2f}", used)
        )

    click.echo(console.table(rows))
    click.echo(f"{cache_folder.cache_folder()}: at most {cache_folder.limit_bytes() / 1e9:g} GB")


@click.command(cls=Command, short_help="Write the report of a run, a bundle or a history.")
@click.argument(
    "what", metavar="[RUN|BUNDLE|HISTORY]", required=False, type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[default: in the folder, or next to the history]",
)
def report(what: Path | None, out: Path | None) -> None:
    """Write the report of a RUN, copy that of a BUNDLE, or plot the latency HISTORY.

    HISTORY: written by `ftkit bench --save`; by default ftkit-bench.jsonl at the root of this
    repository.
    """
    from ftkit.benchmark import history
    from ftkit.report.latency_history import write_history

    if what and (what / "manifest.json").is_file():
        page = out or what / "report.html"
        if out:
            write_atomically(out, (what / "report.html").read_bytes())
    elif what and what.is_dir():
        from ftkit.report.build import load_pictures, write_report
        from ftkit.training.run import open_run, read_metrics

        run = open_run(what)
        page = out or what / "report.html"
        write_report(page, run.data, read_metrics(what), load_pictures(what / "mistakes"))
    else:
        path = what or history.place(Path.cwd())
        page = out or path.with_suffix(".html")
        write_history(history.read_history(path), page)

    click.echo(f"report: {page}")


@click.command("try", cls=Command, short_help="Try a bundle in a browser on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any free one.",
)
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@RUNTIME
@KEY
def try_bundle(bundle: Path, port: int, show: bool, runtime: Path | None, key: Path | None) -> None:
    """Try BUNDLE in a local browser: drop an image or use the camera.

    Nothing leaves the machine.
    """
    import threading
    import webbrowser

    from ftkit.exporting import web
    from ftkit_export.bundle.archive import unpacked

    with unpacked(bundle, key) as folder, web.serving(folder, web.runtime(runtime), port) as url:
        click.echo(f"{url}  (Ctrl-C ends)")
        if show:
            webbrowser.open(url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            click.echo("")
