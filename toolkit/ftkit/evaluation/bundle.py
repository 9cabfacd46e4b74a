"""Evaluate an exported file on labelled images, alone or against an earlier release.

    images, seen = unseen("bundle", labelled("photos"))
    new = answers_of("bundle", images)
    new.text()
    new.against(answers_of("old-bundle", images), max_drop=0.01).verdict

Classes need no torch; the other tasks are in bundle_targets.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit.data.dataset import Asked, Labelled
from ftkit.evaluation.answers import Answers, Change, Regressed, drop_text, judged, require_numbers
from ftkit.evaluation.metrics import Metrics, evaluate
from ftkit.utils import console
from ftkit_export.proof.decision import paired
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError, ImageError, choices
from ftkit_export.runtime.predict import AnyModel, load_model
from ftkit_export.runtime.readout import Values

# In a run and in its bundle: one digest per line, of each train and val image
TRAINED_ON = "trained_on.txt"
# In a run and its bundle: every image with its split, for dataset.read_images
SPLITS_CSV = "splits.csv"
DIGEST = 32  # hexadecimal digits of SHA-256: 100,000 images in 3 MB, without chance collisions


@dataclass(frozen=True, kw_only=True)
class ClassAnswers(Answers):
    """Answers of a single-label file. labels: true class names; said: predicted ones."""

    labels: tuple[str, ...]
    said: tuple[str, ...]
    probability: tuple[float, ...]
    metrics: Metrics

    @property
    def right(self) -> Array:
        """Whether each answer is correct, (N,) bool."""
        return np.array([a == b for a, b in zip(self.labels, self.said, strict=True)])

    @property
    def figures(self) -> dict[str, Any]:
        """As Answers.figures."""
        return asdict(self.metrics)

    @property
    def headline(self) -> str:
        """As Answers.headline."""
        return f"accuracy {self.metrics.accuracy:.4f}"

    def against(self, old: Answers, *, max_drop: float) -> Change:
        """As Answers.against."""
        assert isinstance(old, ClassAnswers)  # require_same compared the tasks
        before = old.right
        after = self.right
        labels = np.array(self.labels)
        groups = np.array(self.groups)
        names = [name for name in self.metrics.classes if name in set(self.labels)]
        parts = {}
        for name in names:
            own = labels == name
            parts[name] = paired(before[own], after[own], list(groups[own]), looks=len(names))

        regressed = [
            Regressed(
                image=str(self.files[row]),
                label=self.labels[row],
                said=self.said[row],
                probability=self.probability[row],
            )
            for row in np.flatnonzero(before & ~after)
        ]
        return judged(
            paired(before, after, list(groups)),
            parts,
            max_drop,
            regressed,
            int((after & ~before).sum()),
        )

    def table(self, change: Change | None) -> str:
        """As Answers.table."""
        metrics = self.metrics
        lines = [
            f"{self.headline} [{metrics.accuracy_low:.3f}, {metrics.accuracy_high:.3f}] on "
            f"{ground(metrics.images, metrics.clusters)}",
            f"NLL {metrics.nll:.3f}, ECE {metrics.ece:.3f}",
        ]
        rows = [("class", "images", "recall", "precision", *["drop, points [95 %]"] * bool(change))]
        for place, name in enumerate(metrics.classes):
            shares = [
                f"{value:.3f}" if value is not None else "-"
                for value in (metrics.recall[place], metrics.precision[place])
            ]
            drop = [drop_text(change.parts[name]) if name in change.parts else ""] if change else []
            rows.append((name, str(sum(metrics.confusion[place])), *shares, *drop))
        return "\n".join([*lines, console.table(rows)])


def unseen(bundle: str | Path, images: Sequence[Labelled]) -> tuple[list[Labelled], int | None]:
    """Images that the bundle's model was not trained on, and how many others there are.

    Images are compared by content. The number is None when `bundle` does not tell (a bare
    model.onnx, or a bundle of an older ftkit). Raises FtkitError when no image is left.
    """
    path = Path(bundle) / TRAINED_ON
    if not path.is_file():
        return list(images), None

    known = set(path.read_text().split())
    left = [image for image in images if trained_on_digest(image.path) not in known]
    if not left:
        raise FtkitError(
            f"{images[0].path.parent}: expected images that the model was not trained on, found that it "
            f"was on all {len(images)}. Try held-out images"
        )

    return left, len(images) - len(left)


def trained_on_digest(path: Path) -> str:
    """A file's digest as in TRAINED_ON; "" for an unreadable file, which is reported elsewhere."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGEST]
    except OSError:
        return ""


