"""Runners built from the bundle alone: C++, plain C (arm64 too), ORT format, OpenVINO."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
from conftest import built_cpp, ftkit, needs, run_
from PIL import Image

from ftkit_export.bundle.enroll import enroll
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.preprocess import to_frame
from ftkit_export.runtime.session import Session


@pytest.fixture(scope="module")
def photo(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph as PPM, enlarged to an odd size."""
    path = tmp_path_factory.mktemp("ppm") / "photo.ppm"
    with Image.open(next(iter(sorted((photos / "poly-ok").iterdir())))) as image:
        image.convert("RGB").resize((640, 427)).save(path)
    return path


@needs("cmake", "g++", "apt-get")
def test_the_cpp_runner(bundle: Path, photos: Path, photo: Path, sdk: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "the bundle"))
    program = built_cpp(copy, sdk, tmp_path / "build")
    check = run_(program, "--self-check")
    assert (check.returncode, "self-check passed" in check.stdout) == (0, True), (
        check.stdout + check.stderr
    )

    answer = Classifier(bundle)(photo)
    assert f"{photo}  {answer.label}  {answer.probability:.3f}" in run_(program, photo).stdout
    (tmp_path / "frame").write_bytes(np.asarray(Image.open(photo)).tobytes())
    assert (
        f"{answer.label}  {answer.probability:.3f}"
        in run_(program, "--raw", 427, 640, tmp_path / "frame").stdout
    )
    (tmp_path / "cut.ppm").write_bytes(photo.read_bytes()[:5000])
    for bad, said in (
        (["--raw", 5, 5, photo], "expected 75 bytes"),
        ([tmp_path / "cut.ppm"], "a whole binary PPM"),
        (["--bundle", tmp_path, photo], "model.onnx"),
        (["--what"], "expected --bundle"),
    ):
        found = run_(program, *bad)
        assert (found.returncode, said in found.stderr) == (2, True), found.stderr
    _collects_as_python_does(program, bundle, photos, tmp_path)
    more = enroll(bundle, "more", sorted((photos / "poly-ok").iterdir())[:8], tmp_path / "more")
    check = run_(program, "--bundle", more.folder, "--self-check")
    assert check.returncode == 0, check.stdout + check.stderr
    assert (
        Classifier(more.folder)(photo).label in run_(program, "--bundle", more.folder, photo).stdout
    )

    golden = copy / "golden" / "raw" / "probabilities.f32"
    golden.write_bytes(np.roll(np.fromfile(golden, "<f4"), 1).tobytes())
    assert run_(program, "--self-check").returncode == 1


def _collects_as_python_does(program: Path, bundle: Path, photos: Path, tmp_path: Path) -> None:
    """The C++ runner's log and pictures, beside those of Classifier(keep=...) on the same images."""
    frames = []
    for number, path in enumerate(sorted(photos.rglob("*.png"))[::4]):
        frames.append(tmp_path / f"{number:02d}.ppm")
        with Image.open(path) as image:
            image.convert("RGB").save(frames[-1])
    done = run_(program, "--keep", tmp_path / "cpp", "--control", 0, *frames)
    assert (done.returncode, done.stderr) == (0, "")
    with Classifier(bundle, keep=tmp_path / "python") as classify:
        assert classify.collector
        classify.collector._control = 0.0
        for frame in frames:
            classify(frame)

    logged = [
        [json.loads(line) for line in (tmp_path / runner / "log.jsonl").read_text().splitlines()]
        for runner in ("cpp", "python")
    ]
    assert len(logged[0]) == len(frames)
    for line, own in zip(*logged, strict=True):
        assert (line["label"], line["bundle"]) == (own["label"], own["bundle"])
        for name in ("probability", "score", "coordinates", "frame"):
            assert line[name] == pytest.approx(own[name], abs=1e-3), name
        reasons = {(each["kept"] or "").split("/")[0] for each in (line, own)}
        assert len(reasons) == 1, reasons
        if line["kept"]:
            with Image.open(tmp_path / "cpp" / line["kept"]) as kept:
                assert kept.size == (300, 300)

    bounds = ["--keep", tmp_path / "few", "--control", 1, "--keep-most", 6]
    assert run_(program, *bounds, *frames).returncode == 0
    assert run_(program, *bounds, *frames).returncode == 0
    assert len(list((tmp_path / "few").glob("*/*.ppm"))) <= 6
    seen = json.loads((tmp_path / "few" / "state.json").read_text())["seen"]
    assert sum(seen.values()) == 2 * len(frames), "counts go on over restarts"

    (tmp_path / "blocked" / "log.jsonl").mkdir(parents=True)
    done = run_(program, "--keep", tmp_path / "blocked", *frames)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, len(frames))
    assert done.stderr.count("collecting stops, classifying goes on") == 1
    assert run_(program, "--keep", frames[0], *frames).returncode == 2


