"""Collect on the device what is worth labelling, and a log for the drift test; never in the way.

    collector = Collector("collected", reference)
    collector.offer(sighting, picture)          # after each answer; returns why the picture was kept, or ""
    collector.close()

    collected/doubtful/  foreign/  control/     pictures, by why they were kept
    collected/log.jsonl, log.1.jsonl, ...       a line an image, never its pixels or its name
    collected/state.json                        counts, and the drift test

Kept are a random share of all pictures, and of the others those of low confidence and those unlike the
training images.
Their number and bytes are bounded: within each reason a picture that arrives has the same chance to
be there at the end as any other (reservoir sampling, Vitter 1985); where bytes run out, the oldest
control pictures go first.

Whatever fails here, such as a full disk, ends the collecting, with one line on standard error, and
never the classifying.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.drift import DriftTest, Reference
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import is_full, replacing

REASONS = ("foreign", "doubtful", "control")
LOG = "log.jsonl"
STATE = "state.json"
LOG_BYTES = 8_000_000  # of one log file: about 30,000 images
LOGS = 4
SAVED_EVERY = 100  # images; the state is also saved with every picture
SPARE_BYTES = 100_000_000  # left free on the disk

Picture = Callable[[], tuple[bytes, str]]  # the content of an image file, and its suffix


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What the model made of an image. score: out-of-distribution score. coordinates (K,): of the
    embedding, scaled to length 1, along the directions of the out-of-distribution statistics. frame:
    drift.frame_statistics. embedding (D,): as it came."""

    label: str
    probability: float
    doubtful: bool
    foreign: bool
    score: float
    coordinates: Array
    frame: Array
    embedding: Array


