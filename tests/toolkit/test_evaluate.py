"""The numbers a user is told, against ones worked out elsewhere."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss, precision_score, recall_score

from ftkit.evaluate import (
    abstain_threshold,
    abstention,
    cka,
    ece,
    evaluate,
    fit_temperature,
    wilson,
    worst_mistakes,
)  # fmt: skip
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
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(LABELS, guess))
    assert found.macro_f1 == pytest.approx(f1_score(LABELS, guess, average="macro"))
    assert found.top5 is None


def test_top5_counts_the_five_best_of_many_classes() -> None:
    probabilities = softmax(RNG.normal(size=(200, 9)))
    labels = RNG.integers(0, 9, 200)
    expected = np.mean([label in np.argsort(row)[-5:] for label, row in zip(labels, probabilities, strict=True)])
    assert evaluate(probabilities, labels, tuple("abcdefghi")).top5 == pytest.approx(expected)


def test_the_abstain_threshold_is_the_lowest_that_reaches_the_precision() -> None:
    probabilities = softmax(LOGITS)
    threshold = abstain_threshold(probabilities, LABELS, 0.9)
    assert threshold is not None
    found = abstention(probabilities, LABELS, 0.9, threshold)
    assert found.precision >= 0.9
    assert 0.05 < found.coverage < 0.95
    top, right = probabilities.max(1), probabilities.argmax(1) == LABELS
    lower = [value for value in top if value < threshold]
    assert all(right[top >= value].mean() < 0.9 for value in lower)
    assert abstain_threshold(probabilities, (probabilities.argmax(1) + 1) % 3, 0.9) is None
    assert abstention(probabilities, LABELS, 1.0, None).coverage == 0


def test_cka_knows_rotations_from_changes() -> None:
    features = RNG.normal(size=(60, 20))
    rotation, _ = np.linalg.qr(RNG.normal(size=(20, 20)))
    assert cka(features, 3 * features @ rotation + 5) == pytest.approx(1.0)
    assert cka(features, RNG.normal(size=(60, 20))) < 0.5
    wide = RNG.normal(size=(20, 90))  # more features than images: the other formula
    assert cka(wide, wide @ np.linalg.qr(RNG.normal(size=(90, 90)))[0]) == pytest.approx(1.0)
    assert cka(wide[:, :30], wide) == pytest.approx(cka(wide, wide[:, :30]))


def test_worst_mistakes_come_first_and_are_mistakes() -> None:
    probabilities = softmax(LOGITS)
    worst = worst_mistakes(probabilities, LABELS, np.arange(1000, 1500), count=5)
    assert [item.probability for item in worst] == sorted((item.probability for item in worst), reverse=True)
    wrong = probabilities.argmax(1) != LABELS
    assert worst[0].probability == pytest.approx(probabilities.max(1)[wrong].max())
    assert all(item.label == LABELS[item.row - 1000] != item.said for item in worst)


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