@needs("make", "cc")
def test_the_plain_c_runner(bundle: Path, photo: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "the bundle"))
    folder = copy / "device" / "c"
    built = run_("make", "-C", folder, "CFLAGS=-O3 -march=native -Wall -Wextra -Wno-unused")
    assert built.returncode == 0, built.stderr
    assert not re.search(r"classify\.c:\d+.*warning", built.stderr), built.stderr
    program = folder / "classify"
    check = run_(program, "--self-check")
    assert (check.returncode, "self-check passed" in check.stdout) == (0, True), (
        check.stdout + check.stderr
    )
    assert re.search(r"memory +\d+ MB", check.stdout)

    fp32 = json.loads((bundle / "manifest.json").read_text())["variants"]["fp32"]["file"]
    answer = Classifier(bundle / fp32)(photo)
    found = re.search(rf"{answer.label}  ([\d.]+)", run_(program, photo).stdout)
    assert found
    assert float(found[1]) == pytest.approx(answer.probability, abs=5e-3)
    (tmp_path / "cut.ppm").write_bytes(photo.read_bytes()[:5000])
    for bad, said in (
        (["--raw", 5, 5, photo], "another number of bytes"),
        ([tmp_path / "cut.ppm"], "binary PPM"),
        ([tmp_path / "none.ppm"], "a readable file"),
        ([], "images or --self-check"),
    ):
        refused = run_(program, *bad)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    golden = copy / "golden" / "raw" / "logits.f32"
    golden.write_bytes((np.fromfile(golden, "<f4") + np.float32(0.01)).tobytes())
    failed = run_(program, "--self-check")
    assert (failed.returncode, "logits        FAILED" in failed.stdout) == (1, True)


@needs("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
def test_the_plain_c_runner_on_arm64(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle / "device" / "c", tmp_path / "c"))
    built = run_("make", "-C", folder, "CC=aarch64-linux-gnu-gcc -static", "CFLAGS=-O3")
    assert built.returncode == 0, built.stderr
    check = run_(
        "qemu-aarch64-static",
        folder / "classify",
        "--golden",
        bundle / "golden" / "raw",
        "--self-check",
    )
    assert (check.returncode, "self-check passed" in check.stdout) == (0, True), (
        check.stdout + check.stderr
    )


def test_the_ort_format_answers_as_the_model_does(bundle: Path, photo: Path) -> None:
    folder = bundle / "device" / "ort"
    image = np.asarray(Image.open(photo))[None]
    session = onnxruntime.InferenceSession(
        str(folder / "model.ort"), providers=["CPUExecutionProvider"]
    )
    expected = Classifier(bundle).probabilities(image[0])
    assert np.abs(session.run(["probabilities"], {"image": image})[0][0] - expected).max() < 1e-4
    config = (folder / "required_operators.config").read_text()
    assert re.search(r"ai\.onnx;13;.*Softmax", config)
    assert re.search(r"ai\.onnx;18;.*Resize", config)