class Collector:
    """Keeps pictures and the log in one folder, which one process at a time may use.

    control: share of all images that is kept. most, megabytes: of all pictures together. seed: of
    the random choices. On a full disk nothing is collected, and `stopped` says so. Raises FtkitError
    when the folder cannot be used otherwise, or is in use.
    """

    def __init__(
        self,
        folder: str | Path,
        reference: Reference | None = None,
        *,
        control: float = 0.01,
        most: int = 2000,
        megabytes: float = 500.0,
        seed: int | None = None,
    ):
        if not 0 <= control <= 1 or most < 3 or not megabytes > 0:
            raise FtkitError(
                f"{folder}: expected a control share of 0 to 1, 3 pictures or more, and some space, found {control}, "
                f"{most}, {megabytes} MB. Check the options"
            )
        self.folder = Path(folder)
        self.stopped = ""
        self._control = control
        self._most = most
        self._bytes = int(min(megabytes, 1e9) * 1e6)
        self._random = random.Random(seed)
        self._seen = dict.fromkeys(REASONS, 0)
        self._kept: dict[str, dict[str, int]] = {reason: {} for reason in REASONS}
        self._unsaved = 0
        self._last = 0
        self.drift: DriftTest | None = None
        self._bundle = reference.name if reference else ""

        try:
            for reason in REASONS:
                (self.folder / reason).mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            self._find_kept()
            state = _read_state(self.folder)
            self._log = (self.folder / LOG).open("a", encoding="utf-8")
            if _is_torn(self.folder / LOG):
                self._log.write("\n")
        except OSError as error:
            if is_full(error):  # the classifier must start all the same
                self._stop(error.strerror or "the disk is full")
                return
            raise FtkitError(
                f"{self.folder}: expected a folder to collect in, found: {error.strerror or error}. Try another --keep"
            ) from None

        self._seen.update(state.get("seen", {}))
        for reason, kept in self._kept.items():  # the state may be lost
            self._seen[reason] = max(self._seen[reason], len(kept))
        if reference:
            self.drift = _resumed(reference, state.get("drift"))

    def offer(self, sighting: Sighting, picture: Picture) -> str:
        """Log an image, and keep its picture if it is worth it. Never raises."""
        if self.stopped:
            return ""
        try:
            return self._offer(sighting, picture)
        except Exception as error:  # whatever it is, the next image must still be classified
            self._stop(f"{getattr(error, 'strerror', None) or error}")
            return ""

    def _offer(self, sighting: Sighting, picture: Picture) -> str:
        reason = self._reason(sighting)
        name = self._keep(reason, picture) if reason else ""
        self._write_line(sighting, f"{reason}/{name}" if name else None)

        if self.drift and np.isfinite(sighting.coordinates).all():
            values = self.drift.values_of(
                sighting.score,
                sighting.probability,
                sighting.label,
                sighting.coordinates,
                sighting.frame,
            )
            for stream in self.drift.update(values):
                _say(f"drift: {stream}: {self.drift.alarms[stream]['what']}")
                self._unsaved = SAVED_EVERY

        self._unsaved += 1
        if name or self._unsaved >= SAVED_EVERY:
            self._save()
        return reason if name else ""

    def _reason(self, sighting: Sighting) -> str:
        if self._random.random() < self._control:  # of all, so that it stands for all
            return "control"
        return "foreign" if sighting.foreign else "doubtful" if sighting.doubtful else ""

    def _keep(self, reason: str, picture: Picture) -> str:
        """Store a picture if the reservoir takes it; return its name, or ""."""
        self._seen[reason] += 1
        kept = self._kept[reason]
        room = self._most // len(REASONS)
        if len(kept) >= room and self._random.random() >= room / self._seen[reason]:
            return ""

        try:
            content, suffix = picture()
        except FileNotFoundError:  # whoever brought it has taken it away again
            return ""
        replaced = self._random.sample(sorted(kept), max(0, len(kept) - room + 1))
        if not self._takes(reason, len(content), sum(kept[name] for name in replaced)):
            return ""
        if shutil.disk_usage(self.folder).free < SPARE_BYTES + len(content):
            self._stop(f"less than {SPARE_BYTES // 1_000_000} MB of disk are left")
            return ""
        for name in replaced:
            self._remove(reason, name)
        self._make_room(len(content))

        self._last = max(self._last + 1, time.time_ns() // 1_000_000)
        name = f"{self._last}{suffix}"
        with replacing(self.folder / reason / name) as beside:
            beside.write_bytes(content)
        kept[name] = len(content)
        return name

    @property
    def kept(self) -> int:
        """Number of pictures that are there."""
        return sum(map(len, self._kept.values()))

    @property
    def _used(self) -> int:
        return sum(sum(kept.values()) for kept in self._kept.values())

    @property
    def _largest(self) -> str:
        """The reason that has the most bytes, but for controls, which go first."""
        return max(REASONS[:2], key=lambda each: sum(self._kept[each].values()))

    def _takes(self, reason: str, size: int, freed: int) -> bool:
        """Whether a picture of so many bytes is taken. freed: by pictures of its reason that it replaces.

        Controls make room for others, not for each other beyond their number. Where a picture's own
        reason has the most bytes, it is taken with the chance that keeps the reason's sample fair.
        """
        control = sum(self._kept["control"].values())
        others = self._used - control + size - (0 if reason == "control" else freed)
        if size > self._bytes or (reason == "control" and others > self._bytes):
            return False
        own = sum(self._kept[reason].values())
        if (
            reason == "control"
            or others <= self._bytes
            or own < sum(self._kept[self._largest].values())
        ):
            return True
        return self._random.random() < len(self._kept[reason]) / self._seen[reason]

    def _make_room(self, size: int) -> None:
        """Remove the oldest control first; then a random picture of the reason that has the most bytes."""
        while self._used + size > self._bytes and self._kept["control"]:
            self._remove("control", min(self._kept["control"], key=lambda name: (len(name), name)))
        while self._used + size > self._bytes:
            largest = self._largest
            self._remove(largest, self._random.choice(list(self._kept[largest])))

    def _remove(self, reason: str, name: str) -> None:
        (self.folder / reason / name).unlink(missing_ok=True)
        del self._kept[reason][name]

    def _write_line(self, sighting: Sighting, kept: str | None) -> None:
        line = {
            "time": round(time.time(), 3),
            "bundle": self._bundle,
            "label": sighting.label,
            "probability": round(sighting.probability, 9),
            "score": round(sighting.score, 6),
            "coordinates": sighting.coordinates.round(7).tolist(),
            "frame": sighting.frame.round(6).tolist(),
            "kept": kept,
        }
        self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._log.flush()
        if self._log.tell() > LOG_BYTES:
            self._log.close()
            _rotate(self.folder)
            self._log = (self.folder / LOG).open("a", encoding="utf-8")

    def _find_kept(self) -> None:
        for reason in REASONS:
            for path in (self.folder / reason).iterdir():
                if path.name.startswith("."):  # half written when a process was killed
                    path.unlink()
                else:
                    self._kept[reason][path.name] = path.stat().st_size
                    if path.stem.isdecimal():  # the clock may have been set back since
                        self._last = max(self._last, int(path.stem))

    def _save(self) -> None:
        self._unsaved = 0
        state = {"seen": self._seen, "drift": self.drift and self.drift.state}
        beside = self.folder / f".{STATE}"
        beside.write_text(json.dumps(state))
        beside.replace(self.folder / STATE)

    def _stop(self, why: str) -> None:
        self.stopped = why
        _say(f"{self.folder}: collecting stops, classifying goes on: {why}")

    def close(self) -> None:
        """Save the state and let another process have the folder. Never raises."""
        with contextlib.suppress(Exception):
            if not self.stopped:
                self._save()
        with contextlib.suppress(Exception):
            self._log.close()
        with contextlib.suppress(Exception):
            self._lock.close()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _lock(folder: Path) -> Any:
    """The folder for this process alone, until the file returned is closed."""
    file = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: the user's own care
        pass
    except OSError:
        file.close()
        raise FtkitError(
            f"{folder}: expected a folder that no other process collects in, found one in use. Try another --keep"
        ) from None
    return file


def _is_torn(path: Path) -> bool:
    """Whether a power cut left the last line without its end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _rotate(folder: Path) -> None:
    """log.jsonl becomes log.1.jsonl, that log.2.jsonl, and so on; the oldest goes."""
    for number in range(LOGS - 1, 0, -1):
        older = folder / f"log.{number}.jsonl"
        newer = folder / (f"log.{number - 1}.jsonl" if number > 1 else LOG)
        if newer.exists():
            newer.replace(older)


def logs(folder: Path) -> list[Path]:
    """The log files of a folder, the oldest first."""
    older = [folder / f"log.{number}.jsonl" for number in range(LOGS - 1, 0, -1)]
    return [path for path in (*older, folder / LOG) if path.is_file()]


def stored_test(folder: Path, reference: Reference) -> DriftTest:
    """The drift test as last saved in a folder, which another process may be collecting in."""
    return _resumed(reference, _read_state(folder).get("drift"))


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _resumed(reference: Reference, state: Any) -> DriftTest:
    """The drift test where it stood, or from its start for another bundle or a damaged state."""
    try:
        return DriftTest(reference, state)
    except (ValueError, KeyError, TypeError, AttributeError):
        return DriftTest(reference)
