"""Drift: has what the device sees moved from the images the model was made with?

    test = DriftTest(Reference.from_json(text))
    test.update(test.values_of(score, probability, label, coordinates, frame_statistics(frame)))
    test.alarms, test.evidence

Five things are watched: the out-of-distribution score, the confidence, how often each class is
answered, the directions of the embedding, and the frames themselves (a darker or blurred picture
may leave the answers as they are, and still be worth knowing). Each is split into events that an image shows, or
shows in part: "the score is beyond that of 95 % of the held-out images"; "how many of seven such
marks it is beyond", which tells when all images shift a little. The Reference has the highest rate
at which images like the held-out ones show each event, as an upper confidence bound.

Against each event the test bets at the odds of that rate. As long as the true rate is no higher,
the stake is expected to shrink, so that by Ville's inequality it ever exceeds 100 times its start
with a probability of 1 % at most: the test may be looked at any time. The stake moves from idle to
the bets as time goes on, so that drift is found whenever it begins, in constant memory. The stake
of a stream is the mean of its events'.

Images of one object or one scene are not independent. Where the training images have groups, as
many images as a group has count as one observation: the mean of each event over them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ftkit_export.runtime.arrays import Array

STREAMS = ("score", "confidence", "classes", "embedding", "frame")
ALARM = 100.0  # of each of the five: without drift, at most 5 % of all devices ever alarm
LEAST = 200  # images, before "no drift" is said
ODDS = (1.5, 2.5, 5.0, 15.0)  # what the bets take the event's odds to have become
FRAME = ("brightness", "contrast", "sharpness", "red", "blue")
SAMPLED = 48  # pixels a side that a frame's statistics are taken from, about
SAMPLED_BEFORE = 96  # by references that do not say
PATIENCE = 1000  # observations; sets how early most of the stake is bet
MOST = 1e60  # a stake is cut to this, so that it can be written down


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that an image shows by 0 to 1: the share of `marks` that a value is above, or below.

    stream: one of STREAMS. value: "score", "confidence", "class NAME" (1 where it is the answer),
    "direction N" or one of FRAME. rate: the highest mean over images without drift.
    """

    stream: str
    value: str
    above: bool
    marks: Sequence[float]
    rate: float

    def __str__(self) -> str:
        if self.stream == "classes":
            return f"{self.value.removeprefix('class ')}, {'more' if self.above else 'less'} often"
        if len(self.marks) > 1:
            return f"{self.value} {'higher' if self.above else 'lower'} on the whole"
        return f"{self.value} {'above' if self.above else 'below'} {self.marks[0]:.3g}"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is seen without drift. images, groups: that it was measured on; groups is None without
    any. block: images that count as one observation. sampled: what the frames' statistics were taken
    from (`frame_statistics`)."""

    events: Sequence[Event]
    classes: Sequence[str]
    directions: int
    images: int
    groups: int | None
    block: int
    sampled: int = SAMPLED_BEFORE

    def to_json(self) -> str:
        """For the bundle."""
        data = asdict(self)
        if self.sampled == SAMPLED_BEFORE:
            del data["sampled"]  # as it was read, since the text's hash is its name
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Reference:
        """Inverse of to_json. Raises ValueError, KeyError or TypeError for other text."""
        data = json.loads(text)
        reference = Reference(**{**data, "events": [Event(**event) for event in data["events"]]})
        values = set(reference.values)
        if not (reference.block >= 1 and reference.sampled >= 1 and reference.events):
            raise ValueError("a reference without events")
        for event in reference.events:
            known = event.value in values and event.stream in STREAMS and len(event.marks)
            if not known or not 0 < event.rate <= 1:
                raise ValueError(f"the event {event}")
        return reference

    @cached_property
    def name(self) -> str:
        """Tells this reference from every other, in a log."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def values(self) -> list[str]:
        """Names of the values of an image, in the order of `DriftTest.update`."""
        classes = [f"class {name}" for name in self.classes]
        directions = [f"direction {number}" for number in range(self.directions)]
        return ["score", "confidence", *classes, *directions, *FRAME]