def test_another_compilers_outputs_are_judged(bundle: Path, tmp_path: Path) -> None:
    """OpenVINO compiles the hand-off.

    Shuffled outputs fail the check; outputs of the wrong shape are bad input.
    """
    model = openvino.Core().compile_model(
        str(bundle / "handoff" / "core.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    inputs = np.load(bundle / "handoff" / "inputs.npy")
    calibration = sorted((bundle / "handoff" / "calibration").iterdir())
    assert np.load(calibration[0]).shape == (1, *inputs.shape[1:])
    logits = np.concatenate([model(item[None])[0] for item in inputs])
    np.savez(tmp_path / "openvino.npz", logits=logits)
    result = ftkit("verify", bundle, "--outputs", tmp_path / "openvino.npz")
    assert result.exit_code == 3, "a dozen val images settle nothing, and it says so"
    assert "outputs: inconclusive" in result.stdout
    assert "least cosine 1.00000, top-1 changed 0" in result.stdout
    np.savez(tmp_path / "shuffled.npz", logits=np.roll(logits, 1, axis=1))
    result = ftkit("verify", bundle, "--outputs", tmp_path / "shuffled.npz")
    assert (result.exit_code, "outputs: refused" in result.stdout) == (1, True)
    np.savez(tmp_path / "short.npz", logits=logits[:3])
    (tmp_path / "junk.npz").write_bytes(b"junk")
    for name, said in (
        ("short", "expected logits of shape"),
        ("junk", "expected an .npz with an array `logits`"),
    ):
        result = ftkit("verify", bundle, "--outputs", tmp_path / f"{name}.npz")
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


@pytest.fixture(scope="module")
def camera(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for a camera that delivers NV12."""
    out = tmp_path_factory.mktemp("camera") / "bundle"
    result = ftkit(
        "export",
        run,
        "--out",
        out,
        "--quick",
        "--input-format",
        "nv12",
        "--c",
        "--set",
        "export.variants=fp32",
    )
    assert result.exit_code == 0, result.output
    return out


def test_the_python_runner_takes_the_cameras_frames(
    camera: Path, photo: Path, tmp_path: Path
) -> None:
    frame = to_frame(np.asarray(Image.open(photo)), "nv12")
    assert frame.shape == (642, 640, 1)  # 427 rows rounded up to even, plus half as many for chroma
    (tmp_path / "frame").write_bytes(frame.tobytes())
    expected = Classifier(camera)(photo)
    runner = [sys.executable, camera / "device" / "classify.py"]
    for found in (
        run_(*runner, "--raw", 642, 640, tmp_path / "frame", "--json"),
        run_(*runner, photo, "--json"),
    ):
        assert json.loads(found.stdout)["probabilities"] == pytest.approx(
            expected.probabilities, abs=1e-5
        )
    refused = run_(*runner, "--raw", 600, 640, tmp_path / "frame")
    assert (refused.returncode, "expected 384000 bytes, found 410880" in refused.stderr) == (
        2,
        True,
    )
    assert run_(*runner, "--self-check").returncode == 0
    signature = Session(camera / "model.onnx")
    assert signature.metadata["input_format"] == "nv12"


@needs("make", "cc")
def test_the_c_runner_takes_the_cameras_frames(camera: Path, photo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(camera, tmp_path / "bundle")) / "device" / "c"
    assert run_("make", "-C", folder).returncode == 0
    check = run_(folder / "classify", "--self-check")
    assert (check.returncode, "pixels        ok" in check.stdout) == (0, True), check.stdout
    (tmp_path / "odd").write_bytes(b"123")
    refused = run_(folder / "classify", "--raw", 3, 1, tmp_path / "odd")
    assert (refused.returncode, "expected NV12 with even sides" in refused.stderr) == (2, True)
    assert "expected a raw NV12 frame" in run_(folder / "classify", photo).stderr
    frame = to_frame(np.asarray(Image.open(photo)), "nv12")
    (tmp_path / "frame").write_bytes(frame.tobytes())
    answer = Classifier(camera)(photo)
    found = re.search(
        rf"{answer.label}  ([\d.]+)",
        run_(folder / "classify", "--raw", 642, 640, tmp_path / "frame").stdout,
    )
    assert found
    assert float(found[1]) == pytest.approx(answer.probability, abs=5e-3)


@needs("make", "cc")
def test_a_grey_cameras_c_runner_sees_pictures_in_grey(camera: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(camera / "device" / "c", tmp_path / "c"))
    header = next(path for path in folder.glob("*.h") if "NV12" in path.read_text())
    header.write_text(re.sub(r"(#define FORMAT )NV12", r"\1GREY", header.read_text()))
    assert run_("make", "-C", folder).returncode == 0
    colours = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    colours = np.kron(colours, np.ones((8, 8, 1), np.uint8))
    grey = to_frame(colours, "grey")
    Image.fromarray(colours).save(tmp_path / "picture.ppm")
    (tmp_path / "frame").write_bytes(grey.tobytes())
    by_picture = run_(folder / "classify", tmp_path / "picture.ppm").stdout.split("  ")[1:]
    by_frame = run_(folder / "classify", "--raw", 320, 240, tmp_path / "frame").stdout
    assert by_picture and by_picture == by_frame.split("  ")[1:]


@needs("cmake", "g++", "apt-get")
def test_the_cpp_runner_takes_the_cameras_frames(
    camera: Path, photo: Path, sdk: Path, tmp_path: Path
) -> None:
    run_(
        "cmake",
        "-S",
        camera / "device" / "cpp",
        "-B",
        tmp_path / "build",
        f"-DONNXRUNTIME_ROOT={sdk}",
    )
    assert run_("cmake", "--build", tmp_path / "build").returncode == 0
    program = tmp_path / "build" / "classify"
    assert run_(program, "--self-check").returncode == 0
    refused = run_(program, photo)
    assert (refused.returncode, "expected raw nv12 frames" in refused.stderr) == (2, True)
