"""After shipping, end to end: a device collects, its log is tested for drift at home."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ftkit
from PIL import Image

from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.preprocess import decode
from ftkit_export.runtime.verify import verify


def _device(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "device" / "classify.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def photographs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs of the small run twice, in random order."""
    folder = tmp_path_factory.mktemp("field") / "frames"
    folder.mkdir()
    paths = sorted(photos.glob("*/*.png")) * 2
    for number, place in enumerate(np.random.default_rng(0).permutation(len(paths))):
        shutil.copyfile(paths[place], folder / f"{number:03d}.png")
    return folder


def test_a_device_collects_and_its_log_shows_drift(
    bundle: Path, photographs: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "collected"
    told = _device(bundle, photographs, "--keep", kept, "--control", "0.2")
    assert (told.returncode, told.stderr) == (0, "")
    lines = [json.loads(line) for line in (kept / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(told.stdout.splitlines()) == 240
    for line in lines:
        assert not line["kept"] or (kept / line["kept"]).is_file()
    remarks = {"foreign": "foreign", "doubtful": "doubtful", "": "control"}
    for said, line in zip(told.stdout.splitlines(), lines, strict=True):
        remark = said.split("  ")[3] if said.count("  ") == 3 else ""
        reasons = (remarks[remark], "control")  # a control may be of any kind
        assert line["kept"] is None or line["kept"].split("/")[0] in reasons
    kinds = {
        said.split("  ")[3] if said.count("  ") == 3 else ""
        for said, line in zip(told.stdout.splitlines(), lines, strict=True)
        if line["kept"] and line["kept"].startswith("control")
    }
    assert len(kinds) > 1, "controls stand for all that is seen"
    assert verify(bundle).passed, "nothing is written into the bundle"

    alike = ftkit("drift", bundle, kept)
    assert alike.exit_code == 0, alike.output
    page = (kept / "drift.html").read_text()
    assert "No drift found" in page

    dark = tmp_path / "dark"
    dark.mkdir()
    for path in list(photographs.iterdir())[:120]:
        with Image.open(path) as image:
            image.point(lambda grey: grey // 3).save(dark / path.name)
    told = _device(bundle, dark, "--keep", kept)
    assert told.returncode == 0
    assert "drift:" in told.stderr, "the device says so at once"

    moved = ftkit("drift", bundle, kept, "--json", tmp_path / "drift.json")
    assert moved.exit_code == 1, moved.output
    found = json.loads((tmp_path / "drift.json").read_text())
    assert found["images"] == 360
    assert all(200 <= alarm["since"] <= 300 for alarm in found["alarms"]), "it began at 240"
    for alarm in found["alarms"]:
        assert all((kept / picture).is_file() for picture in alarm["pictures"])
    (gone,) = {alarm["pictures"][0] for alarm in found["alarms"][:1]}
    (kept / gone).unlink()  # as the reservoir does
    again = ftkit("drift", bundle, kept, "--json", tmp_path / "drift.json")
    assert again.exit_code == 1
    assert gone not in (tmp_path / "drift.json").read_text()

    log = (kept / "log.jsonl").read_text().splitlines(keepends=True)
    (kept / "log.jsonl").write_text("".join(log[-20:]))  # the others were rotated away
    late = ftkit("drift", bundle, kept, "--json", tmp_path / "late.json")
    assert late.exit_code == 1, "twenty images alone do not tell"
    told_late = json.loads((tmp_path / "late.json").read_text())
    assert told_late["forgotten"] == 340
    assert {alarm["since"] for alarm in told_late["alarms"]} == {
        alarm["since"] for alarm in found["alarms"]
    }
    (kept / "log.jsonl").write_text("".join(log))

    check = _device(bundle, "--self-check", "--keep", kept)
    assert check.returncode == 0
    assert "since image" in check.stdout
    few = tmp_path / "few"
    _device(bundle, dark / sorted(dark.iterdir())[0].name, "--keep", few)
    assert ftkit("drift", bundle, few).exit_code == 3


def test_a_log_of_another_bundle_or_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    missing = ftkit("drift", bundle, tmp_path)
    assert (missing.exit_code, "found none" in missing.stderr) == (2, True)
    line = {
        "time": 0,
        "bundle": "another",
        "label": "cat",
        "probability": 1,
        "score": 1,
        "coordinates": [0],
        "frame": [0],
        "kept": None,
    }
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n{half")
    other = ftkit("drift", bundle, tmp_path)
    assert (other.exit_code, "one of another" in other.stderr) == (2, True)


def test_a_watched_folder_is_classified_until_stopped(
    bundle: Path, photographs: Path, tmp_path: Path
) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    first, second = sorted(photographs.iterdir())[:2]
    shutil.copyfile(first, incoming / first.name)
    (incoming / "broken.png").write_bytes(b"no image")
    command = [sys.executable, str(bundle / "device" / "classify.py"), "--watch", str(incoming)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert first.name in running.stdout.readline()
        shutil.copyfile(second, incoming / second.name)
        assert second.name in running.stdout.readline()
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 0
    assert "broken.png" in said, "one bad file does not end the watch"


def test_frames_and_bytes_are_kept_as_pictures(
    bundle: Path, photographs: Path, tmp_path: Path
) -> None:
    path = next(photographs.iterdir())
    with Classifier(bundle, keep=tmp_path / "kept") as classify:
        assert classify.collector
        classify.collector._control = 1.0
        pixels = classify.decode(path)
        for image in (pixels, path.read_bytes(), path):
            classify(image)
        classify.frame(pixels)
    kept = sorted((tmp_path / "kept").rglob("*.png"))
    assert len(kept) == 4
    assert all(decode(picture).shape == pixels.shape for picture in kept)


def test_a_shadow_is_compared_and_its_labels_settle_which_is_better(
    bundle: Path, photographs: Path, tmp_path: Path
) -> None:
    """The second bundle has two classes exchanged: it is worse wherever they differ."""
    second = tmp_path / "second"
    shutil.copytree(bundle, second)
    model = onnx.load(second / "model.onnx")
    labels = next(each for each in model.metadata_props if each.key == "labels")
    names = json.loads(labels.value)
    labels.value = json.dumps([names[1], names[0], *names[2:]])
    onnx.save(model, second / "model.onnx")

    kept = tmp_path / "kept"
    told = _device(bundle, photographs, "--keep", kept, "--shadow", second, "--shadow-every", "2")
    assert (told.returncode, told.stderr) == (0, "")
    alone = _device(bundle, photographs)
    assert told.stdout == alone.stdout, "the second's answers are not shown"

    first = ftkit("shadow", kept)
    assert first.exit_code == 3, first.output
    missing = _device(bundle, photographs, "--keep", tmp_path / "x", "--shadow", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (0, alone.stdout), "it classifies all the same"
    assert "shadow: nothing is compared" in missing.stderr
    table = kept / "shadow" / "shadow.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {frozenset((row["first"], row["second"])) for row in rows} == {frozenset(names[:2])}
    for row in rows:
        row["label"] = row["first"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settled = ftkit("shadow", kept, "--json", tmp_path / "shadow.json")
    assert settled.exit_code == 0, settled.output
    found = json.loads((tmp_path / "shadow.json").read_text())
    assert (found["verdict"], found["frames"]) == ("first", 120)
    assert found["gain"][0] == pytest.approx(-found["differing"])
    log = kept / "shadow.jsonl"
    line = {**json.loads(log.read_text().splitlines()[-1]), "pair": "another", "kept": None}
    log.write_text(log.read_text() + json.dumps(line) + "\n")
    ftkit("shadow", kept)
    with table.open(newline="") as file:
        left = {row["path"]: row["label"] for row in csv.DictReader(file)}
    assert left == {row["path"]: row["label"] for row in rows}, "labels are never lost"
    assert ftkit("shadow", tmp_path).exit_code == 2
