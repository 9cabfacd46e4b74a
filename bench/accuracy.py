"""Accuracy and time of the recipes on real photographs, beside the tutorial loop and a linear probe.

    python bench/accuracy.py --what lite0 --split random --seeds 3        (see bench/README.md for what was measured)

Data: ELPV, four classes (mono | poly x ok | defect, certain labels). Splits: `random` is scikit-learn's stratified
70/30 with random_state=0; `group` keeps runs of 60 consecutive cells (about one module) on one side.
The tutorial loop is what a newcomer would write: ImageFolder and DataLoader, the backbone forward at every step, head
5 epochs at 1e-3, then the last two blocks 10 epochs at 1e-4, Adam, random horizontal and vertical flips.
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
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ftkit.backbones import build, trainable
from ftkit.demo import SETTINGS, write_elpv
from ftkit.feed import set_mode
from ftkit.recipe import load, override
from ftkit.train import train

FLIPS = [setting for setting in SETTINGS if setting != "--set"]


def write_random_split(out: Path, seed: int = 0) -> None:
    """out/{train,test}/CLASS by scikit-learn's stratified 70/30 split."""
    with tempfile.TemporaryDirectory() as scratch:
        write_elpv(Path(scratch), split=False)
        files = sorted(Path(scratch).rglob("*.png"), key=lambda path: path.name)
        labels = [path.parent.name for path in files]
        parts = train_test_split(np.arange(len(files)), test_size=0.3, stratify=labels, random_state=seed)
        for split, rows in zip(("train", "test"), parts, strict=True):
            for row in rows:
                folder = out / split / labels[row]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[row], folder)


def _loaders(data: Path) -> tuple[DataLoader, DataLoader]:
    normalise = [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
    ]
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()]
    training = ImageFolder(data / "train", transforms.Compose([*flips, *normalise]))
    if (data / "val").is_dir():  # the tutorial has no val split: it trains on all it has
        training = torch.utils.data.ConcatDataset(
            [training, ImageFolder(data / "val", transforms.Compose([*flips, *normalise]))]
        )
    test = ImageFolder(data / "test", transforms.Compose(normalise))
    return DataLoader(training, 32, shuffle=True, num_workers=2), DataLoader(test, 64, num_workers=2)


def tutorial(data: Path, seed: int) -> tuple[float, float, list[float]]:
    """(last test accuracy, training seconds, test accuracy of the last five epochs); evaluating is not counted."""
    torch.manual_seed(seed)
    training, test = _loaders(data)
    backbone = build("efficientnet_lite0", 4)
    model, seconds, curve = backbone.model, 0.0, []
    for stage, epochs, lr in (("head", 5, 1e-3), ("last:2", 10, 1e-4)):
        set_mode(model, trainable(backbone, stage), batchnorm=True)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for epoch in range(epochs):
            begun = time.perf_counter()
            for images, labels in training:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            seconds += time.perf_counter() - begun
            print(f"  tutorial {stage} {epoch + 1}/{epochs}: {seconds:.0f} s of training", flush=True)
            if stage == "head" or epoch < epochs - 5:
                continue
            modes = [module.training for module in model.modules()]
            model.eval()
            with torch.inference_mode():
                right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode
            curve.append(right / len(test.dataset))
            print(f"  test accuracy {curve[-1]:.4f}", flush=True)
    return curve[-1], seconds, curve


def probe(data: Path) -> float:
    """Test accuracy of a logistic regression on the frozen, pooled features."""
    _, test = _loaders(data)
    training, _ = _loaders(data)
    model = build("efficientnet_lite0", 4).model
    features = {}
    for name, dataset in (("train", training.dataset), ("test", test.dataset)):
        for part in getattr(dataset, "datasets", [dataset]):
            part.transform = test.dataset.transform
        with torch.inference_mode():
            parts = [
                (model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in DataLoader(dataset, 64)
            ]
        features[name] = torch.cat([x for x, _ in parts]).numpy(), torch.cat([y for _, y in parts]).numpy()
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(*features["train"])
    return float(fitted.score(*features["test"]))


def recipe(name: str, data: Path, seed: int, settings: list[str]) -> tuple[float, float]:
    """(test accuracy, seconds of the whole `train`, decoding and evaluation included, nothing cached)."""
    with tempfile.TemporaryDirectory() as scratch:
        import os

        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        run = train(override(load(name), [*FLIPS, *settings]), data, Path(scratch) / "run", seed=seed)
        seconds = time.perf_counter() - begun
        return json.loads((run / "run.json").read_text())["metrics"]["test"]["accuracy"], seconds


def main() -> None:
    """Run one comparison and print one line a seed, then the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="lite0", help="tutorial, probe, or a recipe's name")
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
            if options.what == "tutorial":
                results.append(tutorial(data, seed)[:2])
            elif options.what == "probe":
                results.append((probe(data), 0.0))
            else:
                results.append(recipe(options.what, data, seed, options.settings))
            print(
                f"{options.what}, {options.split}, seed {seed}: {results[-1][0]:.4f} in {results[-1][1]:.0f} s",
                flush=True,
            )
    accuracies, times = zip(*results, strict=True)
    print(f"{options.what}, {options.split}: mean {statistics.mean(accuracies):.4f}, {statistics.mean(times):.0f} s")


if __name__ == "__main__":
    main()
