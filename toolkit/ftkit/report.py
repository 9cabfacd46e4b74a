"""One self-contained report.html: verdict first, then curves, confusion, parity, latency. No network, no script.

write_report(Path("report.html"), run_data, manifest, epochs)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftkit.files import write_atomically
from ftkit.terminal import condition

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --faint: #5c6166; --paper: #fff; --line: #d8dce0;
  --good: #0b6b3a; --bad: #b3261e; --one: #1f5fa8; --two: #b45309; --cell: 31, 95, 168; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #a8aeb4; --paper: #16181a; --line: #3a3f44;
  --good: #6fd39a; --bad: #ff8a80; --one: #7db4f0; --two: #f0b067; --cell: 125, 180, 240; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
p, figcaption { color: var(--faint); margin: .3rem 0 } figure { margin: 0 }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
td.n, th.n { text-align: right } td.cell { text-align: center; padding: .35rem .6rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font: 12px system-ui, sans-serif }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem 2rem; margin-top: 1rem }
@media print { body { max-width: none } h2 { break-after: avoid } }
"""


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Header and rows; numbers are set right; a cell that is already markup comes as a 1-tuple."""

    def cell(value: Any) -> str:
        if isinstance(value, tuple):
            return f"<td>{value[0]}</td>"
        return (
            f'<td class="n">{_number(value)}</td>' if isinstance(value, int | float) else f"<td>{_number(value)}</td>"
        )

    numeric = [bool(rows) and isinstance(value, int | float) for value in (rows[0] if rows else head)]
    top = "".join(
        f'<th{" class=n" if n else ""} scope="col">{escape(h)}</th>' for h, n in zip(head, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _interval(paired: Mapping[str, Any] | None) -> str:
    return f"{100 * paired['low']:+.2f} to {100 * paired['high']:+.2f}" if paired else ""


def _verdict(passed: bool) -> tuple[str]:
    return ('<span class="good">passed</span>' if passed else '<span class="bad">failed</span>',)


def _curves(epochs: Sequence[Mapping[str, Any]]) -> str:
    """Loss above, accuracies below, a band a stage; drawn as SVG."""
    width, height, left = 860, 170, 44
    span = max(1, len(epochs) - 1)

    def x(index: float) -> float:
        return left + (width - left - 10) * index / span

    def plot(title: str, series: Sequence[tuple[str, str, Sequence[float]]]) -> str:
        values = [value for _, _, points in series for value in points if value == value]
        low, high = min(values), max(values)
        room = (high - low) or 1.0

        def y(value: float) -> float:
            return 12 + (height - 40) * (high - value) / room

        parts = []
        stages = [row["stage"] for row in epochs]
        for stage in sorted(set(stages)):
            begin = stages.index(stage)
            if begin:
                parts.append(f'<line x1="{x(begin - .5):.1f}" x2="{x(begin - .5):.1f}" y1="4" y2="{height - 24}" '
                             'stroke="var(--line)" stroke-dasharray="4 4"/>')  # fmt: skip
            parts.append(
                f'<text x="{x(max(begin - 0.5, 0)) + 4:.1f}" y="{height - 8}">{escape(epochs[begin]["train"])}</text>'
            )
        for value in (low, high):
            parts.append(f'<text x="0" y="{y(value) + 4:.1f}">{value:.3g}</text>')
        legend = []
        for name, colour, points in series:
            path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(points))
            parts.append(f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="2"/>')
            dots = [
                f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="2.5" fill="var({colour})"/>' for i, v in enumerate(points)
            ]
            parts += dots
            legend.append(f'<span style="color:var({colour})">{escape(name)}</span>')
        head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        caption = f"{escape(title)}: {', '.join(legend)}"
        return f"<figure>{head}{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"

    loss = [("training loss", "--one", [row["loss"] for row in epochs])]
    accuracy = [
        ("train accuracy", "--one", [row["train_accuracy"] for row in epochs]),
        ("val accuracy", "--two", [row["val_accuracy"] for row in epochs]),
    ]
    return plot("By epoch", loss) + plot("By epoch", accuracy)


def _confusion(metrics: Mapping[str, Any]) -> str:
    names = metrics["classes"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = ""
    for name, counts in zip(names, metrics["confusion"], strict=True):
        whole = sum(counts) or 1
        cells = "".join(
            f'<td class="cell" style="background:rgba(var(--cell),{0.55 * count / whole:.2f})">{count}</td>'
            for count in counts
        )
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (f'<div class="scroll"><table><caption><p>Rows: the true class. Columns: what the file said.</p></caption>'
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>")  # fmt: skip


def _doubts(run: Mapping[str, Any]) -> str:
    """Calibration before and after, what withholding doubtful answers brings, and how many images pass as familiar."""
    after, before, held = run["metrics"]["test"], run["uncalibrated"]["test"], run["abstention"]
    text = (f"Temperature {run['temperature']:.2f}: NLL {before['nll']:.3f} to {after['nll']:.3f}, "
            f"ECE {before['ece']:.3f} to {after['ece']:.3f}. ")  # fmt: skip
    if held["threshold"] is None:
        text += f"No threshold on val reached a precision of {held['wanted']:.0%}: every answer is marked doubtful. "
    else:
        right = "" if held["precision"] is None else f", of which {held['precision']:.1%} are right"
        text += (f"Answers below {held['threshold']:.2f} are doubtful ({held['wanted']:.0%} wanted on val); the other "
                 f"{held['coverage']:.0%} are not{right}. ")  # fmt: skip
    return text + f"{run['foreign_kept']:.1%} of these photographs pass as familiar (95 % on val)."


def _accuracy(run: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    found = evidence["accuracy"]["file"]
    rows = [
        (who, m["images"], m["accuracy"], f"{m['accuracy_low']:.3f} to {m['accuracy_high']:.3f}",
         m["balanced_accuracy"], m["macro_f1"], m["nll"], m["ece"])
        for who, m in (("exported file", found), ("framework", evidence["accuracy"]["framework"]))
    ]  # fmt: skip
    classes = list(zip(found["classes"], found["recall"], found["precision"], strict=True))
    return "".join([
        "<h2>Accuracy on held-out photographs</h2>",
        _table(("of the", "images", "accuracy", "95 % interval", "balanced", "macro F1", "NLL", "ECE"), rows),
        f"<p>{_doubts(run)}</p>",
        "<h2>By class</h2>", _table(("class", "recall", "precision"), classes), _confusion(found),
    ])  # fmt: skip


def _training(run: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> str:
    stages = [
        (*(s[key] for key in ("train", "epochs", "lr", "val_accuracy", "drift", "seconds")),
         "kept" if s["kept"] else "left out")
        for s in run["stages"]
    ]  # fmt: skip
    mistakes = [(m["image"], m["class"], m["said"], m["probability"]) for m in run["mistakes"]]
    return "".join([
        "<h2>Training</h2>", _curves(epochs),
        _table(("stage", "epochs", "rate", "val accuracy", "CKA", "seconds", "verdict"), stages),
        "<p>CKA: likeness of the embedding to the pretrained backbone's, 1 = features unmoved.</p>",
        "<h2>Worst mistakes</h2>", _table(("image", "is", "said", "probability"), mistakes),
    ])  # fmt: skip


def _variants(manifest: Mapping[str, Any]) -> str:
    rows = [
        (
            row["name"], row["accuracy"], row["paired"] and 100 * row["paired"]["drop"], _interval(row["paired"]),
            row["ratio"], row["p50_ms"], row["p95_ms"], row["size_bytes"] / 1e6,
            f"{row['in_8_bits']} of {row['heavy']}", row["verdict"],
        )
        for row in manifest["evidence"]["decision"]
    ]  # fmt: skip
    return "".join([
        f"<h2>Variants: {escape(manifest['chosen'])} for {escape(manifest['target'])}</h2>",
        _table(("variant", "val accuracy", "drop, points", "95 % bounds", "time", "p50 ms", "p95 ms", "MB", "in 8 bits",
                "verdict"), rows),
        "<p>Drop: paired with fp32 on the same images of val. Time: of fp32's, runs taken in turn on one thread. In "
        "8 bits: convolutions and matrix products.</p>",
        *(f"<p>{escape(row['name'])}: {escape(row['reason'])}.</p>" for row in manifest["evidence"]["decision"][1:]),
    ])  # fmt: skip


def _histogram(item: Mapping[str, Any]) -> str:
    """One measured condition's runs, fastest to 99th percentile, as SVG."""
    counts, width, height = item["histogram"], 300, 90
    step, most = width / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{number * step:.1f}" y="{(height - 18) * (1 - count / most):.1f}" width="{step - 1:.1f}" '
        f'height="{(height - 18) * count / most:.1f}" fill="var(--one)"/>'
        for number, count in enumerate(counts)
        if count
    )
    title = f"{item['variant']} on {condition(item)}: {item['runs']} runs, p50 {item['p50_ms']:.2f} ms"
    return (f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{bars}'
            f'<text x="0" y="{height - 4}">{item["low_ms"]:.2f} ms</text>'
            f'<text x="{width}" y="{height - 4}" text-anchor="end">{item["high_ms"]:.2f} ms</text></svg>'
            f"<figcaption>{escape(title)}</figcaption></figure>")  # fmt: skip


