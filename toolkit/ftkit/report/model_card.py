"""MODEL_CARD.md of a bundle: what the model is, on what evidence, its limits, how to use it
(Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.utils.console import condition, frames
from ftkit_export.proof.intervals import ground


def model_card(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """run: run.json's data; manifest: as sealed, but for the files. Returns Markdown."""
    accuracy = manifest["evidence"]["accuracy"]["file"]
    evidence = manifest["evidence"]
    chosen = [item for item in evidence["latency"] if item["variant"] == manifest["chosen"]]
    machine = manifest["machine"]

    return f"""# {manifest["name"]}

{manifest["backbone"]}, fine-tuned in {len(run["stages"])} stages to {len(manifest["labels"])} classes;
the file is its {manifest["chosen"]} variant for {manifest["target"]}. Written by ftkit {manifest["ftkit"]}.

## Data

{_data(run)} Data fingerprint `{manifest["data_fingerprint"][:16]}`, run `{manifest["run"][:16]}`.
The licence of the images and of the pretrained weights binds the model too; ftkit does not know them.

## Measured on {accuracy["images"]} held-out images, by the file itself

Accuracy {accuracy["accuracy"]:.3f} [{accuracy["accuracy_low"]:.3f}, {accuracy["accuracy_high"]:.3f}] (95 %;
{ground(accuracy["images"], accuracy["clusters"])}), macro F1 {accuracy["macro_f1"]:.3f},
calibration error (ECE) {accuracy["ece"]:.3f}.

| class | images | recall | precision |
|---|---|---|---|
{_classes(accuracy)}

| one image at a time, {frames(manifest["frame"])} | p50 ms | p95 ms | memory MB |
|---|---|---|---|
{_latency(chosen)}

Machine: {machine["cpu"]}, {machine["cores"]} cores, ONNX Runtime {machine["onnxruntime"]}.

## Limits

- The images above resemble the training images. On others (another camera, another light) expect less, and measure.
- {_doubtful(run["abstention"])}.
- {run["foreign_kept"]:.0%} of the held-out images pass as familiar, others are marked foreign. Neither mark is a
  guarantee.
- Probabilities were calibrated on {run["metrics"]["val"]["images"]} val images.
- Not judged: fairness between groups, resistance to attack, any use in which an error harms.

## Use

Input `image`: uint8 {_shape(manifest["input_format"])}, any height and width, {manifest["input_format"].upper()}; all
preprocessing is inside. Outputs: `probabilities` (batch, classes) in the order of labels.txt, and `embedding`.

    python device/classify.py --self-check
    python device/classify.py photo.jpg
"""


def _classes(accuracy: Mapping[str, Any]) -> str:
    supports = (sum(row) for row in accuracy["confusion"])
    rows = zip(
        accuracy["classes"], supports, accuracy["recall"], accuracy["precision"], strict=True
    )

    return "\n".join(
        "| {} | {} | {} | {} |".format(
            name.replace("|", "\\|"), support, _share(recall), _share(precision)
        )
        for name, support, recall, precision in rows
    )


def _latency(measured: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"| {condition(item)} | {item['p50_ms']:.1f} | {item['p95_ms']:.1f} | {item['peak_rss_bytes'] / 1e6:.0f} |"
        for item in measured
    )


def _doubtful(held: Mapping[str, Any]) -> str:
    if held["threshold"] is None:
        return "Every answer is marked doubtful: the wanted precision was not reached on val"
    shown = "shown with 95 % confidence" if held["proven"] else "observed, not proven"
    return (
        f"Answers below a probability of {held['threshold']:.2f} are marked doubtful: on val at least "
        f"{held['wanted']:.0%} of the others were right ({shown})"
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _data(run: Mapping[str, Any]) -> str:
    counts = run["splits"]
    return f"{sum(counts.values())} labelled images: {', '.join(f'{n} {split}' for split, n in counts.items())}."


def _shape(input_format: str) -> str:
    return {"grey": "(batch, H, W, 1)", "nv12": "(batch, H x 3 / 2, W, 1)"}.get(
        input_format, "(batch, H, W, 3)"
    )
