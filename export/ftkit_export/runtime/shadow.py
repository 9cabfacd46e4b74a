"""Run a second bundle beside the first on some frames, and note where they differ; its answers are never shown.

    shadow = Shadow(Classifier("next"), "first and next", Path("collected"), every=10)
    shadow.offer(answer, answers, picture)    # after each answer of the first

    collected/shadow.jsonl      a line a frame compared: both answers
    collected/shadow/           pictures on which they differ, a fair sample

A failure of the second bundle ends the comparing, with one line on standard error, and never the
classifying.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit_export.runtime.collect import LOG_BYTES, SPARE_BYTES
from ftkit_export.runtime.files import replacing
from ftkit_export.runtime.predict import Classifier, Prediction
from ftkit_export.runtime.preprocess import SUFFIXES

LOG = "shadow.jsonl"
FOLDER = "shadow"
MOST = 500  # pictures


class Shadow:
    """Compares each `every`-th answer with a second bundle's. pair: tells which two are compared."""

    def __init__(
        self,
        second: Classifier,
        pair: str,
        folder: Path,
        every: int = 10,
        seed: int | None = None,
    ):
        self.second = second
        self.pair = pair
        self.folder = folder
        self.every = every
        self.stopped = ""
        self._offered = 0
        self._random = random.Random(seed)
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self._kept = sorted(
            path.name for path in (folder / FOLDER).iterdir() if path.suffix.lower() in SUFFIXES
        )
        lines = [line for line in read_lines(folder) if line["pair"] == pair]
        self._differing = max(
            len(self._kept), sum(line["first"] != line["second"] for line in lines)
        )

    def offer(
        self,
        answer: Prediction,
        answers: Callable[[Classifier], Prediction],
        picture: Callable[[], tuple[bytes, str]],
    ) -> None:
        """Compare an answer, if it is its turn. answers: asks a classifier about the same image.

        Never raises.
        """
        self._offered += 1
        if self.stopped or self._offered % self.every:
            return
        try:
            other = answers(self.second)
            kept = self._keep(picture) if other.label != answer.label else None
            self._write(answer, other, kept)
        except Exception as error:  # whatever it is, the next image must still be classified
            self.stopped = str(getattr(error, "strerror", None) or error)
            print(f"shadow: comparing stops: {self.stopped}", file=sys.stderr)

    def _keep(self, picture: Callable[[], tuple[bytes, str]]) -> str | None:
        self._differing += 1
        if len(self._kept) >= MOST:
            if self._random.random() >= MOST / self._differing:
                return None
            gone = self._kept.pop(self._random.randrange(len(self._kept)))
            (self.folder / FOLDER / gone).unlink(missing_ok=True)
        content, suffix = picture()
        if shutil.disk_usage(self.folder).free < SPARE_BYTES + len(content):
            raise OSError(28, f"less than {SPARE_BYTES // 1_000_000} MB of disk are left")
        name = f"{time.time_ns() // 1_000_000}{suffix}"
        with replacing(self.folder / FOLDER / name) as beside:
            beside.write_bytes(content)
        self._kept.append(name)
        return f"{FOLDER}/{name}"

    def _write(self, answer: Prediction, other: Prediction, kept: str | None) -> None:
        line = {
            "time": round(time.time(), 3),
            "pair": self.pair,
            "first": answer.label,
            "first_probability": round(answer.probability, 5),
            "second": other.label,
            "second_probability": round(other.probability, 5),
            "kept": kept,
        }
        path = self.folder / LOG
        if path.is_file() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name("shadow.1.jsonl"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines logged in a folder, oldest first; those cut short by a power cut are left out."""
    lines = []
    for path in (folder / "shadow.1.jsonl", folder / LOG):
        if path.is_file():
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    line["pair"], line["first"], line["second"], line["kept"]
                except (ValueError, KeyError, TypeError):
                    continue
                lines.append(line)
    return lines
