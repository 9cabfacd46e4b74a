"""Answer images with an exported file: ONNX Runtime, numpy and Pillow, nothing else.

classify = Classifier("bundle")
answer = classify("photo.jpg")
answer.label, answer.probability

with Classifier("bundle", keep="collected") as classify: ...    # also collects what is worth labelling, and a log

model = load_model("bundle")                                    # whatever its task is
model("photo.jpg").text
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from PIL import Image

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.collect import Collector, Sighting
from ftkit_export.runtime.drift import SAMPLED, Reference, frame_statistics
from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.out_of_distribution import OutOfDistribution
from ftkit_export.runtime.preprocess import (
    INPUT_FORMATS,
    SUFFIXES,
    Preprocess,
    from_frame,
    to_frame,
)
from ftkit_export.runtime.readout import (
    KEY,
    NAMES,
    Labels,
    OneClass,
    Readout,
    Task,
    Values,
    of_metadata,
)
from ftkit_export.runtime.session import PROVIDERS, Session
from ftkit_export.runtime.verify import read_manifest

REFERENCE = "drift.json"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction for one image.

    probabilities: class name -> probability, in the model's class order; they sum to 1. doubtful:
    low confidence, below the threshold that reached the wanted precision on val. foreign:
    out-of-distribution, unlike the training images.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]
    doubtful: bool
    foreign: bool

    @property
    def remark(self) -> str:
        """ "foreign", "doubtful" or "", for a line of text."""
        return "foreign" if self.foreign else "doubtful" if self.doubtful else ""

    @property
    def text(self) -> str:
        """The answer as a line of text."""
        return f"{self.label}  {self.probability:.3f}  {self.remark}".rstrip()

    @property
    def explained(self) -> Sequence[str]:
        """The output that `--explain` draws a map of."""
        return (self.label,)


@dataclass(frozen=True, kw_only=True)
class MultiLabelPrediction:
    """Prediction of a multi-label model for one image.

    labels: those that apply, since their probability reaches their threshold. probabilities: label ->
    probability, each on its own. foreign: as Prediction.
    """

    labels: tuple[str, ...]
    probabilities: Mapping[str, float]
    foreign: bool

    @property
    def text(self) -> str:
        """The answer as a line of text."""
        named = ", ".join(f"{name} {self.probabilities[name]:.3f}" for name in self.labels)
        return f"{named or 'none'}  {'foreign' if self.foreign else ''}".rstrip()

    @property
    def explained(self) -> Sequence[str]:
        """The labels that `--explain` draws maps of: those that apply, or the most probable one."""
        return self.labels or (max(self.probabilities, key=lambda name: self.probabilities[name]),)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value in its unit, with the interval that holds the true one in the stated share of images."""

    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class RegressionPrediction:
    """Prediction of a regression model for one image.

    values: name -> estimate. share: of the images whose true value lies in the interval. foreign: as
    Prediction; the intervals then mean nothing.
    """

    values: Mapping[str, Estimate]
    share: float
    foreign: bool

    @property
    def text(self) -> str:
        """The answer as a line of text."""
        named = ", ".join(
            f"{name} {item.value:.4g} [{item.low:.4g}, {item.high:.4g}]{item.unit and ' '}{item.unit}"
            for name, item in self.values.items()
        )
        return f"{named}  {'foreign' if self.foreign else ''}".rstrip()

    @property
    def explained(self) -> Sequence[str]:
        """The quantities that `--explain` draws maps of: all of them."""
        return tuple(self.values)


Said = TypeVar("Said")


