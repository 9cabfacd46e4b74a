"""Shared by the commands: common options, and suggestions for options that do not exist."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from ftkit_export.runtime.errors import LIKE, FtkitError

# Options of other tools -> their equivalents here.
ELSEWHERE = {
    "p50": "--set export.p50_ms=8",
    "p50-ms": "--set export.p50_ms=8",
    "p95": "--set export.p95_ms=8",
    "p95-ms": "--set export.p95_ms=8",
    "latency-ms": "--set export.p95_ms=8",
    "size-mb": "--set export.size_mb=5",
    "memory-mb": "--set export.memory_mb=200",
    "max-drop": "--set export.max_accuracy_drop=0.01",
    "frame": "--set export.frame=640x480",
    "lr": "--set stages.1.lr=1e-4",
    "epochs": "--set stages.0.epochs=10",
    "batch-size": "--set stages.0.batch_size=16",
    "imgsz": "--set preprocess.size=160",
    "img-size": "--set preprocess.size=160",
    "size": "--set preprocess.size=160",
    "fit": "--set preprocess.fit=pad",
    "backbone": "--set backbone=NAME",
    "model": "--recipe",
    "output": "--out",
    "name": "--out",
}
BUDGET_OPTIONS = {
    "p50": "p50_ms=8",
    "p50-ms": "p50_ms=8",
    "p95": "p95_ms=8",
    "p95-ms": "p95_ms=8",
    "cold-ms": "cold_ms=300",
    "memory-mb": "memory_mb=200",
    "size-mb": "size_mb=5",
}


class Command(click.Command):
    """Suggest an existing option for an unknown one: by meaning first, then by spelling."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; raises NoSuchOption with a suggestion."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            meant = self._meant(error.option_name)
            told = f"No such option {error.option_name!r}.{f' Try {meant}.' if meant else ''}"
            raise click.NoSuchOption(error.option_name, told, ctx=ctx) from None

    def _meant(self, wrong: str) -> str:
        name = wrong.lstrip("-").lower()
        own = {
            option.lstrip("-"): option
            for item in self.params
            for option in item.opts
            if option.startswith("--")
        }
        if "budget" in own and name in BUDGET_OPTIONS:
            return f"--budget {BUDGET_OPTIONS[name]}"

        said = ELSEWHERE.get(name, "")
        if said and said.split()[0].lstrip("-") in own:
            return said

        like = difflib.get_close_matches(name, own, n=1, cutoff=LIKE)
        return own[like[0]] if like else ""


def _allow(_: click.Context, __: click.Parameter, pixels: int | None) -> None:
    """Set the limit for this process and for the decoding processes it starts."""
    if pixels:
        # Imported only when needed: it loads numpy
        from ftkit_export.runtime.preprocess import MAX_PIXELS as LIMIT

        os.environ[LIMIT] = str(pixels)


MAX_PIXELS_OPTION = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    metavar="N",
    expose_value=False,
    callback=_allow,
    help="Largest image to decode. [default: Pillow's limit, 89 million]",
)

SIGN = click.option(
    "--sign", type=click.Path(path_type=Path), metavar="KEY", help="Ed25519 private key (PEM)."
)


def writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
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
    callback=writable,
    help="Write all figures to FILE as JSON; - prints them.",
)


KEY = click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="Public key that the bundle must be signed with.",
)


def echo_for(as_json: Path | None) -> Callable[..., None]:
    """Print to standard output, or to standard error when the JSON goes to standard output."""
    return partial(click.echo, err=as_json == Path("-"))


def write_json(path: Path | None, told: object) -> None:
    from ftkit_export.runtime.files import finite, write_atomically

    text = json.dumps(finite(told), indent=1, default=str, allow_nan=False) + "\n"
    if path == Path("-"):
        click.echo(text, nl=False)
    elif path:
        write_atomically(path, text.encode())
