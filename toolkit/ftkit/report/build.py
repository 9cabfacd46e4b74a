"""Write report.html: one self-contained page without scripts, the verdict first.

write_report(Path("report.html"), run_data, epochs, pictures)                    # of a run
write_report(Path("report.html"), run_data, epochs, pictures, manifest)          # of a bundle: gates and evidence too
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from markupsafe import Markup

from ftkit.data.canvas import Canvases
from ftkit.report import charts
from ftkit.report.export_sections import Data, export_sections
from ftkit.report.pages import Table, render, where_judged
from ftkit.report.target_sections import WORDS, counted, target_sections, task_name
from ftkit.utils.console import frames, with_bounds
from ftkit_export.bundle.seal import overall
from ftkit_export.conversion.class_activation import Explainer, overlay
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.files import write_atomically

SIDE = 160  # pixels of a thumbnail
LOW_RECALL = 0.5  # recall below which a class is marked
NAMED_COLUMNS = 5  # a confusion matrix with more classes has numbered columns


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image for the page and, if known, its class activation map, as JPEG bytes."""

    photograph: bytes
    heat: bytes = b""


def pictures(
    canvases: Canvases, mistakes: Sequence[Data], explain: Explainer | None = None
) -> list[Picture]:
    """Thumbnails of the worst mistakes, with activation maps of the wrong outputs if any."""
    thumbnails = []
    for item in mistakes:
        canvas = canvases.array([item["row"]])[0]
        if explain is None or "said_label" not in item:  # nor in older runs of other tasks
            thumbnails.append(Picture(photograph=_jpeg(PIL.Image.fromarray(canvas))))
            continue
        heat, _ = explain(canvas, item["said_label"])
        seen = explain.seen(canvas)
        thumbnails.append(
            Picture(photograph=_jpeg(PIL.Image.fromarray(seen)), heat=_jpeg(overlay(seen, heat)))
        )

    return thumbnails


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

    run: run.json. epochs: the lines of metrics.jsonl. manifest: that of the bundle, without the
    hashes of its files.
    """
    export = export_sections(manifest, Path.cwd()) if manifest else None
    titles = {
        id: title
        for id, title in TITLES.items()
        if (id != "pipeline" or run.get("pipeline"))
        and (id not in EXPORT_ONLY or (export and (id != "history" or export["history"])))
    }
    test = _judged(run, manifest)
    task = task_name(run)
    if task == "single-label":
        own: dict[str, Any] = {
            "figures": _figures(test),
            "accuracy": _accuracy(run, manifest),
            "classes": _classes(test),
            "confidence": _confidence(run),
        }
    else:
        sections = target_sections(run, test, _compared(run, manifest))
        own = {**sections, "classes": {"table": sections["outputs"], "confusion": None}}
        titles |= {"accuracy": "On held-out images", "by-class": str(WORDS[task]["by-class"])}

    page = render(
        "report.html",
        name=run["recipe"]["name"],
        titles=titles,
        side=SIDE,
        header=_header(run, own["figures"], manifest),
        export=export,
        accuracy=own["accuracy"],
        training=_training(run, epochs),
        pipeline=_pipeline(run),
        classes=own["classes"],
        confidence=own["confidence"],
        mistakes=_mistakes(run, shown),
        data=_data(run),
        reproduce=_reproduce(run, manifest),
    )
    write_atomically(path, page.encode())


TITLES = {
    "gates": "Gates",
    "accuracy": "Accuracy on held-out images",
    "training": "Training",
    "pipeline": "Pipeline",
    "by-class": "By class",
    "how-sure-it-is": "How sure it is",
    "worst-mistakes": "Worst mistakes",
    "variants": "Variants",
    "parity": "Parity with the framework",
    "latency": "Latency, cold start, memory",
    "history": "History",
    "data": "Data",
    "reproduce": "Reproduce",
}
EXPORT_ONLY = ("gates", "variants", "parity", "latency", "history")


def _judged(run: Data, manifest: Data | None) -> Data:
    """Test metrics: of the exported file where there is one."""
    metrics: Data = manifest["evidence"]["accuracy"]["file"] if manifest else run["metrics"]["test"]
    return metrics


def _header(run: Data, figures: list[dict[str, Any]], manifest: Data | None) -> dict[str, Any]:
    """Verdict, model and the figures that decide, for whoever reads no further."""
    task = task_name(run)
    count = len(run["classes"])
    outputs = f"{count} classes" if task == "single-label" else counted(task, count)
    model = f"{run['recipe']['backbone']}, fine-tuned in {len(run['stages'])} stages on {outputs}"
    if missing := run.get("not_trained"):  # not in older runs
        model += f". The training was interrupted: {', '.join(missing)} is missing"
    if manifest is None:
        return {
            "verdict": "trained, not exported yet",
            "mood": "",
            "model": f"{model}.",
            "figures": figures,
        }

    outcome = overall(gate["verdict"] for gate in manifest["gates"])
    return {
        "verdict": VERDICTS[outcome],
        "mood": "good" if outcome == "passed" else "bad",
        "model": f"{model}; chosen: {manifest['chosen']} for {manifest['target']}.",
        "figures": [*figures, *_cost(manifest)],
    }


def _figures(test: Data) -> list[dict[str, Any]]:
    """Accuracy, and the class that it may hide."""
    recall, weakest = _weakest(test)
    return [
        {
            "name": "of the held-out images correct",
            "value": f"{test['accuracy']:.1%}",
            "detail": f"{test['accuracy_low']:.1%} to {test['accuracy_high']:.1%} (95 %; "
            f"{ground(test['images'], test['clusters'])}); balanced {test['balanced_accuracy']:.1%}",
            "bad": False,
        },
        {
            "name": f"worst class {weakest}",
            "value": f"{recall:.1%}",
            "detail": "of its images correct" + _without_images(test),
            "bad": recall < LOW_RECALL,
        },
    ]


VERDICTS = {
    "passed": "all gates passed",
    "failed": "a gate failed",
    "inconclusive": "a gate is inconclusive",
}


def _cost(manifest: Data) -> list[dict[str, Any]]:
    """Latency and size of the chosen file."""
    figures = manifest["figures"]
    cost = [
        {
            "name": "size of the file",
            "value": f"{figures['size_bytes'] / 1e6:.1f} MB",
            "detail": f"{manifest['chosen']}, model.onnx",
            "bad": False,
        }
    ]
    if figures["p50_ms"] and figures["p95_ms"]:
        cost.insert(
            0,
            {
                "name": "per image, one thread",
                "value": f"{figures['p50_ms']:.1f} ms",
                "detail": f"p95 {figures['p95_ms']:.1f} ms, {frames(manifest['frame'])}",
                "bad": False,
            },
        )
    return cost


def _weakest(test: Data) -> tuple[float, str]:
    """Recall and name of the class that accuracy may hide."""
    return min(
        (recall, name)
        for recall, name in zip(test["recall"], test["classes"], strict=True)
        if recall is not None
    )


def _without_images(test: Data) -> str:
    names = [
        name for recall, name in zip(test["recall"], test["classes"], strict=True) if recall is None
    ]
    return f"; no test image of {', '.join(names)}" if names else ""


def _compared(run: Data, manifest: Data | None) -> list[tuple[str, Data]]:
    """Metrics of the file and the framework on test; with folds, of the folds' models out of fold."""
    judged = [("framework", run["metrics"]["test"])]
    if run.get("folds"):
        judged.append(("folds' models, out of fold", run["metrics"]["val"]))
    if manifest:
        judged.insert(0, ("exported file", manifest["evidence"]["accuracy"]["file"]))
    return judged


