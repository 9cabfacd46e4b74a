"""The command `eval`: accuracy of an exported file, alone and against a release."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.options import JSON, KEY, MAX_PIXELS_OPTION, Command, echo_for, write_json
from ftkit_export.runtime.errors import FtkitError

if TYPE_CHECKING:
    from ftkit.data.dataset import Labelled


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
    type=float,
    help="Largest accepted drop of accuracy or macro-AP, or rise of the mean absolute error, as a fraction.  "
    "[default: 0.01; of the error 0.02]",
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
    max_drop: float | None,
    provider: str,
    group_by: str,
    root: Path | None,
    key: Path | None,
    as_json: Path | None,
) -> None:
    """Accuracy of BUNDLE's file on labelled images: the test split of DATA, or all of DATA.

    Images that the model was trained on are left out. Of a multi-label model: macro-AP; of a regression
    model: the mean absolute error.

    With --against: exit 0 when the accuracy drop is at most --max-drop, 1 when it is larger, 3 when
    the result is inconclusive.
    """
    from ftkit.data.dataset import labelled
    from ftkit.evaluation.bundle import answers_of, require_same
    from ftkit.recipe import Export
    from ftkit.utils import console
    from ftkit_export.bundle.archive import unpacked

    if max_drop is not None and not 0 < max_drop < 1:
        raise FtkitError(
            f"--max-drop: expected a share between 0 and 1, found {max_drop:g}. Try 0.01"
        )

    if max_drop is not None and not old:
        raise FtkitError("--max-drop: expected --against with it, found none. Try --against OLD")

    echo = echo_for(as_json)
    bundles = [bundle, old] if old else [bundle]
    with unpacked(bundle, key) as new_path, unpacked(old or bundle, key) as old_path:
        asked = require_same(new_path, old_path)
    images, left_out = _unseen_by_all(bundles, labelled(data, group_by, root, asked), key, echo)
    if not images:
        raise FtkitError(
            f"{data}: expected images that neither bundle was trained on, found none. Try held-out images"
        )

    answered = []
    for each in bundles:
        title = f"{each.name} on {len(images)} images"
        with unpacked(each, key) as path, console.bar(title) as step:
            answered.append(
                answers_of(
                    path, images, asked if asked.names else None, provider=provider, step=step
                )
            )

    new = answered[0]
    if provider != "cpu":
        echo(f"{provider}: {new.placement}")
    for line in new.unreadable:
        click.echo(f"left out: {line}", err=True)

    told: dict[str, Any] = {
        "bundle": str(bundle),
        "metrics": new.figures,
        "left_out": left_out,
    }
    if not old:
        echo(new.text())
        write_json(as_json, told)
        return

    before = answered[1]
    usual = Export.max_error_rise if asked.task == "regression" else Export.max_accuracy_drop
    change = new.against(before, max_drop=usual if max_drop is None else max_drop)
    echo(new.text(before, change))
    told["against"] = {"bundle": str(old), "metrics": before.figures, **change.as_json()}
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

        fresh = {image.path for image in left}
        kept = [image for image in kept if image.path in fresh]
        left_out[str(bundle)] = seen

        if seen is None:
            click.echo(
                f"{bundle.name} does not tell what it was trained on: the training images may be among these",
                err=True,
            )
        elif seen:
            echo(f"left out: {seen} images that {bundle.name} was trained on")

    return kept, left_out
