"""Whether a stage is better than what stood before, on the folds trained so far.

    decision = StageDecision(work, number)     # from the answers that the run has kept
    while not decision.settled:
        ...                                    # train decision.next_fold, and decide again
    decision.better, str(decision)             # whether the stage is kept; a line for the trace

A stage is kept when it is surely better, and also when all folds are trained and it is still open,
but has the lower loss on them (of labels and numbers: the better figure). The bounds hold for all
looks at a stage together: half of the error rate is the last look's, the earlier ones share the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ftkit.tasks.task import SINGLE_LABEL, Task
from ftkit.training.checkpoint import TrainState
from ftkit.training.work import Work
from ftkit.utils import console
from ftkit_export.proof.decision import Comparison, paired, what_would_settle
from ftkit_export.runtime.arrays import Array

# Share of its answers that an 8-bit file typically changes: 1 to 4 % on the photographs of the demo
CHANGED = 0.025
DIVISIONS = 6  # of a head stage at most: the first, and repeats with other folds
NARROWED = 0.95  # a repeat must leave at most this share of the interval, or it is the last

Verdict = Literal["better", "worse", "equal", "open"]


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for every training image by models that have not seen it; NaN where no fold's
    model has predicted it. logits (n, classes), embedding (n, features), float32."""

    logits: Array
    embedding: Array

    @property
    def known(self) -> Array:
        """Whether each image is predicted, (n,) bool."""
        return ~np.isnan(self.logits[:, 0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """As TrainState keeps it."""
        return {
            "logits": torch.from_numpy(self.logits),
            "embedding": torch.from_numpy(self.embedding),
        }


def out_of_fold(run: TrainState, role: str = "oof") -> OutOfFold | None:
    """What stands, or under "oof-new" the stage in training. Collective."""
    found = run.tensors(role)
    if not found:
        return None
    return OutOfFold(found["logits"].numpy(), found["embedding"].numpy())


def verdict_of(compared: Comparison, limit: float) -> Verdict:
    """better, worse: surely. equal: surely within the limit of either side."""
    if compared.high < 0:
        return "better"
    if compared.low > 0:
        return "worse"
    return "equal" if max(-compared.low, compared.high) <= limit else "open"


def losses_of(
    task: Task, verdict: Verdict, before: Array, after: Array, targets: Array
) -> tuple[float, float] | None:
    """Task.deciding_loss without a stage and with it; None where the verdict decides, or the figure."""
    if verdict in ("better", "worse"):
        return None
    losses = (task.deciding_loss(before, targets), task.deciding_loss(after, targets))
    return None if losses[0] is None or losses[1] is None else (losses[0], losses[1])


def losses_in_words(losses: tuple[float, float]) -> str:
    """What decided."""
    return f"  so the loss decides: {losses[0]:.3f} without it, {losses[1]:.3f} with it"


def in_words(compared: Comparison, verdict: Verdict, limit: float) -> str:
    """The gain with its bounds, and what that settles."""
    gain, low, high = (0.0 - 100 * value for value in (compared.drop, compared.high, compared.low))
    said = {
        "better": "surely better",
        "worse": "surely worse",
        "equal": f"within {console.short(100 * limit)}",
        "open": "open",
    }
    of = f"{compared.images} images"
    if compared.clusters is not None:
        of = f"{compared.clusters} groups"
    return f"{gain:+.1f} {compared.unit} [{low:+.1f}, {high:+.1f}], {of}: {said[verdict]}"


def what_is_open(compared: Comparison, limit: float) -> str:
    """What the images can settle, and what it would take."""
    reach = 100 * max(compared.high - compared.drop, compared.drop - compared.low)
    short = console.short(100 * limit)
    unit = compared.unit
    question = "1 point" if (short, unit) == ("1", "points") else f"{short} {unit}"
    return (
        f"  {compared.ground} settle {reach:.1f} {unit};\n"
        f"  {what_would_settle(compared, limit, question)}"
    )


class StageDecision:
    """What the answers so far say about a stage.

    before, after: out-of-fold answers without and with it. done: folds trained. compared: the paired
    comparison, None where nothing stood before.
    """

    def __init__(self, work: Work, number: int):
        folds = work.folds
        assert folds
        run = work.state
        self.before = out_of_fold(run)
        self.after = out_of_fold(run, "oof-new")
        self.broken = run.broken_fold
        self.late = run.late
        self._task = work.task
        self._limit = work.task.limit(work.recipe.export)
        self._labels = work.labels["train"].cpu().numpy()
        self._cheap = work.recipe.stages[number].train == "head"
        self._in_haste = work.recipe.folds == "auto"

        self._folds = list(range(folds.count))
        if self.before is not None:
            known = self.before.known
            self._folds = [fold for fold in self._folds if known[folds.held(fold)].all()]
        self.done = [k for k in self._folds if self.after and self.after.known[folds.held(k)].all()]
        self._left = [k for k in self._folds if k not in self.done]
        self.rows = np.flatnonzero(np.isin(folds.of, self.done))

        again = run.tensors("repeats")
        self._repeats = (
            [again["before"].numpy().astype(bool), again["after"].numpy().astype(bool)]
            if again
            else []
        )
        canvases = work.loaders.canvases
        groups = canvases.groups(canvases.rows("train"))
        self._groups = [groups[row] for row in self.rows]
        self.compared = self._compare(self.divisions)

    @property
    def divisions(self) -> int:
        """Divisions into folds that the stage was trained on."""
        return 1 + (self._repeats[0].shape[1] if self._repeats else 0)

    def _compare(self, divisions: int) -> Comparison | None:
        """The comparison on the first so many divisions."""
        if self.before is None or self.after is None or not self.done:
            return None
        if not self._repeats:
            answers = (self.before.logits[self.rows], self.after.logits[self.rows])
            return self._task.compare(*answers, self._labels[self.rows], self._groups, self._looks)

        columns = [[self._right(self.before)], [self._right(self.after)]]
        for kept, repeated in zip(columns, self._repeats, strict=False):
            kept += list(repeated[self.rows, : divisions - 1].T)
        before, after = (np.stack(kept, axis=1) for kept in columns)
        return paired(before, after, self._groups, looks=self._looks)

    @property
    def _looks(self) -> int:
        if self._cheap:
            return 1  # it is the width of the interval that ends it, not where it lies
        return 2 * max(1, len(self._folds) - 1) if self._left else 2

    def _right(self, answers: OutOfFold) -> Array:
        right: Array = answers.logits[self.rows].argmax(1) == self._labels[self.rows]
        return right

    @property
    def verdict(self) -> Verdict:
        """As verdict_of."""
        if self.broken:
            return "worse"
        return "open" if self.compared is None else verdict_of(self.compared, self._limit)

    @property
    def next_fold(self) -> int:
        """The fold to train next."""
        return self._left[0]

    @property
    def settled(self) -> bool:
        """Whether no further fold is needed.

        A head's are cheap, and all of them are trained. A good stage's answers are evidence for
        what is decided later: it is trained on all folds where their number was given, else on as
        many images as settle whether 8 bits lose more than the limit.
        """
        if self.broken or self.late or not self._left:
            return True
        if self._cheap or self.verdict == "open":
            return False
        enough = self._task is SINGLE_LABEL and self._enough_for_later
        return self.verdict == "worse" or (self._in_haste and enough)

    @property
    def _enough_for_later(self) -> bool:
        """Whether these images can tell that an 8-bit file, which changes CHANGED of the answers and
        as many for the better as for the worse, loses no more than the limit."""
        return 1.96 * math.sqrt(CHANGED / len(self.rows)) <= self._limit

    @property
    def worth_repeating(self) -> bool:
        """Whether another division into folds may narrow the interval.

        Not whether it is open: to go on until it no longer is would look at it again and again.
        """
        if not self._cheap or self._left or self.late or self._task is not SINGLE_LABEL:
            return False  # of answers other than right or wrong, repeats are not averaged
        if self.compared is None or self.divisions >= DIVISIONS:
            return False
        if self.divisions == 1:
            return True

        fewer = self._compare(self.divisions - 1)
        assert fewer
        width, before = (found.high - found.low for found in (self.compared, fewer))
        return width <= NARROWED * before

    @property
    def accuracy(self) -> float:
        """Out-of-fold accuracy of the stage so far, or the figure of another task."""
        if self.after is None or not len(self.rows):  # its first fold broke
            return 0.0
        return self._task.figure(self.after.logits[self.rows], self._labels[self.rows])

    @property
    def better(self) -> bool:
        """Whether the stage is kept."""
        if self.broken or self.after is None or not self.done:
            return False
        if self.before is None or self.compared is None:
            return True
        if self.verdict in ("better", "worse"):
            return self.verdict == "better"
        if losses := self.losses:
            return losses[1] < losses[0]
        return (-self.compared.drop, -self.nll(self.after)) > (0.0, -self.nll(self.before))

    @property
    def losses(self) -> tuple[float, float] | None:
        """As losses_of, on the folds trained so far."""
        if self.before is None or self.after is None or self.compared is None:
            return None
        answers = (self.before.logits[self.rows], self.after.logits[self.rows])
        return losses_of(self._task, self.verdict, *answers, self._labels[self.rows])

    def nll(self, answers: OutOfFold) -> float:
        """Of the answers on the folds trained so far."""
        logits = torch.from_numpy(answers.logits[self.rows]).double()
        labels = torch.from_numpy(self._labels[self.rows])
        return self._task.mean_loss(logits, labels)

    def __str__(self) -> str:
        text = f"fold {len(self.done)} of {len(self._folds)}"
        if self.divisions > 1:
            text = f"{self.divisions} divisions"
        if self.broken:
            return f"{text}: the loss is no longer finite"

        text += f": {self._task.metric} {console.figure(self.accuracy)}"
        if self.compared is None:
            return text
        return f"{text}, {in_words(self.compared, self.verdict, self._limit)}"

    @property
    def left_open(self) -> str:
        """What these images can settle, what it would take, and what decides instead; "" where accuracy
        decides."""
        lines = []
        if self.compared is not None and self.verdict == "open":
            lines.append(what_is_open(self.compared, self._limit))
        if self.losses:
            lines.append(losses_in_words(self.losses))
        return "\n".join(lines)
