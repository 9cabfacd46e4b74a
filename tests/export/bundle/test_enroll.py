"""A class that is enrolled is known on every runner, costs the old classes what is said, and is proven."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ftkit, rewrite
from PIL import Image
from sklearn.datasets import load_sample_images

from ftkit_export.bundle import enroll as enroll_module
from ftkit_export.bundle.archive import check_signature
from ftkit_export.bundle.enroll import enroll
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.enroll import FILE, KeptSample
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.verify import read_manifest, verify

# The bundle keeps 16 test images: even if none is lost, the bound is 17 points
LIMIT = 0.2


def _patches(folder: Path, picture: int, count: int) -> Path:
    """Patches of one of scikit-learn's photographs: nothing like a solar cell."""
    draw = np.random.default_rng(picture)
    folder.mkdir()
    pixels = load_sample_images().images[picture]
    for number in range(count):
        top, left = draw.integers(427 - 200), draw.integers(640 - 200)
        Image.fromarray(pixels[top : top + 200, left : left + 200]).save(
            folder / f"{number:02d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def temple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 patches of a temple."""
    return _patches(tmp_path_factory.mktemp("temple") / "temple", 0, 12)


@pytest.fixture(scope="module")
def enrolled(
    bundle: Path, temple: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle, which also knows the temple, signed."""
    out = tmp_path_factory.mktemp("enrolled") / "next"
    result = ftkit(
        "enroll", bundle, "temple", temple, "--out", out, "--max-drop", LIMIT, "--sign", keys[0]
    )
    assert result.exit_code == 0, result.output
    return out


def test_the_new_class_is_known_and_the_old_ones_keep_their_shares(
    bundle: Path, enrolled: Path, photos: Path, tmp_path: Path
) -> None:
    before = Classifier(bundle)
    after = Classifier(enrolled)
    assert after.labels == [*before.labels, "temple"]

    fresh = sorted(_patches(tmp_path / "fresh", 0, 30).iterdir())[12:]  # others than were enrolled
    answers = [after(path) for path in fresh]
    assert sum(answer.label == "temple" for answer in answers) >= 0.9 * len(fresh)
    assert sum(before(path).foreign for path in fresh) > sum(answer.foreign for answer in answers)

    for path in sorted(photos.rglob("*.png"))[::10]:
        old, new = before(path), after(path)
        rest = 1 - new.probabilities["temple"]
        for label, share in old.probabilities.items():
            assert new.probabilities[label] == pytest.approx(share * rest, abs=1e-5)


def test_the_enrolled_bundle_is_proven_signed_and_a_model_onnx_accepts(
    bundle: Path, enrolled: Path, keys: tuple[Path, Path]
) -> None:
    found = verify(enrolled)
    assert found.passed
    images = len(json.loads((bundle / "golden" / "golden.json").read_text())["images"])
    assert {check.images for check in found.checks} == {images + 4}
    check_signature(enrolled, keys[1])

    manifest = read_manifest(enrolled)
    assert (bundle / "variants" / "explain.onnx").is_file()
    assert not (enrolled / "variants" / "explain.onnx").exists(), "its head knows the old classes"
    for forms in manifest["variants"].values():
        for file in forms.values():
            onnx.checker.check_model(onnx.load(enrolled / file), full_check=True)
    (entry,) = manifest["enrolled"]
    assert entry["name"] == "temple"
    assert entry["lost"] / entry["kept"] <= entry["drop_high"] <= LIMIT
    assert manifest["gates"][:-1] == read_manifest(bundle)["gates"]
    assert manifest["version"] >= read_manifest(bundle)["version"]


def test_another_class_can_follow_on_a_device_without_onnx_scipy_or_torch(
    enrolled: Path, tmp_path: Path
) -> None:
    flower = _patches(tmp_path / "flower", 1, 12)
    script = enrolled / "device" / "classify.py"
    hidden = ("onnx", "scipy", "torch", "click", "cryptography")
    run = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden!r})); sys.argv = sys.argv[1:]; "
        f"sys.path.insert(0, {str(script.parent)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", run, script, "--enroll", "flower", "--max-drop", str(LIMIT)]
    command += ["--group-by", "0([0-4])[.]png"]  # the seven others are on their own
    out = tmp_path / "both"
    done = subprocess.run(
        [*command, "--out", out, flower], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = read_manifest(out)["enrolled"]
    assert [each["groups"] for each in told] == [None, 12]

    assert verify(out).passed
    classify = Classifier(out)
    assert classify.labels[-2:] == ["temple", "flower"]
    said = [classify(path).label for path in sorted(flower.iterdir())]
    assert said.count("flower") >= 10


def test_the_vectors_for_c_and_cpp_have_a_value_for_every_class(enrolled: Path) -> None:
    head, *lines = (enrolled / "golden" / "raw" / "index.txt").read_text().splitlines()
    images, classes, *_ = map(float, head.split())
    labels = (enrolled / "labels.txt").read_text().splitlines()
    assert (images, classes) == (len(lines), len(labels))
    values = np.fromfile(enrolled / "golden" / "raw" / "probabilities.f32", "<f4")
    assert np.allclose(values.reshape(len(lines), len(labels)).sum(1), 1, atol=1e-5)


def test_a_new_name_for_an_old_class_cannot_take_it_over(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    found = enroll(
        bundle,
        "twin",
        sorted((photos / "mono-ok").iterdir())[:20],
        tmp_path / "twin",
        max_drop=LIMIT,
    )
    assert found.lost / found.kept <= LIMIT
    assert found.drop_high <= LIMIT


def test_images_of_a_group_are_judged_by_those_of_others(
    bundle: Path, temple: Path, tmp_path: Path
) -> None:
    flower = _patches(tmp_path / "flower", 1, 4)
    mixed = [*sorted(flower.iterdir()), *sorted(temple.iterdir())[:4]]
    alone, grouped = (
        enroll(bundle, "sight", mixed, tmp_path / name, max_drop=LIMIT, group_by=group_by)
        for name, group_by in (("alone", ""), ("grouped", "flower|temple"))
    )
    assert (alone.groups, grouped.groups) == (None, 2)
    assert grouped.recognised <= alone.recognised
    assert grouped.recall_low < alone.recall_low - 0.3, "two groups say less than eight images"


def test_where_the_kept_images_cannot_tell_it_is_open(
    bundle: Path, temple: Path, tmp_path: Path
) -> None:
    result = ftkit("enroll", bundle, "temple", temple, "--out", tmp_path / "next")
    assert result.exit_code == 3, result.output
    assert not (tmp_path / "next").exists()
    assert read_manifest(tmp_path / "next.inconclusive")["verdict"] == "inconclusive"


def test_what_several_enrolments_cost_together_is_bounded(
    bundle: Path, enrolled: Path, photos: Path, tmp_path: Path
) -> None:
    """A name for half of an old class, and again: their images are no evidence for the old ones."""
    images = sorted((photos / "mono-ok").iterdir())
    second = enroll(enrolled, "twin", images[:12], tmp_path / "second", max_drop=LIMIT)
    third = enroll(second.folder, "triplet", images[12:24], tmp_path / "third", max_drop=LIMIT)
    kept = KeptSample.read(bundle / FILE)
    for found in (second, third):
        assert found.kept == kept.exported == len(kept.labels)
        assert found.drop_high <= LIMIT
    assert third.lost >= second.lost, "against the answers before the first one"


def test_a_file_that_does_not_compute_what_was_fitted_is_not_shipped(
    bundle: Path, temple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = enroll_module.with_class

    def shifted(model: bytes, weights: Array, bias: Array, *rest: Any) -> bytes:
        return real(model, weights, bias + np.float32(0.05), *rest)

    monkeypatch.setattr(enroll_module, "with_class", shifted)
    with pytest.raises(FtkitError, match="expected the old answers with the class added"):
        enroll(bundle, "temple", sorted(temple.iterdir()), tmp_path / "out", max_drop=LIMIT)
    assert not list(tmp_path.glob("*out*"))


def test_an_older_bundles_runners_are_renewed(bundle: Path, temple: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(bundle, older)
    gone = "device/ftkit_export/runtime/enroll.py"
    (older / gone).unlink()
    files = read_manifest(bundle)["files"]
    kept = {name: digest for name, digest in files.items() if name != gone}
    rewrite(older / "manifest.json", {"files": kept})

    found = enroll(older, "temple", sorted(temple.iterdir()), tmp_path / "next", max_drop=LIMIT)
    script = found.folder / "device" / "classify.py"
    done = subprocess.run(
        [sys.executable, script, "--self-check"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_enrolled_is_refused_and_nothing_is_written(
    bundle: Path, temple: Path, tmp_path: Path
) -> None:
    images = sorted(temple.iterdir())
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(9):
        shutil.copyfile(images[0], copies / f"{number}.png")

    def altered(change: Callable[[Path], object]) -> Path:
        folder = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle, folder)
        change(folder)
        return folder

    def without_sample(folder: Path) -> None:
        (folder / FILE).unlink()
        files = read_manifest(bundle)["files"]
        rewrite(
            folder / "manifest.json",
            {"files": {name: files[name] for name in files if name != FILE}},
        )

    cases = [
        (bundle, "mono-ok", images, "does not know"),
        (bundle, "two\nlines", images, "one line"),
        (bundle, "not \udcff text", images, "one line"),
        (bundle, "temple", sorted(copies.iterdir()), "found 1"),
        (bundle, "temple", images[:4], "found 4"),
        (
            altered(lambda folder: (folder / "labels.txt").write_text("x\n")),
            "temple",
            images,
            "labels.txt",
        ),
        (altered(without_sample), "temple", images, FILE),
    ]
    for where, name, files, said in cases:
        with pytest.raises(FtkitError, match=said):
            enroll(where, name, files, tmp_path / "out", max_drop=LIMIT)
    assert not list(tmp_path.glob("*out*"))
    for group_by, said in (("(", "regular"), ("temple", "no match"), ("png", "two groups")):
        with pytest.raises(FtkitError, match=said):
            enroll(bundle, "temple", images, tmp_path / "out", max_drop=LIMIT, group_by=group_by)
    with pytest.raises(FtkitError, match="outside the bundle"):
        enroll(bundle, "temple", images, bundle / "next", max_drop=LIMIT)
    assert ftkit("enroll", bundle, "mono-ok", temple, "--out", tmp_path / "out").exit_code == 2
