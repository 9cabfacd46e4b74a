"""Judge and print measured latencies: budgets, and the regression gate.

limits = parse_budgets(["p95_ms=8", "size_mb=5"])
verdicts = judge(found, limits)
gate = against("bundle", "old-bundle", BenchOptions(threads=[1]))
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.options import BenchOptions
from ftkit.utils import console
from ftkit_export.proof.regression import (
    Comparison,
    compare_latency,
    compare_sizes,
    compare_starts,
    compare_stored,
)
from ftkit_export.runtime.errors import FtkitError, choices
from ftkit_export.runtime.latency import Condition, Start, machine
from ftkit_export.runtime.measure import bench_model, find, starts
from ftkit_export.runtime.verify import Outcome

BUDGETS = ("p50_ms", "p95_ms", "cold_ms", "memory_mb", "size_mb")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit and the values measured against it.

    values: one per process, the longest measurement first; empty when it could not be measured. The
    verdict is passed when every process is within the limit, failed when none is, else
    inconclusive. By the sign test, six that agree are 98 % confidence, the four of a quick
    measurement 94 %.
    """

    name: str
    limit: float
    values: tuple[float, ...]

    @property
    def verdict(self) -> Outcome:
        """passed, failed or inconclusive."""
        within = sum(value <= self.limit for value in self.values)
        if not self.values:
            return "inconclusive"
        return "passed" if within == len(self.values) else "inconclusive" if within else "failed"

    @property
    def excess(self) -> float:
        """The value over the limit; infinite where none was measured."""
        return self.values[0] / self.limit if self.values else math.inf

    def __str__(self) -> str:
        values = f"{min(self.values):.4g}" if self.values else "not measured"
        if len(self.values) > 1:
            values += f" to {max(self.values):.4g} in {len(self.values)} processes"
        return f"{self.name} {values}, limit {self.limit:g}"


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Parse budgets: ["p95_ms=8"] -> {"p95_ms": 8.0}.

    Raises FtkitError for an unknown name or an invalid limit.
    """
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in BUDGETS:
            raise FtkitError(f"--budget {text}: expected a known budget, {choices(name, BUDGETS)}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = 0.0
        if not 0 < limits[name] < float("inf"):
            raise FtkitError(
                f"--budget {text}: expected a limit above 0, found {value!r}. Try {name}=10"
            )

    return limits


def judge_bench(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[Budget]:
    """Budgets of the shipped variant in the first measured condition (provider, threads, batch)."""
    row = figures["rows"][0]
    starts = [Start(**start) for start in figures["starts"][row["variant"]]]
    return judge_budgets(
        limits, starts, p50_ms=row["p50_ms"], p95_ms=row["p95_ms"], size_bytes=row["size_bytes"]
    )


def judge_budgets(
    limits: Mapping[str, float],
    starts: Sequence[Start],
    *,
    p50_ms: float | None,
    p95_ms: float | None,
    size_bytes: int,
) -> list[Budget]:
    """Compare measurements with limits, for `ftkit bench` and `ftkit export` alike.

    starts: one per process. p50_ms, p95_ms: of a longer measurement; None when there is none, and
    then the latencies of `starts` do not count either.
    """
    values: dict[str, tuple[float, ...]] = {
        "p50_ms": () if p50_ms is None else (p50_ms, *(start.p50_ms for start in starts)),
        "p95_ms": () if p95_ms is None else (p95_ms, *(start.p95_ms for start in starts)),
        "cold_ms": tuple(start.cold_ms for start in starts),
        # 0 where the system does not tell
        "memory_mb": tuple(s.peak_rss_bytes / 1e6 for s in starts if s.peak_rss_bytes),
        "size_mb": (size_bytes / 1e6,),
    }
    return [Budget(name=name, limit=limit, values=values[name]) for name, limit in limits.items()]


def measure_here(
    model: str | Path,
    options: BenchOptions,
    *,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure all figures of a bundle or any ONNX file on this machine.

    say: called with what is measured next.
    """
    return bench_model(
        model,
        providers=options.providers,
        threads=options.threads,
        batches=options.batches,
        image=options.image,
        frame=options.frame,
        quick=options.quick,
        say=say,
    )


