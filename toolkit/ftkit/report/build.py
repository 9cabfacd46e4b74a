"""One self-contained report.html: verdict first, then how it was trained, how sure it is, what it costs. No script.

write_report(Path("report.html"), run_data, epochs, pictures)                    # of a run
write_report(Path("report.html"), run_data, epochs, pictures, manifest)          # of a bundle: gates and evidence too
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import PIL.Image

from ftkit.data.canvas import Canvases
from ftkit.report.export_sections import found_in, gates, latency_section, parity, variants
from ftkit.report.html import anchor, lengths, lines, page, reliability_chart, section, table
from ftkit.utils.console import frames
from ftkit_export.bundle.write import overall
from ftkit_export.conversion.class_activation import Explainer, overlay
from ftkit_export.files import write_atomically
from ftkit_export.proof.intervals import ground

Data = Mapping[str, Any]
SIDE = 160  # pixels of a thumbnail
LOW_RECALL = 0.5  # recall below which a class is marked
NAMED_COLUMNS = 5  # classes of a confusion matrix; of more, its columns have numbers


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A photograph for the page, as JPEG bytes, and where the model looked, if that is known."""

    photograph: bytes
    heat: bytes = b""


def pictures(
    canvases: Canvases, mistakes: Sequence[Data], explain: Explainer | None = None
) -> list[Picture]:
    """The worst mistakes as thumbnails, with class activation maps of the wrong answers where there
    are any."""
    found = []
    for item in mistakes:
        canvas = canvases.array([item["row"]])[0]
        if explain is None:
            found.append(Picture(photograph=_jpeg(PIL.Image.fromarray(canvas))))
            continue
        heat, _ = explain(canvas, item["said_label"])
        seen = explain.seen(canvas)
        found.append(
            Picture(photograph=_jpeg(PIL.Image.fromarray(seen)), heat=_jpeg(overlay(seen, heat)))
        )

    return found


def _jpeg(image: PIL.Image.Image) -> bytes:
    content = io.BytesIO()
    image.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS).save(content, "JPEG", quality=82)
    return content.getvalue()


def write_report(
    path: Path,
    run: Data,
    epochs: Sequence[Data],
    shown: Sequence[Picture] = (),
    manifest: Data | None = None,
) -> None:
    """Write the report of a run, or of one export.

    run: run.json; epochs: the lines of metrics.jsonl; manifest: as sealed, less its file hashes.
    """
    named = [
        ("Gates", gates(manifest) if manifest else ""),
        ("Accuracy on held-out images", _accuracy(run, manifest)),
        ("Training", _training(run, epochs)),
        ("By class", _classes(_judged(run, manifest))),
        ("How sure it is", _sureness(run)),
        ("Worst mistakes", _mistakes(run, shown)),
        ("Variants", variants(manifest) if manifest else ""),
        ("Parity with the framework", parity(manifest) if manifest else ""),
        ("Latency, cold start, memory", latency_section(manifest) if manifest else ""),
        ("History", found_in(Path.cwd(), manifest) if manifest else ""),
        ("Data", _data(run)),
        ("Reproduce", _reproduce(run, manifest)),
    ]

    there = [(title, text) for title, text in named if text]
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title, _ in there)
    body = [
        *_verdict(run, manifest),
        f'<nav aria-label="Sections">{links}</nav>',
        *(section(title, text) for title, text in there),
    ]
    write_atomically(path, page(f"ftkit: {run['recipe']['name']}", body))


def _judged(run: Data, manifest: Data | None) -> Data:
    """Test metrics: of the exported file where there is one."""
    found: Data = manifest["evidence"]["accuracy"]["file"] if manifest else run["metrics"]["test"]
    return found


