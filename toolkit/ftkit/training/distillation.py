"""Distillation from another run, on the very views the student sees (Beyer et al. 2022).

teacher = load_teacher("runs/large", preprocess, images, task)  # student pixels -> teacher logits
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ftkit.data.dataset import Images
from ftkit.tasks.task import Regression, Task
from ftkit.training.run import Run, open_run
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess


class Teacher(nn.Module):
    """A run's model that converts the student's pixels to its own normalisation and size, and its
    standardised values to the student's."""

    scale: torch.Tensor
    shift: torch.Tensor
    spread: torch.Tensor
    offset: torch.Tensor

    def __init__(self, run: Run, student: Preprocess, task: Task):
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
        spread, offset = _standards(run.task, task)
        self.register_buffer("spread", spread)
        self.register_buffer("offset", offset)
        self.key = f"teacher {run.data['model_fingerprint']} {own!r}"
        if isinstance(task, Regression):
            self.key += f" {run.task!r} {task!r}"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, S, S) as the student takes them -> logits (n, K)."""
        pixels = pixels * self.scale + self.shift
        if not self.same_size:
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode="bilinear", align_corners=False
            )
        logits: torch.Tensor = self.model(pixels) * self.spread + self.offset
        return logits


def _standards(teacher: Task, student: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """(spread, offset), each (K,) or one number, that turn the teacher's standardised values into the
    student's: their training images have other means and spreads."""
    if not (isinstance(teacher, Regression) and isinstance(student, Regression)):
        return torch.tensor(1.0), torch.tensor(0.0)
    own, wanted = torch.tensor(teacher.spreads), torch.tensor(student.spreads)
    apart = torch.tensor(teacher.means) - torch.tensor(student.means)
    return own / wanted, apart / wanted


def require_teacher(folder: str, images: Images, task: Task) -> Run:
    """Open the teacher's run; raises FtkitError if it is no run, or has learned anything else."""
    run = open_run(folder)
    asked = (task.name, images.names, images.units)
    units = run.task.units if isinstance(run.task, Regression) else images.units
    if (run.task.name, run.classes, units) != asked:
        raise FtkitError(
            f"stage.teacher {folder}: expected a run of {_learned(*asked)}, found one of "
            f"{_learned(run.task.name, run.classes, units)}. Try a run trained on these images"
        )
    return run


def _learned(task: str, names: Sequence[str], units: Sequence[str]) -> str:
    """What a run has learned, in words."""
    kind = {
        "single-label": "the classes",
        "multi-label": "the labels",
        "regression": "the quantities",
    }[task]
    if task != "regression":
        return f"{kind} {', '.join(names)}"
    named = zip(names, units, strict=True)
    return f"{kind} {', '.join(f'{name} [{unit}]' if unit else name for name, unit in named)}"


def load_teacher(folder: str, student: Preprocess, images: Images, task: Task) -> Teacher:
    """The teacher for a student with this preprocess; raises FtkitError as require_teacher."""
    teacher = Teacher(require_teacher(folder, images, task), student, task)
    return teacher.eval().requires_grad_(False)
