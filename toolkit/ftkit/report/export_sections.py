"""The part of a report that is about an exported file: gates, variants, parity, latency, history.
Each returns HTML.

gates(manifest) + variants(manifest) + parity(manifest) + latency(manifest) + found_in(folder, manifest)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ftkit.benchmark import history
from ftkit.report.html import bars, points, table
from ftkit.report.latency_history import plot
from ftkit.utils.console import condition, frames, short
from ftkit_export.proof.parity import DECADES
from ftkit_export.runtime.errors import FtkitError

Data = Mapping[str, Any]


def _passed(passed: bool) -> tuple[str]:
    return _verdict("passed" if passed else "failed")


def _verdict(verdict: str) -> tuple[str]:
    return (f'<span class="{"good" if verdict == "passed" else "bad"}">{verdict}</span>',)


def gates(manifest: Data) -> str:
    """Each gate with its value (and range over processes) and limit, those that did not pass first."""
    order = ("failed", "inconclusive", "passed")
    rows = []
    for gate in sorted(manifest["gates"], key=lambda gate: order.index(gate["verdict"])):
        name = gate["name"]
        if gate["unsettled"] and not gate["passed"]:
            name += f"; {gate['unsettled']}"
        value = gate["value"]
        if gate["low"] is not None:
            value = f"{short(value)} [{short(gate['low'])} to {short(gate['high'])}]"
        rows.append((name, _verdict(gate["verdict"]), value, gate["limit"]))

    return table(("gate", "verdict", "value", "at most"), rows)


def variants(manifest: Data) -> str:
    """The decision table: each variant with its figures, its verdict and the reason."""
    decision = manifest["evidence"]["decision"]

    def bounds(paired: Data | None) -> str:
        if not paired:
            return ""
        return f"{100 * paired['drop']:+.2f} [{100 * paired['low']:+.2f} to {100 * paired['high']:+.2f}]"

    rows = [
        (
            row["name"],
            f"chosen, {row['verdict']}" if row["name"] == manifest["chosen"] else row["verdict"],
            row["accuracy"],
            bounds(row["paired"]),
            row["ratio"],
            row["p50_ms"],
            row["p95_ms"],
            row["size_bytes"] / 1e6,
            f"{row['in_8_bits']} of {row['heavy']}",
        )
        for row in decision
    ]

    placed = [
        (row["name"], row["p50_ms"], row["accuracy"], row["name"] == manifest["chosen"])
        for row in decision
        if row["p50_ms"] and row["accuracy"] is not None
    ]

    return "".join(
        [
            table(
                (
                    "variant",
                    "verdict",
                    "val accuracy",
                    "drop in points [95 %]",
                    "time",
                    "p50 ms",
                    "p95",
                    "MB",
                    "in 8 bits",
                ),
                rows,
            ),
            f"<p>Drop: paired with fp32 on the same images of val. Time: of fp32's, runs taken in turn on one thread, "
            f"{frames(manifest['frame'])}. In 8 bits: convolutions and matrix products.</p>",
            *(f"<p>{escape(row['name'])}: {escape(row['reason'])}.</p>" for row in decision[1:]),
            f'<div class="grid">{points("Accuracy and latency", placed, "p50 ms", "val accuracy")}</div>'
            if placed
            else "",
        ]
    )


def parity(manifest: Data) -> str:
    """Every check, and how far the logits are from float64."""
    evidence = manifest["evidence"]
    every = [
        *evidence["parity"],
        *({"provider": name, "checks": checks} for name, checks in evidence["agreement"].items()),
    ]
    rows = [
        (
            c["name"],
            "images" if c["group"] == "photographs" else c["group"],
            item["provider"],
            _passed(c["passed"]),
            c["inputs"],
            f"{short(c['value'])} of {short(c['limit'])} allowed",
        )
        for item in every
        for c in item["checks"]
    ]

    drawn = []
    for item in evidence["parity"]:
        logits = next(
            (
                c
                for c in item["checks"]
                if c["name"] == "core logits" and c["group"] == "photographs"
            ),
            None,
        )
        if not logits or not any(item["errors"]):
            continue

        filled = [i for i, count in enumerate(item["errors"]) if count]
        # from a whole power of ten
        first = max(min(filled) - 1, 0) // 4 * 4
        last = len(DECADES) - 1
        ends = (float(DECADES[first]), float(DECADES[last]))
        known = (("framework's own", logits["floor"]), ("limit", logits["limit"]))
        marks = [
            ((math.log10(value) - ends[0]) / (ends[1] - ends[0]), name)
            for name, value in known
            if value
        ]
        title = f"Logits of images on {item['provider']}: distance from float64"
        edges = (f"1e{ends[0]:g}", f"1e{ends[1]:g}")
        drawn.append(
            bars(
                title, item["errors"][first:], edges, marks, "each bar a quarter of a power of ten"
            )
        )

    placed = "".join(
        f"<p>{escape(item['provider'])}: {escape(item['placement'])}.</p>"
        for item in evidence["parity"]
    )

    return (
        f'<div class="grid">{"".join(drawn)}</div>' * bool(drawn)
        + placed
        + table(("compared", "inputs from", "provider", "verdict", "inputs", "worst"), rows)
    )


def latency_section(manifest: Data) -> str:
    """One image at a time: percentiles, cold start and memory, over frame sizes, and the
    histograms."""
    found = manifest["evidence"]["latency"]
    rows = [
        (
            item["variant"],
            condition(item),
            item["p50_ms"],
            item["p95_ms"],
            item["runs"],
            "quick" if item["quick"] else "full",
            item["import_ms"],
            item["session_ms"],
            item["first_run_ms"],
            item["import_ms"] + item["session_ms"] + item["first_run_ms"],
            item["peak_rss_bytes"] / 1e6,
            item["size_bytes"] / 1e6,
        )
        for item in found
    ]

    drawn = "".join(map(_histogram, found))
    said = f"<p>On {frames(manifest['frame'])}, which the file resizes; decoding apart.</p>"
    over = manifest["evidence"]["latency_over_sizes"]
    sizes = table(
        ("frame", "p50 ms", "p95"),
        [(item["frame"].replace("x", " x "), item["p50_ms"], item["p95_ms"]) for item in over],
        f"{manifest['chosen']} over frame sizes, one thread",
    )

    return (
        said
        + f'<div class="grid">{drawn}{f"<div>{sizes}</div>" if over else ""}</div>'
        + table(
            (
                "variant",
                "provider",
                "p50 ms",
                "p95",
                "runs",
                "protocol",
                "import ms",
                "session",
                "first run",
                "cold start",
                "peak MB",
                "file MB",
            ),
            rows,
        )
    )


def _histogram(item: Data) -> str:
    """One condition's runs, fastest to 99th percentile."""
    low = item["low_ms"]
    high = item["high_ms"]
    marks = [((item["p50_ms"] - low) / ((high - low) or 1), f"p50 {item['p50_ms']:.2f}")]
    edges = (f"{low:.2f} ms", f"{high:.2f} ms")

    return bars(
        f"{item['variant']} on {condition(item)}",
        item["histogram"],
        edges,
        marks,
        f"{item['runs']} runs, fastest to 99th percentile",
    )


def found_in(folder: Path, manifest: Data) -> str:
    """Plots of what `ftkit bench --save` wrote for this model on this machine, where `folder` is in
    a repository."""
    path = history.place(folder)
    machine = manifest["machine"]["fingerprint"]

    try:
        lines = (
            [line for line in history.read_history(path) if line["name"] == manifest["name"]]
            if path.is_file()
            else []
        )
    except FtkitError as error:  # it is the user's file, and no evidence
        return f"<p>{escape(str(error).replace(str(path), path.name))}</p>"

    every = {series for line in lines for series in line["series"]}
    here = sorted(series for series in every if series.fingerprint == machine)
    return "".join(
        plot(series, [line for line in lines if series in line["series"]]) for series in here
    )
