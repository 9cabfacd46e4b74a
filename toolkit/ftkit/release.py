"""A shipped file judged on labelled images, and against the release before it. ONNX Runtime only, no torch.

new = answers("bundle", labelled("photos"), provider="cpu")
new.metrics.accuracy
change = against(new, answers("old-bundle", ...), max_drop=0.01)
change.verdict, change.regressed, change.classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit.evaluate import Metrics, evaluate
from ftkit_export.decision import Paired, Verdict, paired
from ftkit_export.errors import FtkitError, ImageError, choices
from ftkit_export.predict import Classifier
from ftkit_export.preprocess import decode

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one file says. labels: the class names of the images; said: the answers; unreadable: paths left out."""

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    said: tuple[str, ...]
    probability: tuple[float, ...]
    metrics: Metrics
    unreadable: tuple[str, ...]

    @property
    def right(self) -> Array:
        """(N,) bool."""
        return np.array([a == b for a, b in zip(self.labels, self.said, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Regressed:
    """An image that was answered right and is no more."""

    image: str
    label: str
    said: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """New against old, on the same images. paired: of all; classes: of each class, bounds that hold for all together.

    verdict: refused also where one class surely lost more than the limit, whatever the others won.
    """

    verdict: Verdict
    max_drop: float
    paired: Paired
    classes: dict[str, Paired]
    regressed: tuple[Regressed, ...]
    repaired: int

    @property
    def worse_classes(self) -> list[str]:
        """Classes that surely lost more than the limit."""
        return [name for name, found in self.classes.items() if found.verdict(self.max_drop) == "refused"]


def answers(
    bundle: str | Path, images: Sequence[tuple[Path, str]], *, provider: str = "cpu",
    step: Callable[[int, int], object] = lambda done, total: None,
) -> Answers:  # fmt: skip
    """File bytes -> answer for each (path, class name), as a device would. step: told how many are done.

    Raises FtkitError when a class is unknown to the file, or no image can be read.
    """
    classify = Classifier(bundle, provider=provider)
    known = {name: number for number, name in enumerate(classify.labels)}
    for path, label in images:
        if label not in known:
            raise FtkitError(f"{path}: expected a class that {bundle} knows, {choices(label, known)}")
    found, kept, unreadable = [], [], []
    for number, (path, label) in enumerate(images, start=1):
        try:
            found.append(classify.probabilities(decode(path)))
            kept.append((path, label))
        except ImageError as error:
            unreadable.append(str(error))
        step(number, len(images))
    if not kept:
        raise FtkitError(f"{images[0][0]}: expected images that can be read, found none. {unreadable[0]}")
    probabilities = np.stack(found)
    labels = np.array([known[label] for _, label in kept])
    return Answers(
        files=tuple(path for path, _ in kept), labels=tuple(label for _, label in kept),
        said=tuple(classify.labels[best] for best in probabilities.argmax(1)),
        probability=tuple(float(value) for value in probabilities.max(1)),
        metrics=evaluate(probabilities, labels, classify.labels), unreadable=tuple(unreadable),
    )  # fmt: skip


def against(new: Answers, old: Answers, *, max_drop: float) -> Change:
    """Paired comparison of two releases on the same images; each of the bounds is one-sided, 95 %."""
    before, after, labels = old.right, new.right, np.array(new.labels)
    overall, names = paired(before, after), [name for name in new.metrics.classes if name in set(new.labels)]
    classes = {name: paired(before[labels == name], after[labels == name], looks=len(names)) for name in names}
    regressed = [
        Regressed(image=str(path), label=label, said=said, probability=probability)
        for path, label, said, probability, was, now in zip(
            new.files, new.labels, new.said, new.probability, before, after, strict=True
        )
        if was and not now
    ]
    verdict = overall.verdict(max_drop)
    if any(found.verdict(max_drop) == "refused" for found in classes.values()):
        verdict = "refused"
    return Change(
        verdict=verdict, max_drop=max_drop, paired=overall, classes=classes, regressed=tuple(regressed),
        repaired=int((after & ~before).sum()),
    )  # fmt: skip