def _verdict(run: Data, manifest: Data | None) -> list[str]:
    found = _judged(run, manifest)
    name = escape(run["recipe"]["name"])
    right = (
        f"{found['accuracy']:.1%} of the held-out images right [{found['accuracy_low']:.1%} to "
        f"{found['accuracy_high']:.1%}; {ground(found['images'], found['clusters'])}]; {_weakest(found)}"
    )
    what = f"{escape(run['recipe']['backbone'])} in {len(run['stages'])} stages over {len(run['classes'])} classes"

    if manifest is None:
        return [f"<h1>{name}: trained, not exported yet</h1>", f"<p>{what}; {right}.</p>"]

    verdict = overall(gate["verdict"] for gate in manifest["gates"])
    word = {
        "passed": '<span class="good">all gates passed</span>',
        "failed": '<span class="bad">a gate failed</span>',
        "inconclusive": '<span class="bad">a gate is not settled</span>',
    }[verdict]
    figures = manifest["figures"]
    took = ""
    if figures["p50_ms"] and figures["p95_ms"]:
        took = f", {figures['p50_ms']:.1f} ms (p95 {figures['p95_ms']:.1f}) on {frames(manifest['frame'])}"

    return [
        f"<h1>{name}: {word}</h1>",
        f"<p>{what}; chosen: {escape(manifest['chosen'])} for {escape(manifest['target'])}, "
        f"{figures['size_bytes'] / 1e6:.1f} MB{took}; {right}.</p>",
    ]


def _weakest(found: Data) -> str:
    """Balanced accuracy, and the class that accuracy may hide."""
    known = [
        (recall, name)
        for recall, name in zip(found["recall"], found["classes"], strict=True)
        if recall is not None
    ]
    recall, name = min(known)
    weak = f"worst class {escape(name)}: {recall:.1%}"
    unjudged = [
        name
        for recall, name in zip(found["recall"], found["classes"], strict=True)
        if recall is None
    ]
    missing = f"; no test image of {escape(', '.join(unjudged))}" if unjudged else ""
    marked = f'<span class="bad">{weak}</span>' if recall < LOW_RECALL else weak

    return f"balanced {found['balanced_accuracy']:.1%}, {marked}{missing}"


def _accuracy(run: Data, manifest: Data | None) -> str:
    judged = [("framework", run["metrics"]["test"])]
    if manifest:
        judged.insert(0, ("exported file", manifest["evidence"]["accuracy"]["file"]))

    rows = [
        (
            who,
            m["images"],
            m["accuracy"],
            f"{m['accuracy_low']:.3f} to {m['accuracy_high']:.3f}",
            "none: as if independent" if m["clusters"] is None else m["clusters"],
            m["balanced_accuracy"],
            m["macro_f1"],
            m["nll"],
            m["ece"],
        )
        for who, m in judged
    ]

    return table(
        (
            "of the",
            "images",
            "accuracy",
            "95 % interval",
            "groups",
            "balanced",
            "macro F1",
            "NLL",
            "ECE",
        ),
        rows,
    )


def _training(run: Data, epochs: Sequence[Data]) -> str:
    begins = [i for i, row in enumerate(epochs) if i == 0 or row["stage"] != epochs[i - 1]["stage"]]
    bands = [(begin, epochs[begin]["train"]) for begin in begins]

    def of(key: str) -> list[float]:
        return [float(row[key]) for row in epochs]

    stages = [
        (
            s["train"],
            "kept" if s["kept"] else "left out",
            s["epochs"],
            s["lr"],
            s["val_accuracy"],
            s["drift"],
            s["seconds"],
        )
        for s in run["stages"]
    ]

    drift = [
        (s["train"], s["drift"], f"{s['drift']:.3f}")
        for s in run["stages"]
        if s["drift"] is not None
    ]

    return "".join(
        [
            '<div class="grid">',
            lines(
                "Loss",
                [("train", "--one", of("loss")), ("val (NLL)", "--two", of("val_nll"))],
                bands,
            ),
            lines(
                "Accuracy",
                [("train", "--one", of("train_accuracy")), ("val", "--two", of("val_accuracy"))],
                bands,
            ),
            lengths(
                "Likeness of the features to the pretrained ones after each stage (CKA, 1 = unmoved)",
                drift,
            ),
            "</div>",
            table(("stage", "verdict", "epochs", "rate", "val accuracy", "CKA", "seconds"), stages),
            *(f"<p>{escape(s['train'])}: {escape(s['how'])}.</p>" for s in run["stages"]),
            "<p>A stage that is no better than the one before on val is left out.</p>",
        ]
    )


