"""A class that the model was not trained on, from a few images and without training: the arithmetic.

    sample = KeptSample.read(bundle / "enroll.npz")
    new = fit_class(statistics, sample, embedding, probabilities, max_drop=0.01)
    new.recognised.mean(); new.drop_high

"Is it the new class, or any old one?" is answered beside the network's own head, which stays as it
is: p(new) = sigmoid(min over old classes c of (weights[c] @ u + bias[c])), u being the embedding
scaled to length 1, and every old class keeps its share of the rest. So old classes never change
among themselves; an old image can only be lost to the new class.

The weights are the linear discriminant between two classes of a shared covariance (Fisher 1936), of
which the out-of-distribution statistics of the bundle hold the old means and the covariance: no old
image is needed, and a few new ones do, since only their mean is estimated. A scale and an offset
make a log-odds of it (Platt 1999), from the kept sample and from every new image scored by the mean
of the others. Last, the offset is lowered until the kept sample shows that at most `max_drop` of the
old accuracy is lost, at 95 % confidence: a threshold at an order statistic is a tolerance limit
(Wilks 1941), here nearly so, as the same sample sets the scale; tests/export/runtime/test_enroll.py
simulates how often it fails. Images of a group count as if what is lost clustered like the file's
mistakes; where one group in thirty looks like the new class, and none of those was kept, no bound
from the sample can tell.

Later classes are judged on the same images, and against the answers before the first one: what all of
them cost together stays within `max_drop`. Numpy alone: this runs on a device.
"""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.out_of_distribution import OutOfDistribution, unit_length

FILE = "enroll.npz"
MOST_KEPT = 512  # images of the sample
FEWEST = 5  # images of a new class
MAX_DROP = 0.01
LEVEL = 0.95
NEWTON_STEPS = 50
# Of a log-odds. The sample's embeddings are kept in 8 bits, which moves it by 0.005 (standard
# deviation): an image at the limit stays on its side in the file
ON_LIMIT = 0.02


@dataclass(frozen=True, kw_only=True)
class KeptSample:
    """Held-out images as the file sees them: what a new class is judged on in place of old images.

    embedding (M, D) float32, scaled to length 1. labels (M,): class numbers. probabilities (M,
    classes): the file's. right (M,) bool: whether its answer was correct before anything was enrolled.
    The first `exported` images are test images, the others those of enrolled classes, on which no
    bound rests. independent: number of independent images that bound a share as the test images do.
    clusters: their groups, None for images without.
    """

    embedding: Array
    labels: Array
    probabilities: Array
    right: Array
    exported: int
    independent: float
    clusters: int | None

    def as_bytes(self) -> bytes:
        """The content of FILE: one byte a value of the embedding, with a scale for each image."""
        largest = np.maximum(np.abs(self.embedding).max(1), 1e-12)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            embedding=np.rint(self.embedding / largest[:, None] * 127).astype(np.int8),
            largest=largest.astype(np.float32),
            labels=self.labels.astype(np.int32),
            probabilities=self.probabilities.astype(np.float32),
            right=self.right.astype(bool),
            exported=np.int64(self.exported),
            independent=np.float64(self.independent),
            clusters=np.int64(self.clusters or 0),
        )
        return content.getvalue()

    @staticmethod
    def read(path: Path) -> KeptSample:
        """Read FILE of a bundle. Raises BundleError when it is not there, or is damaged."""
        if not path.is_file():
            raise BundleError(
                f"{path}: expected the sample on which a new class is judged, found none. "
                "Export the run again, with golden=images"
            )
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                values = stored["embedding"] * (stored["largest"] / 127)[:, None]
                sample = KeptSample(
                    embedding=unit_length(values).astype(np.float32),
                    labels=stored["labels"],
                    probabilities=stored["probabilities"],
                    right=stored["right"],
                    exported=int(stored["exported"]),
                    independent=float(stored["independent"]),
                    clusters=int(stored["clusters"]) or None,
                )
            sample._check()
        except (ValueError, KeyError, IndexError, TypeError, OSError, zipfile.BadZipFile):
            raise BundleError(
                f"{path}: expected the sample on which a new class is judged, found it damaged. "
                "Copy the bundle again"
            ) from None
        return sample

    def _check(self) -> None:
        """Raises ValueError where the arrays do not fit each other."""
        count = len(self.embedding)
        if not (
            0 < self.exported <= count
            and 0 <= self.independent <= self.exported
            and self.embedding.ndim == self.probabilities.ndim == 2
            and self.labels.shape == self.right.shape == (count,) == self.probabilities.shape[:1]
            and 0 <= self.labels.min() <= self.labels.max() < self.probabilities.shape[1]
            and np.isfinite(self.embedding).all()
            and np.isfinite(self.probabilities).all()
        ):
            raise ValueError("a kept sample whose parts do not fit")


