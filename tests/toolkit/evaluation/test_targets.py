"""Metrics of labels and of values: as scikit-learn has them, and honest on images not seen."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from ftkit.evaluation.multilabel import evaluate_labels, fit_labels
from ftkit.evaluation.regression import evaluate_values, fit_values
from ftkit.tasks.task import Regression
from ftkit_export.runtime.readout import sigmoid

NONE = [""] * 4000


def _labels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are twice too large, and labels (count, 2), of which a tenth is not known."""
    draw = np.random.default_rng(seed)
    true = draw.normal([0.0, -2.0], [2.0, 1.5], (count, 2))
    targets = (draw.random((count, 2)) < sigmoid(true)).astype(float)
    targets[draw.random((count, 2)) < 0.1] = np.nan
    return 2 * true, targets


def test_labels_are_judged_as_by_scikit_learn_on_what_is_known() -> None:
    logits, targets = _labels(400, 0)
    probabilities = sigmoid(logits)
    found = evaluate_labels(probabilities, targets, ("a", "b"), (0.5, 0.5), NONE[:400])
    for place, label in enumerate(found.labels):
        known = ~np.isnan(targets[:, place])
        own, said = targets[known, place], probabilities[known, place]
        assert label.ap == pytest.approx(average_precision_score(own, said))
        assert label.f1 == pytest.approx(f1_score(own, said >= 0.5))
        assert label.images == known.sum()
    assert found.macro_ap == pytest.approx(np.mean([label.ap for label in found.labels]))
    whole = ~np.isnan(targets).any(1)
    right = ((probabilities >= 0.5) == (targets == 1))[whole].all(1).mean()
    assert found.subset_accuracy == pytest.approx(right)


def test_temperatures_and_thresholds_are_fitted_label_by_label() -> None:
    logits, targets = _labels(4000, 1)
    readout = fit_labels(logits, targets, NONE)
    assert np.allclose(readout.temperatures, 2.0, rtol=0.15), "logits were twice too large"
    for place, threshold in enumerate(readout.thresholds):
        known = ~np.isnan(targets[:, place])
        own, said = targets[known, place], readout.answers(logits)[known, place]
        best = max(f1_score(own, said >= cut) for cut in np.linspace(0.05, 0.95, 37))
        assert f1_score(own, said >= threshold) >= best - 1e-9


def test_a_precision_that_is_promised_holds_on_other_images() -> None:
    kept = 0
    for seed in range(20):
        readout = fit_labels(*_labels(1000, seed), NONE[:1000], precision=0.8)
        logits, targets = _labels(4000, seed + 100)
        said = readout.answers(logits) >= readout.thresholds
        known = ~np.isnan(targets[:, 0])
        kept += (targets[known & said[:, 0], 0] == 1).mean() >= 0.8
    assert kept >= 17, "of 20; 19 are meant"


def test_intervals_hold_the_share_they_promise() -> None:
    task = Regression(means=(10.0,), spreads=(4.0,), units=("mm",))
    covered = []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        said = draw.normal(size=(300, 1))
        true = said + draw.standard_t(3, (300, 1)) / 2
        readout = fit_values(said[:100], true[:100], task, 0.9)
        metrics = evaluate_values(readout, said[100:], true[100:], ("width",), NONE[:200])
        covered.append(metrics.quantities[0].covered.value)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_values_are_judged_in_their_unit() -> None:
    draw = np.random.default_rng(0)
    task = Regression(means=(10.0, 0.0), spreads=(4.0, 0.5), units=("mm", ""))
    targets = draw.normal(size=(200, 2))
    targets[::5, 1] = np.nan
    logits = np.nan_to_num(targets) + draw.normal(scale=0.1, size=(200, 2))
    readout = fit_values(logits, targets, task, 0.9)
    found = evaluate_values(readout, logits, targets, ("width", "age"), NONE[:200])
    width, age = found.quantities
    assert width.mae.value == pytest.approx(4 * np.abs(logits - targets)[:, 0].mean())
    assert age.images == 160
    assert width.r2.value > 0.95
    assert width.rank.value > 0.95
    assert found.mae == pytest.approx(np.nanmean(np.abs(logits - targets)), rel=1e-6)