def _accuracy(run: Data, manifest: Data | None) -> Table:
    """Who was how accurate."""
    head = (
        "model",
        "images",
        "accuracy",
        "95 % interval",
        "groups",
        "balanced accuracy",
        "macro F1",
        "NLL",
        "ECE",
    )
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
        for who, m in _compared(run, manifest)
    ]
    return Table(head, rows)


def _training(run: Data, epochs: Sequence[Data]) -> dict[str, Any]:
    """Curves over the epochs, and a row per stage."""
    starts = [i for i, row in enumerate(epochs) if i == 0 or row["stage"] != epochs[i - 1]["stage"]]
    bands = [(start, epochs[start]["train"]) for start in starts]

    def of(key: str) -> list[float]:
        return [float(row[key]) for row in epochs]

    metric = _metric(run)
    loss = [
        ("train", "--one", of("loss")),
        (f"{_held_out_name(run)} (NLL)", "--two", of("val_nll")),
    ]
    held = _held_out_name(run)
    accuracy = [("train", "--one", of("train_accuracy")), (held, "--two", of("val_accuracy"))]
    if task_name(run) == "multi-label":  # whose train figure is another: the share of labels right
        del accuracy[0]
    drift = [
        (stage["train"], stage["drift"], f"{stage['drift']:.3f}")
        for stage in run["stages"]
        if stage["drift"] is not None
    ]
    similarity = (
        "Similarity of features to the pretrained ones after each stage (CKA, 1 = unchanged)"
    )

    head = (
        "stage",
        "verdict",
        "epochs",
        "learning rate",
        f"{held} {metric}",
        f"gain in {'%' if task_name(run) == 'regression' else 'points'} [95 %]",
        "CKA",
        "seconds",
    )
    rows = [
        (
            stage["train"],
            _verdict_of_stage(stage),
            stage["epochs"],
            stage["lr"],
            stage["val_accuracy"],
            _gain(stage),
            stage["drift"],
            stage["seconds"],
        )
        for stage in run["stages"]
    ]

    return {
        "charts": [
            charts.lines("Loss", loss, bands),
            charts.lines(f"{metric[0].upper()}{metric[1:]}", accuracy, bands),
            charts.lengths(similarity, drift),
            *_fold_chart(run),
        ],
        "folds": bool(run.get("folds")),
        "left_out": not all(stage["kept"] for stage in run["stages"]),
        "start": _head_start(run),
        "stages": Table(head, rows),
        "how": run["stages"],
    }


