"""Coverage of intervals: independent images, images in groups, and edge cases."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from ftkit_export.proof import intervals
from ftkit_export.proof.decision import paired
from ftkit_export.proof.intervals import (
    Design,
    Prior,
    clopper_pearson,
    design,
    difference_bounds,
    difference_design,
    share_interval,
    wilson,
)

RNG = np.random.default_rng(20)


def test_intervals_of_textbook_cases() -> None:
    # Newcombe 1998, table I
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20, 1.959964) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert clopper_pearson(0.1, 50, 0.975) == pytest.approx((0.0333, 0.2181), abs=1e-4)
    assert clopper_pearson(0.0, 100, 0.95) == pytest.approx((0.0, 1 - 0.05**0.01), abs=1e-9)


def test_images_on_their_own_and_images_without_groups_are_the_same() -> None:
    right = RNG.random(400) < 0.8
    assert share_interval(right, [""] * 400) == share_interval(right) == share_interval(right, None)
    alone = share_interval(right, [str(number) for number in range(400)])
    assert alone[:2] == pytest.approx(share_interval(right)[:2], abs=2e-3)
    assert alone[2] == 400


def test_copies_of_one_image_tell_no_more_than_the_image() -> None:
    """Twenty groups of twenty identical images carry the information of twenty images."""
    each = np.arange(20) < 15
    low, high, clusters = share_interval(
        np.repeat(each, 20), [str(number) for number in range(20) for _ in range(20)]
    )
    assert clusters == 20
    few_low, few_high, _ = share_interval(each)
    assert low < few_low + 0.02
    assert high > few_high - 0.02


def test_one_group_tells_nothing() -> None:
    right = RNG.random(50) < 0.8
    assert share_interval(right, ["a"] * 50) == (0.0, 1.0, 1)
    found = paired(right, ~right, ["a"] * 50)
    assert (found.low, found.high, found.verdict(0.01)) == (-1.0, 1.0, "inconclusive")


def test_the_demos_accuracy_by_module_is_known_much_less_well_than_by_cell() -> None:
    """Seven modules with accuracies of 0.60 to 0.98, 375 cells.

    The interval is [0.73, 0.98] by t on the modules, [0.81, 0.89] for independent images.
    """
    shares, size = (0.60, 0.80, 0.85, 0.88, 0.92, 0.95, 0.98), 54
    right = np.concatenate([np.arange(size) < round(share * size) for share in shares])
    groups = [str(number) for number in range(7) for _ in range(size)]
    low, high, _ = share_interval(right, groups)
    assert low < 0.74
    assert high > 0.92
    narrow = share_interval(right)
    assert high - low > 2.5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(("clusters", "size"), [(10, 5), (20, 10), (50, 40)])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_95_percent_intervals_cover_95_percent(
    clusters: int, size: int, correlation: float
) -> None:
    covered, trials, share = 0, 600, 0.85
    groups = [str(number) for number in range(clusters) for _ in range(size)]
    for _ in range(trials):
        chances = np.full(clusters, share)
        if correlation:
            spread = 1 / correlation - 1
            chances = RNG.beta(share * spread, (1 - share) * spread, clusters)
        low, high, _ = share_interval(
            RNG.random(clusters * size) < np.repeat(chances, size), groups
        )
        covered += low <= share <= high
    assert covered / trials > 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize(("clusters", "size"), [(30, 20), (15, 40)])
def test_a_drop_at_the_limit_is_accepted_at_its_level_when_it_comes_in_groups(
    clusters: int, size: int
) -> None:
    """Treated as independent images, such a drop is accepted in 5 to 11 % instead of 1.25 %."""
    groups, trials, level = (
        [str(number) for number in range(clusters) for _ in range(size)],
        1500,
        0.0125,
    )
    accepted, naive = 0, 0
    for _ in range(trials):
        rates = (
            np.minimum(0.9, 0.04 * RNG.gamma(0.5, 2.0, clusters)),
            0.02 * RNG.gamma(0.5, 2.0, clusters),
        )
        draw = RNG.random(clusters * size)
        worse = draw < np.repeat(rates[0], size)
        better = draw > 1 - np.repeat(np.minimum(rates[1], 0.9 - rates[0] / 2), size)
        better &= ~worse
        shares = worse.mean(), better.mean()
        found = difference_design(worse, better, groups)
        accepted += difference_bounds(*shares, found, 1 - level)[1] <= 0.02
        naive += difference_bounds(*shares, Design(images=len(draw)), 1 - level)[1] <= 0.02
    assert accepted / trials < level + 3 * math.sqrt(level / trials)
    assert naive / trials > 2 * level


def test_the_variance_and_its_degrees_of_freedom_are_those_of_a_linear_model_with_the_cr2_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed from the definition with full matrices.

    Adjusted residuals (I - H)^-1/2 e, summed within groups.
    """
    monkeypatch.setattr(intervals, "PRIOR_EVENTS", 0.0)
    sizes = (3, 8, 5, 12)
    total, bounds = sum(sizes), np.cumsum((0, *sizes))
    values = RNG.random(total)
    groups = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    variance, rows = 0.0, []
    for start, end in itertools.pairwise(bounds):
        inner = np.eye(end - start) - np.ones((end - start, end - start)) / total
        eigen, vectors = np.linalg.eigh(inner)
        adjusted = vectors @ np.diag(eigen**-0.5) @ vectors.T
        variance += ((adjusted @ (values - values.mean())[start:end]).sum() / total) ** 2
        residual_maker = np.eye(total)[start:end] - 1 / total
        rows.append((adjusted @ residual_maker).sum(0))
    found = design(values, groups, Prior(correlation=0.0, least_effect=0.0))
    assert found.effect == pytest.approx(variance / (values.var() / total))

    correlation = 0.3
    same = np.equal.outer(groups, groups)
    covariance = np.where(same, correlation, 0.0) + (1 - correlation) * np.eye(total)
    matrix = np.array(rows) @ covariance @ np.array(rows).T
    shares = np.array(sizes) / total
    df = intervals._degrees_of_freedom(
        shares, np.array(sizes) * (1 + (np.array(sizes) - 1) * correlation)
    )
    assert df == pytest.approx(np.trace(matrix) ** 2 / (matrix**2).sum())


