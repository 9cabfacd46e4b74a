"""The run folder: run.json, metrics.jsonl, model.safetensors, report.html.

Holds data only, no pickle; each file is written atomically.

folder = create(out)
append(folder, {...})            # one line of metrics.jsonl
finish(folder, model, {...})     # weights, then run.json: without run.json a run is unfinished
run = open_run(folder)
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import ftkit
from ftkit.models.backbones import Backbone, build
from ftkit.recipe import Recipe, restore, restore_preprocess
from ftkit.report.pages import Table, table_html
from ftkit.tasks.task import Task, headline, task_from
from ftkit.utils import console
from ftkit.utils.lock import LOCK, in_use
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.files import write_atomically
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import OneClass, Readout, readout_of
from ftkit_export.runtime.verify import is_whole, with_digest

RUN = "run.json"
METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"
OUT_OF_FOLD = "oof.npz"
TENSORBOARD = "tensorboard"  # a folder; there before the first checkpoint
FOLD_WEIGHTS = "folds.safetensors"
SO_FAR = "so-far"  # of an interrupted run: what stood then, as a run of its own
RUN_SCHEMA = 5  # of run.json


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, as read from disk. classes: or the labels, or the quantities, of another task.
    data: the whole run.json."""

    folder: Path
    recipe: Recipe
    preprocess: Preprocess
    classes: tuple[str, ...]
    temperature: float
    data: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Split (val, test) -> fields of evaluation.metrics.Metrics: accuracy, recall, ... or of
        MultiLabelMetrics or RegressionMetrics."""
        metrics: Mapping[str, Any] = self.data["metrics"]
        return metrics

    @property
    def task(self) -> Task:
        """What the model has learned."""
        return task_from(self.data.get("task"))  # not in older runs

    @property
    def readout(self) -> Readout:
        """How its logits are read."""
        stored = self.data.get("readout")
        return readout_of(stored) if stored else OneClass(temperature=self.temperature)

    @property
    def so_far(self) -> str:
        """What an interrupted run has not trained, in words; "" for a finished one."""
        missing = self.data.get("not_trained")  # not in older runs
        return f"without {', '.join(missing)}" if missing else ""

    def _repr_html_(self) -> str:
        test = self.metrics["test"]
        rows = [
            (
                s["train"],
                "kept" if s["kept"] else "left out",
                s["epochs"],
                s["lr"],
                s["val_accuracy"],
            )
            for s in self.data["stages"]
        ]

        return (
            f"<p>{escape(str(self.folder))}: {escape(self.recipe.backbone)}, {len(self.classes)} outputs, test "
            f"{self.task.metric} {console.with_bounds(*headline(test))} on "
            f"{ground(test['images'], test['clusters'])}</p>"
            f"{table_html(Table(('stage', 'verdict', 'epochs', 'rate', 'held-out ' + self.task.metric), rows))}"
        )

    def backbone(self) -> Backbone:
        """The trained model, in eval mode on the CPU."""
        recipe = self.recipe
        backbone = build(
            recipe.backbone, len(self.classes), "none", cut=recipe.cut, pooling=recipe.pooling
        )
        state = safetensors.torch.load_file(self.folder / WEIGHTS)
        backbone.model.load_state_dict(state)
        return backbone


def fold_models(run: Run) -> list[tuple[nn.Module, Array, Array]]:
    """Each fold's model, with the rows of the canvases that it has not seen, and those it has.

    Empty where the run had no folds. Rows whose fold was not needed are in no model's first.
    """
    path = run.folder / OUT_OF_FOLD
    if not path.is_file():
        return []

    with np.load(path, allow_pickle=False) as stored:
        of, rows, known = stored["fold"], stored["train_rows"], stored["rows"]
    weights = safetensors.torch.load_file(run.folder / FOLD_WEIGHTS)

    models = []
    for fold in range(int(of.max()) + 1):
        prefix = f"{fold}/"
        own = {
            name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)
        }
        held = np.intersect1d(rows[of == fold], known)
        if len(held):
            model = run.backbone().model
            model.load_state_dict(own, strict=False)
            models.append((model.eval(), held, rows[of != fold]))
    return models


def next_free(base: Path) -> Path:
    """The first of runs/lite0-1, runs/lite0-2, ... that does not exist."""
    number = 1
    while base.with_name(f"{base.name}-{number}").exists():
        number += 1
    return base.with_name(f"{base.name}-{number}")


def claim(base: Path) -> Path:
    """Create the first of runs/lite0-1, runs/lite0-2, ... that does not exist.

    Creating it at once keeps other processes from taking the same one.
    """
    while True:
        folder = next_free(base)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_symlink() or not folder.exists():  # a broken link, here or in a parent
                raise FtkitError(
                    f"{folder}: expected a place to write to, found a broken link. Try --out"
                ) from None
        except OSError as error:
            raise FtkitError(
                f"{folder}: expected a place to write to, found {error.strerror}. Try --out"
            ) from None
        else:
            return folder  # if another process was first, the next number is tried


def create(out: Path) -> Path:
    """Create a new run folder. Raises FtkitError if `out` is not empty or cannot be created."""
    if out.is_dir() and in_use(out):
        raise FtkitError(
            f"{out}: expected a new folder, found one that another process trains in. Try another --out"
        )

    if out.exists() and (
        not out.is_dir() or any(path.name not in (LOCK, TENSORBOARD) for path in out.iterdir())
    ):
        way = "--resume" if (out / "state").is_dir() else "another --out"
        raise FtkitError(
            f"{out}: expected a new folder, found one there already. Try {way}, or remove it"
        )

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FtkitError(
            f"{out}: expected a place to write to, found {error.strerror}. Try another --out"
        ) from None

    return out


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a finished run."""
    return (folder / RUN).is_file() and (folder / WEIGHTS).is_file()


