"""--gpus N: run a command with one process per GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ftkit_export.runtime.errors import FtkitError

DEVICE = click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])
)
GPUS = click.option(
    "--gpus",
    type=click.IntRange(1),
    metavar="N",
    help="Use N GPUs of this machine, as torchrun does.",
)


def require_gpus(ctx: click.Context, gpus: int) -> None:
    """Raise FtkitError unless the command may use so many GPUs, and they are here."""
    from ftkit.utils.distributed import pick_device

    if ctx.params["device"] == "cpu":
        raise FtkitError(
            "--gpus: expected --device cuda, found cpu. For processes on a CPU, try torchrun -m ftkit "
            f"{ctx.command.name}"
        )
    pick_device("cuda", gpus - 1)


def launch_again(ctx: click.Context, gpus: int, more: Sequence[str] = ()) -> int:
    """Run the same command, with `more` arguments, in one process per GPU; its exit code."""
    from ftkit.utils.distributed import launch

    arguments = [str(ctx.command.name), str(ctx.params["data"]), "--device", "cuda", *more]
    for option in ctx.command.params:
        given = (
            ctx.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        )
        known = option.name in ctx.params  # others act while they are parsed, by the environment
        if not (given and known) or option.name in ("data", "device", "gpus"):
            continue
        value = ctx.params[option.name or ""]
        for item in value if isinstance(value, tuple) else [value]:
            arguments += [option.opts[0]] if item is True else [option.opts[0], str(item)]
    return launch(gpus, arguments)
