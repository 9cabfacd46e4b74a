"""MODEL_CARD.md of a bundle: what the model is, on what evidence, its limits, how to use it
(Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftkit.report.pages import render, where_judged
from ftkit.report.target_sections import WORDS, counted, target_sections, task_name
from ftkit.utils.console import condition, frames
from ftkit_export.proof.intervals import ground

SHAPES = {"grey": "(batch, H, W, 1)", "nv12": "(batch, H x 3 / 2, W, 1)"}


def model_card(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Render the card as Markdown. run: run.json. manifest: without its file hashes."""
    evidence = manifest["evidence"]
    accuracy = evidence["accuracy"]["file"]
    task = task_name(run)
    single = task == "single-label"

    return render(
        "model_card.md",
        run=run,
        manifest=manifest,
        accuracy=accuracy,
        ground=ground(accuracy["images"], accuracy["clusters"]),
        images=sum(run["splits"].values()),
        splits=", ".join(f"{count} {split}" for split, count in run["splits"].items() if count),
        task=task,
        counted=f"{len(manifest['labels'])} classes"
        if single
        else counted(task, len(manifest["labels"])),
        outputs="classes" if single else WORDS[task]["outputs"],
        sections=None if single else target_sections(run, accuracy, []),
        classes=_classes(accuracy) if single else [],
        where=where_judged(run),
        frames=frames(manifest["frame"]),
        latency=[
            {**item, "condition": condition(item)}
            for item in evidence["latency"]
            if item["variant"] == manifest["chosen"]
        ],
        abstention=run.get("abstention"),
        shape=SHAPES.get(manifest["input_format"], "(batch, H, W, 3)"),
    )


def _classes(accuracy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per class."""
    supports = [sum(row) for row in accuracy["confusion"]]
    columns = (accuracy["classes"], supports, accuracy["recall"], accuracy["precision"])
    keys = ("name", "images", "recall", "precision")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