class DriftTest:
    """The test, image by image; `state` is all it remembers.

    evidence: by stream, how many times its start the stake has become. alarms: by stream, the
    Alarm, kept once raised.
    """

    def __init__(self, reference: Reference, state: Mapping[str, Any] | None = None):
        self.reference = reference
        events = reference.events
        values = reference.values
        marks = [len(event.marks) for event in events]
        self._column = np.repeat([values.index(event.value) for event in events], marks)
        self._sign = np.repeat([1.0 if event.above else -1.0 for event in events], marks)
        self._mark = self._sign * np.concatenate([event.marks for event in events])
        self._first = np.cumsum([0, *marks[:-1]])
        self._marks = np.array(marks)
        self._of = np.array([STREAMS.index(event.stream) for event in events])
        members = (np.arange(len(STREAMS))[:, None] == self._of).astype(float)
        self._means = members / np.maximum(members.sum(1, keepdims=True), 1)  # (streams, events)
        self._places = {name: place for place, name in enumerate(reference.classes)}

        # A bet that multiplies the odds pays 1 + share * (shown - rate), which is never negative
        rate = np.array([event.rate for event in events])[:, None]
        odds = np.array(ODDS)[None]
        expected = odds * rate / (1 - rate + odds * rate)
        self._rate = rate
        self._share = (expected - rate) / np.maximum(rate * (1 - rate), 1e-12)

        count = len(events)
        self.images = 0
        self.observations = 0
        self.alarms: dict[str, dict[str, Any]] = {}
        self._waiting = 0
        self._shown = np.zeros(count)
        self._bets = np.full((count, len(ODDS)), 0.5 / len(ODDS))
        self._idle = np.full(count, 0.5)
        # Since when each bet has been winning
        self._sum = np.zeros((count, len(ODDS)))
        self._since = np.zeros((count, len(ODDS)), int)
        if state:
            self._restore(state)

    def values_of(
        self, score: float, probability: float, label: str, coordinates: Array, frame: Array
    ) -> Array:
        """An image's values, in the order of Reference.values. frame: its `frame_statistics`."""
        answered = np.zeros(len(self._places))
        if label in self._places:
            answered[self._places[label]] = 1.0
        return np.concatenate([[score, probability], answered, coordinates, frame])

    def update(self, values: Array) -> list[str]:
        """Take one image's values (`values_of`); return the streams that alarm from here on."""
        self.images += 1
        beyond = self._sign * values[self._column] > self._mark
        self._shown += np.add.reduceat(beyond, self._first, dtype=float) / self._marks
        self._waiting += 1
        if self._waiting < self.reference.block:
            return []

        observed = self._shown[:, None] / self._waiting - self._rate
        self._shown[:] = 0
        self._waiting = 0
        return self._observe(observed)

    def _observe(self, above: Array) -> list[str]:
        """above: (events, 1), by how much the observed share exceeds each rate."""
        pays = 1 + self._share * above
        self.observations += 1
        moved = self._idle / (self.observations + PATIENCE)
        self._idle -= moved
        self._bets += moved[:, None] / len(ODDS)
        self._bets *= pays
        np.minimum(self._bets, MOST, out=self._bets)

        self._sum = self._sum + np.log(np.maximum(pays, 1e-12))
        begun = self._sum <= 0
        self._sum[begun] = 0.0
        self._since[begun] = self.images

        alarms = []
        stakes = self._stakes
        for stream in np.flatnonzero(self._means @ stakes >= ALARM):
            name = STREAMS[stream]
            if name not in self.alarms:
                event = int(np.where(self._of == stream, stakes, -1.0).argmax())
                self.alarms[name] = {
                    "at": self.images,
                    "since": int(self._since[event, self._bets[event].argmax()]),
                    "event": event,
                    "what": str(self.reference.events[event]),
                }
                alarms.append(name)
        return alarms

    @property
    def _stakes(self) -> Array:
        stakes: Array = self._idle + self._bets.sum(1)
        return stakes

    @property
    def evidence(self) -> dict[str, float]:
        """By stream: its stake, 1 at the start."""
        return dict(zip(STREAMS, (self._means @ self._stakes).tolist(), strict=True))

    @property
    def verdict(self) -> int:
        """1: drift. 3: too few images to say that there is none. 0: none found."""
        if self.alarms:
            return 1
        return 0 if self.images >= LEAST and self._could_alarm else 3

    @property
    def _could_alarm(self) -> bool:
        """Whether so many observations would have raised an alarm if every one had shown all that a
        stream watches for; half of its events, as a value cannot be both too high and too low."""
        logs = self.observations * np.log1p(self._share * (1 - self._rate))
        most = (0.5 / len(ODDS) * np.exp(np.minimum(logs, 100.0))).sum(1)
        return bool((0.5 * self._means @ most >= ALARM).any())

    @property
    def state(self) -> dict[str, Any]:
        """All that the test remembers, for JSON."""
        return {
            "reference": self.reference.name,
            "images": self.images,
            "observations": self.observations,
            "alarms": self.alarms,
            "waiting": self._waiting,
            "shown": self._shown.tolist(),
            "bets": self._bets.tolist(),
            "idle": self._idle.tolist(),
            "sum": self._sum.tolist(),
            "since": self._since.tolist(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a state of another reference."""
        bets = np.array(state["bets"], float)
        if state["reference"] != self.reference.name or bets.shape != self._bets.shape:
            raise ValueError("the state of another bundle's test")
        self.images = int(state["images"])
        self.observations = int(state["observations"])
        self.alarms = dict(state["alarms"])
        self._waiting = int(state["waiting"])
        self._shown = np.array(state["shown"], float)
        self._bets = bets
        self._idle = np.array(state["idle"], float)
        self._sum = np.array(state["sum"], float)
        self._since = np.array(state["since"], int)


def least_images(reference: Reference) -> int:
    """Images after which the test alarms where each shows all that is watched for."""
    test = DriftTest(reference)
    while not test.alarms and test.observations < LEAST:
        test.images += reference.block
        test._observe(1 - test._rate)
    return test.images


def frame_statistics(frame: Array, input_format: str, sampled: int = SAMPLED) -> Array:
    """Brightness, contrast, sharpness, and red and blue relative to green, of a frame (H, W, C) uint8
    in the model's input format (preprocess.to_frame): (5,) float64, in grey levels.

    Taken from about `sampled` rows and columns, in tens of microseconds. Sharpness: the mean difference
    between neighbours in a row, relative to the contrast. Formats without colour planes have no red and
    blue.
    """
    if input_format == "nv12":
        frame = frame[: frame.shape[0] * 2 // 3]
    rows = frame[:: max(1, frame.shape[0] // sampled)]
    step = max(1, frame.shape[1] // sampled)
    left = rows[:, :-1:step]
    right = rows[:, 1::step][:, : left.shape[1]]
    if not left.size:  # one pixel wide
        return np.array([float(rows.mean()), 0.0, 0.0, 0.0, 0.0])

    # As matrix products: numpy's reductions over strided axes take four times as long
    here = left.astype(np.float32).reshape(-1, frame.shape[2])  # (pixels, channels)
    means = np.ones(len(here), np.float32) @ here / len(here)
    flat = here.ravel()
    apart = right.astype(np.float32).ravel()
    apart -= flat
    difference = float(np.abs(apart, out=apart).sum()) / flat.size
    flat -= means.mean()  # or the squares' sum is too coarse in float32
    contrast = math.sqrt(float(flat @ flat) / flat.size)
    red = blue = 0.0
    if len(means) == 3:
        first, last = float(means[0] - means[1]), float(means[2] - means[1])
        red, blue = (last, first) if input_format == "bgr" else (first, last)
    return np.array([float(means.mean()), contrast, difference / (contrast + 1), red, blue])
