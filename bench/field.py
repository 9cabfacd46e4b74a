"""After shipping: drift found and falsely found, updates under kills and full disks, what collecting costs.

    python bench/field.py --what drift         # 10 minutes, 2 cores; writes bench/README.md
    python bench/field.py --what groups        # 5 minutes: drift where the images come in groups
    python bench/field.py --what update        # 8 minutes; full disks need root (tmpfs)
    python bench/field.py --what cost          # --onnxruntime DIR, for C++ too: a release of ONNX Runtime
    python bench/field.py --what enroll        # 15 minutes
    python bench/field.py --what review        # 5 minutes

drift: a bundle trained on 60 % of the demo's photographs, random split; frames are drawn from the
other 40 %, as they are or changed. 100 devices each: undrifted for 6,000 frames; changed from frame
500 on. The level: as many times a reference is made from a sample of those photographs, and frames
are drawn from the same ones. poly: a bundle that knows the mono-crystalline cells only, to which
poly-crystalline ones come.

enroll: bundles that know all classes but one, which is enrolled from few images, five times each; a
quarter of the old images and half of the new are kept for judging. Beside it the head is trained
again in closed form, on the same images and all of the old ones.

review: a bundle that tells intact from defective mono-crystalline cells sees poly-crystalline ones;
some are labelled, in the order of `ftkit review` or at random, and the head is trained again in
closed form with them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tables
from PIL import Image, ImageEnhance, ImageFilter
from search import write_digits
from sklearn.datasets import load_sample_images

from ftkit.cli.demo import write_elpv
from ftkit.exporting.drift import MORE_FRAMES
from ftkit.field.review import ordered
from ftkit.training.closed_form import default_folds, fit_head
from ftkit_export.bundle import archive
from ftkit_export.bundle.enroll import enroll
from ftkit_export.bundle.seal import write_manifest
from ftkit_export.proof.drift_reference import Seen, make_reference
from ftkit_export.runtime.collect import Collector, Sighting
from ftkit_export.runtime.drift import FRAME, DriftTest, Reference
from ftkit_export.runtime.predict import Classifier, read_reference
from ftkit_export.runtime.preprocess import to_frame
from ftkit_export.runtime.verify import read_manifest, verify

DEVICES = 100
QUIET = 6000  # frames: 30 days of 200
BEGINS = 500
WITHIN = 200
ENROLL_LIMIT = 0.02
LABELS = (10, 20, 40, 80, 160)
SMALL = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128", "--folds", "0")

Change = Callable[[Image.Image], Image.Image]


def _ftkit(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "ftkit", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


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
            _copy(path, photos)
    small = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128")
    bundle = _bundle(place, photos, "grouped", *small, "--group-by", "module[0-9]+")
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


def _bundle(place: Path, photos: Path, name: str, *settings: str) -> Path:
    out = place / f"{name}-bundle"
    _ftkit("train", photos, "--out", place / name, "--set", "augment.vflip=true", *settings)
    subprocess.run(
        [sys.executable, "-m", "ftkit", "export", place / name, "--out", out, "--quick"],
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return next(path for path in (out, out.with_name(f"{out.name}.inconclusive")) if path.exists())


def _copy(path: Path, photos: Path) -> None:
    """Copy a photograph into the folder of its class below `photos`."""
    (photos / path.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, photos / path.parent.name / path.name)


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


def drift(place: Path) -> str:
    """The table of false alarms and of delays."""
    everything = place / "all"
    write_elpv(everything, split=False)
    draw = random.Random(0)
    photos, held = place / "photos", []
    for path in sorted(everything.rglob("*.png")):
        if draw.random() < 0.4:
            held.append(path)
        else:
            _copy(path, photos)
    bundle = _bundle(place, photos, "both")
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
        _copy(path, mono)
    bundle = _bundle(place, mono, "mono-only")
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


KILLED = """
import sys
from pathlib import Path
from ftkit_export.bundle import update
update._self_check = lambda *_: None
update._require_as_fast = lambda *_: None
print("begun", flush=True)
update.update(Path(sys.argv[1]), Path(sys.argv[2]), key=Path(sys.argv[3]), allow_downgrade=True)
"""


def _versions(place: Path) -> tuple[list[Path], Path]:
    """Three signed zips of a small bundle, and the public key."""
    photos = place / "small"
    write_elpv(place / "every", split=False)
    for folder in (place / "every").iterdir():
        for path in sorted(folder.glob("*.png"))[:30]:
            _copy(path, photos)
    bundle = _bundle(place, photos, "little")
    key, public = place / "key.pem", place / "pub.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    told = read_manifest(bundle)
    kept = {name: told[name] for name in told if name not in ("schema", "files", "digest")}
    zips = []
    for version in (1, 2, 3):
        write_manifest(bundle, {**kept, "version": version})
        archive.sign(bundle, key)
        zips.append(place / f"{version}.zip")
        archive.pack(bundle, zips[-1])
    return zips, public


def updates(place: Path, kills: int, disks: int) -> str:
    """How many kills and full disks leave a bundle that verifies."""
    zips, public = _versions(place)
    device = place / "device"
    command = [sys.executable, "-c", KILLED]

    def install(into: Path, version: int) -> int:
        call = [*command, zips[version - 1], into, public]
        return subprocess.run(call, capture_output=True, check=False).returncode

    def begin(version: int) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [*command, zips[version - 1], device, public], stdout=subprocess.PIPE
        )
        assert child.stdout
        child.stdout.readline()
        return child

    assert install(device, 1) == install(device, 2) == 0
    with begin(3) as child:
        begun = time.perf_counter()
        child.wait()
    lasts = time.perf_counter() - begun

    old = new = 0
    draw = random.Random(0)
    for _ in range(kills):
        running = int(read_manifest(device / "current")["version"])
        kept = int(read_manifest(device / "previous")["version"])
        wanted = next(version for version in (1, 2, 3) if version not in (running, kept))
        with begin(wanted) as child:
            time.sleep(draw.random() * lasts * 1.1)
            child.kill()
        assert verify(device / "current").passed
        assert verify(device / "previous").passed
        ends = int(read_manifest(device / "current")["version"])
        assert ends in (running, wanted)
        old += ends == running
        new += ends == wanted

    small = place / "disk"
    small.mkdir()
    need = sum(path.stat().st_size for path in device.rglob("*") if path.is_file()) / 2e6
    full = 0
    for number in range(disks):
        size = need * (1.05 + 0.9 * number / max(1, disks - 1))
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1e6)}", "tmpfs", small], check=True
        )
        try:
            assert install(small, 1) == 0
            code = install(small, 2)
            assert verify(small / "current").passed
            assert int(read_manifest(small / "current")["version"]) == (2 if code == 0 else 1)
            full += code != 0
        finally:
            subprocess.run(["umount", small], check=True)
    return "\n".join(
        [
            f"- {kills} kills at random moments of an update ({lasts:.1f} s, checks of answers and speed left out): "
            f"all end on a bundle that verifies, {old} on the old one, {new} on the new.",
            f"- {disks} disks with room for 1.05 to 1.95 bundles of {need:.0f} MB: {full} were too small; all end on a "
            "bundle that verifies, the old one where the new did not fit.",
        ]
    )


def _frame_ms(command: list[object], photographs: list[Path]) -> tuple[float, float]:
    """(milliseconds an image, peak memory in MB) of a runner's process over all photographs."""
    begun = time.perf_counter()
    child = subprocess.Popen(
        [*map(str, command), *map(str, photographs)], stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    child.returncode = status
    assert status == 0
    return 1e3 * seconds / len(photographs), used.ru_maxrss / 1024


def _runner_cost(name: str, command: list[object], photographs: list[Path], place: Path) -> str:
    """A line on a runner as a process of its own, with and without collecting in turn."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(20):
        keeps = number % 2 == 0
        collects = ["--keep", place / f"{name}-kept"] if keeps else []
        found[keeps].append(_frame_ms([*command, *collects], photographs))
    (plain, memory), (collecting, more_memory) = (
        np.median(np.array(found[keeps]), axis=0) for keeps in (False, True)
    )
    disk = sum(
        path.stat().st_size for path in (place / f"{name}-kept").rglob("*") if path.is_file()
    )
    seen = 10 * len(photographs)
    more = 100 * (collecting / plain - 1)
    return (
        f"- {name}, processes of {len(photographs)} images in turn: {plain:.2f} ms an image without, "
        f"{collecting:.2f} ms with ({more:+.1f} %); peak memory {memory:.0f} and {more_memory:.0f} MB; "
        f"{disk / 1e6:.1f} MB of disk after {seen} images."
    )


def cost(place: Path, onnxruntime: Path | None) -> str:
    """Time and memory with and without collecting, in turn."""
    zips, _ = _versions(place)
    with archive.opened(zips[0]) as bundle:
        photographs = sorted((place / "small").rglob("*.png"))
        classify = Classifier(bundle, threads=1)
        images = [classify.decode(path) for path in photographs]
        collector = Collector(place / "kept", read_reference(bundle))
        times: dict[str, list[float]] = {"plain": [], "logged": [], "kept": []}
        for number in range(40 * len(images)):
            keeps = number % 2 == 0
            classify.collector = collector if keeps else None
            held = collector.kept
            begun = time.perf_counter()
            classify(images[number // 2 % len(images)])
            took = 1e3 * (time.perf_counter() - begun)
            what = "kept" if collector.kept != held else "logged" if keeps else "plain"
            times[what].append(took)
        collector.close()
        kept = [path for path in (place / "kept").rglob("*") if path.is_file()]

        (place / "frames").mkdir()
        frames = []
        for number, image in enumerate(images):
            frames.append(place / "frames" / f"{number}.ppm")
            Image.fromarray(image).save(frames[-1])
        python: list[object] = [sys.executable, bundle / "device" / "classify.py", "--threads", 1]
        runners = [_runner_cost("Python", python, frames, place)]
        if onnxruntime:
            build = place / "build"
            source = bundle / "device" / "cpp"
            for step in (
                ["-S", source, "-B", build, f"-DONNXRUNTIME_ROOT={onnxruntime}"],
                ["--build", build],
            ):
                subprocess.run(["cmake", *map(str, step)], check=True, stdout=subprocess.DEVNULL)
            program: list[object] = [build / "classify", "--bundle", bundle]
            runners.append(_runner_cost("C++", program, frames, place))
    plain, logged, keeping = (statistics.median(times[what]) for what in times)
    disk = sum(path.stat().st_size for path in kept)
    more = 100 * (logged / plain - 1)
    return (
        f"- One thread, in turn: p50 {plain:.2f} ms without `--keep`; with it {logged:.2f} ms ({more:+.1f} %) for an "
        f"image that is logged and tested for drift ({len(times['logged'])} images), {keeping:.2f} ms for one whose "
        f"picture is kept, as PNG, too ({len(times['kept'])}); {disk / 1e6:.0f} MB of disk.\n"
    ) + "\n".join(runners)


def _held_back(place: Path, photos: Path, held: str) -> list[str]:
    """Rows of the table for a data set from which one class is held back."""
    draw = random.Random(0)
    known = place / "known"
    fresh: list[tuple[Path, str]] = []
    pool = []
    for path in sorted(photos.rglob("*.png")):
        label = path.parent.name
        if draw.random() < (0.5 if label == held else 0.25):
            fresh.append((path, label))
        elif label == held:
            pool.append(path)
        else:
            _copy(path, known)
    bundle = _bundle(place, known, "first", *SMALL)

    classify = Classifier(bundle)
    classes = [*classify.labels, held]

    def embedded(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        seen = [
            classify.sight(to_frame(classify.decode(path), classify.input_format), statistics=False)
            for path in files
        ]
        return np.stack([sighting.embedding for sighting, _ in seen]), np.stack(
            [answer for _, answer in seen]
        )

    files = sorted(known.rglob("*.png"))
    old, _ = embedded(files)
    old_labels = np.array([classes.index(path.parent.name) for path in files])
    judged, before = embedded([path for path, _ in fresh])
    truth = np.array([classes.index(label) for _, label in fresh])
    is_new = truth == len(classes) - 1
    right = (before.argmax(1) == truth)[~is_new].mean()

    rows = []
    for count in (5, 10, 20, 50):
        figures = []
        for seed in range(5):
            images = random.Random(seed).sample(pool, count)
            out = place / f"next-{count}-{seed}"
            begun = time.perf_counter()
            enrolled = enroll(bundle, held, images, out, max_drop=ENROLL_LIMIT)
            seconds = time.perf_counter() - begun
            after = Classifier(enrolled.folder)
            said = np.array([classes.index(after(path).label) for path, _ in fresh])
            shutil.rmtree(enrolled.folder)

            new, _ = embedded(images)
            labels = np.concatenate([old_labels, np.full(count, len(classes) - 1)])
            weights = 1 / np.bincount(labels)
            head = fit_head(
                np.vstack([old, new]),
                labels,
                default_folds(labels, [""] * len(labels)),
                len(classes),
                weights / weights.mean(),
            )
            again = (judged @ head.weight.T + head.bias).argmax(1)
            figures.append(
                (
                    np.mean(said[is_new] == truth[is_new]),
                    enrolled.recognised / enrolled.images,
                    right - np.mean(said[~is_new] == truth[~is_new]),
                    np.mean(again[is_new] == truth[is_new]),
                    right - np.mean(again[~is_new] == truth[~is_new]),
                    seconds,
                )
            )
        table = np.array(figures)
        recall, believed, lost, recall_again, lost_again, seconds = table.mean(0)
        worst = 100 * table[:, 2].max()
        rows.append(
            f"| {held} | {count} | {recall:.2f} ({believed:.2f}) | {100 * lost:.1f}, at most {worst:.1f} | "
            f"{recall_again:.2f} | {100 * lost_again:.1f} | {seconds:.1f} |"
        )
    return rows


def enrolments(place: Path) -> str:
    """The table of enrolled classes."""
    lines = [
        f"Limit {100 * ENROLL_LIMIT:.0f} points. Means of five draws, judged on images that no bundle has seen; in "
        "brackets what `ftkit enroll` says itself, each image by the others.",
        "",
        "| class | images | recognised | points lost by the old | head again: recognised | points lost | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = place / "cells"
    write_elpv(cells, split=False)
    digits = place / "digits"
    write_digits(digits)
    for photos, held in (
        (cells, "mono-defect"),
        (cells, "poly-ok"),
        (digits, "digit-3"),
        (digits, "digit-8"),
    ):
        folder = place / held
        folder.mkdir()
        lines += _held_back(folder, photos, held)
    return "\n".join(lines)


def _head(embedding: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    head = fit_head(embedding, labels, default_folds(labels, [""] * len(labels)), 2)
    return head.weight, head.bias


def _first_as_good(accuracies: list[float], wanted: float) -> int | None:
    """Labels from which on the accuracy is never below `wanted`."""
    below = [count for count, value in zip(LABELS, accuracies, strict=True) if value < wanted]
    later = [count for count in LABELS if count > max(below, default=-1)]
    return later[0] if later else None


def reviews(place: Path) -> str:
    """Labels that it takes to recover from poly-crystalline cells, by the order they are labelled in."""
    cells = place / "cells"
    write_elpv(cells, split=False)
    known = place / "known"
    for path in cells.rglob("mono-*/*.png"):
        folder = known / path.parent.name.removeprefix("mono-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    bundle = _bundle(place, known, "first", *SMALL)
    classify = Classifier(bundle, threads=1)

    def looked_at(files: list[Path]) -> tuple[list[Sighting], np.ndarray, np.ndarray]:
        seen = [
            classify.sight(to_frame(classify.decode(path), classify.input_format))[0]
            for path in files
        ]
        labels = np.array(
            [classify.labels.index(path.parent.name.split("-")[-1]) for path in files]
        )
        return seen, np.stack([sighting.embedding for sighting in seen]), labels

    _, old, old_labels = looked_at(sorted(known.rglob("*.png")))
    files = sorted(cells.rglob("poly-*/*.png"))
    sightings, embedding, labels = looked_at(files)

    curves: dict[str, list[list[float]]] = {"review": [], "random": []}
    needed: dict[str, list[int | None]] = {"review": [], "random": []}
    whole = []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(files))
        stream, judged = order[: len(order) // 2], order[len(order) // 2 :]

        collected = place / f"collected-{seed}"
        content = {files[row].read_bytes(): int(row) for row in stream}
        collector = Collector(collected, read_reference(bundle), seed=seed)
        for row in stream:
            collector.offer(sightings[row], lambda row=row: (files[row].read_bytes(), ".png"))
        collector.close()
        by_review = [
            content[(collected / picture.path).read_bytes()] for picture in ordered(collected)
        ]

        def accuracy(rows: list[int], judged: np.ndarray = judged) -> float:
            weight, bias = _head(
                np.vstack([old, embedding[rows]]), np.concatenate([old_labels, labels[rows]])
            )
            return float(((embedding[judged] @ weight.T + bias).argmax(1) == labels[judged]).mean())

        whole.append((accuracy([]), accuracy(list(stream))))
        for name, rows in (("review", by_review), ("random", [int(row) for row in stream])):
            curve = [accuracy(rows[:count]) for count in LABELS]
            curves[name].append(curve)
            needed[name].append(_first_as_good(curve, sum(whole[-1]) / 2))
        shutil.rmtree(collected)

    before, after = np.array(whole).mean(0)
    judged_on = len(files) - len(files) // 2
    lines = [
        f"Accuracy on {judged_on} poly-crystalline cells that are not labelled, means of ten seeds: "
        f"{before:.3f} before, {after:.3f} with all {len(files) // 2} of the stream labelled.",
        "",
        f"| order | {' | '.join(f'{count} labels' for count in LABELS)} | labels for half of the gain |",
        f"|---|{'---|' * len(LABELS)}---|",
    ]
    for name, curve in curves.items():
        means = " | ".join(f"{value:.3f}" for value in np.array(curve).mean(0))
        counts = sorted(math.inf if count is None else count for count in needed[name])
        lines.append(
            f"| {name} | {means} | median {statistics.median(counts):.0f}, {counts[0]} to {counts[-1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="drift,groups,update,cost,enroll,review")
    parser.add_argument("--onnxruntime", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disks", type=int, default=20)
    options = parser.parse_args()
    wanted = options.what.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = str(Path(scratch) / "cache")
        for name, measured in (
            ("drift", drift),
            ("groups", groups),
            ("update", lambda place: updates(place, options.kills, options.disks)),
            ("cost", lambda place: cost(place, options.onnxruntime)),
            ("enroll", enrolments),
            ("review", reviews),
        ):
            if name in wanted:
                place = Path(scratch) / name
                place.mkdir()
                tables.write(f"field-{name}", measured(place), tables.README)


if __name__ == "__main__":
    main()