def append(folder: Path, line: Mapping[str, object]) -> None:
    """Append one JSON line to metrics.jsonl and sync it to disk: later checkpoints rely on it."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one per epoch; empty if no epoch was completed."""
    if not (folder / METRICS).is_file():
        return []
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def finish(folder: Path, model: nn.Module, data: Mapping[str, Any]) -> None:
    """Write the final weights, then run.json."""
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    write_atomically(folder / WEIGHTS, safetensors.torch.save(state))
    write_atomically(folder / RUN, with_digest(json.dumps(data, indent=1) + "\n"))


def environment() -> dict[str, str]:
    """Versions that affect what a run computes."""
    versions = {
        "ftkit": ftkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "onnxruntime": onnxruntime.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def open_run(folder: str | Path) -> Run:
    """Read a finished run. Raises FtkitError if there is none, or it is unfinished."""
    path = Path(folder)
    if not is_finished(path):
        if (path / "state" / "state.json").is_file():
            again = f"ftkit train DATA --out {shlex.quote(str(folder))} --resume"
            raise FtkitError(
                f"{folder}: expected a finished run, found one that is not finished. Try `{again}`"
            )
        raise FtkitError(
            f"{folder}: expected a run (with {RUN} and {WEIGHTS}), found none. Try `ftkit train DATA`"
        )

    try:
        content = (path / RUN).read_bytes()
        data = json.loads(content)
        if data["schema"] != RUN_SCHEMA:
            raise ValueError(f"schema {data['schema']}, not {RUN_SCHEMA}")
        if not is_whole(content):
            raise ValueError("another digest than its own: it was edited, or damaged")
        return Run(
            folder=path,
            recipe=restore(data["recipe"]),
            preprocess=restore_preprocess(data["preprocess"]),
            classes=tuple(data["classes"]),
            temperature=float(data["temperature"]),
            data=data,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FtkitError(
            f"{path / RUN}: expected a run of this ftkit, found {error!r}. Train again"
        ) from None