def _metric(run: Data) -> str:
    task = task_name(run)
    return "accuracy" if task == "single-label" else str(WORDS[task]["metric"])


def _verdict_of_stage(stage: Data) -> str:
    """Whether a stage was kept, and how sure that is."""
    known = {
        "better": "surely better",
        "worse": "surely worse",
        "equal": "within the limit",
        "open": "not settled",
        "late": "no time",
    }
    words = ["kept" if stage["kept"] else "left out"]
    if sure := known.get(str(stage.get("verdict"))):  # not in older runs
        words.append(sure)
    if stage.get("losses"):
        words.append("by the loss")
    return ", ".join(words)


def _gain(stage: Data) -> str:
    """A stage's gain over what stood before, with its bounds; "" where none was measured."""
    if not stage.get("gain"):
        return ""
    gain, low, high = (100 * value for value in stage["gain"])
    return f"{gain:+.1f} [{low:+.1f} to {high:+.1f}]"


def _pipeline(run: Data) -> Table:
    """Image, preprocessing, the parts of the network, and what comes of them."""
    preprocess = run["preprocess"]
    size = preprocess["size"]
    parts = run.get("pipeline", [])  # not in older runs
    classes = len(run["classes"])
    task = task_name(run)
    read = ("softmax", f"temperature {run['temperature']:.2f}")
    if task != "single-label":
        read = ("readout", str(WORDS[task]["readout"]))

    rows = [
        ("image", "any camera's or file's", "(H, W, 3)", "", ""),
        ("preprocess", preprocess["fit"], f"(3, {size}, {size})", "", "in the file"),
        *(
            (
                part["name"],
                _span(part["blocks"]),
                str(tuple(part["shape"])),
                part["parameters"],
                ", ".join(part["stages"]) or "pretrained, never trained here",
            )
            for part in parts
        ),
        (*read, f"({classes},)", "", "fitted on held-out answers"),
    ]
    return Table(("step", "what", "output", "parameters", "trained in"), rows if parts else [])