def asked_of(model: AnyModel) -> Asked:
    """What a model's answers are to be compared with."""
    if model.task == "single-label":
        return Asked()
    units = model.readout.units if isinstance(model.readout, Values) else ("",) * len(model.labels)
    return Asked(task=model.task, names=tuple(model.labels), units=units)


def require_same(new: str | Path, old: str | Path) -> Asked:
    """What both bundles answer. Raises FtkitError where that is not the same, but for single-label
    bundles, whose classes are compared with the images' own."""
    one, other = (asked_of(load_model(bundle)) for bundle in (new, old))
    if one.task != other.task:
        raise FtkitError(
            f"{old}: expected a {one.task} bundle as {new} is, found a {other.task} one. Compare models of one task"
        )
    if set(zip(one.names, one.units, strict=True)) != set(
        zip(other.names, other.units, strict=True)
    ):
        raise FtkitError(
            f"{old}: expected {', '.join(one.names)} as {new} answers, found {', '.join(other.names)}, or other units. "
            "Compare models of the same ones"
        )
    return one


def require_labels(bundle: str | Path, images: Sequence[Labelled]) -> None:
    """Raise FtkitError when `bundle` is not a bundle, or lacks the class of an image."""
    model = load_model(bundle)
    if model.task != "single-label":
        return  # labelled() took what the model answers
    for image in images:
        if image.label not in model.labels:
            raise FtkitError(
                f"{image.path}: expected a class that {bundle} knows, {choices(image.label, model.labels)}"
            )


def answers_of(
    bundle: str | Path,
    images: Sequence[Labelled],
    asked: Asked | None = None,
    *,
    provider: str = "cpu",
    step: Callable[[int, int], object] = lambda done, total: None,
) -> Answers:
    """Answer each image from its file, as a device would.

    asked: what the images' targets are, by default what the bundle answers. step: called with the
    number done and the total. Raises FtkitError like `require_labels`, and when no image can be read.
    """
    model = load_model(bundle, provider=provider)
    answers = []
    kept = list[Labelled]()
    unreadable = []
    for number, image in enumerate(images, start=1):
        try:
            answers.append(model.answers(model.decode(image.path)))
            kept.append(image)
        except ImageError as error:
            unreadable.append(str(error))
        step(number, len(images))

    if not kept:
        raise FtkitError(
            f"{images[0].path}: expected images that can be read, found none. {unreadable[0]}"
        )

    require_numbers(np.stack(answers), [image.path for image in kept])
    told: dict[str, Any] = {
        "files": tuple(image.path for image in kept),
        "groups": tuple(image.group for image in kept),
        "unreadable": tuple(unreadable),
        "placement": model.session.placement,
    }
    if model.task != "single-label":
        from ftkit.evaluation.bundle_targets import target_answers

        return target_answers(np.stack(answers), kept, model, asked or asked_of(model), told)

    probabilities = np.stack(answers)
    known = {name: number for number, name in enumerate(model.labels)}
    labels = np.array([known[image.label] for image in kept])
    return ClassAnswers(
        labels=tuple(image.label for image in kept),
        said=tuple(model.labels[best] for best in probabilities.argmax(1)),
        probability=tuple(float(value) for value in probabilities.max(1)),
        metrics=evaluate(probabilities, labels, model.labels, told["groups"]),
        **told,
    )
