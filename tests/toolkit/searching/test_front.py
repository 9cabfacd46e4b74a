"""The front and the pick: what beats what, budgets, what is settled and what stays open."""

from dataclasses import replace

import numpy as np
import pytest

from ftkit.models.backbones import build
from ftkit.searching.candidates import Candidate, candidates, sizes_of
from ftkit.searching.front import Point, non_dominated, pick
from ftkit.searching.judge import judge_of
from ftkit.searching.score import worth_going_on
from ftkit.tasks.task import SINGLE_LABEL

IMAGES = 2000
ALONE = judge_of(SINGLE_LABEL, np.zeros(IMAGES, np.int64), [""] * IMAGES, outputs=2)


def _point(name: str, wrong: int, ms: float, first: int = 0, size_mb: float = 1.0) -> Point:
    """A network that errs on `wrong` images from place `first` on."""
    right = np.ones(IMAGES, bool)
    right[first : first + wrong] = False
    accuracy = float(right.mean())
    return Point(
        candidate=Candidate(
            backbone=name, size=96, cut="", pooling="mean", multiplications=int(ms * 1e6)
        ),
        precision="fp32",
        evidence=right,
        figure=accuracy,
        low=accuracy - 0.02,
        high=accuracy + 0.02,
        p50_ms=ms,
        p95_ms=ms * 1.1,
        size_bytes=int(size_mb * 1e6),
    )


def test_the_front_holds_what_nothing_else_beats() -> None:
    fast, slow, useless = _point("fast", 300, 1.0), _point("slow", 100, 4.0), _point("no", 310, 2.0)
    untimed = replace(_point("untimed", 0, 1.0), p50_ms=None)
    twin = _point("twin", 100, 4.5)
    assert non_dominated([slow, useless, untimed, fast, twin]) == [fast, slow]


def test_the_pick_is_the_fastest_that_surely_loses_little() -> None:
    best = _point("best", 100, 8.0)
    close = _point("close", 102, 4.0)  # two more images wrong, of 2,000
    open_ = _point("open", 118, 2.0)  # 0.9 points: neither surely more nor less than one
    worse = _point("worse", 300, 1.0)
    choice = pick([best, close, open_, worse], {}, 0.01, ALONE.compare)
    assert choice.point is close
    assert choice.best is best
    assert [point for point, _ in choice.open] == [open_]
    compared = choice.open[0][1]
    assert compared.drop == pytest.approx(0.009)
    assert pick([best, close, open_, worse], {}, compared.high, ALONE.compare).point is open_


def test_a_few_groups_settle_less_than_many_images() -> None:
    best, close = _point("best", 100, 8.0), _point("close", 104, 4.0)
    groups = [f"module{place // 400}" for place in range(IMAGES)]
    assert pick([best, close], {}, 0.01, ALONE.compare).point is close
    assert pick([best, close], {}, 0.01, replace(ALONE, groups=groups).compare).point is best


def test_budgets_are_kept_and_the_nearest_is_named_where_nothing_meets_them() -> None:
    best, middle, fast = _point("a", 100, 8.0), _point("b", 200, 4.0), _point("c", 300, 2.0)
    points = [best, middle, fast]
    assert pick(points, {"p50_ms": 5.0}, 0.01, ALONE.compare).point is middle
    # A drop that was asked for is a budget like the others
    choice = pick(points, {"p50_ms": 5.0, "max_drop": 0.01}, 0.01, ALONE.compare)
    assert (choice.point, choice.missed) == (middle, {"max_drop": pytest.approx(5.0)})
    assert not pick(points, {"p50_ms": 5.0, "max_drop": 0.1}, 0.1, ALONE.compare).missed
    choice = pick(points, {"p95_ms": 1.0}, 0.01, ALONE.compare)
    assert choice.point is fast
    assert choice.missed == {"p95_ms": pytest.approx(2.2)}
    choice = pick(points, {"size_mb": 0.5, "p50_ms": 9.0}, 0.01, ALONE.compare)
    assert choice.missed == {"size_mb": pytest.approx(2.0)}


def test_a_budget_of_size_is_met_by_what_is_not_on_the_front_of_time() -> None:
    fast = _point("fast", 200, 2.0, size_mb=5.0)
    small = _point("small", 200, 3.0, size_mb=1.0)
    assert pick([fast, small], {"size_mb": 2.0}, 0.01, ALONE.compare).point is small


def test_wrong_picks_are_as_rare_as_stated() -> None:
    """Sixty networks that truly lose a little more than the limit: the luckiest of them are compared, for
    which bounds of these few alone would not do."""
    rng = np.random.default_rng(0)
    images, searches, wrong, alone = 5000, 100, 0, 0
    judge = judge_of(SINGLE_LABEL, np.zeros(images, np.int64), [""] * images, outputs=2)
    for _ in range(searches):
        hard = rng.random(images) < 0.1
        points = []
        for number in range(61):
            right = ~hard ^ (rng.random(images) < 0.03)
            if number:
                right &= rng.random(images) >= 0.0105 / 0.876
            base = _point(f"{number}", 0, 100.0 - number)
            points.append(replace(base, evidence=right, figure=float(right.mean())))
        best = points[0]
        lucky = sorted(points[1:], key=lambda point: point.score)[-4:]
        for competed in (61, 1):
            choice = pick([best, *lucky], {}, 0.01, judge.compare, competed=competed)
            lost = choice.best is best and choice.point is not best
            wrong += lost and competed > 1
            alone += lost and competed == 1
    assert wrong <= 0.05 * searches + 3 * np.sqrt(searches * 0.05 * 0.95)
    assert alone > 2 * wrong + 5


def test_a_corner_is_left_only_when_a_cheaper_one_is_surely_better() -> None:
    cheap, dear = _point("cheap", 100, 1.0), _point("dear", 300, 4.0)
    dropped = worth_going_on({("cheap", 96): [cheap], ("dear", 96): [dear]}, ALONE)
    assert [each.backbone for each in dropped] == ["dear"]
    assert "0.850" in dropped[0].reason

    alike = _point("dear", 105, 4.0, first=300)
    assert not worth_going_on({("cheap", 96): [cheap], ("dear", 96): [alike]}, ALONE)
    shallow = _point("dear", 150, 0.5)  # its rival needs more than it
    corners = {("cheap", 96): [cheap], ("dear", 96): [dear, shallow]}
    assert not worth_going_on(corners, ALONE)
    better_but_dearer = {
        ("cheap", 96): [_point("cheap", 300, 1.0)],
        ("dear", 96): [_point("dear", 100, 4.0)],
    }
    assert not worth_going_on(better_but_dearer, ALONE)


def test_candidates_are_all_depths_with_what_they_cost() -> None:
    space = candidates(build("efficientnet_lite0", 2, "none"), 224)
    assert len({candidate.name for candidate in space}) == len(space)
    by_cut = {candidate.cut: candidate.multiplications for candidate in space}
    assert by_cut[""] == pytest.approx(385e6, rel=0.03)  # as published, without the classifier
    ordered = [by_cut[f"blocks.{number}"] for number in range(1, 7)]
    assert ordered == sorted(ordered)
    half = {
        candidate.cut: candidate
        for candidate in candidates(build("efficientnet_lite0", 2, "none"), 112)
    }
    assert half[""].multiplications == pytest.approx(by_cut[""] / 4, rel=0.15)
    assert sizes_of(224) == [96, 128, 160, 192, 224, 256]
