"""Metrics compared with independently computed values."""

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
)

from ftkit.evaluation.metrics import (
    abstain_threshold,
    abstention,
    cka,
    ece,
    evaluate,
    fit_temperature,
    worst_mistakes,
)
from ftkit_export.runtime.readout import softmax

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
    expected = np.mean(
        [label in np.argsort(row)[-5:] for label, row in zip(labels, probabilities, strict=True)]
    )
    assert evaluate(probabilities, labels, tuple("abcdefghi")).top5 == pytest.approx(expected)


def test_the_abstain_threshold_is_the_lowest_that_reaches_the_precision() -> None:
    probabilities = softmax(LOGITS)
    threshold, proven = abstain_threshold(probabilities, LABELS, 0.9)
    assert proven
    found = abstention(probabilities, LABELS, 0.9, threshold, proven)
    assert found.precision >= 0.9
    assert 0.05 < found.coverage < 0.95
    assert abstention(probabilities, LABELS, 1.0, None).coverage == 0


def test_too_few_images_leave_the_threshold_as_observed_and_unproven() -> None:
    probabilities, labels = softmax(LOGITS)[:40], LABELS[:40]
    threshold, proven = abstain_threshold(probabilities, labels, 0.9)
    assert threshold is not None
    assert not proven
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    assert right[top >= threshold].mean() >= 0.9
    assert all(right[top >= value].mean() < 0.9 for value in top if value < threshold)
    assert abstain_threshold(probabilities, (probabilities.argmax(1) + 1) % 3, 0.9) == (None, False)


def test_cka_knows_rotations_from_changes() -> None:
    features = RNG.normal(size=(60, 20))
    rotation, _ = np.linalg.qr(RNG.normal(size=(20, 20)))
    assert cka(features, 3 * features @ rotation + 5) == pytest.approx(1.0)
    assert cka(features, RNG.normal(size=(60, 20))) < 0.5
    wide = RNG.normal(size=(20, 90))  # more features than images, which uses the other formula
    assert cka(wide, wide @ np.linalg.qr(RNG.normal(size=(90, 90)))[0]) == pytest.approx(1.0)
    assert cka(wide[:, :30], wide) == pytest.approx(cka(wide, wide[:, :30]))


def test_worst_mistakes_come_first_and_are_mistakes() -> None:
    probabilities = softmax(LOGITS)
    worst = worst_mistakes(probabilities, LABELS, np.arange(1000, 1500), count=5)
    assert [item.probability for item in worst] == sorted(
        (item.probability for item in worst), reverse=True
    )
    wrong = probabilities.argmax(1) != LABELS
    assert worst[0].probability == pytest.approx(probabilities.max(1)[wrong].max())
    assert all(item.label == LABELS[item.row - 1000] != item.said for item in worst)


def test_a_class_without_images_has_no_recall_rather_than_nan() -> None:
    found = evaluate(softmax(LOGITS), np.minimum(LABELS, 1), ("a", "b", "c"))
    assert found.recall[2] is None
    assert found.precision[2] == 0


def test_temperature_undoes_an_overconfident_scale() -> None:
    base = fit_temperature(LOGITS.astype(np.float32), LABELS)
    sharp = fit_temperature((LOGITS * 4).astype(np.float32), LABELS)
    assert sharp == pytest.approx(4 * base, rel=0.1)
    assert ece(softmax(LOGITS * 4 / sharp), LABELS) < ece(softmax(LOGITS * 4), LABELS)


def test_a_perfect_and_a_coin_tossing_model_have_the_calibration_they_should() -> None:
    certain = np.eye(2)[np.array([0, 1] * 50)]
    assert ece(certain, np.array([0, 1] * 50)) == 0
    assert ece(certain, np.array([0, 0] * 50)) == pytest.approx(0.5)


def test_a_proven_threshold_keeps_its_word_in_19_of_20_draws() -> None:
    """The threshold of the empirical share does so in only about every second draw."""
    rng, broken, observed, proofs = np.random.default_rng(3), 0, 0, 0
    many = 3 * rng.normal(size=(50_000, 3))
    truth = np.array([rng.choice(3, p=row) for row in softmax(many)])
    top, right = softmax(many).max(1), softmax(many).argmax(1) == truth
    for _ in range(150):
        rows = rng.integers(0, len(many), 300)
        threshold, proven = abstain_threshold(softmax(many[rows]), truth[rows], 0.9)
        if threshold is None:
            continue
        wrong = right[top >= threshold].mean() < 0.9
        proofs += proven
        broken += proven and wrong
        found = [value for value in top[rows] if right[rows][top[rows] >= value].mean() >= 0.9]
        observed += right[top >= min(found)].mean() < 0.9
    assert proofs > 100
    assert broken <= 0.05 * proofs + 5
    assert observed > 45


def test_groups_weaken_what_is_proven() -> None:
    probabilities, labels = np.tile([0.99, 0.01], (300, 1)), np.zeros(300, int)
    labels[::60] = 1
    assert abstain_threshold(probabilities, labels, 0.95)[1]
    assert not abstain_threshold(
        probabilities, labels, 0.95, [str(number // 60) for number in range(300)]
    )[1]


def test_a_small_val_split_without_an_error_is_no_proof_of_certainty() -> None:
    """Regression: with 20 correct images the temperature went to its bound.

    Half of the later errors then had p > 0.99.
    """
    rng = np.random.default_rng(1)
    logits = 2.5 * rng.normal(size=(4000, 4)) + 6 * np.eye(4)[rng.integers(0, 4, 4000)]
    labels = np.array([rng.choice(4, p=row) for row in softmax(logits)])
    few = np.flatnonzero(logits.argmax(1) == labels)[:20]
    temperature = fit_temperature(logits[few], labels[few])

    def nll(scale: float) -> float:
        return float(log_loss(labels, softmax(logits / scale), labels=range(4)))

    assert temperature > 0.7
    assert nll(temperature) < nll(1.0) + 0.02


@pytest.mark.parametrize("images", [20, 60, 200])
def test_a_calibrated_model_is_left_alone_but_for_noise(images: int) -> None:
    rng = np.random.default_rng(images)
    many = 3 * rng.normal(size=(20_000, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(many)])
    worse = []
    for _ in range(25):
        rows = rng.integers(0, len(many), images)
        temperature = fit_temperature(many[rows], labels[rows])
        worse.append(
            log_loss(labels, softmax(many / temperature)) - log_loss(labels, softmax(many))
        )
    assert np.mean(worse) < 0.005
    assert max(worse) < 0.05


def test_accuracy_says_how_many_groups_it_rests_on() -> None:
    probabilities, groups = softmax(LOGITS), [str(number // 50) for number in range(500)]
    alone, grouped = (
        evaluate(probabilities, LABELS, ("a", "b", "c"), each) for each in (None, groups)
    )
    assert (alone.clusters, grouped.clusters) == (None, 10)
    assert alone.accuracy == grouped.accuracy
    assert (alone.accuracy_low, alone.accuracy_high) != (
        grouped.accuracy_low,
        grouped.accuracy_high,
    )
