"""Latency, file size and accuracy of smaller inputs and other recipes on the demo's data.

python bench/sizes.py train FOLDER        # lite0 at five sizes and lite2, on the demo's photographs: 15 minutes
python bench/sizes.py time FOLDER         # every recipe's file, interleaved, idle machine: 4 min

Recipes whose weights are not in a Python package are timed with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

import ftkit
from ftkit.cli.demo import write_elpv
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.overrides import override
from ftkit.recipe import load_recipe
from ftkit.training.run import open_run
from ftkit.utils import console
from ftkit_export.conversion.convert import export_core, write
from ftkit_export.conversion.graph import image_form
from ftkit_export.proof.decision import paired
from ftkit_export.runtime.latency import machine, race
from ftkit_export.runtime.readout import OneClass

GROUPS = "module([0-9]+)"
SIZES = (224, 192, 160, 128, 96)
TRAINED = [*(("lite0", size) for size in SIZES), ("lite2", 260)]
TIMED = [
    *TRAINED,
    ("mobilenet_v3_small", 224),
    ("mobilenet_v3_large", 224),
    ("mobilenet_v4_small", 224),
    ("efficientnet_b0", 224),
    ("resnet18", 224),
    ("staged_resnet50", 224),
]
FRAME = "640x480"


def train(folder: Path) -> None:
    """Train each on the same split and seed; print test accuracy and paired drop."""
    photos = folder / "photos"
    if not photos.is_dir():
        write_elpv(photos, split=True)

    labels = {
        image.path: image
        for image in read_images(photos, group_by=GROUPS).images
        if image.split == "test"
    }
    truth = np.array([image.label for image in labels.values()])
    groups = [image.group for image in labels.values()]
    rows = [("recipe", "size", "test accuracy [95 %]", "drop, points [95 %]", "s")]

    first = None
    for recipe, size in TRAINED:
        out = folder / f"{recipe}-{size}"
        if not (out / "run.json").is_file():
            settings = ["augment.vflip=true", f"preprocess.size={size}"]
            ftkit.train(
                photos, out=out, recipe=recipe, settings=settings, group_by=GROUPS, quiet=True
            )

        data = open_run(out).data
        test, right = data["metrics"]["test"], np.array(data["answers"]) == truth
        first = right if first is None else first
        drop = paired(first, right, groups)
        rows.append(
            (
                recipe,
                str(size),
                f"{test['accuracy']:.3f} [{test['accuracy_low']:.3f}, {test['accuracy_high']:.3f}]",
                f"{100 * drop.drop:+.1f} [{100 * drop.low:+.1f}, {100 * drop.high:+.1f}]",
                f"{data['seconds']:.0f}",
            )
        )

    print(console.table(rows))


def time(folder: Path) -> None:
    """Time all image forms, interleaved, on one thread, with frames of one size."""
    photograph = next((folder / "photos" / "test").rglob("*.png"))
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, (recipe, size) in enumerate(TIMED):
            plan = override(load_recipe(recipe), [f"preprocess.size={size}"])
            backbone = build(plan.backbone, 4, "none")
            preprocess = plan.preprocess or backbone.preprocess
            path = Path(scratch) / f"{number}.onnx"
            core = export_core(backbone.model, preprocess.size).model
            metadata = {
                "preprocess": json.dumps(dataclasses.asdict(preprocess)),
                "labels": '["a", "b", "c", "d"]',
            }
            write(image_form(core, preprocess, OneClass(temperature=1.0)), path, metadata)
            files.append(path)

        raced = race(files, photograph, frame=FRAME)
        rows = [("recipe", "size", "p50 ms", "p95", "of lite0", "MB")]

        for (recipe, size), item, path in zip(TIMED, raced, files, strict=True):
            megabytes = f"{path.stat().st_size / 1e6:.1f}"
            ratio = f"{item.ratio:.2f}"
            rows.append(
                (recipe, str(size), f"{item.p50_ms:.2f}", f"{item.p95_ms:.2f}", ratio, megabytes)
            )

    print(f"{console.frames(FRAME)}, one thread, fp32\n{console.table(rows)}\n{machine()}")


def main() -> None:
    """Run `train` or `time`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "time"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    {"train": train, "time": time}[options.what](options.folder)


if __name__ == "__main__":
    main()