def _span(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def _held_out_name(run: Data) -> str:
    """What a training was judged on."""
    return "out of fold" if run.get("folds") else "val"


def _fold_chart(run: Data) -> list[Markup]:
    """A strip of accuracies, one per fold."""
    folds = run.get("folds")  # not in older runs
    if not folds:
        return []
    rows = [
        (f"fold {number}", accuracy, f"{accuracy:.3f} ({images})")
        for number, (accuracy, images) in enumerate(
            zip(folds["accuracy"], folds["images"], strict=True), start=1
        )
        if accuracy is not None
    ]
    return [
        charts.lengths(
            f"Out-of-fold {_metric(run)} of each fold (images)",
            rows,
            max(1.0, *(value for _, value, _ in rows)),
        )
    ]


def _head_start(run: Data) -> str:
    """What the frozen features were worth before any epoch."""
    start = run.get("head_start")  # not in older runs, nor with init = "random"
    if not start:
        return ""
    return (
        f"Before training, a ridge regression on the frozen features: out-of-fold {_metric(run)} "
        f"{with_bounds(start['accuracy'], start['low'], start['high'])} on "
        f"{ground(start['images'], start['clusters'])}. Each image was judged by a head fitted without "
        "its fold."
    )


def _classes(test: Data) -> dict[str, Any]:
    """Recall and precision of each class, and the confusion matrix."""
    names = test["classes"]
    counts = test["confusion"]
    rows = [
        (name, sum(row), recall, "" if low is None else f"{low:.2f} to {high:.2f}", precision)
        for name, row, recall, low, high, precision in zip(
            names,
            counts,
            test["recall"],
            test["recall_low"],
            test["recall_high"],
            test["precision"],
            strict=True,
        )
    ]
    confusion = [
        {
            "name": name,
            "cells": [
                {"count": count, "opacity": f"{0.55 * count / (sum(row) or 1):.2f}"}
                for count in row
            ],
        }
        for name, row in zip(names, counts, strict=True)
    ]

    return {
        "numbered": len(names) > NAMED_COLUMNS,
        "names": names,
        "confusion": confusion,
        "table": Table(("class", "images", "recall", "95 % interval", "precision"), rows),
    }


def _confidence(run: Data) -> dict[str, Any]:
    """Calibration before and after temperature scaling, the threshold for doubtful answers, and the
    share of images that pass as in-distribution."""
    after = run["metrics"]["test"]
    before = run["uncalibrated"]["test"]
    text = [
        f"Temperature {run['temperature']:.2f}: NLL {before['nll']:.3f} to {after['nll']:.3f}, "
        f"ECE {before['ece']:.3f} to {after['ece']:.3f}.",
        _threshold(run["abstention"], where_judged(run)),
        f"{run['foreign_kept']:.1%} of the test images pass as in-distribution (95 % {where_judged(run)}); the "
        "others are marked foreign.",
        "A dot on the dashed line is perfectly calibrated; its area shows its number of images.",
    ]
    named = {
        f"{when} temperature scaling": run["reliability"][when] for when in ("before", "after")
    }
    return {
        "chart": charts.reliability_chart("Reliability on held-out images", named),
        "text": " ".join(text),
    }


def _threshold(held: Data, where: str) -> str:
    """What the threshold for doubtful answers brings, in words."""
    if held["threshold"] is None:
        return (
            f"No threshold {where} reached a precision of {held['wanted']:.0%}: every answer is marked "
            "doubtful."
        )

    right = "" if held["precision"] is None else f", of which {held['precision']:.1%} are correct"
    shown = "with 95 % confidence" if held["proven"] else "but on too few images to be certain"
    return (
        f"Answers with a probability below {held['threshold']:.2f} are marked doubtful: {where} at "
        f"least {held['wanted']:.0%} of the others were correct, {shown}. On test "
        f"{held['coverage']:.0%} are not doubtful{right}."
    )


def _mistakes(run: Data, shown: Sequence[Picture]) -> dict[str, Any]:
    """The worst mistakes, with pictures where there are any."""
    mistakes = run["mistakes"]
    rows = [
        (m["image"], m["class"], m["said"], m.get("probability", m.get("error"))) for m in mistakes
    ]
    task = task_name(run)
    head: Any = ("image", "true class", "predicted class", "probability")
    words = "Wrong answers, the most confident first."
    if task != "single-label":
        head, words = WORDS[task]["head"], str(WORDS[task]["mistakes"])
    pictures = [
        {
            "photograph": picture.photograph,
            "heat": picture.heat,
            "place": mistake["image"],
            "output": mistake.get("output", mistake["said"]),
            "text": f"true: {mistake['class']}, predicted: {mistake['said']} ({_how_far(mistake)})",
        }
        for mistake, picture in zip(mistakes, shown, strict=bool(shown))
    ]
    return {
        "table": Table(head, rows),
        "words": words,
        "pictures": pictures,
        "heat": bool(shown and shown[0].heat),
    }


def _how_far(mistake: Data) -> str:
    if "error" in mistake:
        return f"{mistake['error']:.1f} standard deviations off"
    return f"{mistake['probability']:.2f}"


def _data(run: Data) -> dict[str, Any]:
    """Images by class and split, and what the audit found."""
    audit = run["audit"]
    splits = list(next(iter(audit["counts"].values())))
    rows = [(name, *(each[split] for split in splits)) for name, each in audit["counts"].items()]
    made = [f"{split} (made by ftkit)" if split in audit["made"] else split for split in splits]
    words = {
        "bad": "unreadable",
        "alike": "sets of identical or nearly identical images",
        "leaks": "of them in several splits",
        "conflicts": "of them with several labels",
        "shared_groups": "groups in several splits",
        "tiny": "very small",
        "huge": "very large",
        "flat": "of a single colour",
    }
    names = [" = ".join(item["images"]) for item in (*audit["leaks"], *audit["conflicts"])]
    bad = [f"{path}: {why}" for path, why in audit["bad"]]

    kind = "class" if task_name(run) == "single-label" else "stratum"
    return {
        "passed": audit["passed"],
        "findings": ", ".join(f"{audit['totals'][key]} {word}" for key, word in words.items()),
        "formats": _first(audit["formats"], "{1} {0}"),
        "sizes": _first(audit["sizes"], "{1} of {0}"),
        "imbalance": audit["imbalance"],
        "listed": [*names, *bad][:20],
        "table": Table((kind, *made), rows),
    }


def _first(counts: Mapping[str, int], text: str) -> str:
    return ", ".join(text.format(name, count) for name, count in list(counts.items())[:4])


def _reproduce(run: Data, manifest: Data | None) -> dict[str, Any]:
    """Commands, recipe and versions that make the same again."""
    facts = {
        "data": run["data_fingerprint"],
        "run": run["model_fingerprint"],
        "backbone weights": run["weights"],
        "seed": run["seed"],
        **run["environment"],
    }
    commands = _training_commands(run)
    if manifest:
        commands += _export_commands(run, manifest)
        facts |= {"model.onnx sha256": manifest["model_sha256"], **manifest["machine"]}

    # Weights may be a local path, and so may a teacher
    recipe = {**run["recipe"], "weights": Path(run["recipe"]["weights"]).name}
    recipe["stages"] = [
        {**stage, "teacher": stage["teacher"] and Path(stage["teacher"]).name}
        for stage in recipe["stages"]
    ]

    return {
        "commands": "\n".join(commands),
        "recipe": json.dumps(recipe, indent=1),
        "facts": Table(("what", "value"), [(key, str(value)) for key, value in facts.items()]),
    }


def _training_commands(run: Data) -> list[str]:
    versions = run["environment"]
    packages = [
        f"{name}=={versions[name].split('+')[0]}"
        for name in ("ftkit", "torch", "torchvision", "timm")
    ]

    train = f"ftkit train DATA --recipe recipe.json --seed {run['seed']} --out run"
    if run["group_by"]:
        train += f" --group-by {shlex.quote(run['group_by'])}"
    for option, value in (("--root", run.get("root")), ("--add", run.get("add"))):
        if value:  # the folder's name is this machine's own
            train += f" {option} {option.strip('-').upper()}"
    if run.get("max_pixels"):
        train += f" --max-pixels {run['max_pixels']}"
    audit = run["audit"]
    alike = [*audit["leaks"], *audit["conflicts"]]
    if audit["shared_groups"] or any(item["exact"] for item in alike):
        train += " --allow-leakage"

    return [f"pip install {' '.join(packages)}", train]


def _export_commands(run: Data, manifest: Data) -> list[str]:
    providers = dict.fromkeys(item["provider"] for item in manifest["evidence"]["parity"])
    settings = [
        f"--set {shlex.quote(f'export.{key}={value}')}"
        for key, value in manifest["limits"].items()
        if value != run["recipe"]["export"].get(key) and value is not None
    ]
    export = " ".join(["ftkit export run --out bundle --providers", ",".join(providers), *settings])
    return [export, "ftkit verify bundle"]


def load_pictures(folder: Path) -> list[Picture]:
    """Load the thumbnails saved in a run."""
    return [Picture(photograph=path.read_bytes()) for path in sorted(folder.glob("*.jpg"))]


def save_pictures(folder: Path, shown: Sequence[Picture]) -> None:
    """Save thumbnails in a run as NN.jpg."""
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(shown):
        write_atomically(folder / f"{number:02d}.jpg", picture.photograph)