@dataclass(frozen=True, kw_only=True)
class NewClass:
    """A fitted class, and what it costs.

    weights (old classes, D), bias (old classes,): float32, of the embedding scaled to length 1.
    statistics: with the new class's mean. recognised (n,) bool: each new image, scored by the mean of
    the images of other groups; recall_low, recall_high: two-sided 95 %. lost (M,) bool: images of the kept sample
    that were right before anything was enrolled, and are no longer; drop_low, drop_high: of their
    share among the test images, each one-sided 95 %.
    log_odds (n,): of each new image, by the others. settled: whether the sample can bound a loss
    as small as the limit.
    """

    weights: Array
    bias: Array
    statistics: OutOfDistribution
    recognised: Array
    recall_low: float
    recall_high: float
    lost: Array
    drop_low: float
    drop_high: float
    log_odds: Array
    settled: bool

    def log_odds_of(self, embedding: Array) -> Array:
        """(n, D) -> (n,) float64: the new class against the nearest old one."""
        odds: Array = (unit_length(embedding) @ self.weights.T + self.bias).min(1)
        return odds


def joined(probabilities: Array, log_odds: Array) -> Array:
    """(n, old classes) and the new class's log-odds (n,) -> (n, old classes + 1)."""
    share = 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))[:, None]
    whole: Array = np.hstack([probabilities * (1 - share), share])
    return whole


def fit_class(
    statistics: OutOfDistribution,
    sample: KeptSample,
    embedding: Array,
    probabilities: Array,
    max_drop: float,
    groups: Array | None = None,
) -> NewClass:
    """Fit a new class to the embeddings (n, D) of its images.

    probabilities (n, old classes): what the file says of them now. max_drop: accuracy that the old
    classes may lose, in 0..1. groups (n,): numbers from 0; images of one group show one thing, and
    count as one. None: every image is on its own. There must be two groups.
    """
    images = unit_length(embedding)
    count = len(images)
    groups = np.arange(count) if groups is None else groups
    sizes = np.bincount(groups)
    whole = images.sum(0)
    of_groups = np.zeros((len(sizes), images.shape[1]))
    np.add.at(of_groups, groups, images)
    # (n, D): the mean without each image's group
    others = (whole - of_groups[groups]) / (count - sizes[groups])[:, None]
    discriminant = _Discriminant(statistics)
    apart = discriminant.scores(images, others)
    weights, bias = discriminant.line(whole / count)
    old = (sample.embedding @ weights.T + bias).min(1)
    scale, offset = _platt(old, apart, len(sample.probabilities[0]))

    # By how much each image is the new class's rather than an old one's
    margins = scale * old + offset - _log(sample.probabilities.max(1))
    own_margins = scale * apart + offset - _log(probabilities.max(1))
    stands = sample.right & (sample.probabilities.argmax(1) == sample.labels)
    judged = np.arange(len(stands)) < sample.exported
    at_stake = margins[stands & judged]
    before = int((sample.right & ~stands & judged).sum())  # lost to classes enrolled earlier
    allowed, settled = _allowed(sample, max_drop)
    left = max(0, allowed - before)
    lower = _worth_it(at_stake, sample.exported, own_margins, sample.probabilities.shape[1])
    if left < len(at_stake):
        lower = max(lower, float(np.sort(at_stake)[::-1][left]) + ON_LIMIT)

    offset -= lower
    lost = sample.right & (~stands | (margins > lower))
    drop_low, drop_high = _drop_bounds(int((lost & judged).sum()), sample)
    log_odds = scale * apart + offset
    recognised = own_margins > lower
    low, high = _recall_bounds(recognised, groups)
    return NewClass(
        weights=(scale * weights).astype(np.float32),
        bias=(scale * bias + offset).astype(np.float32),
        statistics=_with_mean(statistics, images, others),
        recognised=recognised,
        recall_low=low,
        recall_high=high,
        lost=lost,
        drop_low=drop_low,
        drop_high=drop_high,
        log_odds=log_odds,
        settled=settled,
    )


def _recall_bounds(recognised: Array, groups: Array) -> tuple[float, float]:
    """Two-sided 95 % interval of the share of images recognised, a group counting as one of them."""
    count = len(np.unique(groups))
    hits = float(recognised.mean()) * count
    level = (1 + LEVEL) / 2
    low = 1 - upper_bound(count - math.floor(hits + 1e-9), count, level)
    return low, upper_bound(math.ceil(hits - 1e-9), count, level)


def _with_mean(statistics: OutOfDistribution, images: Array, others: Array) -> OutOfDistribution:
    """The statistics with the new class's mean, and its spread: as wide as it takes for as many of
    its images (n, D) to be in-distribution as of the old ones. others (n, D): the mean without each.
    """
    alone = [
        float(replace(statistics, means=mean[None], spreads=None).score(image[None])[0])
        for image, mean in zip(images, others, strict=True)
    ]
    wide = float(np.quantile(alone, statistics.kept)) / statistics.threshold
    known = np.ones(len(statistics.means)) if statistics.spreads is None else statistics.spreads
    means = np.vstack([statistics.means.astype(np.float64), images.mean(0)])
    return replace(
        statistics,
        means=means.astype(np.float16),
        spreads=np.append(known, max(1.0, wide)).astype(np.float32),
    )