def _parity_and_latency(evidence: Mapping[str, Any]) -> str:
    parity = [
        (c["name"], c["group"], item["provider"], c["inputs"], c["value"], c["limit"], _verdict(c["passed"]))
        for item in (*evidence["parity"], *({"provider": name, "checks": checks}
                                            for name, checks in evidence["agreement"].items())) for c in item["checks"]
    ]  # fmt: skip
    latency = [
        (
            item["variant"],
            condition(item),
            *(item[key] for key in ("p50_ms", "p95_ms", "runs", "first_run_ms", "session_ms")),
            item["peak_rss_bytes"] / 1e6,
            "quick" if item["quick"] else "full",
        )
        for item in evidence["latency"]
    ]
    return "".join([
        "<h2>Parity with the framework</h2>",
        _table(("compared", "inputs from", "provider", "inputs", "worst", "limit", "verdict"), parity),
        "<h2>Latency, one photograph at a time</h2>",
        _table(("variant", "provider", "p50 ms", "p95 ms", "runs", "first run ms", "session ms", "peak MB",
                "protocol"), latency),
        f'<div class="grid">{"".join(map(_histogram, evidence["latency"]))}</div>',
    ])  # fmt: skip


def write_report(
    path: Path, run: Mapping[str, Any], manifest: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> None:
    """Write the report of one export.

    run: run.json; manifest: as sealed, less its file hashes; epochs: the lines of metrics.jsonl.
    """
    evidence, found = manifest["evidence"], manifest["evidence"]["accuracy"]["file"]
    gates = [(g["name"], g["value"], g["limit"], _verdict(g["passed"])) for g in manifest["gates"]]
    passed = all(gate["passed"] for gate in manifest["gates"])
    word = '<span class="good">All gates passed</span>' if passed else '<span class="bad">A gate failed</span>'
    facts = [*manifest["machine"].items(), *run["environment"].items(), ("seed", str(run["seed"])),
             ("run", manifest["run"]), ("data", manifest["data_fingerprint"])]  # fmt: skip
    body = [
        f"<h1>{escape(manifest['name'])}: {word}</h1>",
        f"<p>{escape(manifest['backbone'])} over {len(manifest['labels'])} classes; "
        f"chosen variant {manifest['chosen']}; "
        f"{found['accuracy']:.1%} of {found['images']} held-out photographs right.</p>",
        "<h2>Gates</h2>", _table(("gate", "value", "limit", "verdict"), gates),
        _accuracy(run, evidence), _training(run, epochs), _variants(manifest), _parity_and_latency(evidence),
        "<h2>Where and with what</h2>", _table(("what", "value"), [(k, str(v)) for k, v in facts]),
    ]  # fmt: skip
    title = escape(f"ftkit: {manifest['name']}")
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>'
            f"<body><main>{''.join(body)}</main></body></html>\n")  # fmt: skip
    write_atomically(path, page.encode())
