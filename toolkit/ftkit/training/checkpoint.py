"""Checkpoint of an unfinished run, in RUN/state; a resumed run is bit-for-bit the same.

    state = TrainState(folder=folder, plan=plan)   # a new run
    state = read_state(folder, plan)               # an interrupted one
    state.ranks = ranks                            # the first rank reads and writes for all
    state.save(step=tensors)                       # commits the state and these tensors

state.json is the only commit point: tensors are written under new names first, then state.json,
which names them, and then the old ones are deleted. No random-number state is saved: every draw
follows from (seed, stage, step).
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch

from ftkit.recipe import resolve, restore
from ftkit.training.run import METRICS
from ftkit.utils.distributed import SOLO, Ranks
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically

SAVE_EVERY = 20.0  # seconds
SAVE_SHARE = 50  # or this many times the duration of the last save, so saving costs 2 % at most


@dataclass(kw_only=True)
class TrainState:
    """Progress of an unfinished run.

    - plan: what the run was started with (recipe, seed, data_fingerprint, groups); never changes.
    - source: the data's path, root and added CSV, and the limit of an image's size, as they were then.
    - stage, epoch, step: completed so far (epochs and steps count within the stage).
    - lr: the stage's peak learning rate.
    - best: val score (validate.Score) of the weights kept so far.
    - stage_best: val score of the stage's best epoch.
    - waited: epochs since stage_best.
    - stages: results of finished stages.
    - fold: the part of the stage in training: a fold's number, or the number of folds for the refit.
    - broken_fold: whether a fold of this stage ended with a loss that is no longer finite.
    - late: whether what is left to do needs more time than is left.
    - curve: [images right, images, sum of NLL] out of fold after each epoch of the stage.
    - head_start: what the head was worth before any epoch (head_start.HeadStart).
    - lines: number of valid lines in metrics.jsonl.
    - seconds, stage_seconds: time spent before an interruption, in total and in this stage.
    - circumstances: what bit-for-bit reproducibility depends on (threads, device, cache, ...).
    - files: role -> file in RUN/state.
    """

    folder: Path
    plan: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    epoch: int = 0
    step: int = 0
    lr: float | None = None
    best: tuple[float, float] | None = None
    stage_best: tuple[float, float] | None = None
    waited: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    fold: int = 0
    broken_fold: bool = False
    late: bool = False
    curve: list[list[float]] = field(default_factory=list)
    head_start: dict[str, Any] | None = None
    lines: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    circumstances: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = SOLO
        self._opened = self._stage_opened = self._saved_at = time.monotonic()
        self._save_seconds = 0.0

    @property
    def spent(self) -> float:
        """Seconds spent on the whole run, excluding interruptions."""
        return self.seconds + time.monotonic() - self._opened

    @property
    def stage_spent(self) -> float:
        """Seconds spent on this stage."""
        return self.stage_seconds + time.monotonic() - self._stage_opened

    def begin_stage(self) -> None:
        """Start the stage's clock."""
        self._stage_opened = time.monotonic()

    def next_stage(self) -> None:
        """Advance to the beginning of the next stage."""
        self.next_part()
        self.stage = self.stage + 1
        self.fold = 0
        self.broken_fold = False
        self.curve = []
        self.lr = None
        self.stage_seconds = 0.0
        self.begin_stage()

    def next_part(self) -> None:
        """Advance to the beginning of the stage's next training: another fold, or the refit."""
        self.epoch = 0
        self.step = 0
        self.waited = 0
        self.stage_best = None

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last save to save again."""
        return time.monotonic() - self._saved_at > max(SAVE_EVERY, SAVE_SHARE * self._save_seconds)

    def save(self, **tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Commit the state together with new tensors by role.

        A role given as None is deleted; a role not given keeps its tensors.
        """
        begun = time.monotonic()
        place = self.folder / "state"

        if self.ranks.main:
            place.mkdir(exist_ok=True)

        for role, content in tensors.items():
            self.files.pop(role, None)
            if content is not None:
                place_in_run = f"{self.stage}-{self.fold}-{self.epoch}-{self.step}"
                self.files[role] = f"{role}-{place_in_run}.safetensors"
                if self.ranks.main:
                    plain = {
                        key: value.detach().cpu().contiguous().clone()
                        for key, value in content.items()
                    }
                    write_atomically(place / self.files[role], safetensors.torch.save(plain))

        if not self.ranks.main:
            return

        fields = {**asdict(self), "seconds": self.spent, "stage_seconds": self.stage_spent}
        del fields["folder"]
        write_atomically(place / "state.json", (json.dumps(fields, indent=1) + "\n").encode())

        for path in place.iterdir():
            if path.name not in (*self.files.values(), "state.json"):
                path.unlink()

        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - begun

    def tensors(self, role: str) -> dict[str, torch.Tensor]:
        """Load the tensors saved under `role`, on the CPU; empty if there are none.

        Collective: every rank must call it.
        """
        if role not in self.files:
            return {}
        path = self.folder / "state" / self.files[role]
        return self.ranks.tensors(safetensors.torch.load_file(path) if self.ranks.main else {})


