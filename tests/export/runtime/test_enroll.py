"""What a new class costs the old ones is bounded as promised, whatever the images are like."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from ftkit_export.proof.intervals import clopper_pearson
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.enroll import FILE, KeptSample, NewClass, fit_class, upper_bound
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.out_of_distribution import fit, unit_length

WIDTH = 24
LIMIT = 0.03


def _drawn(draw: np.random.Generator, centres: Array, labels: Array) -> Array:
    """Embeddings around their class's centre, with tails heavier than a normal's."""
    return centres[labels] + draw.standard_t(4, (len(labels), centres.shape[1]))


class _World:
    """Three old classes and the centre of a new one; what a bundle of the old ones keeps."""

    def __init__(self, draw: np.random.Generator, apart: float):
        self.centres = 5 + apart * draw.standard_normal((4, WIDTH))
        train = draw.integers(3, size=600)
        kept = draw.integers(3, size=400)
        held = _drawn(draw, self.centres, kept)
        self.statistics = fit(_drawn(draw, self.centres, train), train, held)
        self.sample = KeptSample(
            embedding=unit_length(held),
            labels=kept,
            probabilities=self.answers(held),
            right=self.answers(held).argmax(1) == kept,
            exported=len(kept),
            independent=len(kept),
            clusters=None,
        )

    def answers(self, values: Array) -> Array:
        """The probabilities of the old classes."""
        distances = ((values[:, None] - self.centres[:3]) ** 2).sum(2)
        return np.asarray(softmax(-distances / 2, axis=1))

    def taken(self, new: NewClass, values: Array) -> Array:
        """Whether each image is answered with the new class."""
        odds = (unit_length(values) @ new.weights.T + new.bias).min(1)
        return np.asarray(odds > np.log(self.answers(values).max(1)))


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    for hits, count in ((0, 300), (3, 300), (17, 20), (20, 20)):
        _, high = clopper_pearson(hits / count, count, 0.95)
        assert upper_bound(hits, count, 0.95) == pytest.approx(high, abs=1e-9)


def test_the_old_classes_lose_more_than_the_limit_in_five_of_a_hundred_enrolments_at_most() -> None:
    trials = 100
    beyond = 0
    recalls = []
    for trial in range(trials):
        draw = np.random.default_rng(trial)
        world = _World(draw, 1.6)
        fresh = draw.integers(3, size=4000)
        new = _drawn(draw, world.centres, np.full(15, 3))
        found = fit_class(world.statistics, world.sample, new, world.answers(new), LIMIT)

        values = _drawn(draw, world.centres, fresh)
        right = world.answers(values).argmax(1) == fresh
        lost = right & world.taken(found, values)
        beyond += lost.mean() > LIMIT
        assert found.drop_high <= LIMIT
        recalls.append(found.recognised.mean())

    assert beyond <= 10  # 5 % of 100, and what chance adds to it in 97 of 100 cases
    assert np.mean(recalls) > 0.5


def test_images_of_few_objects_promise_no_more_than_new_objects_hold() -> None:
    """24 images of 6 objects: judged one by one, each is recognised by others of its own object."""
    promised = {True: 0.0, False: 0.0}
    covered = 0
    truth = 0.0
    trials = 40
    for trial in range(trials):
        draw = np.random.default_rng(trial)
        world = _World(draw, 0.9)

        def objects(count: int, each: int) -> Array:
            own = world.centres[3] + 2.0 * draw.standard_normal((count, WIDTH))  # noqa: B023
            return np.repeat(own, each, 0) + 0.5 * draw.standard_normal((count * each, WIDTH))  # noqa: B023

        new, groups = objects(6, 4), np.repeat(np.arange(6), 4)
        found = {
            grouped: fit_class(
                world.statistics,
                world.sample,
                new,
                world.answers(new),
                LIMIT,
                groups if grouped else None,
            )
            for grouped in (True, False)
        }
        for grouped, each in found.items():
            promised[grouped] += each.recognised.mean() / trials
        values = objects(400, 1)
        new_class = found[True]
        share = float(world.taken(new_class, values).mean())
        truth += share / trials
        covered += new_class.recall_low <= share <= new_class.recall_high

    assert promised[False] > truth + 0.05
    assert promised[True] < truth + 0.03
    assert covered >= 0.9 * trials


def test_a_sample_comes_back_as_it_was_written_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sample = KeptSample(
        embedding=unit_length(np.maximum(draw.standard_normal((9, WIDTH)), 0)),
        labels=np.arange(9) % 3,
        probabilities=softmax(draw.standard_normal((9, 3)), axis=1),
        right=np.arange(9) < 5,
        exported=7,
        independent=4.5,
        clusters=2,
    )
    path = tmp_path / FILE
    path.write_bytes(sample.as_bytes())
    again = KeptSample.read(path)
    assert np.abs(again.embedding - sample.embedding).max() < 0.005
    assert np.array_equal(again.right, sample.right)
    assert (again.independent, again.clusters, again.exported) == (4.5, 2, 7)

    for spoilt in ({"independent": np.nan}, {"exported": 10}, {"labels": np.full(9, 3)}):
        path.write_bytes(replace(sample, **spoilt).as_bytes())
        with pytest.raises(BundleError, match="damaged"):
            KeptSample.read(path)
    path.write_bytes(sample.as_bytes())

    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="damaged"):
        KeptSample.read(path)