def conditions_of(
    models: Sequence[str | Path], options: BenchOptions
) -> tuple[list[Condition], Path | None]:
    """Bundles or ONNX files under the first condition of `options`, on frames of the first one's size,
    and the image for all of them. Raises FtkitError like `find`."""
    first = find(models[0], options.image, options.frame)
    provider = options.providers[0]
    every = [first, *(find(model, options.image) for model in models[1:])]
    conditions = [
        Condition(
            model=str(model.shipped(provider)),
            provider=provider,
            threads=options.threads[0] if options.threads else 1,
            batch=options.batches[0],
            frame=first.frame,
        )
        for model in every
    ]
    return conditions, first.image


def compare_in_turn(
    candidate: str | Path,
    baseline: str | Path,
    options: BenchOptions,
    *,
    say: Callable[[str], object] = lambda text: None,
) -> list[Comparison]:
    """Regression gate: latency, cold start, memory and size of a candidate against a baseline.

    Both are a bundle (its model.onnx) or any ONNX file, run alternately in the first condition of
    `options` on frames of the candidate's size. Two thirds of the time are for the latency. Raises
    FtkitError like `find`.
    """
    (one, other), image = conditions_of([candidate, baseline], options)

    say("latency, in turn")
    latency = compare_latency(
        one, other, image, tolerance=options.max_slowdown, seconds=options.seconds * 2 / 3
    )
    say("cold starts and memory, in turn")
    starts = compare_starts(one, other, image, seconds=options.seconds / 3)
    sizes = compare_sizes(*(Path(item.model).stat().st_size for item in (one, other)))

    return [latency, *starts, sizes]


def compare_with_stored(
    model: str | Path, stored: Mapping[str, Any], *, image: str | Path | None = None
) -> list[Comparison]:
    """Regression gate against the figures of an earlier bench (`stored`), in its condition.

    Advisory if they are from another machine.
    """
    candidate = find(model, image, stored["frame"])
    row = stored["rows"][0]
    path = candidate.shipped(stored["provider"])
    condition = Condition(
        model=str(path),
        provider=stored["provider"],
        threads=stored["threads"],
        batch=row["batch"],
        frame=candidate.frame,
    )

    return _stored(
        lambda: starts(condition, candidate.image), path.stat().st_size, stored, machine()
    )


def compare_there(
    measure: Callable[[], Mapping[str, Any]], figures: Mapping[str, Any], stored: Mapping[str, Any]
) -> list[Comparison]:
    """Regression gate for figures measured on another machine.

    measure: repeats the measurement, to confirm a failure.
    """
    row = figures["rows"][0]
    here, there = ((item["provider"], item["threads"]) for item in (figures, stored))

    if figures["frame"] != stored["frame"]:
        raise FtkitError(
            f"--against: expected figures of the same frames, found {figures['frame'] or 'none'} and "
            f"{stored['frame'] or 'none'}. Measure the baseline again"
        )
    if here != there:
        raise FtkitError(
            f"--against: expected figures of {here[0]} on {here[1]} threads, found {there[0]} on "
            f"{there[1]}. Try --providers {there[0]} --threads {there[1]}"
        )

    asked = iter([figures])

    return _stored(
        lambda: [
            Start(**start) for start in (next(asked, None) or measure())["starts"][row["variant"]]
        ],
        row["size_bytes"],
        stored,
        figures["machine"],
    )


def _stored(
    now: Callable[[], Sequence[Start]],
    size_bytes: int,
    stored: Mapping[str, Any],
    where: Mapping[str, Any],
) -> list[Comparison]:
    """Compare new measurements with stored ones.

    where: the machine that `now` measures on.
    """
    row = stored["rows"][0]
    then = [Start(**start) for start in stored["starts"][row["variant"]]]
    return [
        *compare_stored(now, then, elsewhere=_differing(where, stored["machine"])),
        compare_sizes(size_bytes, row["size_bytes"]),
    ]