def exists(folder: Path) -> bool:
    """Whether `folder` holds a run that can be resumed."""
    return (folder / "state" / "state.json").is_file()


def plan_of(folder: Path) -> dict[str, Any]:
    """The plan of an interrupted run. Raises FtkitError if its state cannot be read."""
    plan: dict[str, Any] = _load(folder)["plan"]
    return plan


def source_of(folder: Path) -> dict[str, Any]:
    """Where the data of an interrupted run was. Raises FtkitError if its state cannot be read."""
    data = _load(folder)
    return {"data": ".", "root": None, "add": None, "max_pixels": None, **data.get("source", {})}


def _load(folder: Path) -> dict[str, Any]:
    path = folder / "state" / "state.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return {**data, "plan": dict(data["plan"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FtkitError(
            f"{path}: expected the state of an unfinished run, found {error!r}. Train again"
        ) from None


def _as_now(name: str, value: Any) -> Any:
    """A part of a stored plan; a recipe with the fields that it has today, at their defaults."""
    if name != "recipe" or not isinstance(value, dict):
        return value
    try:
        return json.loads(json.dumps(resolve(restore(value))))
    except FtkitError:
        return value


def read_state(folder: Path, plan: dict[str, Any], ranks: Ranks = SOLO) -> TrainState:
    """Read the state of an interrupted run; truncate metrics.jsonl to its valid lines.

    Raises FtkitError if the run was started with another plan, or its state cannot be read.
    """
    data = ranks.first(lambda: _load(folder))
    for name, value in plan.items():
        before = data["plan"].get(name, value)  # an older ftkit did not know of it
        if _as_now(name, before) != json.loads(json.dumps(value)):
            raise FtkitError(
                f"{folder}: expected the {name.replace('_', ' ')} this run began with, found another. "
                "Try --resume with only DATA and --out, or another --out"
            )

    try:
        for key in ("best", "stage_best"):
            data[key] = data[key] and tuple(data[key])
        state = TrainState(folder=folder, **data)
    except (TypeError, KeyError) as error:
        raise FtkitError(
            f"{folder}: expected a run of this ftkit, found {error}. Train again"
        ) from None

    state.ranks = ranks
    ranks.first(lambda: _cut_back(folder / METRICS, state.lines))
    return state


def _cut_back(metrics: Path, count: int) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
    if len(lines) < count:
        raise FtkitError(f"{metrics}: expected {count} lines, found {len(lines)}. Train again")
    write_atomically(metrics, b"".join(lines[:count]))


def seeded(*place: object) -> int:
    """Derive a seed from a position in the run alone, such as (seed, stage, step)."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run; the message says how to resume it.

    signal: its number. exit_code: the shell's, 128 + signal.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.signal = number
        self.exit_code = 128 + number


class Stop:
    """Context in which Ctrl-C and SIGTERM raise Stopped.

    Within stop.deferred() the first signal only sets stop.signal, for the loop to check after its
    step; a second Ctrl-C raises at once. A second SIGTERM does not: under a scheduler each rank
    receives it twice, from the scheduler and from torchrun.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._deferring = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._former[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: signal handlers stay as they are
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring or (self.signal and number == signal.SIGINT):
            raise Stopped(number)
        self.signal = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals to the loop; raise Stopped at the end if one was received."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.signal:
            raise Stopped(self.signal)
