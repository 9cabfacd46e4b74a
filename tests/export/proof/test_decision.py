"""The int8 decision: error rate of the bounds, and choice of the fastest variant within budgets."""

import math

import numpy as np
import pytest

from ftkit_export.proof.decision import Paired, judge_variant, paired
from ftkit_export.proof.intervals import Design, difference_bounds


def bounds(worse: int, better: int, images: int, looks: int = 1) -> tuple[float, float]:
    """Bounds for independent images, from counts."""
    return difference_bounds(
        worse / max(1, images), better / max(1, images), Design(images=images), 1 - 0.05 / looks
    )


@pytest.mark.parametrize(("images", "better"), [(300, 0.0), (300, 0.02), (667, 0.003), (667, 0.03)])
def test_a_drop_at_the_limit_is_accepted_at_most_once_in_twenty(images: int, better: float) -> None:
    """Exact, over all outcomes of the multinomial distribution with a true drop of 1 point."""

    def pmf(k: int, n: int, p: float) -> float:
        if p == 0:
            return float(k == 0)
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))

    worse, accepted = 0.01 + better, 0.0
    for c in range(60):
        if (chance := pmf(c, images, better)) > 1e-8:
            accepted += chance * sum(
                pmf(b, images - c, worse / (1 - better))
                for b in range(80)
                if bounds(b, c, images)[1] <= 0.01
            )
    assert accepted < 0.0505


def test_four_looks_are_four_times_as_strict() -> None:
    """Images needed when no answer changes.

    With one look 299 (0.99^299 < 5 %), with four 437 (0.99^437 < 1.25 %).
    """
    looks = {
        n: [bounds(0, 0, images, n)[1] <= 0.01 for images in (298, 299, 436, 437)] for n in (1, 4)
    }
    assert looks == {1: [False, True, True, True], 4: [False, False, False, True]}
    assert paired(np.ones(100, bool), np.ones(100, bool), looks=4).settled_by(0.01) == (437, None)


def test_bounds_turn_around_with_the_roles_and_close_in_with_images() -> None:
    assert bounds(7, 3, 400) == pytest.approx(tuple(-x for x in bounds(3, 7, 400)[::-1]), abs=1e-9)
    assert bounds(70, 30, 4000)[1] < bounds(7, 3, 400)[1]
    assert bounds(0, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("worse", "better", "images", "verdict"),
    [
        (0, 0, 300, "accepted"),
        (0, 0, 200, "inconclusive"),
        (5, 5, 5000, "accepted"),
        (40, 5, 800, "refused"),
    ],
)
def test_the_verdict_follows_the_bounds(worse: int, better: int, images: int, verdict: str) -> None:
    reference = np.arange(images) < images - better
    candidate = np.arange(images) >= worse
    found = paired(reference, candidate)
    assert (found.worse, found.better) == (worse, better)
    assert found.verdict(0.01) == verdict


def test_the_images_that_would_settle_it_do() -> None:
    found = paired(np.arange(200) > 1, np.arange(200) < 198)
    more, clusters = found.settled_by(0.01) or (0, 0)
    assert clusters is None
    assert bounds(round(0.01 * more), round(0.01 * more), more)[1] <= 0.01
    groups = [str(number // 20) for number in range(200)]
    grouped = paired(np.arange(200) > 1, np.arange(200) < 198, groups)
    many, clusters = grouped.settled_by(0.01) or (0, 0)
    assert (clusters or 0) > 10, "of the ten groups there are, more are wanted"
    assert many > more
    assert paired(np.arange(200) > -1, np.arange(200) > 1).settled_by(0.01) is None, (
        "exactly at the limit"
    )


def test_speed_must_be_proven_and_real() -> None:
    found = paired(np.ones(500, bool), np.ones(500, bool))
    assert judge_variant(found, 0.01, 0.7)[0] == "accepted"
    assert judge_variant(found, 0.01, None)[0] == "unproven on target"
    assert judge_variant(found, 0.01, 1.02)[0] == "refused"


@pytest.mark.parametrize(
    ("worse", "better", "size"),
    [(0.0, 0.0, 0), (0.01, 0.01, 0), (0.03, 0.005, 0), (0.01, 0.01, 20)],
)
def test_as_many_images_as_are_said_to_settle_it_do(worse: float, better: float, size: int) -> None:
    """The stated number of images settles the question in about four of five cases.

    Checked by resampling at the observed shares. size: images per group, 0 for no groups.
    """
    rng = np.random.default_rng(0)

    def drawn(images: int, exact: bool) -> Paired:
        change = rng.random(images)
        if exact:
            change = np.linspace(0, 1, images, endpoint=False)[rng.permutation(images)]
        reference = ~((change >= worse) & (change < worse + better))
        candidate = change >= worse
        groups = [f"g{number // size}" for number in range(images)] if size else None
        return paired(reference, candidate & reference | (candidate & ~reference), groups)

    few = drawn(200, exact=True)
    assert few.verdict(0.01) == "inconclusive"
    settles = few.settled_by(0.01)
    assert settles
    enough = settles[0]
    rate = np.mean([drawn(enough, exact=False).verdict(0.01) != "inconclusive" for _ in range(200)])
    assert rate >= 0.68
    quarter = np.mean(
        [drawn(enough // 4, exact=False).verdict(0.01) != "inconclusive" for _ in range(200)]
    )
    assert quarter <= 0.68
