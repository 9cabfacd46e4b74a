"""What the labels of frames on which two bundles differ say of them, however often it is asked."""

import numpy as np
import pytest

from ftkit.field.shadow import share_bounds


def test_of_two_equal_bundles_none_is_called_better_at_any_look() -> None:
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        second_right = random.random(300) < 0.5
        looks = [share_bounds(second_right[:count].sum(), count) for count in range(10, 301, 10)]
        wrong += any(low > 0.5 or high < 0.5 for low, high in looks)
    assert wrong <= 0.05 * 300


def test_a_better_bundle_is_found_with_its_share() -> None:
    low, high = share_bounds(80, 100)
    assert 0.5 < low < 0.8 < high < 0.95
    assert share_bounds(0, 0) == pytest.approx((0, 1), abs=1e-3)
    found = [share_bounds(0.75 * count, count)[0] > 0.5 for count in (20, 40, 80, 160)]
    assert found == sorted(found)
    assert found[-1]
