"""Advice for an export that misses a budget: measured alternatives, and the command to run.

    for line in budget_advice(run, missed, unproven, rows, context):
        print(line)

A smaller input lowers latency. The same network's latency at another resolution can be measured
without training: it is converted again and timed on the spot, in seconds.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ftkit.benchmark.budgets import Budget
from ftkit.exporting.candidates import Context
from ftkit.models.inference import WithEmbedding
from ftkit.training.run import Run
from ftkit.utils import console
from ftkit_export.conversion.convert import core_for_timing, write
from ftkit_export.conversion.graph import image_form
from ftkit_export.proof.decision import Row, what_would_settle
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import Condition, over_sizes

SIZE_STEP = 32  # pixels: most backbones downsample by 2 five times
SMALLEST_SIZE = 64  # pixels
MOST_SIZES = 4  # number of resolutions that are timed


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """Measured latency of the same network at another input size.

    judged_ms: the one of both that the budget is about. int8_ms: the same of int8, estimated from its
    ratio to fp32 at the run's own size; None without such a ratio.
    """

    size: int
    p50_ms: float
    p95_ms: float
    judged_ms: float
    int8_ms: float | None


def budget_advice(
    run: Run,
    missed: Sequence[Budget],
    unproven: Sequence[Row],
    rows: Sequence[Row],
    context: Context,
) -> list[str]:
    """Advice on budgets that are missed or inconclusive, as lines of text.

    rows: the decision table.
    """
    lines = [
        f"missed: {item}" if item.verdict == "failed" else f"inconclusive: {item}"
        for item in missed
    ]
    if unproven:  # only this one's accuracy is open: no smaller input is needed
        lines.append(_unproven(_surest(unproven), context))
        return lines

    large = next((item for item in missed if item.name == "size_mb"), None)
    small = [
        row
        for row in rows
        if large and row.precision == "int8" and row.size_bytes / 1e6 <= large.limit
    ]

    small = [row for row in small if row.verdict != "refused" and not row.shippable]
    if small:
        best = _surest(small)
        lines.append(
            f"{best.name} would meet size_mb alone: {best.size_bytes / 1e6:.1f} MB; {_open(best, context)}"
        )
    elif large:
        lines.append("a smaller file needs a smaller backbone: docs/recipes.md lists the sizes")

    timed = [item for item in missed if item.name in ("p50_ms", "p95_ms") and item.values]
    slow = max(timed, key=lambda item: item.excess, default=None)
    if slow and context.target.provider == "cpu" and (context.here or context.device):
        lines += _resolutions(run, slow, rows, context, only_int8=bool(small))

    return lines


def _open(row: Row, context: Context) -> str:
    """The reason why a variant may not ship yet."""
    if row.paired is None or row.verdict != "inconclusive":
        return f"{row.verdict}: {row.reason}"
    limit = context.limit
    beyond = (row.paired.high - limit) * 100
    enough = math.ceil(row.paired.high * 1000) / 1000
    name = "max_accuracy_drop" if context.task.rising else "max_error_rise"
    return (
        f"its {row.paired.name} is inconclusive by {beyond:.2f} {row.paired.unit}: "
        f"{what_would_settle(row.paired, limit)}, or a wider limit: --set export.{name}={enough:g}"
    )


def _surest(rows: Sequence[Row]) -> Row:
    """The variant with the lowest upper bound on its accuracy drop."""
    return min(rows, key=lambda row: row.paired.high if row.paired else 1.0)


def _unproven(row: Row, context: Context) -> str:
    p95 = f"p95 {row.p95_ms:.1f} ms, " if row.p95_ms else ""
    return f"{row.name} would meet them ({p95}{row.size_bytes / 1e6:.1f} MB); {_open(row, context)}"


def _resolutions(
    run: Run,
    slow: Budget,
    rows: Sequence[Row],
    context: Context,
    *,
    only_int8: bool,
) -> list[str]:
    """Table of smaller inputs, and the command for the largest that is likely to meet the budget.

    only_int8: the float32 file is too large at any input size.
    """
    ratios = [
        row.ratio
        for row in rows
        if row.precision == "int8" and row.verdict != "refused" and row.ratio
    ]
    ratio = min(ratios, default=None)
    timed = _timed(run, slow, ratio, context)
    if not timed:
        return []

    judged = slow.name.removesuffix("_ms")
    table = [("input", "fp32 p50/p95 ms", f"int8 {judged} ms, if its accuracy holds")]
    for item in timed:
        int8 = "" if item.int8_ms is None else f"about {item.int8_ms:.1f}"
        table.append((f"{item.size} x {item.size}", f"{item.p50_ms:.1f}/{item.p95_ms:.1f}", int8))

    lines = [
        f"the same network at smaller input sizes, not retrained ({console.frames(context.frame)}):"
    ]
    lines.append(console.table(table))
    best = None
    if not only_int8:
        best = next((item for item in timed if item.judged_ms <= slow.limit), None)

    best = best or next(
        (item for item in timed if (item.int8_ms or slow.limit * 2) <= slow.limit), None
    )
    if best:
        lines.append(f"try: {_command(run, best.size)}")
    else:
        lines.append("none of them meets the budget: try a smaller backbone (docs/recipes.md)")

    return lines


def _timed(run: Run, slow: Budget, ratio: float | None, context: Context) -> list[Smaller]:
    """Time the largest input sizes that may meet the budget in fp32 or int8, largest first.

    Empty for a network with a fixed input size.
    """
    own = run.preprocess.size
    excess = slow.excess
    wanted = {_rounded(own / excess**0.5), _rounded(own / (excess * (ratio or 1)) ** 0.5)}
    wanted |= {size - SIZE_STEP for size in wanted}
    sizes = sorted(
        {max(size, SMALLEST_SIZE) for size in wanted if max(size, SMALLEST_SIZE) < own},
        reverse=True,
    )

    measured = []
    net = WithEmbedding(run.backbone())
    with tempfile.TemporaryDirectory() as scratch, console.bar("other input sizes"):
        for size in sizes[:MOST_SIZES]:
            smaller = run.preprocess.at(size)
            path = Path(scratch) / f"{size}.onnx"

            try:
                core = core_for_timing(net, size)
            except FtkitError:
                return []

            form = image_form(core, smaller, context.readout, context.limits.input_format)
            write(form, path, {**context.metadata, "preprocess": json.dumps(asdict(smaller))})

            if context.device:
                (timed,) = context.device.over_sizes(path, context.photograph, [context.frame])
            else:
                (timed,) = over_sizes(
                    Condition(model=str(path), threads=1), context.photograph, [context.frame]
                )

            _, p50, p95 = timed
            judged = p50 if slow.name == "p50_ms" else p95
            measured.append(
                Smaller(
                    size=size,
                    p50_ms=p50,
                    p95_ms=p95,
                    judged_ms=judged,
                    int8_ms=ratio and judged * ratio,
                )
            )

    return measured


def _rounded(size: float) -> int:
    return int(size) // SIZE_STEP * SIZE_STEP


def _command(run: Run, size: int) -> str:
    """Command that trains the same recipe on the same data at another input size."""
    words = ["ftkit", "train", run.data["data"], "--recipe", str(run.folder / "run.json")]
    words += ["--set", f"preprocess.size={size}", "--out", f"{run.folder}-{size}"]
    if run.data["group_by"]:
        words += ["--group-by", run.data["group_by"]]
    if run.data["root"]:
        words += ["--root", run.data["root"]]
    if run.data.get("add"):
        words += ["--add", run.data["add"]]
    if run.data["seed"]:
        words += ["--seed", str(run.data["seed"])]
    return shlex.join(words)
