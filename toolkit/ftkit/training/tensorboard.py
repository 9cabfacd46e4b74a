"""TensorBoard events of a run, beside metrics.jsonl: loss, accuracy, rate and speed per epoch.

with tensorboard(run / "tensorboard", done=0) as log:
    log(line, step)        # line: as appended to metrics.jsonl
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftkit_export.runtime.errors import FtkitError

Log = Callable[[Mapping[str, Any], int], None]
NAMES = {
    "loss": "loss/train",
    "val_nll": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "lr": "rate",
    "images_per_s": "images per s",
    "stage": "stage",
}


def nowhere(line: Mapping[str, Any], step: int) -> None:
    """Log that discards everything, for a run without TensorBoard."""


def require_tensorboard() -> None:
    """Raise FtkitError if the package is not installed."""
    try:
        with warnings.catch_warnings():  # its protobuf code raises deprecation warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise FtkitError(
            "--tensorboard: expected the package tensorboard, found it not installed. "
            "Try `pip install 'ftkit[tensorboard]'`"
        ) from None


@contextmanager
def tensorboard(folder: Path, done: int) -> Iterator[Log]:
    """Open the event log of a run.

    done: number of valid epochs; what an interrupted run logged beyond them is hidden.
    """
    from torch.utils.tensorboard import SummaryWriter  # after require_tensorboard

    writer = SummaryWriter(str(folder), purge_step=done + 1 if folder.is_dir() else None)

    def log(line: Mapping[str, Any], step: int) -> None:
        for key, name in NAMES.items():
            writer.add_scalar(name, line[key], step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()
