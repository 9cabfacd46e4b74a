"""Accuracy and time of the recipes on real photographs, compared with a linear probe.

    python bench/accuracy.py --what lite0 --split random --seeds 3     (results: bench/README.md)

Data: ELPV, four classes (mono | poly x ok | defect, certain labels). Splits: `random` is
scikit-learn's stratified 70/30 with random_state=0; `group` keeps runs of 60 consecutive cells
(about one module) in one split. The tutorial loop, on equal work, is in race.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ftkit.cli.demo import SETTINGS, write_elpv
from ftkit.models.backbones import build
from ftkit.options import TrainOptions
from ftkit.overrides import override
from ftkit.recipe import load_recipe
from ftkit.training.train import train

FLIPS = [setting for setting in SETTINGS if setting != "--set"]


def write_random_split(out: Path, seed: int = 0) -> None:
    """out/{train,test}/CLASS by scikit-learn's stratified 70/30 split."""
    with tempfile.TemporaryDirectory() as scratch:
        write_elpv(Path(scratch), split=False)
        files = sorted(Path(scratch).rglob("*.png"), key=lambda path: path.name)
        labels = [path.parent.name for path in files]
        parts = train_test_split(
            np.arange(len(files)), test_size=0.3, stratify=labels, random_state=seed
        )
        for split, rows in zip(("train", "test"), parts, strict=True):
            for row in rows:
                folder = out / split / labels[row]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[row], folder)


def loaders(data: Path, batch: int = 32, size: int = 224) -> tuple[DataLoader, DataLoader]:
    """Loaders of flipped, shuffled training images and of test images, for Lite backbones."""
    normalise = [
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
    ]
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()]
    training = ImageFolder(data / "train", transforms.Compose([*flips, *normalise]))
    test = ImageFolder(data / "test", transforms.Compose(normalise))

    return DataLoader(training, batch, shuffle=True, num_workers=2), DataLoader(
        test, 64, num_workers=2
    )


def probe(data: Path) -> float:
    """Test accuracy of a logistic regression on frozen, pooled features of all non-test images."""
    transform = loaders(data)[1].dataset.transform
    model = build("efficientnet_lite0", 4).model
    features: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}

    for split in (split for split in ("train", "val", "test") if (data / split).is_dir()):
        with torch.inference_mode():
            for x, y in DataLoader(ImageFolder(data / split, transform), 64):
                found = model.forward_head(model.forward_features(x), pre_logits=True)
                features["test" if split == "test" else "train"].append((found.numpy(), y.numpy()))

    whole = {
        name: [np.concatenate(column) for column in zip(*parts, strict=True)]
        for name, parts in features.items()
    }
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(
        *whole["train"]
    )
    return float(fitted.score(*whole["test"]))


def recipe(name: str, data: Path, seed: int, settings: list[str]) -> tuple[float, float]:
    """(test accuracy, seconds of the whole `train`, with decoding and evaluation, empty cache)."""
    with tempfile.TemporaryDirectory() as scratch:
        import os

        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        run = train(
            override(load_recipe(name), [*FLIPS, *settings]),
            data,
            Path(scratch) / "run",
            TrainOptions(seed=seed),
        )
        seconds = time.perf_counter() - begun
        return json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"], seconds


def main() -> None:
    """Run one comparison and print one line per seed, then the mean."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="lite0", help="probe, or a recipe's name")
    parser.add_argument("--split", default="random", choices=["random", "group"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings")

    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "elpv"
        if options.split == "random":
            write_random_split(data)
        else:
            write_elpv(data, split=True)

        results = []
        for seed in range(options.seeds):
            if options.what == "probe":
                results.append((probe(data), 0.0))
            else:
                results.append(recipe(options.what, data, seed, options.settings))
            print(
                f"{options.what}, {options.split}, seed {seed}: {results[-1][0]:.4f} in {results[-1][1]:.0f} s",
                flush=True,
            )

    accuracies, times = zip(*results, strict=True)
    print(
        f"{options.what}, {options.split}: mean {statistics.mean(accuracies):.4f}, {statistics.mean(times):.0f} s"
    )


if __name__ == "__main__":
    main()