def _differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """In which way two machines differ, in words; "" for the same."""
    if now["fingerprint"] == then["fingerprint"]:
        return ""
    names = [name for name in {**then, **now} if name != "fingerprint"]
    found = [
        f"{name}: {then.get(name, 'none')} before, {now.get(name, 'none')} now"
        for name in names
        if now.get(name) != then.get(name)
    ]
    return "; ".join(found) or "another fingerprint"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 when one failed, else 3 when one is inconclusive, else 0."""
    return 1 if "failed" in outcomes else 3 if "inconclusive" in outcomes else 0


def as_tables(figures: Mapping[str, Any]) -> str:
    """Tables of latency, cold start and parts, within 80 columns."""
    tables = [_latency_table(figures["rows"]), _starts_table(figures)]
    if figures["parts"]:
        tables.append(_parts_table(figures["parts"]))

    return "\n".join(["\n\n".join(tables), *_remarks(figures)])


def _latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row per condition."""
    head = ("variant", "provider", "threads", "batch", "p50 ms", "p90", "p95", "p99", "img/s")
    lines = [(*head, "runs")]
    for row in rows:
        ways = f"{'' if row['spinning'] else ' no spin'}{'' if row['copies'] else ' no copy'}"
        lines.append(
            (
                row["variant"],
                row["provider"],
                f"{row['threads']}{ways}",
                str(row["batch"]),
                _ms(row["p50_ms"]),
                *(_ms(row[key]) if row[key] else "-" for key in ("p90_ms", "p95_ms", "p99_ms")),
                f"{1000 * row['batch'] / row['p50_ms']:.0f}",
                str(row["runs"]),
            )
        )

    return console.table(lines)


def _starts_table(measured: Mapping[str, Any]) -> str:
    """Medians over processes, one row per variant."""
    lines = [("variant", "import ms", "session", "first run", "cold start", "peak MB", "file MB")]
    sizes = {row["variant"]: row["size_bytes"] for row in measured["rows"]}

    for name, items in measured["starts"].items():
        times = [
            statistics.median(item[key] for item in items)
            for key in ("import_ms", "session_ms", "first_run_ms")
        ]
        peak = statistics.median(item["peak_rss_bytes"] for item in items)
        figures = [f"{value:.0f}" for value in (*times, sum(times), peak / 1e6)]
        lines.append((name, *figures, f"{sizes[name] / 1e6:.1f}"))

    return console.table(lines)


def _parts_table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Time per image spent on decoding, preprocessing and the network."""
    columns = {
        "decode ms": "decode_ms",
        "preprocess": "preprocess_ms",
        "network": "network_ms",
        "the last two": "together_ms",
        "Pillow's preprocess": "pillow_ms",
    }
    lines = [("variant", *columns)]
    lines += [(name, *(_ms(part[key]) for key in columns.values())) for name, part in parts.items()]
    return console.table(lines)


def _remarks(figures: Mapping[str, Any]) -> list[str]:
    """Remarks below the tables: frames, placement, GPU memory, races, quick runs."""
    frames = [f"{console.frames(figures['frame'])}, decoding apart"] if figures["frame"] else []
    placed = [
        f"{row['variant']} on {row['provider']}: {row['placement']}"
        for row in figures["rows"]
        if row["provider"] != "cpu" and row.get("placement")
    ]
    held = {
        f"{row['variant']} on {row['provider']}": row["gpu_bytes"]
        for row in figures["rows"]
        if row.get("gpu_bytes")
    }
    memory = [f"GPU memory: {where} {size / 1e6:.0f} MB" for where, size in held.items()]
    raced = [
        f"alternating runs: {name} takes {item['ratio']:.2f} of fp32's time [{item['ratio_low']:.2f}, "
        f"{item['ratio_high']:.2f}]"
        for name, item in figures["raced"].items()
        if name != "fp32"
    ]
    quick = ["quick: short runs, not for comparisons"] if figures["quick"] else []

    return [*frames, *dict.fromkeys(placed), *memory, *raced, *quick]


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def as_budgets(budgets: Sequence[Budget]) -> str:
    """One line per budget."""
    return "\n".join(f"{console.MARKS[item.verdict]}  {item}" for item in budgets)


def as_gate(verdicts: Sequence[Comparison]) -> str:
    """One row per quantity, candidate over baseline, then each reason."""
    rows = [("", "ratio", "95 % interval", "A/A", "margin", "procs", "s", "verdict")]
    for item in verdicts:
        rows.append(
            (
                item.what,
                f"{item.ratio:.3f}",
                f"{item.low:.3f} to {item.high:.3f}",
                f"{item.spread:.1%}",
                f"{item.margin:.0%}",
                str(item.processes),
                f"{item.seconds:.0f}",
                item.verdict,
            )
        )

    reasons = [
        textwrap.fill(f"{item.what}: {item.reason}", 80, subsequent_indent="  ")
        for item in verdicts
    ]
    return "\n".join([console.table(rows), *reasons])
