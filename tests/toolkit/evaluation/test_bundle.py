"""`ftkit eval`: an exported file on labelled images, alone and against the previous release."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import ftkit
from PIL import Image

from ftkit_export.runtime.predict import Classifier


@pytest.fixture(scope="module")
def rotated(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A faulty release: the same file with its labels rotated by one."""
    model = onnx.load(bundle / "model.onnx")
    for item in model.metadata_props:
        if item.key == "labels":
            labels = json.loads(item.value)
            item.value = json.dumps([*labels[1:], labels[0]])
    path = tmp_path_factory.mktemp("bad release") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def copies(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the images with unknown digests, to get many evaluation images."""
    root = tmp_path_factory.mktemp("copies")
    for path in photos.rglob("*.png"):
        target = root / path.relative_to(photos)
        target.parent.mkdir(exist_ok=True)
        with Image.open(path) as image:
            image.save(target, compress_level=1)
    return root


def test_images_that_the_model_was_trained_on_are_left_out_and_counted(
    bundle: Path, run: Path, photos: Path, tmp_path: Path
) -> None:
    """Regression: with 18 of 24 images from training, eval gave 0.959 instead of 0.845."""
    splits = json.loads((run / "run.json").read_text())["splits"]
    result = ftkit("eval", bundle, photos, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["left_out"] == {str(bundle): splits["train"] + splits["val"]}
    assert f"left out: {splits['train'] + splits['val']} images" in result.stderr
    expected = json.loads((run / "run.json").read_text())["metrics"]["test"]
    assert (found["metrics"]["images"], found["metrics"]["accuracy"]) == (
        splits["test"],
        expected["accuracy"],
    )

    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    shutil.copytree(photos / "mono-ok", moved / "new class")  # unknown to splits.csv
    again = ftkit("eval", bundle, bundle / "splits.csv", "--root", moved, "--json", "-")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["metrics"] == found["metrics"]
    assert "left out" not in again.stderr, "it names the test images"
    assert str(photos) not in (bundle / "splits.csv").read_text()

    trained = set((bundle / "trained_on.txt").read_text().split())
    only = tmp_path / "seen" / "mono-ok"
    only.mkdir(parents=True)
    for path in (photos / "mono-ok").iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest()[:32] in trained:
            shutil.copy(path, only)
    result = ftkit("eval", bundle, only.parent)
    assert result.exit_code == 2
    assert "found that it was on all" in result.stderr
    result = ftkit("eval", bundle / "model.onnx", only.parent)
    assert result.exit_code == 0
    assert "does not tell what it was trained on" in result.stderr


def test_images_in_groups_are_compared_as_groups(bundle: Path, copies: Path) -> None:
    """120 agreeing images bound the drop at 2.5 points; in four groups the bound is useless."""
    alone = ftkit("eval", bundle, copies, "--against", bundle, "--max-drop", "0.04", "--json", "-")
    grouped = ftkit(
        "eval", bundle, copies, "--against", bundle, "--group-by", "^([^/]+)/", "--json", "-"
    )
    one, other = (
        json.loads(result.stdout, parse_constant=pytest.fail) for result in (alone, grouped)
    )
    assert {part["effect"] for part in other["against"]["parts"].values()} == {None}, "one group"
    assert (one["metrics"]["clusters"], one["against"]["verdict"]) == (None, "accepted")
    assert (other["metrics"]["clusters"], other["against"]["compared"]["clusters"]) == (4, 4)
    widths = [
        told["metrics"]["accuracy_high"] - told["metrics"]["accuracy_low"] for told in (one, other)
    ]
    assert widths[1] > widths[0]
    assert other["against"]["compared"]["high"] > one["against"]["compared"]["high"]
    assert "images, as if independent" in alone.stderr
    assert "images in 4 groups" in grouped.stderr


def test_accuracy_is_that_of_predict_and_needs_no_torch(
    bundle: Path, copies: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    script = (
        "import atexit, sys\nfrom ftkit.cli.main import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "eval", str(bundle), str(copies), "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "torch was imported"
    found, classify = json.loads(out.read_text())["metrics"], Classifier(bundle)
    files = list(copies.rglob("*.png"))
    right = sum(classify(path).label == path.parent.name for path in files)
    assert (found["images"], found["accuracy"]) == (len(files), right / len(files))
    assert {"nll", "ece", "recall", "confusion"} <= set(found)


def test_a_bad_release_is_exit_1_with_every_image_that_was_right(
    bundle: Path, copies: Path, rotated: Path
) -> None:
    result = ftkit("eval", rotated, copies, "--against", bundle, "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["against"]
    assert found["verdict"] == "refused"
    was_right = round(found["metrics"]["accuracy"] * found["metrics"]["images"])
    assert len(found["regressed"]) == found["compared"]["worse"] > 0.5 * was_right
    assert all(item["label"] != item["said"] for item in found["regressed"])
    assert "formerly right and now wrong" in result.stderr
    assert "surely lost more than 1.0%" in result.stderr


def test_the_same_release_passes_when_the_images_can_tell_and_else_says_so(
    bundle: Path, copies: Path
) -> None:
    """120 images without a disagreement bound the drop at about 2.5 points."""
    few = ftkit("eval", bundle, copies, "--against", bundle)
    assert few.exit_code == 3, few.output
    assert "inconclusive" in few.stdout
    assert max(map(len, few.stdout.splitlines())) <= 80
    assert ftkit("eval", bundle, copies, "--against", bundle, "--max-drop", "0.05").exit_code == 0


def test_one_class_that_surely_got_worse_is_enough(bundle: Path, copies: Path) -> None:
    """Whatever the other classes gained; here they are unchanged."""
    from ftkit.data.dataset import labelled
    from ftkit.evaluation.bundle import ClassAnswers, answers_of

    old = answers_of(bundle, labelled(copies))
    assert isinstance(old, ClassAnswers)
    said = tuple(
        "mono-ok" if label == "poly-ok" else answer
        for label, answer in zip(old.labels, old.said, strict=True)
    )
    new = ClassAnswers(**{**vars(old), "said": said})
    change = new.against(old, max_drop=0.3)
    assert change.compared.verdict(0.3) != "refused"
    assert change.verdict == "refused"
    assert change.worse_parts == ["poly-ok"]


def test_unreadable_images_are_named_and_left_out_and_unknown_classes_refused(
    bundle: Path, copies: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "held out" / "mono-ok"
    folder.mkdir(parents=True)
    for path in sorted((copies / "mono-ok").iterdir())[:3]:
        shutil.copy(path, folder)
    whole = next(folder.iterdir()).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (40, 30), (10, 200, 30, 40)).save(folder / "print.jpg")
    result = ftkit("eval", bundle, folder.parent)
    assert result.exit_code == 0, result.output
    assert "on 4 images" in result.stdout, "one class is enough to be judged on"
    assert "left out:" in result.stderr and "cut.png" in result.stderr
    (folder.parent / "unknown").mkdir()
    shutil.copy(folder / "print.jpg", folder.parent / "unknown")
    result = ftkit("eval", bundle, folder.parent)
    assert (result.exit_code, "expected a class that" in result.stderr) == (2, True)
