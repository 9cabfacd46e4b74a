"""The part of a report that is about an exported file: gates, variants, parity, latency, history.

sections = export_sections(manifest, Path.cwd())       # what templates/report.html calls `export`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from ftkit.benchmark import history
from ftkit.report import charts
from ftkit.report.latency_history import plot
from ftkit.report.pages import Table, verdict
from ftkit.report.target_sections import WORDS
from ftkit.utils.console import condition, frames, short
from ftkit_export.proof.parity import DECADES
from ftkit_export.runtime.errors import FtkitError

Data = Mapping[str, Any]


def export_sections(manifest: Data, folder: Path) -> dict[str, Any]:
    """Tables and charts of an exported file. folder: where the repository with the latency history
    may be."""
    evidence = manifest["evidence"]
    return {
        "frames": frames(manifest["frame"]),
        "gates": _gates(manifest),
        "variants": _variants(manifest),
        "judged": evidence["judged"],
        "metric": metric_of(manifest),
        "reasons": evidence["decision"][1:],
        "front": _accuracy_and_latency(manifest),
        "parity": _parity(evidence),
        "error_charts": [_errors(item) for item in evidence["parity"] if _has_errors(item)],
        "placed": evidence["parity"],
        "latency": _latency(evidence),
        "latency_charts": [_histogram(item) for item in evidence["latency"]],
        "sizes": _sizes(manifest),
        "history": _history(folder, manifest),
    }


def _gates(manifest: Data) -> Table:
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
        rows.append((name, verdict(gate["verdict"]), value, gate["limit"]))

    return Table(("gate", "verdict", "value", "at most"), rows)


def _variants(manifest: Data) -> Table:
    """The decision table: each variant with its figures and verdict."""
    head = (
        "variant",
        "verdict",
        f"{metric_of(manifest)} {manifest['evidence']['judged']}",
        f"drop in {_unit(manifest)} [95 %]",
        "time / fp32",
        "p50 ms",
        "p95",
        "MB",
        "8-bit operators",
    )
    rows = [
        (
            row["name"],
            f"chosen, {row['verdict']}" if _is_chosen(row, manifest) else row["verdict"],
            row["accuracy"],
            _bounds(row["paired"]),
            row["ratio"],
            row["p50_ms"],
            row["p95_ms"],
            row["size_bytes"] / 1e6,
            f"{row['in_8_bits']} of {row['heavy']}",
        )
        for row in manifest["evidence"]["decision"]
    ]
    return Table(head, rows)


def metric_of(manifest: Data) -> str:
    """What a bundle's task is judged by."""
    task = (manifest.get("readout") or {"task": "single-label"})["task"]
    return "accuracy" if task == "single-label" else str(WORDS[task]["metric"])


def _unit(manifest: Data) -> str:
    units = [row["paired"].get("unit", "points") for row in manifest["evidence"]["decision"][1:]]
    return units[0] if units else "points"


def _bounds(paired: Data | None) -> str:
    if not paired:
        return ""
    return (
        f"{100 * paired['drop']:+.2f} [{100 * paired['low']:+.2f} to {100 * paired['high']:+.2f}]"
    )


def _accuracy_and_latency(manifest: Data) -> Markup | None:
    placed = [
        (row["name"], row["p50_ms"], row["accuracy"], _is_chosen(row, manifest))
        for row in manifest["evidence"]["decision"]
        if row["p50_ms"] and row["accuracy"] is not None
    ]
    if not placed:
        return None
    return charts.points(
        f"{metric_of(manifest)[0].upper()}{metric_of(manifest)[1:]} and latency",
        placed,
        "p50 ms",
        f"{metric_of(manifest)} {manifest['evidence']['judged']}",
    )


def _is_chosen(row: Data, manifest: Data) -> bool:
    """Whether a row of the decision table is the file's own."""
    return bool(row.get("chosen", row["name"] == manifest["chosen"]))  # not in older bundles


def _parity(evidence: Data) -> Table:
    """Every check of parity and of agreement."""
    every = [
        *evidence["parity"],
        *({"provider": name, "checks": checks} for name, checks in evidence["agreement"].items()),
    ]
    rows = [
        (
            check["name"],
            "images" if check["group"] == "photographs" else check["group"],
            item["provider"],
            verdict("passed" if check["passed"] else "failed"),
            check["inputs"],
            f"{short(check['value'])} of {short(check['limit'])} allowed",
        )
        for item in every
        for check in item["checks"]
    ]
    return Table(("compared", "inputs from", "provider", "verdict", "inputs", "worst"), rows)


def _core_logits(item: Data) -> Data | None:
    """The check of the logits on photographs."""
    checks: list[Data] = item["checks"]
    wanted = ("core logits", "photographs")
    return next((check for check in checks if (check["name"], check["group"]) == wanted), None)


def _has_errors(item: Data) -> bool:
    return _core_logits(item) is not None and any(item["errors"])


def _errors(item: Data) -> Markup:
    """How far the logits are from float64, in quarters of a power of ten."""
    check = _core_logits(item)
    assert check  # _has_errors

    filled = [i for i, count in enumerate(item["errors"]) if count]
    first = max(min(filled) - 1, 0) // 4 * 4  # from a whole power of ten
    low = float(DECADES[first])
    high = float(DECADES[-1])
    known = (("framework's own", check["floor"]), ("limit", check["limit"]))
    marks = [((math.log10(value) - low) / (high - low), name) for name, value in known if value]

    return charts.bars(
        f"Logits of images on {item['provider']}: distance from float64",
        item["errors"][first:],
        (f"1e{low:g}", f"1e{high:g}"),
        marks,
        "four bars per power of ten",
    )


def _latency(evidence: Data) -> Table:
    """One image at a time: percentiles, cold start and memory."""
    head = (
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
    )
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
        for item in evidence["latency"]
    ]
    return Table(head, rows)


def _sizes(manifest: Data) -> Table:
    """Latency of the chosen file over frame sizes."""
    rows = [
        (item["frame"].replace("x", " x "), item["p50_ms"], item["p95_ms"])
        for item in manifest["evidence"]["latency_over_sizes"]
    ]
    caption = f"{manifest['chosen']} by frame size, one thread"
    return Table(("frame", "p50 ms", "p95"), rows, caption)


def _histogram(item: Data) -> Markup:
    """One condition's runs, fastest to 99th percentile."""
    low = item["low_ms"]
    high = item["high_ms"]
    marks = [((item["p50_ms"] - low) / ((high - low) or 1), f"p50 {item['p50_ms']:.2f}")]

    return charts.bars(
        f"{item['variant']} on {condition(item)}",
        item["histogram"],
        (f"{low:.2f} ms", f"{high:.2f} ms"),
        marks,
        f"{item['runs']} runs, fastest to 99th percentile",
    )


def _history(folder: Path, manifest: Data) -> list[Markup]:
    """Plots of what `ftkit bench --save` wrote for this model on this machine, where `folder` is in
    a repository."""
    path = history.place(folder)
    if not path.is_file():
        return []

    try:
        lines = [line for line in history.read_history(path) if line["name"] == manifest["name"]]
    except FtkitError as error:  # it is the user's file, and no evidence
        return [Markup("<p>{}</p>").format(escape(str(error).replace(str(path), path.name)))]

    machine = manifest["machine"]["fingerprint"]
    every = {series for line in lines for series in line["series"]}
    here = sorted(series for series in every if series.fingerprint == machine)
    return [plot(series, lines) for series in here]