class _Discriminant:
    """Half the difference of an image's squared distances, to an old mean and to a new one, in the
    shared covariance: linear in the image."""

    def __init__(self, statistics: OutOfDistribution):
        self._statistics = statistics
        old = statistics.means.astype(np.float64)  # (C, D)
        self._axes = statistics.directions.astype(np.float64)
        self._old = self._through(old)
        self._old_square = (old * self._old).sum(1)

    def _through(self, values: Array) -> Array:
        """By the inverse covariance: (N, D) -> (N, D)."""
        scaled: Array = (
            values / self._statistics.rest
            - (values @ self._axes.T * self._statistics.weights) @ self._axes
        )
        return scaled

    def line(self, mean: Array) -> tuple[Array, Array]:
        """(weights (C, D), bias (C,)) for a new mean (D,)."""
        through = self._through(mean[None])[0]
        return through - self._old, (self._old_square - mean @ through) / 2

    def scores(self, images: Array, means: Array) -> Array:
        """(n,): of each image (n, D) for a new mean of its own (n, D), against the old class that is
        nearest."""
        through = self._through(means)
        new = (images * through).sum(1) - (means * through).sum(1) / 2
        scores: Array = new - (images @ self._old.T - self._old_square / 2).max(1)
        return scores


def _log(values: Array) -> Array:
    logs: Array = np.log(np.maximum(values, 1e-30))
    return logs


def _platt(old: Array, new: Array, classes: int) -> tuple[float, float]:
    """Scale and offset that make log-odds of scores, the new class as frequent as an old one.

    Weighted logistic regression on one number, with Platt's targets, which keep it finite where
    the scores do not overlap.
    """
    scores = np.concatenate([old, new])
    spread = float(scores.std()) or 1.0
    features = np.stack([scores / spread, np.ones(len(scores))], axis=1)
    targets = np.concatenate(
        [np.full(len(old), 1 / (len(old) + 2)), np.full(len(new), (len(new) + 1) / (len(new) + 2))]
    )
    weights = np.concatenate(
        [np.full(len(old), 1 / len(old)), np.full(len(new), 1 / len(new) / classes)]
    )

    found = np.array([1.0, -math.log(classes)])
    for _ in range(NEWTON_STEPS):
        shares = 1 / (1 + np.exp(-np.clip(features @ found, -500, 500)))
        slope = features.T @ (weights * (shares - targets))
        curve = (features * (weights * shares * (1 - shares))[:, None]).T @ features
        step = np.linalg.solve(curve + 1e-9 * np.eye(2), slope)
        found = found - step * min(1.0, 2 / max(1e-12, float(np.abs(step).max())))
    return max(float(found[0]), 1e-6) / spread, float(found[1])


def _worth_it(old: Array, images: int, new: Array, classes: int) -> float:
    """By how much to lower the offset, so that the class brings more right answers than it costs.

    0 where it does as it is; else by what is best. old: margins of the kept images that are answered
    correctly, of `images`; new: those of the new class, which counts as much as an average old one.
    """
    lowers = np.concatenate([[0.0], old[old > 0] + ON_LIMIT])
    gains = [(new > lower).mean() / classes - (old > lower).sum() / images for lower in lowers]
    return 0.0 if gains[0] > 0 else float(lowers[int(np.argmax(gains))])


def _allowed(sample: KeptSample, max_drop: float) -> tuple[int, bool]:
    """How many images of the sample may be lost, and whether that bounds the loss by `max_drop`.

    Where not even none would, as many as the limit's share.
    """
    lost = 0
    if _drop_bounds(0, sample)[1] > max_drop:
        return int(max_drop * sample.exported), False
    while lost < sample.exported and _drop_bounds(lost + 1, sample)[1] <= max_drop:
        lost += 1
    return lost, True


def _drop_bounds(lost: int, sample: KeptSample) -> tuple[float, float]:
    """Bounds of the share of images lost, each at 95 %, by the number of independent ones."""
    share = sample.independent / sample.exported
    count = sample.independent
    few, many = math.floor(lost * share), math.ceil(lost * share)
    most = math.floor(count)
    low = 1 - upper_bound(math.ceil(count) - few, math.ceil(count), LEVEL)
    return low, upper_bound(min(many, most), most, LEVEL)


def upper_bound(hits: int, count: int, level: float) -> float:
    """Exact one-sided upper bound of a share, `hits` of `count` seen (Clopper and Pearson 1934)."""
    if hits >= count:
        return 1.0
    picks = np.arange(hits + 1)
    ways = np.array(
        [
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            for k in range(hits + 1)
        ]
    )
    low, high = hits / count, 1.0
    for _ in range(60):
        share = (low + high) / 2
        logs = ways + picks * math.log(share) + (count - picks) * math.log1p(-share)
        if np.exp(logs).sum() > 1 - level:
            low = share
        else:
            high = share
    return high
