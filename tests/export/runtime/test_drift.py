"""The drift test alarms seldom without drift, soon with it, and remembers where it stood."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ftkit_export.proof.drift_reference import Seen, make_reference
from ftkit_export.runtime.drift import (
    SAMPLED,
    DriftTest,
    Reference,
    frame_statistics,
    least_images,
)

CLASSES = ["a", "b", "c"]


def _drawn(random: np.random.Generator, count: int, shift: float = 0.0) -> list[np.ndarray]:
    """Scores, probabilities, answers and coordinates."""
    return [
        random.gamma(9, (1 + shift) / 9, count),
        random.beta(8, 1.5 + 3 * shift, count),
        random.choice(3, count, p=[0.5, 0.3, 0.2]),
        random.normal(0.1 * shift, 0.1, (count, 4)),
        random.normal(100, 20, (count, 5)),
    ]


def _reference(
    random: np.random.Generator,
    groups: list[str] | None = None,
    answers: np.ndarray | None = None,
) -> Reference:
    """Of 800 images; groups, answers: theirs instead of none, and of drawn ones."""
    scores, probabilities, drawn, coordinates, frames = _drawn(random, 800)
    names = groups or [""] * 800
    seen = Seen(
        scores=scores,
        probabilities=probabilities,
        answers=drawn if answers is None else answers,
        groups=names,
        coordinates=coordinates,
        test_groups=names,
        frames=frames,
        frame_groups=names,
    )
    return make_reference(seen, CLASSES)


def _fed(test: DriftTest, images: list[np.ndarray]) -> DriftTest:
    for score, probability, answer, coordinates, frame in zip(*images, strict=True):
        test.update(test.values_of(score, probability, CLASSES[answer], coordinates, frame))
    return test


def test_no_drift_is_no_alarm_and_drift_is_found_with_its_beginning() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        assert not _fed(DriftTest(_reference(random)), _drawn(random, 1500)).alarms

    for _ in range(5):
        test = _fed(DriftTest(_reference(random)), _drawn(random, 600))
        assert test.verdict == 0
        _fed(test, _drawn(random, 200, shift=0.4))
        assert test.verdict == 1
        alarm = test.alarms["score"]
        assert 600 < alarm["at"] <= 800
        assert 400 < alarm["since"] < 700


def test_a_class_answered_more_often_alarms_as_that() -> None:
    random = np.random.default_rng(1)
    test = DriftTest(_reference(random))
    images = _drawn(random, 300)
    images[2] = random.choice(3, 300, p=[0.2, 0.2, 0.6])
    _fed(test, images)
    assert set(test.alarms) == {"classes"}
    assert test.alarms["classes"]["what"] in ("c, more often", "a, less often")


def test_what_is_written_down_goes_on_as_if_never_stopped() -> None:
    random = np.random.default_rng(2)
    reference = _reference(random)
    first, second = _drawn(random, 300), _drawn(random, 300, shift=0.1)
    through = _fed(_fed(DriftTest(reference), first), second)

    stopped = _fed(DriftTest(reference), first)
    state = json.loads(json.dumps(stopped.state))
    again = DriftTest(Reference.from_json(reference.to_json()), state)
    assert _fed(again, second).state == through.state

    other = Reference.from_json(
        json.dumps(
            {
                **json.loads(reference.to_json()),
                "events": json.loads(reference.to_json())["events"][:-1],
            }
        )
    )
    with pytest.raises(ValueError, match="another bundle"):
        DriftTest(other, state)


def test_images_of_one_group_count_as_one() -> None:
    """One module with another mix of answers is no drift where modules differ."""
    random = np.random.default_rng(3)
    groups = [f"module{number // 40}" for number in range(800)]
    answers = np.repeat(random.choice(3, 20, p=[0.5, 0.3, 0.2]), 40)
    reference = _reference(random, groups, answers)
    assert (reference.block, reference.groups) == (40, 20)

    images = _drawn(random, 2000)
    images[2] = np.repeat(random.choice(3, 50, p=[0.5, 0.3, 0.2]), 40)
    assert not _fed(DriftTest(reference), images).alarms
    large = replace(reference, block=120)
    few = _fed(DriftTest(large), [values[:240] for values in images])
    assert (few.verdict, few.observations) == (3, 2), "two groups could not show any drift"
    assert _fed(DriftTest(reference), images).verdict == 0


def _with_frames(random: np.random.Generator, test: np.ndarray, others: np.ndarray) -> Reference:
    """Of 200 test images and others, which have only frames, in 10 and 40 groups."""
    scores, probabilities, answers, coordinates, _ = _drawn(random, 200)
    groups = [f"test{row // 20}" for row in range(200)]
    seen = Seen(
        scores=scores,
        probabilities=probabilities,
        answers=answers,
        groups=groups,
        coordinates=coordinates,
        test_groups=groups,
        frames=np.concatenate([test, others]),
        frame_groups=groups + [f"other{row // 20}" for row in range(len(others))],
    )
    return make_reference(seen, CLASSES)


def test_frames_of_other_images_count_where_the_test_images_do_not_contradict_them() -> None:
    random = np.random.default_rng(5)
    test, others, later = (random.normal(100, 20, (count, 5)) for count in (200, 800, 1500))
    with_others = _with_frames(random, test, others)
    alone = _with_frames(random, test, others[:0])
    images = _drawn(random, 1500)
    images[-1] = later
    assert not _fed(DriftTest(with_others), images).alarms

    images[-1] = later - 40  # darker by two standard deviations
    found = [_fed(DriftTest(each), images).alarms for each in (with_others, alone)]
    assert "frame" in found[0]
    assert found[0]["frame"]["at"] < found[1]["frame"]["at"], "and sooner for it"

    darker = _with_frames(random, test - 40, others)  # a test split of another camera
    assert not _fed(DriftTest(darker), images).alarms


def test_an_older_reference_keeps_its_text_and_its_frames_sampling() -> None:
    reference = _reference(np.random.default_rng(4))
    told = json.loads(reference.to_json())
    assert told.pop("sampled") == reference.sampled == SAMPLED
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    older = Reference.from_json(text)
    assert older.sampled == 96
    assert older.to_json() == text, "its hash is its name in a log"
    frame = np.random.default_rng(5).integers(0, 256, (200, 200, 3), np.uint8)
    assert not np.allclose(frame_statistics(frame, "rgb", 96), frame_statistics(frame, "rgb"))


def test_a_damaged_reference_is_refused() -> None:
    told = json.loads(_reference(np.random.default_rng(4)).to_json())
    for change in (
        {"block": 0},
        {"events": []},
        {"events": [{**told["events"][0], "rate": 0.0}]},
        {"events": [{**told["events"][0], "value": "direction 9"}]},
    ):
        with pytest.raises(ValueError, match=r"event"):
            Reference.from_json(json.dumps({**told, **change}))


def test_a_probation_lasts_until_drift_can_be_found_also_where_groups_count_as_one() -> None:
    random = np.random.default_rng(8)
    alone = _reference(random)
    grouped = _reference(random, groups=[f"g{row // 40}" for row in range(800)])
    for reference in (alone, grouped):
        images = least_images(reference)
        moved = _drawn(random, 2 * images)
        moved[0] += 100.0  # beyond every image of the reference
        moved[3] += 100.0
        assert _fed(DriftTest(reference), moved).alarms
    assert least_images(grouped) > 100 >= least_images(alone)
