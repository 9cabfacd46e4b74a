"""After shipping: drift found and falsely found, updates under kills and full disks, what collecting costs.

    python bench/field.py --what drift         # 10 minutes, 2 cores; writes bench/README.md
    python bench/field.py --what groups        # 5 minutes: drift where the images come in groups
    python bench/field.py --what update        # 8 minutes; full disks need root (tmpfs)
    python bench/field.py --what cost          # --onnxruntime DIR, for C++ too: a release of ONNX Runtime
    python bench/field.py --what enroll        # 15 minutes
    python bench/field.py --what review        # 5 minutes

drift, groups: see drift.py.

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
from pathlib import Path

import drift
import numpy as np
import tables
from drift import copy_photograph, make_bundle
from PIL import Image
from search import write_digits

from ftkit.cli.demo import write_elpv
from ftkit.field.review import ordered
from ftkit.training.closed_form import default_folds, fit_head
from ftkit_export.bundle import archive
from ftkit_export.bundle.enroll import enroll
from ftkit_export.bundle.seal import write_manifest
from ftkit_export.runtime.collect import Collector, Sighting
from ftkit_export.runtime.predict import Classifier, read_reference
from ftkit_export.runtime.preprocess import to_frame
from ftkit_export.runtime.verify import read_manifest, verify

ENROLL_LIMIT = 0.02
LABELS = (10, 20, 40, 80, 160)
SMALL = ("--set", "preprocess.size=128", "--set", "preprocess.resize=128", "--folds", "0")


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
            copy_photograph(path, photos)
    bundle = make_bundle(place, photos, "little")
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
        assert (device / "previous").resolve() != (device / "current").resolve()
        ends = int(read_manifest(device / "current")["version"])
        assert ends in (running, wanted)
        old += ends == running
        new += ends == wanted

    small = place / "disk"
    small.mkdir()
    running = (device / "current").resolve()
    need = sum(path.stat().st_size for path in running.rglob("*") if path.is_file()) / 1e6
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
            f"- {disks} disks with room for 1.05 to 1.95 bundles of {need:.0f} MB, where an update holds both: {full} "
            "were too small; all end on a bundle that verifies, the old one where the new did not fit.",
        ]
    )


# Seconds and peak kB of a command. It is started by this small process, since a child's peak counts the memory
# of the one that started it.
LAUNCHER = """
import resource, subprocess, sys, time
begun = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _frame_ms(command: list[object], photographs: list[Path]) -> tuple[float, float]:
    """(milliseconds an image, peak memory in MB) of a runner's process over all photographs."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *map(str, command), *map(str, photographs)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, peak = map(float, done.stdout.split())
    return 1e3 * seconds / len(photographs), peak / 1024


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
            copy_photograph(path, known)
    bundle = make_bundle(place, known, "first", *SMALL)

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
    bundle = make_bundle(place, known, "first", *SMALL)
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
    parser.add_argument("--what", default="drift,groups,sampling,update,cost,enroll,review")
    parser.add_argument("--onnxruntime", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disks", type=int, default=20)
    options = parser.parse_args()
    wanted = options.what.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = str(Path(scratch) / "cache")
        for name, measured in (
            ("drift", drift.devices),
            ("groups", drift.groups),
            ("sampling", drift.sampling),
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
