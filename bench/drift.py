"""Drift after shipping: found, and falsely found. Run by `python bench/field.py --what drift,groups`.

Photographs drawn at random: a bundle trained on 60 % of the demo's photographs; frames are drawn from the other
40 %, as they are or changed. 100 devices each: undrifted for 6,000 frames; changed from frame 500 on.
The level: as many times a reference is made from a sample of those photographs, and frames are drawn
from the same ones. poly: a bundle that knows the mono-crystalline cells only, to which
poly-crystalline ones come. Groups: the same where frames come module by module.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_images

from ftkit.cli.demo import write_elpv
from ftkit.exporting.drift import MORE_FRAMES
from ftkit_export.proof.drift_reference import Seen, make_reference
from ftkit_export.runtime.collect import Sighting
from ftkit_export.runtime.drift import FRAME, DriftTest, Reference, frame_statistics
from ftkit_export.runtime.predict import Classifier, read_reference
from ftkit_export.runtime.preprocess import to_frame

DEVICES = 100
QUIET = 6000  # frames: 30 days of 200
BEGINS = 500
WITHIN = 200
SAMPLED_EVERY = 8  # photographs

Change = Callable[[Image.Image], Image.Image]


def run_ftkit(*arguments: object) -> None:
    """Run the command; it must succeed."""
    subprocess.run(
        [sys.executable, "-m", "ftkit", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def make_bundle(place: Path, photos: Path, name: str, *settings: str) -> Path:
    """Train on `photos` and export; the bundle, passed or inconclusive."""
    out = place / f"{name}-bundle"
    run_ftkit("train", photos, "--out", place / name, "--set", "augment.vflip=true", *settings)
    subprocess.run(
        [sys.executable, "-m", "ftkit", "export", place / name, "--out", out, "--quick"],
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return next(path for path in (out, out.with_name(f"{out.name}.inconclusive")) if path.exists())


def copy_photograph(path: Path, photos: Path) -> None:
    """Copy a photograph into the folder of its class below `photos`."""
    (photos / path.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, photos / path.parent.name / path.name)


def _held_out_modules(
    classify: Classifier, held: list[Path], test: DriftTest, change: Change | None
) -> list[np.ndarray]:
    """The values of every held-out module's photographs."""
    modules = sorted({path.name.split("-")[0] for path in held})
    return [
        _values(
            test,
            _seen(classify, [path for path in held if path.name.startswith(f"{name}-")], change),
        )
        for name in modules
    ]


