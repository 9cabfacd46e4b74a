"""`ftkit eval`: a shipped file on labelled images, and against the release before it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import ftkit
from PIL import Image

from ftkit_export.predict import Classifier


@pytest.fixture(scope="module")
def rotated(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bad release: the same file with its labels rotated by one."""
    model = onnx.load(bundle / "model.onnx")
    for item in model.metadata_props:
        if item.key == "labels":
            labels = json.loads(item.value)
            item.value = json.dumps([*labels[1:], labels[0]])
    path = tmp_path_factory.mktemp("bad release") / "model.onnx"
    onnx.save(model, path)
    return path


def test_accuracy_is_that_of_predict_and_needs_no_torch(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    script = ("import atexit, sys\nfrom ftkit.cli import main\n"
              "atexit.register(lambda: print('torch' in sys.modules))\nmain()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, "eval", str(bundle), str(photos), "--json", str(out)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "torch was imported"
    found, classify = json.loads(out.read_text())["metrics"], Classifier(bundle)
    files = list(photos.rglob("*.png"))
    right = sum(classify(path).label == path.parent.name for path in files)
    assert (found["images"], found["accuracy"]) == (len(files), right / len(files))
    assert {"nll", "ece", "recall", "confusion"} <= set(found)


def test_a_bad_release_is_exit_1_with_every_image_that_was_right(bundle: Path, photos: Path, rotated: Path) -> None:
    result = ftkit("eval", rotated, photos, "--against", bundle, "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["against"]
    assert found["verdict"] == "refused"
    was_right = round(found["metrics"]["accuracy"] * found["metrics"]["images"])
    assert len(found["regressed"]) == found["paired"]["worse"] > 0.5 * was_right
    assert all(item["label"] != item["said"] for item in found["regressed"])
    assert "formerly right and now wrong" in result.stderr
    assert "surely lost more than 1.0%" in result.stderr


def test_the_same_release_passes_when_the_images_can_tell_and_else_says_so(bundle: Path, photos: Path) -> None:
    """120 images with no disagreement bound the drop at about 2.2 points."""
    few = ftkit("eval", bundle, photos, "--against", bundle)
    assert few.exit_code == 3, few.output
    assert "inconclusive" in few.stdout
    assert max(map(len, few.stdout.splitlines())) <= 80
    assert ftkit("eval", bundle, photos, "--against", bundle, "--max-drop", "0.05").exit_code == 0


def test_one_class_that_surely_got_worse_is_enough(bundle: Path, photos: Path, tmp_path: Path) -> None:
    """Whatever the other classes won: here they stay as they are."""
    from ftkit.intake import labelled
    from ftkit.release import Answers, against, answers

    old = answers(bundle, labelled(photos))
    said = tuple("mono-ok" if label == "poly-ok" else answer
                 for label, answer in zip(old.labels, old.said, strict=True))  # fmt: skip
    new = Answers(**{**vars(old), "said": said})
    change = against(new, old, max_drop=0.3)
    assert change.paired.verdict(0.3) != "refused"
    assert change.verdict == "refused"
    assert change.worse_classes == ["poly-ok"]


def test_unreadable_images_are_named_and_left_out_and_unknown_classes_refused(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "held out" / "mono-ok"
    folder.mkdir(parents=True)
    for path in sorted((photos / "mono-ok").iterdir())[:3]:
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
