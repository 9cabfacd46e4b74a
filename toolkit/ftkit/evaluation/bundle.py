"""Evaluate an exported file on labelled images, alone or against an earlier release; no torch.

images, seen = unseen("bundle", labelled("photos"))
new = answers("bundle", images, provider="cpu")
new.metrics.accuracy
change = against(new, answers("old-bundle", ...), max_drop=0.01)
change.verdict, change.regressed, change.classes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftkit.data.dataset import Labelled
from ftkit.evaluation.metrics import Metrics, evaluate
from ftkit.utils import console
from ftkit_export.proof.decision import Paired, Verdict, paired
from ftkit_export.proof.intervals import ground
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError, ImageError, choices
from ftkit_export.runtime.predict import Classifier

LISTED = 20  # regressed images that are printed; --json has them all
# In a run and in its bundle: one digest per line, of each train and val image
TRAINED_ON = "trained_on.txt"
# In a run and its bundle: every image with its split, for dataset.read_images
SPLITS_CSV = "splits.csv"
DIGEST = 32  # hexadecimal digits of SHA-256: 100,000 images in 3 MB, without chance collisions


@dataclass(frozen=True, kw_only=True)
class BundleAnswers:
    """A file's answers on labelled images.

    labels: true class names; said: predicted ones; groups: "" for none; unreadable: messages on the
    images left out; placement: where the operators ran, in words (session.Session.placement).
    """

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    said: tuple[str, ...]
    probability: tuple[float, ...]
    metrics: Metrics
    unreadable: tuple[str, ...]
    placement: str = ""

    @property
    def right(self) -> Array:
        """Whether each answer is correct, (N,) bool."""
        return np.array([a == b for a, b in zip(self.labels, self.said, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Regressed:
    """An image that was classified correctly before and no longer is."""

    image: str
    label: str
    said: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """Comparison of a new release with an old one on the same images.

    paired: over all images; classes: per class, with bounds that hold for all classes together.

    verdict: refused also when a single class lost more than the limit with confidence, whatever the
    others gained.
    """

    verdict: Verdict
    max_drop: float
    paired: Paired
    classes: dict[str, Paired]
    regressed: tuple[Regressed, ...]
    repaired: int

    @property
    def worse_classes(self) -> list[str]:
        """Classes that lost more than the limit, with confidence."""
        return [
            name
            for name, comparison in self.classes.items()
            if comparison.verdict(self.max_drop) == "refused"
        ]


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


def require_labels(bundle: str | Path, images: Sequence[Labelled]) -> None:
    """Raise FtkitError when `bundle` is not a bundle, or lacks the class of an image."""
    known = Classifier(bundle).labels
    for path, label, _ in images:
        if label not in known:
            raise FtkitError(
                f"{path}: expected a class that {bundle} knows, {choices(label, known)}"
            )


def answers_of(
    bundle: str | Path,
    images: Sequence[Labelled],
    *,
    provider: str = "cpu",
    step: Callable[[int, int], object] = lambda done, total: None,
) -> BundleAnswers:
    """Classify each image from its file, as a device would.

    step: called with the number done and the total. Raises FtkitError like `require_labels`, and
    when no image can be read.
    """
    classify = Classifier(bundle, provider=provider)
    known = {name: number for number, name in enumerate(classify.labels)}

    answers = []
    kept = list[Labelled]()
    unreadable = []
    for number, image in enumerate(images, start=1):
        try:
            answers.append(classify.probabilities(classify.decode(image.path)))
            kept.append(image)
        except ImageError as error:
            unreadable.append(str(error))
        step(number, len(images))

    if not kept:
        raise FtkitError(
            f"{images[0].path}: expected images that can be read, found none. {unreadable[0]}"
        )

    probabilities = np.stack(answers)
    labels = np.array([known[image.label] for image in kept])
    groups = tuple(image.group for image in kept)

    return BundleAnswers(
        files=tuple(image.path for image in kept),
        labels=tuple(image.label for image in kept),
        groups=groups,
        said=tuple(classify.labels[best] for best in probabilities.argmax(1)),
        probability=tuple(float(value) for value in probabilities.max(1)),
        metrics=evaluate(probabilities, labels, classify.labels, groups),
        unreadable=tuple(unreadable),
        placement=classify.session.placement,
    )


def compare_releases(new: BundleAnswers, old: BundleAnswers, *, max_drop: float) -> Change:
    """Paired comparison of two releases on the same images; each of the bounds is one-sided, 95 %."""
    before = old.right
    after = new.right
    labels = np.array(new.labels)
    groups = np.array(new.groups)
    overall = paired(before, after, list(groups))
    names = [name for name in new.metrics.classes if name in set(new.labels)]

    classes = {}
    for name in names:
        own = labels == name
        classes[name] = paired(before[own], after[own], list(groups[own]), looks=len(names))

    regressed = [
        Regressed(image=str(path), label=label, said=said, probability=probability)
        for path, label, said, probability, was, now in zip(
            new.files, new.labels, new.said, new.probability, before, after, strict=True
        )
        if was and not now
    ]

    verdict = overall.verdict(max_drop)
    if any(paired_class.verdict(max_drop) == "refused" for paired_class in classes.values()):
        verdict = "refused"

    return Change(
        verdict=verdict,
        max_drop=max_drop,
        paired=overall,
        classes=classes,
        regressed=tuple(regressed),
        repaired=int((after & ~before).sum()),
    )


def comparison_text(
    new: BundleAnswers, old: BundleAnswers | None = None, change: Change | None = None
) -> str:
    """The result as text: accuracy, one row per class, and what changed since `old`.

    Within 80 columns, except for paths.
    """
    metrics = new.metrics
    lines = [
        f"accuracy {metrics.accuracy:.4f} [{metrics.accuracy_low:.3f}, {metrics.accuracy_high:.3f}] on "
        f"{ground(metrics.images, metrics.clusters)}",
        f"NLL {metrics.nll:.3f}, ECE {metrics.ece:.3f}",
    ]
    rows = [("class", "images", "recall", "precision", *["drop, points [95 %]"] * bool(change))]

    for place, name in enumerate(metrics.classes):
        shares = [
            f"{value:.3f}" if value is not None else "-"
            for value in (metrics.recall[place], metrics.precision[place])
        ]
        drop = [_points(change.classes[name]) if name in change.classes else ""] if change else []
        rows.append((name, str(sum(metrics.confusion[place])), *shares, *drop))

    lines.append(console.table(rows))
    if old and change:
        lines.append(
            f"{len(change.regressed)} formerly right and now wrong, {change.repaired} the other way"
        )
        lines += [
            f"  {item.image}  {item.label} -> {item.said} {item.probability:.3f}"
            for item in change.regressed[:LISTED]
        ]

        if len(change.regressed) > LISTED:
            lines.append(f"  and {len(change.regressed) - LISTED} more: see --json")

        lines += [
            f"class {name} surely lost more than {change.max_drop:.1%}"
            for name in change.worse_classes
        ]
        lines.append(
            f"accuracy {old.metrics.accuracy:.4f} -> {metrics.accuracy:.4f}, drop {_points(change.paired)} "
            f"points, limit {change.max_drop * 100:.2f}"
        )
        lines.append(change.verdict)

    return "\n".join(lines)


def _points(comparison: Paired) -> str:
    return (
        f"{comparison.drop * 100:+.2f} [{comparison.low * 100:+.2f}, {comparison.high * 100:+.2f}]"
    )
