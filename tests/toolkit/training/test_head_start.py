"""The head begins where one solve leads, and what it is worth is said before any epoch."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, ftkit, settings
from sklearn.linear_model import Ridge

from ftkit.training.closed_form import Head, _Ridge, default_folds, fit_head
from ftkit.training.run import open_run


@pytest.mark.parametrize("images", [30, 300], ids=["fewer images than features", "more"])
def test_a_solve_is_ridge_regression_in_either_form(images: int) -> None:
    rng = np.random.default_rng(0)
    features, targets = rng.standard_normal((images, 60)) + 2, rng.standard_normal((images, 3))
    counts = rng.uniform(0.5, 2, images)
    solver = _Ridge(features, targets, counts)
    weight, bias = solver.solve(0.1)
    centred = features - counts @ features / counts.sum()
    unit = (counts[:, None] * centred**2).sum() / 60
    expected = Ridge(alpha=0.1 * unit).fit(features, targets, sample_weight=counts)
    assert weight == pytest.approx(expected.coef_.T, abs=1e-8)
    assert bias == pytest.approx(expected.intercept_, abs=1e-8)


def _images(seed: int, groups: int, apart: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Groups of 20 images of one class, each with a mean of its own beside its class's."""
    rng = np.random.default_rng(seed)
    classes = rng.standard_normal((3, 50)) * apart
    own = rng.standard_normal((groups, 50))
    labels = np.arange(groups) % 3
    features = np.repeat(classes[labels] + own, 20, 0) + 0.1 * rng.standard_normal(
        (groups * 20, 50)
    )
    return features, np.repeat(labels, 20), [f"g{i}" for i in np.repeat(np.arange(groups), 20)]


def _fit(features: np.ndarray, labels: np.ndarray, groups: list[str], **more: np.ndarray) -> Head:
    return fit_head(features, labels, default_folds(labels, groups), int(labels.max()) + 1, **more)


def _right(head: Head, labels: np.ndarray) -> np.ndarray:
    return head.logits.argmax(1) == labels


def test_a_group_is_judged_by_a_head_that_never_saw_it() -> None:
    """Each group is far from the others and alone: whoever saw it knows it, whoever did not guesses."""
    features, labels, groups = _images(0, 30, apart=0.0)
    apart = _fit(features, labels, groups)
    mixed = _fit(features, labels, [""] * len(labels))
    assert _right(mixed, labels).mean() > 0.95
    assert _right(apart, labels).mean() < 0.6


def test_what_is_said_out_of_fold_holds_for_new_images() -> None:
    said, found = [], []
    for seed in range(20):
        features, labels, groups = _images(seed, 60, apart=0.35)
        half = len(labels) // 2
        head = _fit(features[:half], labels[:half], groups[:half])
        said.append(_right(head, labels[:half]).mean())
        logits = features[half:] @ head.weight.T + head.bias
        found.append((logits.argmax(1) == labels[half:]).mean())
    assert np.mean(said) == pytest.approx(np.mean(found), abs=0.04)


def test_scores_become_logits_and_rare_classes_count_where_they_should() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(600) < 0.05).astype(int)
    features = labels[:, None] * 0.8 + rng.standard_normal((600, 10))
    plain = _fit(features, labels, [""] * 600)
    balanced = _fit(features, labels, [""] * 600, weights=np.array([1 / 0.95, 1 / 0.05]))
    entropy = -np.mean(np.where(labels, np.log(0.05), np.log(0.95)))
    assert plain.nll < entropy, "better than the class frequencies alone"
    rare = labels == 1
    assert _right(balanced, labels)[rare].mean() > _right(plain, labels)[rare].mean() + 0.3


def test_too_few_images_or_groups_make_no_folds() -> None:
    assert default_folds(np.array([0, 0, 0, 1]), [""] * 4) == []
    assert default_folds(np.array([0, 0, 1, 1]), ["one"] * 4) == []


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_run_says_what_the_features_are_worth_before_it_trains(
    photos: Path, tmp_path: Path, cache: str
) -> None:
    one_epoch = settings(*TINY, "stages.0.epochs=1", f"stages.0.cache={cache}")
    result = ftkit("train", photos, "--out", tmp_path / "run", *one_epoch)
    assert result.exit_code == 0, result.output
    said = re.search(r"head: out-of-fold accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]", result.stdout)
    assert said
    start = open_run(tmp_path / "run").data["head_start"]
    assert [f"{start[key]:.3f}" for key in ("accuracy", "low", "high")] == list(said.groups())
    assert start["accuracy"] > 0.4, "four classes"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    again = ftkit(
        "train", photos, "--out", tmp_path / "random", *one_epoch, *settings("stages.0.init=random")
    )
    assert "out-of-fold" not in again.stdout
    drawn = [
        json.loads(line) for line in (tmp_path / "random/metrics.jsonl").read_text().splitlines()
    ]
    assert lines[0]["loss"] < drawn[0]["loss"]


def test_a_first_stage_that_spoils_the_head_is_left_out(photos: Path, tmp_path: Path) -> None:
    small = ("preprocess.size=96", "preprocess.resize=96")
    spoiled = settings(*small, "stages.0.lr=30", "stages.0.epochs=1", "stages.0.optimizer=sgd")
    result = ftkit("train", photos, "--out", tmp_path / "run", "--recipe", "gentle", *spoiled)
    assert result.exit_code == 0, result.output
    run = open_run(tmp_path / "run").data
    assert [stage["kept"] for stage in run["stages"]] == [False]
    assert run["metrics"]["val"]["accuracy"] > run["stages"][0]["val_accuracy"]
