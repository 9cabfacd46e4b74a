"""Size of report.html for ten classes, and the time until a browser has rendered it.

python bench/report.py          # a minute; needs Chromium
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_digits

import ftkit

EACH, SIDE, OPENED = 60, 256, 5
SMALL = ["preprocess.size=64", "preprocess.resize=64", "stages.0.epochs=2"]


def main() -> None:
    """Train briefly on handwritten digits over noise: many mistakes, hard to compress."""
    digits = load_digits()
    rng = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in range(10):
            (folder / "data" / str(label)).mkdir(parents=True)
            for number, picture in enumerate(digits.images[digits.target == label][:EACH]):
                large = np.kron(picture * 8, np.ones((SIDE // 8, SIDE // 8)))[..., None]
                noisy = (
                    (large + rng.integers(0, 120, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
                )
                Image.fromarray(noisy).save(folder / "data" / str(label) / f"{number}.png")

        run = ftkit.train(
            folder / "data", out=folder / "run", recipe="gentle", settings=SMALL, quiet=True
        )
        done = ftkit.export(run, quick=True, quiet=True)
        page = done.folder / "report.html"
        print(
            f"{len(run.classes)} classes, {len(run.data['mistakes'])} mistakes: {page.stat().st_size / 1e6:.2f} MB"
        )

        with sync_playwright() as play:
            browser = play.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            times = []
            for _ in range(OPENED):
                tab = browser.new_page()
                tab.goto(page.as_uri())
                times.append(
                    tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
                )

            print(
                f"opens in {statistics.median(times):.0f} ms (median of {OPENED}, to the end of load)"
            )
            browser.close()


if __name__ == "__main__":
    main()