def _stream(modules: list[np.ndarray], frames: int, draw: np.random.Generator) -> np.ndarray:
    """Frames as a device on a line sees them: module after module, each in random order."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < frames:
        parts.append(draw.permutation(modules[draw.integers(len(modules))]))
    return np.concatenate(parts)[:frames]


def _of_drawn_modules(
    modules: list[np.ndarray], like: Reference, test_groups: int, draw: np.random.Generator
) -> Reference:
    """A reference of as many modules, drawn from these; some of them are its test split."""
    assert like.groups
    drawn = [modules[draw.integers(len(modules))] for _ in range(like.groups)]
    rows = np.concatenate(drawn)
    names = [str(number) for number, module in enumerate(drawn) for _ in module]
    few = [number < test_groups for number, module in enumerate(drawn) for _ in module]
    classes = len(like.classes)
    frames = len(FRAME)
    seen = Seen(
        scores=rows[:, 0],
        probabilities=rows[:, 1],
        answers=rows[:, 2 : 2 + classes].argmax(1),
        groups=names,
        coordinates=rows[few, 2 + classes : -frames],
        test_groups=[name for name, picked in zip(names, few, strict=True) if picked],
        frames=rows[:, -frames:],
        frame_groups=names,
    )
    return make_reference(seen, like.classes)


def groups(place: Path) -> str:
    """False alarms and delays where frames come module by module."""
    everything = place / "all"
    write_elpv(everything, split=False)
    files = sorted(everything.rglob("*.png"))
    names = sorted({path.name.split("-")[0] for path in files})
    random.Random(0).shuffle(names)
    away = set(names[: int(0.4 * len(names))])
    held = [path for path in files if path.name.split("-")[0] in away]
    photos = place / "photos"
    for path in files:
        if path not in held:
            copy_photograph(path, photos)
    small = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128")
    bundle = make_bundle(place, photos, "grouped", *small, "--group-by", "module[0-9]+")
    classify = Classifier(bundle)
    reference = read_reference(bundle)
    assert reference
    test = DriftTest(reference)
    plain = _held_out_modules(classify, held, test, None)
    dark = _held_out_modules(classify, held, test, CHANGES["a third darker"])

    alarms = 0
    level = 0
    delays: list[float] = []
    test_modules = max(2, len(names) * 15 // 100)
    for number in range(DEVICES):
        draw = np.random.default_rng(number)
        test = DriftTest(_of_drawn_modules(plain, reference, test_modules, draw))
        for row in _stream(plain, QUIET, draw):
            test.update(row)
        level += bool(test.alarms)

        draw = np.random.default_rng(number)
        test = DriftTest(reference)
        for row in _stream(plain, QUIET, draw):
            test.update(row)
        alarms += bool(test.alarms)

        test = DriftTest(reference)
        for row in _stream(plain, BEGINS, draw):
            test.update(row)
        delay = math.inf
        for frame, row in enumerate(_stream(dark, 10 * QUIET, draw), start=1):
            test.update(row)
            if test.alarms:
                delay = frame
                break
        delays.append(delay)
    return (
        f"- {len(away)} held-out modules of {len(names)}, {len(held)} photographs; the reference is of "
        f"{reference.images} images in {reference.groups} groups, and {reference.block} images count as one.\n"
        f"- Nothing changed, {QUIET} frames, the reference of as many modules drawn from the same {len(away)}: "
        f"{level} of {DEVICES} devices alarm.\n"
        f"- Nothing changed, {QUIET} frames, this bundle and its {len(away)} held-out modules, which come again and "
        f"again: {alarms} of {DEVICES} devices alarm.\n"
        f"- A third darker from frame {BEGINS} on: found after a median of {statistics.median(delays):.0f} frames, "
        f"on {sum(delay < math.inf for delay in delays)} of {DEVICES} devices."
    )


def _tinted(image: Image.Image) -> Image.Image:
    """As a camera with another white balance sees it."""
    red, green, blue = image.convert("RGB").split()
    red, blue = red.point(lambda v: int(v * 1.1)), blue.point(lambda v: int(v * 0.8))
    return Image.merge("RGB", (red, green, blue))


CHANGES: dict[str, Change] = {
    "blur (Gaussian, 2 pixels)": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "a third darker": lambda image: ImageEnhance.Brightness(image).enhance(2 / 3),
    "another camera's colour": _tinted,
}


def _seen(classify: Classifier, files: list[Path], change: Change | None) -> list[Sighting]:
    found = []
    for path in files:
        with Image.open(path) as image:
            shown = (change(image) if change else image).convert("RGB")
        found.append(classify.sight(to_frame(np.asarray(shown), classify.input_format))[0])
    return found


def _patches() -> list[Image.Image]:
    """Pictures of something else: patches of scikit-learn's two photographs."""
    draw = random.Random(0)
    patches = []
    for picture in load_sample_images().images:
        for _ in range(40):
            top, left = draw.randrange(427 - 300), draw.randrange(640 - 300)
            patches.append(Image.fromarray(picture[top : top + 300, left : left + 300]))
    return patches


def _values(test: DriftTest, sightings: list[Sighting]) -> np.ndarray:
    return np.stack(
        [
            test.values_of(item.score, item.probability, item.label, item.coordinates, item.frame)
            for item in sightings
        ]
    )


def _delays(
    bundle: Path, before: np.ndarray, after: np.ndarray, share: float, devices: int
) -> list[int | None]:
    """Frames from the change to the alarm, for each device; None: not within 2,000. share: of the
    frames that are from `after`."""
    reference = read_reference(bundle)
    assert reference
    delays: list[int | None] = []
    for number in range(devices):
        draw = np.random.default_rng(number)
        test = DriftTest(reference)
        for row in before[draw.integers(len(before), size=BEGINS)]:
            test.update(row)
        delay = None
        for frame in range(2000):
            of = after if draw.random() < share else before
            test.update(of[draw.integers(len(of))])
            if test.alarms:
                delay = frame + 1
                break
        delays.append(delay)
    return delays


def _alarms(reference: Reference, frames: np.ndarray, seed: int) -> bool:
    """Whether a device without drift ever alarms in QUIET frames."""
    test = DriftTest(reference)
    for row in frames[np.random.default_rng(1000 + seed).integers(len(frames), size=QUIET)]:
        test.update(row)
    return bool(test.alarms)


