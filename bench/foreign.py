"""Out-of-distribution detection at 95 % of val accepted, on a model of solar cells.

    ftkit train photos --out RUN && python bench/foreign.py RUN

Out-of-distribution images: photographs, noise and digits. ftkit's own statistics are compared with
the energy of the logits (Liu et al. 2020) and the top probability, thresholds from val.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.evaluation.model import Inference, WithEmbedding
from ftkit.models.inference import PREFIX_BATCH, runner
from ftkit.training.run import open_run
from ftkit_export.runtime.out_of_distribution import OutOfDistribution


def crops(image: np.ndarray, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Random square crops of a photograph at random scales."""
    found = []
    for _ in range(count):
        size = int(rng.integers(80, 400))
        top, left = (int(rng.integers(0, length - size)) for length in image.shape[:2])
        square = Image.fromarray(image[top : top + size, left : left + size])
        found.append(np.asarray(square.resize((side, side), Image.Resampling.BILINEAR)))
    return np.stack(found)


def main() -> None:
    """Print a table: score, share of test accepted, share of each foreign set caught."""
    run, rng = open_run(sys.argv[1]), np.random.default_rng(0)
    backbone, side = run.backbone(), run.preprocess.size
    colour = np.concatenate([crops(image, 100, side, rng) for image in load_sample_images().images])
    grey = np.repeat(colour.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    digits = [
        Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB")
        for image in load_digits().images[::9]
    ]
    sets = {
        "colour photographs": colour,
        "grey photographs": grey,
        "noise": rng.integers(0, 256, (100, side, side, 3), np.uint8),
        "digits": np.stack([np.asarray(image.resize((side, side))) for image in digits]),
    }

    canvases = build_canvases(read_images(run.data["data"], run.data["seed"]), run.preprocess)
    answers = Inference(backbone, canvases, run.preprocess)
    found = {split: answers(canvases.rows(split), split) for split in ("val", "test")}
    example = torch.from_numpy(run.preprocess.pixels(colour[:PREFIX_BATCH]))
    net, _ = runner(WithEmbedding(backbone), example)

    for name, images in sets.items():
        pixels = torch.from_numpy(run.preprocess.pixels(images))
        parts = [
            net(pixels[start : start + PREFIX_BATCH])
            for start in range(0, len(pixels), PREFIX_BATCH)
        ]
        found[name] = [np.concatenate(column) for column in zip(*parts, strict=True)]

    familiar = OutOfDistribution.from_text(run.data["foreign"])
    scores = {
        "distance of the embedding (ftkit)": lambda logits, embedding: familiar.score(embedding),
        "energy": lambda logits, embedding: -np.logaddexp.reduce(logits, 1),
        "top probability": lambda logits, embedding: np.logaddexp.reduce(logits, 1) - logits.max(1),
    }
    print(f"| score | test kept | {' | '.join(sets)} |\n|---|---|{'---|' * len(sets)}")

    for name, score in scores.items():
        limit = np.quantile(score(*found["val"]), 0.95)
        caught = " | ".join(f"{(score(*found[each]) > limit).mean():.3f}" for each in sets)
        print(f"| {name} | {(score(*found['test']) <= limit).mean():.3f} | {caught} |")


if __name__ == "__main__":
    main()
