"""Commands for bundles that have shipped: drift, review, enroll, shadow, delta."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftkit.cli.options import JSON, KEY, SIGN, Command, write_json
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.field.review import Picture


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
    write_drift(page, told)
    write_json(as_json, told)
    if as_json != Path("-"):
        click.echo(as_text(found))
        click.echo(f"page: {page}")
    ctx.exit(found.verdict)


@click.command(cls=Command, short_help="Order what a device collected for labelling.")
@click.argument("collected", type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Its classes are offered on the page. [default: those in the log]",
)
@click.option("--serve", is_flag=True, help="Label on a local page, one key a class.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default="any free one", metavar="N"
)
@click.option("--open/--no-open", "show", default=True, help="Open the page in a browser.")
@KEY
def review(
    collected: Path,
    bundle: Path | None,
    serve: bool,
    port: int,
    show: bool,
    key: Path | None,
) -> None:
    """Fold near duplicates of what is in COLLECTED, order the rest with the most informative first,
    and write contact sheets and COLLECTED/review/review.csv, in which to fill in labels.

    `ftkit train DATA --add COLLECTED/review/review.csv` then trains on them too.
    """
    from ftkit.field.review import ordered, read_labels, write_review

    for option, there in (("--bundle", bundle), ("--port", port)):
        if there and not serve:
            raise FtkitError(
                f"{option}: expected --serve with it, whose page it is for, found none. Try --serve"
            )
    if key and not bundle:
        raise FtkitError("--key: expected --bundle with it, found none. Try --bundle BUNDLE")
    classes = _classes(bundle, key) if bundle else []
    pictures = ordered(collected)
    table = write_review(collected, pictures)
    folded = sum(len(picture.alike) for picture in pictures)
    click.echo(f"{len(pictures)} pictures to label, {folded} near duplicates folded")
    click.echo(f"sheets: {table.parent}")
    if serve:
        _label(collected, pictures, classes, port, show)
    click.echo(f"{len(read_labels(table))} labelled: {table}")
    click.echo(f"next: ftkit train DATA --add {shlex.quote(str(table))}")


def _label(
    collected: Path, pictures: Sequence[Picture], classes: Sequence[str], port: int, show: bool
) -> None:
    """Serve the page until Ctrl-C."""
    import threading
    import webbrowser

    from ftkit.field.label_page import labelling

    offered = classes or sorted({picture.suggested for picture in pictures if picture.suggested})
    with labelling(collected, pictures, offered, port) as url:
        click.echo(f"{url}  (Ctrl-C ends)")
        if show:
            webbrowser.open(url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            click.echo("")


def _classes(bundle: Path, key: Path | None) -> list[str]:
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.runtime.verify import read_manifest

    with unpacked(bundle, key) as folder:
        return list(read_manifest(folder)["labels"])


@click.command(cls=Command, short_help="Add a class to a bundle, from a few images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name", metavar="CLASS")
@click.argument("images", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option("--out", type=click.Path(path_type=Path), metavar="NEW", required=True)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    metavar="D",
    help="Accuracy that the old classes may lose to it.",
)
@click.option(
    "--group-by",
    default="",
    metavar="REGEX",
    help="Images of one object: what it finds in a path is their group.",
)
@click.option(
    "--bundle-version",
    type=click.IntRange(0),
    metavar="N",
    help="Counter: a device takes no older one. [default: one more, or the time]",
)
@SIGN
@JSON
@KEY
@click.pass_context
def enroll(
    ctx: click.Context,
    /,
    bundle: Path,
    name: str,
    images: Path,
    out: Path,
    max_drop: float,
    group_by: str,
    bundle_version: int | None,
    sign: Path | None,
    as_json: Path | None,
    key: Path | None,
) -> None:
    """Write a bundle to NEW that also knows CLASS, from the images in FOLDER: 5 to 50 are meant.

    Nothing is trained, and no old image is needed. Exit code 0: the old classes lose at most
    --max-drop, and every gate of BUNDLE had passed; 3: the images that BUNDLE keeps cannot tell, or a
    gate was open, and NEW.inconclusive is written; 1: a gate had failed, and it is NEW.failed.
    """
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.bundle.enroll import enroll as write_enrolled
    from ftkit_export.runtime.predict import image_files

    with unpacked(bundle, key) as folder:
        found = write_enrolled(
            folder,
            name,
            image_files([images]),
            out,
            max_drop=max_drop,
            key=sign,
            version=bundle_version,
            group_by=group_by,
        )

    write_json(as_json, {**dataclasses.asdict(found), "folder": str(found.folder)})
    if as_json != Path("-"):
        click.echo(found.as_text())
        click.echo(f"bundle: {found.folder}")
    ctx.exit({"passed": 0, "failed": 1, "inconclusive": 3}[found.verdict])


@click.command(cls=Command, short_help="Which of two bundles on a device is better?")
@click.argument("collected", type=click.Path(path_type=Path))
@JSON
@click.pass_context
def shadow(ctx: click.Context, /, collected: Path, as_json: Path | None) -> None:
    """How often the bundle and the one that `classify.py --keep COLLECTED --shadow` ran beside it
    differ, which pictures to label to tell which is better, and how many.

    Exit code 0: settled, by the labels in COLLECTED/shadow/shadow.csv; 3: open.
    """
    from ftkit.field.shadow import as_text, compare

    found = compare(collected)
    write_json(as_json, {**dataclasses.asdict(found), "verdict": found.verdict})
    if as_json != Path("-"):
        click.echo(as_text(found))
    ctx.exit(3 if found.verdict == "open" else 0)


@click.command(cls=Command, short_help="A zip of what differs between two bundles.")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.zip",
    help="[default: NEW.delta.zip]",
)
@KEY
def delta(old: Path, new: Path, out: Path | None, key: Path | None) -> None:
    """Write a zip of NEW without the files that OLD has too.

    A device that runs OLD installs it with `device/update.py`, which checks every file as always.
    """
    from ftkit_export.bundle.archive import unpacked
    from ftkit_export.bundle.update import delta as write_delta

    named = new.resolve() if new.name in ("", "..") else new
    path = out or named.with_name(f"{named.name.removesuffix('.zip')}.delta.zip")
    with unpacked(old, key) as before, unpacked(new, key) as after:
        left_out = write_delta(before, after, path)
    click.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; {left_out / 1e6:.1f} MB are on the device"
    )
