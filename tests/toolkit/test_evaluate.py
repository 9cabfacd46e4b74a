"""The numbers a user is told, against ones worked out elsewhere."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, log_loss, precision_score, recall_score

from ftkit.evaluate import ece, evaluate, fit_temperature, wilson
from ftkit_export.parity import softmax

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 500)
LOGITS = RNG.normal(size=(500, 3)) + 1.5 * np.eye(3)[LABELS]


def test_metrics_agree_with_scikit_learn() -> None:
    probabilities = softmax(LOGITS)
    found = evaluate(probabilities, LABELS, ("a", "b", "c"))
    guess = probabilities.argmax(1)
    assert found.accuracy == pytest.approx((guess == LABELS).mean())
    assert np.array_equal(found.confusion, confusion_matrix(LABELS, guess))
    assert found.recall == pytest.approx(tuple(recall_score(LABELS, guess, average=None)))
    assert found.precision == pytest.approx(tuple(precision_score(LABELS, guess, average=None)))
    assert found.nll == pytest.approx(log_loss(LABELS, probabilities))


def test_a_class_without_images_has_no_recall_rather_than_nan() -> None:
    found = evaluate(softmax(LOGITS), np.minimum(LABELS, 1), ("a", "b", "c"))
    assert found.recall[2] is None
    assert found.precision[2] == 0


def test_wilson_interval_of_textbook_cases() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_temperature_undoes_an_overconfident_scale() -> None:
    base = fit_temperature(LOGITS.astype(np.float32), LABELS)
    sharp = fit_temperature((LOGITS * 4).astype(np.float32), LABELS)
    assert sharp == pytest.approx(4 * base, rel=1e-3)
    assert ece(softmax(LOGITS * 4 / sharp), LABELS) < ece(softmax(LOGITS * 4), LABELS)


def test_a_perfect_and_a_coin_tossing_model_have_the_calibration_they_should() -> None:
    certain = np.eye(2)[np.array([0, 1] * 50)]
    assert ece(certain, np.array([0, 1] * 50)) == 0
    assert ece(certain, np.array([0, 0] * 50)) == pytest.approx(0.5)
