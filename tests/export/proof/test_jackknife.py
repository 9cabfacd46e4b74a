"""The jackknife: errors of means as formulas give them, of areas as repetition shows them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ftkit_export.proof.decision import difference
from ftkit_export.proof.jackknife import jackknife


def test_the_error_of_a_mean_is_the_classical_one() -> None:
    values = np.random.default_rng(0).normal(size=90)
    found = jackknife(lambda rows: float(values[rows].mean()), len(values))
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    assert found.clusters is None


def test_groups_that_agree_widen_the_interval() -> None:
    draw = np.random.default_rng(0)
    groups = [str(n // 20) for n in range(400)]
    values = np.repeat(draw.normal(size=20), 20) + draw.normal(scale=0.1, size=400)
    alone, grouped = (
        jackknife(lambda rows: float(values[rows].mean()), 400, each) for each in (None, groups)
    )
    assert grouped.error > 3 * alone.error
    assert grouped.clusters == 20
    assert jackknife(lambda rows: float(values[rows].mean()), 400, ["a"] * 400).df == 0


def test_the_interval_of_average_precision_holds_the_truth() -> None:
    draw = np.random.default_rng(0)

    def world(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = draw.random(count) < 0.3
        return labels, draw.normal(size=count) + 1.2 * labels

    truth = average_precision_score(*world(200_000))
    held = 0
    for _ in range(120):
        labels, scores = world(300)
        found = jackknife(
            lambda rows, a=labels, b=scores: float(average_precision_score(a[rows], b[rows])), 300
        )
        low, high = found.interval()
        held += low <= truth <= high
    assert held >= 107, "of 120; 114 are meant, and 107 is what chance allows in 1 of 100"


def test_a_statistic_that_one_group_alone_defines_has_no_interval() -> None:
    values = np.arange(30.0)
    found = jackknife(lambda rows: float(values[rows][7]) if 7 in rows else np.nan, 30)
    assert found.df == 0
    assert found.interval() == (-np.inf, np.inf)


def test_many_groups_are_left_out_in_blocks() -> None:
    calls = []
    groups = [str(n // 2) for n in range(2000)]
    found = jackknife(lambda rows: calls.append(len(rows)) or float(rows.mean()), 2000, groups)
    assert len(calls) <= 101
    assert found.clusters == 1000


def test_no_change_at_all_is_no_proof() -> None:
    same = difference(lambda rows: 0.0, 50, name="drop")
    assert same.verdict(0.01) == "inconclusive"
    assert difference(lambda rows: 0.0, 5000, name="drop").verdict(0.01) == "accepted"


def test_what_would_settle_a_difference_settles_it() -> None:
    draw = np.random.default_rng(0)
    losses = draw.normal(0.0, 0.5, 400)
    open_ = difference(lambda rows: float(losses[rows].mean()), 400, name="drop")
    assert open_.verdict(0.02) == "inconclusive"
    enough = open_.settled_by(0.02)
    assert enough is not None
    settled = 0
    for _ in range(40):
        more = draw.normal(float(losses.mean()), 0.5, enough[0])
        found = difference(lambda rows, m=more: float(m[rows].mean()), enough[0], name="drop")
        settled += found.verdict(0.02) != "inconclusive"
    assert settled >= 24, "of 40; 32 are meant"
