"""What the stages of a run share, and what each of them came to.

Work: recipe, model, data, state and computing device of one `ftkit train`. StageResult: a line of
the run's record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ftkit.evaluation.metrics import cka
from ftkit.models.backbones import Backbone
from ftkit.recipe import Recipe
from ftkit.tasks.task import Task
from ftkit.training.checkpoint import Stop, Stopped, TrainState
from ftkit.training.folds import Folds
from ftkit.training.loader import Loader
from ftkit.training.optimizer import StepState
from ftkit.training.precision import Compute
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.tensorboard import Log
from ftkit.training.validate import DRIFT_IMAGES, Held, Validation, validate
from ftkit.utils import console
from ftkit.utils.distributed import Ranks
from ftkit_export.runtime.arrays import Array


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of one training stage.

    val_accuracy (or the figure of another task), val_nll: of the stage's final weights. kept: whether
    they became the model.
    epochs: epochs run, fewer than planned after early stopping. lr: peak rate. drift: linear CKA of
    the val embeddings with the pretrained backbone's, 1 = unchanged. val_nll and drift are None if
    the loss was no longer finite. folds, divisions: trained on, with folds. gain: over what stood
    before, on the folds' images or on val, in accuracy (or that figure), with its bounds. verdict:
    what these settled (fold_decision.Verdict), or "late" where --minutes ended the stage. losses: without
    the stage and with it, where they decided.
    """

    train: str
    epochs: int
    lr: float
    val_accuracy: float | None
    val_nll: float | None
    drift: float | None
    seconds: float
    how: str
    kept: bool
    folds: int = 0
    divisions: int = 1
    verdict: str | None = None
    gain: tuple[float, float, float] | None = None
    losses: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """State and data shared by all stages of a run. budget: seconds for the whole of it."""

    recipe: Recipe
    backbone: Backbone
    loaders: StageLoaders
    state: TrainState
    stop: Stop
    seed: int
    labels: dict[str, torch.Tensor]  # the task's targets by split, on the device
    compute: Compute
    ranks: Ranks
    log: Log
    task: Task
    folds: Folds | None = None
    budget: float = math.inf

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - self.state.spent

    @property
    def stands(self) -> bool:
        """Whether there is a model that could ship without a further stage."""
        return "oof" in self.state.files if self.folds else self.state.best is not None

    @property
    def balanced(self) -> bool:
        """Whether stages are compared by balanced accuracy: if any of them balances its classes."""
        return any(stage.balance != "none" for stage in self.recipe.stages)

    def val(self, loader: Loader) -> Held:
        """The val split."""
        return Held(loader.val, self.labels["val"])

    def validated(
        self,
        loader: Loader,
        held: Held,
        weights: dict[str, torch.Tensor],
        *,
        embeddings: int = DRIFT_IMAGES,
    ) -> Validation:
        """Evaluate weights on held-out images; {}: the model as it is."""
        return validate(
            self.backbone,
            loader.eval_net,
            held,
            weights,
            self.ranks,
            balanced=self.balanced,
            task=self.task,
            embeddings=embeddings,
        )

    def drift(self, embedding: Array) -> float | None:
        """CKA with the pretrained backbone's embedding of the same images."""
        return cka(embedding, self.state.tensors("pristine")["embedding"].numpy())

    def pause(self, moving: StepState) -> None:
        """Save if a save is due or any rank received a signal.

        After a signal, Stopped is then raised on all ranks.
        """
        number = self.ranks.largest(self.stop.signal)
        if self.ranks.main and (number or self.state.due):
            self.state.save(step=moving.tensors())
        if number:
            raise Stopped(number)


def compare_circumstances(run: TrainState, now: dict[str, Any]) -> None:
    """Record what reproducibility depends on; warn if it differs from before the interruption."""
    for name, value in now.items():
        before = run.circumstances.setdefault(name, value)
        if before != value:
            console.warn(
                f"resume: expected {name} {before} as before the interruption, found {value}: the weights "
                "will be as good, not the same bit for bit"
            )
            run.circumstances[name] = value
