"""Distillation from another run, on the very views the student sees (Beyer et al. 2022).

teacher = load_teacher("runs/large", preprocess, classes)  # student pixels -> teacher logits
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training.run import Run, open_run
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess


class Teacher(nn.Module):
    """A run's model that converts the student's pixels to its own normalisation and size."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, run: Run, student: Preprocess):
        super().__init__()
        own = run.preprocess
        self.model = run.backbone().model.eval()
        self.size = own.size
        self.same_size = own.size == student.size
        std = torch.tensor(own.std)
        self.register_buffer("scale", (torch.tensor(student.std) / std)[:, None, None])
        self.register_buffer(
            "shift", ((torch.tensor(student.mean) - torch.tensor(own.mean)) / std)[:, None, None]
        )
        self.key = f"teacher {run.data['model_fingerprint']} {own!r}"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, S, S) as the student takes them -> logits (n, classes)."""
        pixels = pixels * self.scale + self.shift
        if not self.same_size:
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode="bilinear", align_corners=False
            )
        logits: torch.Tensor = self.model(pixels)
        return logits


def require_teacher(folder: str, classes: Sequence[str]) -> Run:
    """Open the teacher's run; raises FtkitError if it is no run or has other classes."""
    run = open_run(folder)
    if run.task is not SINGLE_LABEL or run.classes != tuple(classes):
        raise FtkitError(
            f"stage.teacher {folder}: expected a run of the classes {', '.join(classes)}, found one of "
            f"{', '.join(run.classes)}. Try a run trained on these images"
        )
    return run


def load_teacher(folder: str, student: Preprocess, classes: Sequence[str]) -> Teacher:
    """The teacher for a student with this preprocess; raises FtkitError as require_teacher."""
    return Teacher(require_teacher(folder, classes), student).eval().requires_grad_(False)