def test_equal_groups_have_the_degrees_of_freedom_of_a_t_test() -> None:
    sizes = np.full(20, 0.05)
    assert intervals._degrees_of_freedom(sizes, np.ones(20)) == pytest.approx(19)


def test_bounds_move_little_with_one_image_more_or_less() -> None:
    """Without a prior, zero changes would be treated as independent, one change as one group's."""
    groups = [str(number // 100) for number in range(2000)]
    right = np.ones(2000, bool)
    highs = [paired(right, np.arange(2000) >= lost, groups, looks=4).high for lost in range(6)]
    assert all(0.7 < after / before < 1.4 for before, after in itertools.pairwise(highs)), highs
    assert highs[0] > paired(right, right, looks=4).high
    modules = [str(number // 54) for number in range(375)]
    lows = [share_interval(np.arange(375) >= wrong, modules)[0] for wrong in range(4)]
    assert 0.8 < lows[0] < 0.97
    assert all(abs(after - before) < 0.03 for before, after in itertools.pairwise(lows)), lows


def test_many_groups_need_no_matrix_of_groups_by_groups() -> None:
    """20,000 groups, for which such a matrix would take 3 GB."""
    tracemalloc.start()
    right = np.random.default_rng(0).random(40_000) < 0.9
    low, high, clusters = share_interval(right, [str(number // 2) for number in range(40_000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clusters == 20_000
    assert right.mean() - 0.01 < low < right.mean() < high < right.mean() + 0.01
    assert peak < 100e6
