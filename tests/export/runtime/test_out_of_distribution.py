"""Images unlike the training images are told by their embedding."""

import numpy as np
import pytest

from ftkit_export.runtime.out_of_distribution import OutOfDistribution, fit


def _clusters(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes around means of their own, in 40 dimensions of which three vary most."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(7).standard_normal((2, 40)) * 3
    labels = np.arange(count) % 2
    noise = rng.standard_normal((count, 40)) * np.r_[np.full(3, 1.5), np.full(37, 0.3)]
    return means[labels] + noise, labels


def test_as_many_as_asked_of_new_images_of_the_same_kind_are_kept_and_others_are_not() -> None:
    train, labels = _clusters(0, 600)
    val, _ = _clusters(1, 600)
    statistics = fit(train, labels, val, kept=0.95)
    again, _ = _clusters(2, 2000)
    assert np.mean(statistics.score(again) <= statistics.threshold) == pytest.approx(0.95, abs=0.03)
    others = np.random.default_rng(3).standard_normal((200, 40)) * 3
    assert np.mean(statistics.score(others) > statistics.threshold) > 0.99


def test_the_scale_of_an_embedding_does_not_count() -> None:
    train, labels = _clusters(0, 200)
    statistics = fit(train, labels, train)
    assert statistics.score(train[:9] * 17) == pytest.approx(statistics.score(train[:9]), rel=1e-5)


def test_statistics_survive_the_metadata_bit_for_bit() -> None:
    train, labels = _clusters(0, 100)
    statistics = fit(train, labels, train)
    again = OutOfDistribution.from_text(statistics.to_text())
    assert np.array_equal(again.score(train), statistics.score(train))
    with pytest.raises((ValueError, KeyError)):
        OutOfDistribution.from_text(
            statistics.to_text().replace('"shape": [2, 40]', '"shape": [80]')
        )
