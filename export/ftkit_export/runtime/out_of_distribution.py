"""Out-of-distribution detection: distance of an image's embedding from those of training images.

    statistics = OutOfDistribution.from_text(metadata["out_of_domain"])
    statistics.score(embedding) > statistics.threshold

Mahalanobis distance of the L2-normalised embedding to the nearest class mean (Lee et al. 2018;
normalised: Mueller and Hein 2025). The shared covariance is low-rank: a few directions with their
own variance, one variance for all others. Measured: bench/README.md.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np

from ftkit_export.runtime.arrays import Array

DTYPES = {
    "means": np.float16,
    "directions": np.float16,
    "weights": np.float32,
    "spreads": np.float32,
}
OPTIONAL = "spreads"


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """Statistics of the training images' embeddings, scaled to length 1, and the threshold.

    means (classes, D), directions (K, D): float16. rest: variance of all other directions. weights
    (K,) float32: 1 / rest - 1 / (the direction's own variance). threshold: the `kept` quantile of
    the val images' scores. spreads (classes,) float32: by which a class's scores are divided; None:
    1 for all, as only a class that was enrolled later has another.
    """

    means: Array
    directions: Array
    weights: Array
    rest: float
    threshold: float
    kept: float
    spreads: Array | None = None

    def score(self, embedding: Array) -> Array:
        """(N, D) -> (N,) float32: squared distance to the nearest class mean, divided by D.

        About 1 for in-distribution images.
        """
        return self.score_along(embedding)[0]

    def score_along(self, embedding: Array) -> tuple[Array, Array]:
        """(N, D) -> scores (N,) float32, and coordinates (N, K) along the directions."""
        means = self.means.astype(np.float64)
        axes = self.directions.astype(np.float64).T
        unit = unit_length(embedding)
        along = unit @ axes
        mean_along = means @ axes
        squares = _squares(unit, means, np.ones(unit.shape[1])) / self.rest - _squares(
            along, mean_along, self.weights
        )
        if self.spreads is not None:
            squares = squares / self.spreads
        scores: Array = (squares.min(1) / unit.shape[1]).astype(np.float32)

        return scores, along

    def to_text(self) -> str:
        """JSON for the model's metadata."""
        arrays = {name: getattr(self, name) for name in DTYPES}
        packed = {
            name: {
                "shape": list(value.shape),
                "dtype": value.dtype.name,
                "base64": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode(),
            }
            for name, value in arrays.items()
            if value is not None
        }
        return json.dumps(
            {**packed, "rest": self.rest, "threshold": self.threshold, "kept": self.kept}
        )

    @staticmethod
    def from_text(text: str) -> OutOfDistribution:
        """Inverse of `to_text`. Raises ValueError or KeyError for other text."""
        data = json.loads(text)
        for name, dtype in DTYPES.items():
            if name == OPTIONAL and name not in data:
                continue
            item = data[name]
            data[name] = np.frombuffer(
                base64.b64decode(item["base64"], validate=True), dtype
            ).reshape(item["shape"])

        statistics = OutOfDistribution(**data)
        shapes = (
            statistics.means.ndim,
            statistics.directions.ndim,
            statistics.weights.shape,
            statistics.means.shape[1:],
        )
        if (
            shapes != (2, 2, statistics.directions.shape[:1], statistics.directions.shape[1:])
            or not statistics.rest > 0
            or (
                statistics.spreads is not None
                and statistics.spreads.shape != statistics.means.shape[:1]
            )
        ):
            raise ValueError("out-of-domain statistics whose shapes do not match")

        return statistics


def unit_length(embedding: Array) -> Array:
    wide = embedding.astype(np.float64)
    unit: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit


def _squares(one: Array, other: Array, weights: Array) -> Array:
    """Weighted squared distances: (N, D), (M, D), (D,) -> (N, M).

    By matrix products, without an array of N x M x D.
    """
    squares: Array = (
        (one**2 @ weights)[:, None] + (other**2 @ weights)[None] - 2 * (one * weights) @ other.T
    )
    return squares


def fit(
    embedding: Array, labels: Array, val: Array, *, directions: int = 16, kept: float = 0.95
) -> OutOfDistribution:
    """Fit to training embeddings (N, D) with labels (N,); threshold from val embeddings (M, D).

    At most N / 4 directions, so small sets have fewer.
    """
    unit = unit_length(embedding)
    present = np.unique(labels)
    means = np.stack([unit[labels == label].mean(0) for label in present])
    apart = unit - means[np.searchsorted(present, labels)]
    _, sizes, axes = np.linalg.svd(apart, full_matrices=False)
    variance = sizes**2 / len(apart)
    count = min(directions, len(apart) // 4)
    rest = max(float(variance[count:].sum()) / max(1, apart.shape[1] - count), 1e-12)
    statistics = OutOfDistribution(
        means=means.astype(np.float16),
        directions=axes[:count].astype(np.float16),
        rest=rest,
        threshold=0.0,
        kept=kept,
        weights=(1 / rest - 1 / np.maximum(variance[:count], rest)).astype(np.float32),
    )

    threshold = float(np.quantile(statistics.score(val), kept))
    return OutOfDistribution(**{**statistics.__dict__, "threshold": threshold})