class Model(ABC, Generic[Said]):
    """A model loaded from a bundle folder or its model.onnx; called with an image, it answers.

    labels: names of its outputs. A provider that cannot run the image form runs the bundle's core
    form, preprocessed with Pillow. Raises BundleError when there is no model, it has another task,
    or its metadata has no labels or is damaged; ProviderError as Session.
    """

    task: ClassVar[Task]

    def __init__(
        self,
        model: str | Path,
        *,
        provider: str = "cpu",
        threads: int = 0,
        session: Session | None = None,
    ):
        path = _model_file(model, provider)
        self.session = session or Session(path, provider=provider, threads=threads)
        metadata = self.session.metadata
        names = metadata.get("labels") or metadata.get(NAMES)
        if names is None:
            raise BundleError(
                f"{path}: expected labels in its metadata, found none. Try a file ftkit exported"
            )

        self.core = self.session.input_names == ["pixels"]
        try:
            self.readout: Readout = of_metadata(metadata)
            self.labels = _labels(names)
            self.preprocess = Preprocess(**json.loads(metadata.get("preprocess", "{}")))
            self.input_format = metadata.get("input_format", "rgb")
            self._read(metadata)
            self.familiar = (
                OutOfDistribution.from_text(metadata["out_of_domain"])
                if metadata.get("out_of_domain")
                else None
            )

            if self.input_format not in INPUT_FORMATS:
                raise ValueError(f"input_format {self.input_format}")

            width = self.session.outputs[0].shape[-1:]
            if isinstance(width[0], int) and width[0] != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels for {width[0]} outputs")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, FtkitError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BundleError(
                f"{path}: expected the metadata that ftkit writes, found it damaged ({reason}). Copy the file again"
            ) from None

        if self.readout.task != self.task:
            raise BundleError(
                f"{model}: expected a {self.task} model, found a {self.readout.task} one. Try `ftkit predict` without "
                "options, or ftkit.load"
            )

    def _read(self, metadata: Mapping[str, str]) -> None:
        """Read what else the metadata holds; may raise as if it were damaged."""

    def decode(self, source: str | Path | bytes) -> np.ndarray[Any, Any]:
        """Decode an image file (path or bytes) -> (H, W, 3) uint8 RGB, as in training."""
        return self.preprocess.decode(source)

    def answers(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 RGB -> the readout's answers (K,) float32."""
        return self._answer(to_frame(image, self.input_format))[0]

    def _answer(
        self, frame: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """One frame -> answers (K,), embedding (1, D)."""
        if not self.core:
            (answers,), embedding = self.session.run(frame[None])
            return answers, embedding
        canvas = self.preprocess.canvas(from_frame(frame, self.input_format))
        logits, embedding = self.session.run(self.preprocess.pixels(canvas[None]))
        return self.readout.answers(logits)[0], embedding

    def _is_foreign(self, embedding: Array) -> bool:
        if self.familiar is None:
            return False
        return bool(self.familiar.score(embedding)[0] > self.familiar.threshold)

    def __call__(self, image: str | Path | bytes | np.ndarray[Any, Any]) -> Said:
        """Answer an image file, its bytes, or an RGB array (H, W, 3) uint8.

        Raises ImageError for a bad file.
        """
        pixels = image if isinstance(image, np.ndarray) else self.decode(image)
        return self._said(to_frame(pixels, self.input_format), image)

    def frame(self, frame: np.ndarray[Any, Any]) -> Said:
        """Answer a camera frame in the model's input format (preprocess.to_frame)."""
        return self._said(frame, None)

    @abstractmethod
    def _said(
        self, frame: np.ndarray[Any, Any], source: str | Path | bytes | np.ndarray[Any, Any] | None
    ) -> Said:
        """The answer to a frame. source: where it came from, if it was no frame."""


class Classifier(Model[Prediction]):
    """Single-label model: Model, and what is worth labelling can be collected.

    keep: a folder to collect pictures worth labelling and a log in, or a Collector. Raises also
    FtkitError when nothing can be collected there.
    """

    task: ClassVar[Task] = "single-label"

    def __init__(
        self,
        model: str | Path,
        *,
        provider: str = "cpu",
        threads: int = 0,
        keep: str | Path | Collector | None = None,
        session: Session | None = None,
    ):
        super().__init__(model, provider=provider, threads=threads, session=session)
        assert isinstance(self.readout, OneClass)  # Model compared the task
        self.temperature = self.readout.temperature
        bundle = Path(model) if Path(model).is_dir() else Path(model).parent
        self.collector = (
            Collector(keep, read_reference(bundle)) if isinstance(keep, str | Path) else keep
        )
        drift = self.collector and self.collector.drift
        self._sampled = drift.reference.sampled if drift else SAMPLED

    def _read(self, metadata: Mapping[str, str]) -> None:
        self.threshold = float(metadata.get("abstain_threshold", 0))

    def close(self) -> None:
        """Write down what was collected; only needed with `keep`, and done at the end of `with`."""
        if self.collector:
            self.collector.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probabilities(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 RGB -> (classes,) float32."""
        return self.answers(image)

    def sight(
        self, frame: np.ndarray[Any, Any], *, statistics: bool = True
    ) -> tuple[Sighting, np.ndarray[Any, Any]]:
        """What the model makes of a frame in its input format, and the probabilities (classes,).

        statistics: of the frame itself, too; they take tens of microseconds.
        """
        probabilities, embedding = self._answer(frame)
        best = int(probabilities.argmax())
        score, coordinates = 0.0, np.zeros(0)
        if self.familiar:
            scores, along = self.familiar.score_along(embedding)
            score, coordinates = float(scores[0]), along[0]

        sighting = Sighting(
            label=self.labels[best],
            probability=float(probabilities[best]),
            doubtful=bool(probabilities[best] < self.threshold),
            foreign=bool(self.familiar and score > self.familiar.threshold),
            score=score,
            coordinates=coordinates,
            frame=frame_statistics(frame, self.input_format, self._sampled)
            if statistics
            else np.zeros(0),
            embedding=embedding[0],
        )
        return sighting, probabilities

    def _said(
        self, frame: np.ndarray[Any, Any], source: str | Path | bytes | np.ndarray[Any, Any] | None
    ) -> Prediction:
        sighting, probabilities = self.sight(frame, statistics=self.collector is not None)
        if self.collector:
            self.collector.offer(sighting, lambda: picture_of(frame, source, self.input_format))

        named = {
            label: float(value) for label, value in zip(self.labels, probabilities, strict=True)
        }
        return Prediction(
            label=sighting.label,
            probability=sighting.probability,
            probabilities=named,
            doubtful=sighting.doubtful,
            foreign=sighting.foreign,
        )


class MultiLabelClassifier(Model[MultiLabelPrediction]):
    """Multi-label model: each label applies, or not, on its own."""

    task: ClassVar[Task] = "multi-label"

    def _said(
        self, frame: np.ndarray[Any, Any], source: str | Path | bytes | np.ndarray[Any, Any] | None
    ) -> MultiLabelPrediction:
        readout = self.readout
        assert isinstance(readout, Labels)  # Model compared the task
        probabilities, embedding = self._answer(frame)
        named = dict(zip(self.labels, map(float, probabilities), strict=True))
        return MultiLabelPrediction(
            labels=tuple(
                name
                for (name, value), least in zip(named.items(), readout.thresholds, strict=True)
                if value >= least
            ),
            probabilities=named,
            foreign=self._is_foreign(embedding),
        )


class Regressor(Model[RegressionPrediction]):
    """Regression model: numbers in their units, with intervals."""

    task: ClassVar[Task] = "regression"

    def _said(
        self, frame: np.ndarray[Any, Any], source: str | Path | bytes | np.ndarray[Any, Any] | None
    ) -> RegressionPrediction:
        readout = self.readout
        assert isinstance(readout, Values)  # Model compared the task
        values, embedding = self._answer(frame)
        estimates = {
            name: Estimate(
                value=float(value), low=float(value) - margin, high=float(value) + margin, unit=unit
            )
            for name, value, margin, unit in zip(
                self.labels, values, readout.margins, readout.units, strict=True
            )
        }
        return RegressionPrediction(
            values=estimates, share=readout.share, foreign=self._is_foreign(embedding)
        )


AnyModel = Classifier | MultiLabelClassifier | Regressor


def load_model(model: str | Path, *, provider: str = "cpu", threads: int = 0) -> AnyModel:
    """The model of a bundle folder or model.onnx, whatever its task. Raises as Model."""
    session = Session(_model_file(model, provider), provider=provider, threads=threads)
    try:
        task = of_metadata(session.metadata).task
    except (ValueError, KeyError, TypeError, AttributeError):
        task = "single-label"  # which says that the metadata is damaged
    kinds: dict[Task, type[AnyModel]] = {
        kind.task: kind for kind in (Classifier, MultiLabelClassifier, Regressor)
    }
    return kinds[task](model, provider=provider, threads=threads, session=session)


def require_single_label(bundle: str | Path, what: str) -> None:
    """Raise BundleError for a bundle of another task, which `what` is not made for."""
    readout = read_manifest(bundle).get(KEY)
    if readout:
        raise BundleError(
            f"{bundle}: expected a single-label bundle, found a {readout['task']} one, for which {what} is not made. "
            "Try a single-label one"
        )


def _model_file(model: str | Path, provider: str) -> Path:
    """The file to load. Raises BundleError where there is none."""
    path = Path(model)
    if path.is_dir():
        core = provider in PROVIDERS and PROVIDERS[provider].form == "core"
        path = path / (_core_form(path) if core else "model.onnx")
    if not path.is_file():
        raise BundleError(
            f"{model}: expected a bundle or a model.onnx, found neither. Try `ftkit export RUN`"
        )
    return path


def read_reference(bundle: Path) -> Reference | None:
    """The bundle's reference for the drift test; None for one without.

    Raises BundleError for a damaged one.
    """
    path = bundle / REFERENCE
    if not path.is_file():
        return None
    try:
        return Reference.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise BundleError(
            f"{path}: expected the reference of the drift test, found it damaged. Copy the bundle again"
        ) from None


def picture_of(
    frame: np.ndarray[Any, Any] | None,
    source: str | Path | bytes | np.ndarray[Any, Any] | None,
    input_format: str,
) -> tuple[bytes, str]:
    """An image as a file's content and suffix: as it came, or a PNG of the frame in input_format."""
    if isinstance(source, bytes):
        kind = Image.open(io.BytesIO(source)).format or "png"
        return source, f".{kind.lower()}"
    if isinstance(source, str | Path):
        return Path(source).read_bytes(), Path(source).suffix.lower()
    if frame is None:
        raise ValueError("neither a frame nor a source")
    content = io.BytesIO()
    Image.fromarray(from_frame(frame, input_format)).save(content, "PNG", compress_level=1)
    return content.getvalue(), ".png"


def _labels(text: str) -> list[str]:
    """Parse the class names. Raises ValueError for anything but a list of names."""
    labels = json.loads(text)
    if (
        not isinstance(labels, list)
        or not labels
        or not all(isinstance(label, str) for label in labels)
    ):
        raise ValueError("labels that are not names")
    return labels


def _core_form(bundle: Path) -> str:
    """Path of the shipped variant's core form, relative to the bundle."""
    manifest = read_manifest(bundle)
    return str(manifest["variants"][manifest["chosen"]]["core"])


def image_files(paths: list[str | Path]) -> list[Path]:
    """The files given, and all images in the folders given, sorted by path.

    Raises FtkitError for a missing path, or a folder without images.
    """
    files: list[Path] = []
    for item in map(Path, paths):
        if item.is_dir():
            inside = sorted(
                p for p in item.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
            if not inside:
                raise FtkitError(
                    f"{item}: expected images in this folder, found none. Try another folder"
                )
            files += inside
        elif item.is_file():
            files.append(item)
        else:
            raise FtkitError(
                f"{item}: expected an image or a folder, found nothing there. Check the path"
            )

    return files