def _sampled(sightings: list[Sighting], like: Reference, seed: int) -> Reference:
    """A reference of as many images, drawn from these."""
    picks = np.random.default_rng(seed).integers(len(sightings), size=like.images)
    drawn = [sightings[pick] for pick in picks]
    few = drawn[: len(drawn) // 5]  # as the test split is of the images out of fold
    seen = Seen(
        scores=np.array([item.score for item in drawn]),
        probabilities=np.array([item.probability for item in drawn]),
        answers=np.array([list(like.classes).index(item.label) for item in drawn]),
        groups=[""] * len(drawn),
        coordinates=np.stack([item.coordinates for item in few]),
        test_groups=[""] * len(few),
        frames=np.stack([item.frame for item in (*few, *drawn[len(few) :][:MORE_FRAMES])]),
        frame_groups=[""] * min(len(drawn), len(few) + MORE_FRAMES),
    )
    return make_reference(seen, like.classes)


def sampling(place: Path) -> str:
    """Table: a frame's statistics taken from so many rows and columns, against those of every pixel."""
    write_elpv(place / "everything", split=False)
    files = sorted((place / "everything").rglob("*.png"))[::SAMPLED_EVERY]
    frames = [np.asarray(Image.open(path).convert("RGB")) for path in files]

    def taken_from(rows: int) -> tuple[np.ndarray, float]:
        """(frames, 5) statistics, and the median microseconds that one takes."""
        found, seconds = [], []
        for frame in frames:
            begun = time.perf_counter()
            found.append(frame_statistics(frame, "rgb", rows))
            seconds.append(time.perf_counter() - begun)
        return np.array(found), 1e6 * statistics.median(seconds)

    whole, _ = taken_from(max(frame.shape[0] for frame in frames))
    lines = [
        f"Error (standard deviation) over the spread of {len(frames)} photographs.\n",
        "| rows | brightness | contrast | sharpness | microseconds |",
        "|---|---|---|---|---|",
    ]
    for rows in (96, 64, 48, 32):
        sampled, took = taken_from(rows)
        apart = ((sampled - whole).std(0) / np.maximum(whole.std(0), 1e-9))[:3]
        lines.append(
            f"| {rows} | " + " | ".join(f"{each:.2f}" for each in apart) + f" | {took:.0f} |"
        )
    return "\n".join(lines)


def devices(place: Path) -> str:
    """The table of false alarms and of delays."""
    everything = place / "all"
    write_elpv(everything, split=False)
    draw = random.Random(0)
    photos, held = place / "photos", []
    for path in sorted(everything.rglob("*.png")):
        if draw.random() < 0.4:
            held.append(path)
        else:
            copy_photograph(path, photos)
    bundle = make_bundle(place, photos, "both")
    classify = Classifier(bundle)
    reference = read_reference(bundle)
    assert reference
    test = DriftTest(reference)
    plain = _values(test, _seen(classify, held, None))

    begun = time.perf_counter()
    alarms = sum(_alarms(reference, plain, number) for number in range(DEVICES))
    microseconds = 1e6 * (time.perf_counter() - begun) / (DEVICES * QUIET)
    sightings = _seen(classify, held, None)
    level = sum(
        _alarms(_sampled(sightings, reference, number), plain, number) for number in range(DEVICES)
    )

    lines = [
        f"Reference: {reference.images} images out of fold, {len(reference.events)} events; {microseconds:.0f} "
        "microseconds a frame.",
        "",
        f"| what comes, from frame {BEGINS} on | found within {WITHIN} frames | median delay | never in 2,000 |",
        "|---|---|---|---|",
        f"| nothing, {QUIET} frames; reference sampled from the same photographs | {level} of {DEVICES} alarm | | |",
        f"| nothing, {QUIET} frames; this bundle and its held-out photographs | {alarms} of {DEVICES} alarm | | |",
    ]

    def row(name: str, found: list[int | None]) -> None:
        known = [delay for delay in found if delay is not None]
        soon = sum(delay <= WITHIN for delay in known)
        median = f"{statistics.median(known):.0f}" if known else ""
        lines.append(f"| {name} | {soon} of {len(found)} | {median} | {len(found) - len(known)} |")

    for name, change in CHANGES.items():
        changed = _values(test, _seen(classify, held, change))
        row(name, _delays(bundle, plain, changed, 1.0, DEVICES))
    patches = [
        classify.sight(to_frame(np.asarray(patch), classify.input_format))[0]
        for patch in _patches()
    ]
    for share in (0.05, 0.1):
        new = _delays(bundle, plain, _values(test, patches), share, DEVICES)
        row(f"pictures of something else, {share:.0%}", new)

    mono = place / "mono"
    for path in photos.rglob("mono-*/*.png"):
        copy_photograph(path, mono)
    bundle = make_bundle(place, mono, "mono-only")
    classify = Classifier(bundle)
    reference = read_reference(bundle)
    assert reference
    test = DriftTest(reference)
    sides = [
        _values(
            test,
            _seen(classify, [path for path in held if path.parent.name.startswith(kind)], None),
        )
        for kind in ("mono", "poly")
    ]
    for share in (0.05, 0.2, 1.0):
        name = f"poly-crystalline cells to a bundle for mono, {share:.0%}"
        row(name, _delays(bundle, *sides, share, DEVICES))
    return "\n".join(lines)
