"""Judge drift from what a device has collected.

found = find_drift(Path("bundle"), Path("collected"))
found.verdict        # 0 none, 1 drift, 3 too little to say
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.collect import logs, stored_test
from ftkit_export.runtime.drift import ALARM, STREAMS, DriftTest, Reference
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.predict import REFERENCE, read_reference, require_single_label

COURSE = 60  # points of a course
PICTURES = 3
EARLIER = "as the device found"  # when images began to drift that the log no longer holds


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A stream that has drifted. since: the image after which it began, as estimated, and its time;
    at: the image at which it was sure. pictures: those kept since then that show it most."""

    stream: str
    what: str
    since: int
    since_time: str
    at: int
    pictures: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Day:
    """What was seen on one day, local time. answers: share of each class."""

    date: str
    images: int
    median_score: float
    mean_probability: float
    answers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Verdict of the drift test on a log.

    evidence: by stream, the most that its stake has ever been, 1 at the start (of the device's own test, what
    it is now, or an alarm's); course: the stake after each of `marks` images of the log. forgotten:
    images that the device's test has seen, and the log no longer holds;
    others: images in the log that another bundle answered.
    """

    folder: Path
    reference: Reference
    verdict: int
    images: int
    first: str
    last: str
    evidence: Mapping[str, float]
    alarms: Sequence[Alarm]
    marks: Sequence[int]
    course: Mapping[str, Sequence[float]]
    days: Sequence[Day]
    forgotten: int
    others: int


def find_drift(bundle: Path, collected: Path) -> Drift:
    """Run the test over the log of `collected`, from its first line; where the log no longer holds all
    that the device has seen, take the device's own.

    Raises FtkitError for a bundle without a reference, a folder without a log, or a log of another
    bundle.
    """
    reference = read_reference(bundle)
    if reference is None:
        require_single_label(bundle, "the drift test")
        raise FtkitError(
            f"{bundle}: expected the reference of the drift test ({REFERENCE}), found none. Export the run again"
        )
    everything = read_log(collected)
    if not everything:
        raise FtkitError(
            f"{collected}: expected a log that `classify.py --keep` wrote, found none. Check the folder"
        )
    lines = [line for line in everything if line["bundle"] == reference.name]
    if not lines:
        raise FtkitError(
            f"{collected}: expected a log written with this bundle, found one of another. Try the bundle that the "
            "device ran"
        )

    test = DriftTest(reference)
    values = np.stack([_values(test, line) for line in lines])
    marks = np.unique(np.linspace(1, len(lines), min(COURSE, len(lines))).astype(int))
    course: dict[str, list[float]] = {name: [] for name in STREAMS}
    highest = dict.fromkeys(STREAMS, 0.0)
    for number, row in enumerate(values, start=1):
        test.update(row)
        for name, stake in test.evidence.items():
            highest[name] = max(highest[name], stake)
        if number in marks:
            for name, stake in test.evidence.items():
                course[name].append(stake)

    there = stored_test(collected, reference)
    forgotten = max(0, there.images - len(lines))
    has_picture = [bool(line["kept"]) and (collected / line["kept"]).is_file() for line in lines]
    # A test that began anew wherever the log begins would be one test more for each rotation
    whole = there if forgotten else test
    alarms = [
        _alarm(whole, name, values, lines, has_picture, before=forgotten) for name in whole.alarms
    ]
    # What the device found stands
    alarms += [_earlier(there, name) for name in there.alarms if name not in whole.alarms]
    if forgotten:  # of which the highest is not known, but for an alarm
        highest = {
            name: max(stake, ALARM if name in there.alarms else 0.0)
            for name, stake in there.evidence.items()
        }

    return Drift(
        folder=collected,
        reference=reference,
        verdict=1 if alarms else whole.verdict,
        images=len(lines),
        first=_time(lines[0]),
        last=_time(lines[-1]),
        evidence=highest,
        alarms=alarms,
        marks=marks.tolist(),
        course=course,
        days=_days(lines),
        forgotten=forgotten,
        others=len(everything) - len(lines),
    )


def read_log(collected: Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first; a last line cut short by a power cut is left out."""
    lines = []
    for path in logs(collected):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                float(line["time"]), float(line["score"]), float(line["probability"])
                line["bundle"], line["label"], line["coordinates"], line["frame"], line["kept"]
            except (ValueError, KeyError, TypeError):
                continue
            lines.append(line)
    return lines


def _values(test: DriftTest, line: Mapping[str, Any]) -> Array:
    return test.values_of(
        line["score"],
        line["probability"],
        line["label"],
        np.array(line["coordinates"], float),
        np.array(line["frame"], float),
    )


def _alarm(
    test: DriftTest,
    stream: str,
    values: Array,
    lines: Sequence[Mapping[str, Any]],
    has_picture: Sequence[bool],
    before: int,
) -> Alarm:
    """before: images that the test has seen and `lines` no longer has."""
    alarm = test.alarms[stream]
    since = max(0, alarm["since"] - before)
    known = alarm["since"] >= before
    event = test.reference.events[alarm["event"]]
    shown = values[:, test.reference.values.index(event.value)] * (1 if event.above else -1)
    kept = [number for number in range(since, len(lines)) if has_picture[number]]
    kept.sort(key=lambda number: -shown[number])
    return Alarm(
        stream=stream,
        what=alarm["what"],
        since=alarm["since"],
        since_time=_time(lines[min(since, len(lines) - 1)]) if known else EARLIER,
        at=alarm["at"],
        pictures=[str(lines[number]["kept"]) for number in kept[:PICTURES]],
    )


def _earlier(test: DriftTest, stream: str) -> Alarm:
    alarm = test.alarms[stream]
    return Alarm(
        stream=stream,
        what=alarm["what"],
        since=alarm["since"],
        since_time=EARLIER,
        at=alarm["at"],
        pictures=(),
    )


def _time(line: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(line["time"]).strftime("%Y-%m-%d %H:%M")


def _days(lines: Sequence[Mapping[str, Any]]) -> list[Day]:
    by_date: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_date.setdefault(_time(line)[:10], []).append(line)

    days = []
    for date, seen in by_date.items():
        names, counts = np.unique([line["label"] for line in seen], return_counts=True)
        days.append(
            Day(
                date=date,
                images=len(seen),
                median_score=float(np.median([line["score"] for line in seen])),
                mean_probability=float(np.mean([line["probability"] for line in seen])),
                answers={
                    str(name): count / len(seen)
                    for name, count in zip(names, counts.tolist(), strict=True)
                },
            )
        )
    return days


def as_text(found: Drift) -> str:
    """The verdict as lines of at most 80 characters or so."""
    on = f"{found.images} images, {found.first} to {found.last}"
    lines = [f"drift: {on}"]
    if found.forgotten:
        lines.append(f"the log no longer holds {found.forgotten} images before them")
    if found.others:
        lines.append(f"left out: {found.others} images that another bundle answered")
    reference = found.reference
    ground = f"{reference.images} held-out images"
    if reference.groups is not None:
        ground += f" in {reference.groups} groups; {reference.block} images count as one"
    lines.append(f"without drift: {ground}")

    lines.append(f"{'':<11} {'highest':>9} evidence; {ALARM:.0f} is an alarm")
    alarms = {alarm.stream: alarm for alarm in found.alarms}
    for name in STREAMS:
        said = f"{name:<11} {min(found.evidence[name], 1e9):>9.3g}"
        if name in alarms:
            alarm = alarms[name]
            said += f"  {alarm.what}, since {alarm.since_time}"
            said += "".join(f"\n{'':<23}{picture}" for picture in alarm.pictures)
        lines.append(said)
    lines.append({0: "no drift found", 1: "drift", 3: "too little to say"}[found.verdict])
    return "\n".join(lines)