def _classes(found: Data) -> str:
    names = found["classes"]
    counts = found["confusion"]
    rows = [
        (name, sum(row), recall, "" if low is None else f"{low:.2f} to {high:.2f}", precision)
        for name, row, recall, low, high, precision in zip(
            names,
            counts,
            found["recall"],
            found["recall_low"],
            found["recall_high"],
            found["precision"],
            strict=True,
        )
    ]

    numbered = len(names) > NAMED_COLUMNS
    head = "".join(
        f'<th scope="col" title="{escape(name)}">{number if numbered else escape(name)}</th>'
        for number, name in enumerate(names, start=1)
    )

    body = ""
    for number, (name, row) in enumerate(zip(names, counts, strict=True), start=1):
        said = f"{number} {escape(name)}" if numbered else escape(name)
        whole = sum(row) or 1
        cells = "".join(
            f'<td class="cell" style="background:rgba(var(--cell),{0.55 * n / whole:.2f})">{n}</td>'
            for n in row
        )
        body += f'<tr><th scope="row">{said}</th>{cells}</tr>'

    confusion = (
        '<div class="scroll confusion" tabindex="0" role="region" aria-label="confusion matrix"><table>'
        "<caption>Confusion. Rows: the true class. Columns: what the model said.</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    listed = table(("class", "images", "recall", "95 % interval", "precision"), rows)
    return f"{listed}{confusion}" if numbered else f'<div class="grid">{listed}{confusion}</div>'


def _sureness(run: Data) -> str:
    """Calibration before and after, what withholding doubtful answers brings, and how many images
    pass as familiar."""
    after = run["metrics"]["test"]
    before = run["uncalibrated"]["test"]
    held = run["abstention"]
    text = (
        f"Temperature {run['temperature']:.2f}: NLL {before['nll']:.3f} to {after['nll']:.3f}, "
        f"ECE {before['ece']:.3f} to {after['ece']:.3f}. "
    )

    if held["threshold"] is None:
        text += f"No threshold on val reached a precision of {held['wanted']:.0%}: every answer is marked doubtful. "
    else:
        right = "" if held["precision"] is None else f", of which {held['precision']:.1%} are right"
        shown = (
            "with 95 % confidence" if held["proven"] else "though too few images to be sure of it"
        )
        text += (
            f"Answers below {held['threshold']:.2f} are doubtful: above it at least {held['wanted']:.0%} were "
            f"right on val, {shown}. Here {held['coverage']:.0%} are above{right}. "
        )

    text += f"{run['foreign_kept']:.1%} of these images pass as familiar (95 % on val)."
    named = {f"{when} temperature": run["reliability"][when] for when in ("before", "after")}
    drawn = reliability_chart("Reliability on held-out images", named)
    text += " A dot on the dashed line keeps its word; its area is its images."

    return f'<div class="grid">{drawn}<p>{text}</p></div>'


def _mistakes(run: Data, shown: Sequence[Picture]) -> str:
    if not run["mistakes"]:
        return "<p>None: every held-out image was right.</p>"
    if not shown:
        rows = [(m["image"], m["class"], m["said"], m["probability"]) for m in run["mistakes"]]
        return table(("image", "is", "said", "probability"), rows)

    items = []
    for mistake, picture in zip(run["mistakes"], shown, strict=True):
        said = f"is {mistake['class']}, said {mistake['said']} ({mistake['probability']:.2f})"
        tags = [_image(picture.photograph, f"{mistake['image']}: {said}")]
        if picture.heat:
            tags.append(
                _image(picture.heat, f"where the model saw {mistake['said']} in {mistake['image']}")
            )
        items.append(
            f'<figure><div class="{"pair" if picture.heat else ""}">{"".join(tags)}</div><figcaption>'
            f"{escape(said)}<br>{escape(mistake['image'])}</figcaption></figure>"
        )

    heat = " Beside each, the class activation map of the wrong answer." if shown[0].heat else ""
    return (
        f'<p>Wrong, and surest of it first.{heat}</p><div class="pictures">{"".join(items)}</div>'
    )


def _image(content: bytes, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(text)}" width="{SIDE}" height="{SIDE}" src="data:image/jpeg;base64,{data}">'


def _data(run: Data) -> str:
    found = run["audit"]
    splits = list(next(iter(found["counts"].values())))
    rows = [(name, *(each[split] for split in splits)) for name, each in found["counts"].items()]
    made = [f"{split} (made by ftkit)" if split in found["made"] else split for split in splits]
    totals = found["totals"]
    words = {
        "bad": "unreadable",
        "alike": "sets of identical or nearly identical images",
        "leaks": "of them across splits",
        "conflicts": "of them under several labels",
        "shared_groups": "groups on several sides",
        "tiny": "very small",
        "huge": "very large",
        "flat": "of one colour",
    }

    facts = ", ".join(f"{totals[key]} {word}" for key, word in words.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in list(found["formats"].items())[:4])
    sizes = ", ".join(f"{count} of {size}" for size, count in list(found["sizes"].items())[:4])
    word = (
        '<span class="good">No identical image on two sides or under two labels.</span>'
        if found["passed"]
        else '<span class="bad">Splits share images or groups, or an image has two labels.</span>'
    )
    names = [" = ".join(item["images"]) for item in (*found["leaks"], *found["conflicts"])]
    bad = [f"{path}: {why}" for path, why in found["bad"]]
    listed = "".join(f"<li>{escape(text)}</li>" for text in [*names, *bad][:20])

    return "".join(
        [
            f"<p>{word} {facts}.</p><p>{escape(kinds)}; {escape(sizes)}. Largest class over smallest in train: "
            f"{found['imbalance']:.1f}.</p>",
            f"<details><summary>Which</summary><ul>{listed}</ul></details>" if listed else "",
            table(("class", *made), rows),
        ]
    )


def _reproduce(run: Data, manifest: Data | None) -> str:
    versions = run["environment"]
    group = run["group_by"]
    audit = run["audit"]
    leaks = bool(audit["shared_groups"]) or any(item["exact"] for item in audit["leaks"])
    train = f"ftkit train DATA --recipe recipe.json --seed {run['seed']} --out run"

    if group:
        train += f" --group-by {shlex.quote(group)}"
    if leaks:
        train += " --allow-leakage"

    commands = [
        "pip install "
        + " ".join(
            f"{name}=={versions[name].split('+')[0]}"
            for name in ("ftkit", "torch", "torchvision", "timm")
        ),
        train,
    ]

    facts = {
        "data": run["data_fingerprint"],
        "run": run["model_fingerprint"],
        "backbone weights": run["weights"],
        "seed": run["seed"],
        **versions,
    }
    if manifest:
        changed = {**manifest["limits"]}
        providers = ",".join(
            dict.fromkeys(item["provider"] for item in manifest["evidence"]["parity"])
        )
        differs = [
            f"--set {shlex.quote(f'export.{key}={value}')}"
            for key, value in changed.items()
            if value != run["recipe"]["export"].get(key) and value is not None
        ]
        commands += [
            " ".join(["ftkit export run --out bundle --providers", providers, *differs]),
            "ftkit verify bundle",
        ]
        facts |= {"model.onnx sha256": manifest["model_sha256"], **manifest["machine"]}

    # It may be a local path, as a teacher
    recipe = {
        **run["recipe"],
        "weights": Path(run["recipe"]["weights"]).name,
    }
    recipe["stages"] = [
        {**s, "teacher": s["teacher"] and Path(s["teacher"]).name} for s in recipe["stages"]
    ]

    return "".join(
        [
            f"<pre>{escape(chr(10).join(commands))}</pre>",
            f"<details><summary>recipe.json</summary><pre>{escape(json.dumps(recipe, indent=1))}</pre>"
            "</details>",
            table(("what", "value"), [(key, str(value)) for key, value in facts.items()]),
        ]
    )


def load_pictures(folder: Path) -> list[Picture]:
    """The thumbnails that a run keeps."""
    return [Picture(photograph=path.read_bytes()) for path in sorted(folder.glob("*.jpg"))]


def save_pictures(folder: Path, shown: Sequence[Picture]) -> None:
    """Keep thumbnails in a run, NN.jpg."""
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(shown):
        write_atomically(folder / f"{number:02d}.jpg", picture.photograph)
