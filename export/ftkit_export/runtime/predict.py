"""Classify images with an exported file: ONNX Runtime, numpy and Pillow, nothing else.

classify = Classifier("bundle")
answer = classify("photo.jpg")
answer.label, answer.probability
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.errors import BundleError, FtkitError
from ftkit_export.runtime.out_of_distribution import OutOfDistribution
from ftkit_export.runtime.preprocess import (
    INPUT_FORMATS,
    SUFFIXES,
    Preprocess,
    from_frame,
    to_frame,
)
from ftkit_export.runtime.session import PROVIDERS, Session
from ftkit_export.runtime.verify import read_manifest


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


class Classifier:
    """Classifier loaded from a bundle folder or its model.onnx.

    A provider that cannot run the image form runs the bundle's core form, preprocessed with Pillow.
    Raises BundleError when there is no model, its metadata has no labels or is damaged,
    ProviderError as Session.
    """

    def __init__(self, model: str | Path, *, provider: str = "cpu", threads: int = 0):
        path = Path(model)
        if path.is_dir():
            core = provider in PROVIDERS and PROVIDERS[provider].form == "core"
            path = path / (_core_form(path) if core else "model.onnx")

        if not path.is_file():
            raise BundleError(
                f"{model}: expected a bundle or a model.onnx, found neither. Try `ftkit export RUN`"
            )

        self.session = Session(path, provider=provider, threads=threads)
        metadata = self.session.metadata
        if "labels" not in metadata:
            raise BundleError(
                f"{path}: expected labels in its metadata, found none. Try a file ftkit exported"
            )

        self.core = self.session.input_names == ["pixels"]
        try:
            self.labels = _labels(metadata["labels"])
            self.preprocess = Preprocess(**json.loads(metadata.get("preprocess", "{}")))
            self.temperature = float(metadata.get("temperature", 1))
            self.input_format = metadata.get("input_format", "rgb")
            self.threshold = float(metadata.get("abstain_threshold", 0))
            self.familiar = (
                OutOfDistribution.from_text(metadata["out_of_domain"])
                if metadata.get("out_of_domain")
                else None
            )

            if self.input_format not in INPUT_FORMATS or not self.temperature > 0:
                raise ValueError(
                    f"input_format {self.input_format}, temperature {self.temperature}"
                )

            classes = self.session.outputs[0].shape[-1:]
            if isinstance(classes[0], int) and classes[0] != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels for {classes[0]} classes")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, FtkitError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BundleError(
                f"{path}: expected the metadata that ftkit writes, found it damaged ({reason}). Copy the file again"
            ) from None

    def decode(self, source: str | Path | bytes) -> np.ndarray[Any, Any]:
        """Decode an image file (path or bytes) -> (H, W, 3) uint8 RGB, as in training."""
        return self.preprocess.decode(source)

    def probabilities(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 RGB -> (classes,) float32."""
        return self._answer(to_frame(image, self.input_format))[0]

    def _answer(
        self, frame: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """One frame -> probabilities (classes,), embedding (1, D)."""
        if not self.core:
            (probabilities,), embedding = self.session.run(frame[None])
            return probabilities, embedding
        canvas = self.preprocess.canvas(from_frame(frame, self.input_format))
        logits, embedding = self.session.run(self.preprocess.pixels(canvas[None]))
        return softmax(logits[0] / np.float32(self.temperature)), embedding

    def __call__(self, image: str | Path | bytes | np.ndarray[Any, Any]) -> Prediction:
        """Classify an image file, its bytes, or an RGB array (H, W, 3) uint8.

        Raises ImageError for a bad file.
        """
        pixels = image if isinstance(image, np.ndarray) else self.decode(image)
        return self.frame(to_frame(pixels, self.input_format))

    def frame(self, frame: np.ndarray[Any, Any]) -> Prediction:
        """Classify a camera frame in the model's input format (preprocess.to_frame)."""
        probabilities, embedding = self._answer(frame)
        best = int(probabilities.argmax())
        named = {
            label: float(value) for label, value in zip(self.labels, probabilities, strict=True)
        }
        score = self.familiar.score(embedding)[0] if self.familiar else 0.0

        return Prediction(
            label=self.labels[best],
            probability=float(probabilities[best]),
            probabilities=named,
            doubtful=bool(probabilities[best] < self.threshold),
            foreign=bool(self.familiar and score > self.familiar.threshold),
        )


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Softmax over the last axis, in the dtype given."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray[Any, Any] = shifted / shifted.sum(-1, keepdims=True)
    return result


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
