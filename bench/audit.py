"""Time of `ftkit data` on 10,000 photographs (empty cache); recall of its duplicate search.

python bench/audit.py                     # about two minutes, 3 GB of disk in a temporary folder
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ftkit.cli.demo import write_elpv
from ftkit.data import audit
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit_export.runtime.preprocess import Preprocess

COUNT, SIZE = 10_000, (640, 480)


def main() -> None:
    """Print the time, then duplicate pairs and recall on the solar cells."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["FTKIT_CACHE"] = str(root / "cache")
        write_elpv(root / "cells", split=False)
        cells = sorted((root / "cells").rglob("*.png"))
        rng = np.random.default_rng(0)

        for number in range(COUNT):
            path = root / "photos" / f"class{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cell = Image.open(cells[number % len(cells)]).convert("RGB").resize(SIZE)
            levels = np.asarray(cell) * rng.uniform(0.6, 1.0, 3) + rng.normal(
                0, 4, (SIZE[1], SIZE[0], 1)
            )
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path, quality=90)

        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ftkit", "data", str(root / "photos")],
            capture_output=True,
            text=True,
            check=False,
        )

        took = time.perf_counter() - begun
        print(f"{COUNT} JPEGs of {SIZE[0]} x {SIZE[1]}: {took:.1f} s, exit {done.returncode}")
        _found(root)


def _found(root: Path) -> None:
    images = read_images(root / "cells")
    thumbs = audit._thumbnails(build_canvases(images, Preprocess()), lambda done, total: None)
    signs = audit._hashes(thumbs)
    pairs = int(np.triu(signs @ signs.T >= 64 - 2 * audit.BITS_APART, 1).sum())
    rows = np.arange(len(thumbs))
    sure = audit.near_duplicates(thumbs, rows)
    print(
        f"{len(thumbs)} solar cells: hash alone {pairs} pairs, with the correlation {len(sure)} sets of "
        f"{sum(len(each.rows) for each in sure)} images"
    )
    picks = rows[:: len(rows) // 150][:150]

    changes = {
        "JPEG at quality 40": _recompressed,
        "half the resolution": _halved,
        "15 % brighter": _brighter,
        "3 % cropped at each side": _cropped,
    }
    for name, change in changes.items():
        changed = [change(Image.open(images.images[row].path).convert("RGB")) for row in picks]
        drawn = np.stack([_thumb(image) for image in changed])
        found = audit.near_duplicates(
            np.concatenate([thumbs, drawn]), np.arange(len(rows) + len(picks))
        )
        where = {row: number for number, each in enumerate(found) for row in each.rows}
        hits = sum(
            where.get(int(row), -1) == where.get(len(rows) + i, -2) for i, row in enumerate(picks)
        )
        print(f"{name}: {hits} of {len(picks)} found")


def _thumb(image: Image.Image) -> np.ndarray:
    canvas = Image.fromarray(Preprocess().canvas(np.asarray(image))).convert("L")
    return np.asarray(canvas.resize((audit.THUMB, audit.THUMB), Image.Resampling.BOX), np.float32)


def _recompressed(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=40)
    return Image.open(content)


def _halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def _brighter(image: Image.Image) -> Image.Image:
    return image.point(lambda level: min(255, int(level * 1.15)))


def _cropped(image: Image.Image) -> Image.Image:
    x, y = image.width * 3 // 100, image.height * 3 // 100
    return image.crop((x, y, image.width - x, image.height - y))


if __name__ == "__main__":
    main()
