"""The bundle of a real run: contents, self-verification, detection of every change."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import bare, ftkit, rewrite
from onnx import numpy_helper

from ftkit.evaluation.metrics import evaluate
from ftkit.exporting import evidence, export
from ftkit.exporting.variants import as_table
from ftkit.recipe import Export
from ftkit_export.bundle.seal import begin_bundle
from ftkit_export.conversion.convert import Trace
from ftkit_export.proof.decision import Row, paired
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.readout import Labels, OneClass
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.targets import here
from ftkit_export.runtime.verify import _compare, _decided, read_manifest, sha256, verify


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may modify."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_the_file_takes_images_of_any_size_and_gives_probabilities_and_embedding(
    bundle: Path,
) -> None:
    session = Session(bundle / "model.onnx")
    for height, width in ((1, 1), (37, 300), (96, 96)):
        probabilities, embedding = session.run(np.full((2, height, width, 3), 90, np.uint8))
        assert probabilities.shape == (2, 4)
        assert embedding.shape == (2, 1280)
        assert np.abs(probabilities.sum(1) - 1).max() < 1e-5


@pytest.mark.parametrize("file", ["model.onnx", "variants/fp32-core.onnx"])
def test_the_file_is_one_opset_18_ir_8_labelled_and_without_local_paths(
    bundle: Path, file: str
) -> None:
    raw = (bundle / file).read_bytes()
    model = onnx.load_from_string(raw)
    assert (model.ir_version, [item.version for item in model.opset_import]) == (8, [18])
    assert not any(item.external_data for item in model.graph.initializer)
    for leak in (
        str(Path.home()),
        str(Path(__file__).parents[3]),
        str(bundle.parent),
        "site-packages",
        ".py",
    ):
        assert leak.encode() not in raw
    properties = {item.key: item.value for item in model.metadata_props}
    assert json.loads(properties["labels"]) == ["mono-defect", "mono-ok", "poly-defect", "poly-ok"]
    assert json.loads(properties["preprocess"])["size"] == 96
    assert float(properties["temperature"]) > 0


def test_no_file_of_the_bundle_names_a_local_path(bundle: Path, photos: Path) -> None:
    for path in bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(photos).encode() not in content, path
            assert str(bundle.parent).encode() not in content, path


def test_the_manifest_carries_the_evidence(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["verdict"] == "passed"
    assert all(gate["passed"] for gate in manifest["gates"])
    checks = manifest["evidence"]["parity"][0]["checks"]
    assert {check["group"] for check in checks} == {"photographs", "noise", "extremes"}
    for item in manifest["evidence"]["latency"]:
        assert 0 < item["p50_ms"] <= item["p95_ms"]
        assert item["peak_rss_bytes"] < 500e6, (
            "of the measuring process, not of the one that started it"
        )
    assert manifest["evidence"]["accuracy"]["file"]["images"] == 16
    listed = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert listed - {"manifest.json", "manifest.sig"} == set(manifest["files"])
    assert "CC BY-NC-SA" in (bundle / "golden" / "LICENSE.txt").read_text(), (
        "the photographs' licence travels with them"
    )


def test_the_report_shows_every_latency_as_a_histogram(bundle: Path) -> None:
    page = (bundle / "report.html").read_text()
    latency = json.loads((bundle / "manifest.json").read_text())["evidence"]["latency"]
    assert len(latency) >= 2
    for item in latency:
        where = f"{item['variant']} on {item['provider']}, {item['threads']} thread"
        figure = page.split(f'aria-label="{where}', 1)[1].split("</svg>")[0]
        assert figure.count("<rect") == sum(count > 0 for count in item["histogram"])


def test_the_decision_is_printed_within_80_columns_with_all_it_rests_on(bundle: Path) -> None:
    evidence = json.loads((bundle / "manifest.json").read_text())["evidence"]["decision"]
    lines = (bundle.parent / "export.txt").read_text().splitlines()
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("parity"))]
    assert max(map(len, table)) <= 80
    assert table[0].split() == [
        "variant",
        "val",
        "drop,",
        "points",
        "[95",
        "%]",
        "time",
        "p50/p95",
        "MB",
        "verdict",
    ]
    for row, line in zip(evidence, table[1:], strict=False):
        assert line.startswith(row["name"])
        assert line.endswith(row["verdict"])
        assert f"{row['p50_ms']:.1f}/{row['p95_ms']:.1f}" in line
    wide = Row(
        name="int8, 16 float",
        precision="int8",
        verdict="inconclusive",
        reason="r",
        accuracy=0.5,
        ratio=1.5,
        p50_ms=12.34,
        p95_ms=56.78,
        size_bytes=98_700_000,
        paired=paired(np.ones(40, bool), np.arange(40) > 20),
    )
    assert max(map(len, as_table([wide, wide]).splitlines())) <= 80


def test_the_test_data_set_is_what_the_model_answers(bundle: Path) -> None:
    folder = bundle / "test_data_set_0"
    image, probabilities, embedding = (
        numpy_helper.to_array(onnx.load_tensor(folder / name))
        for name in ("input_0.pb", "output_0.pb", "output_1.pb")
    )
    found = Session(bundle / "model.onnx").run(image)
    assert np.abs(found[0] - probabilities).max() < 1e-4
    assert np.abs(found[1] - embedding).max() < 1e-5 * np.abs(embedding).max()


def test_verify_passes_here(bundle: Path) -> None:
    result = verify(bundle)
    assert result.passed
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    assert {check.name for check in result.checks} == {
        f"{v} {f}" for v in variants for f in ("probabilities", "logits")
    }
    assert {check.images for check in result.checks} == {27}


def _files(bundle: Path) -> Iterator[str]:
    yield from json.loads((bundle / "manifest.json").read_text())["files"]


def test_a_changed_byte_in_any_file_is_named(copy: Path) -> None:
    for name in _files(copy):
        original = (copy / name).read_bytes()
        spoiled = bytearray(original or b"x")
        spoiled[len(spoiled) // 2] ^= 1
        (copy / name).write_bytes(spoiled)
        result = ftkit("verify", copy)
        assert result.exit_code == 2
        assert f"{copy / name}: expected sha256" in result.stderr
        (copy / name).write_bytes(original)
    assert ftkit("verify", copy).exit_code == 0


def test_a_missing_and_an_extra_file_are_named(copy: Path) -> None:
    (copy / "labels.txt").rename(copy / "names.txt")
    result = ftkit("verify", copy)
    assert (
        result.exit_code,
        "labels.txt: expected this file, found it missing" in result.stderr,
    ) == (2, True)
    shutil.copy(copy / "names.txt", copy / "labels.txt")
    result = ftkit("verify", copy)
    assert (
        result.exit_code,
        "names.txt: expected only files the manifest lists" in result.stderr,
    ) == (2, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "expected schema 4, found 99. Try a newer ftkit"),
        ({"files": {"../outside": "0"}}, "expected gates, variants and the files they name"),
        ({"variants": {}}, "expected gates, variants and the files they name"),
        ({"gates": []}, "expected gates, variants and the files they name"),
        ({"files": []}, "expected gates, variants and the files they name"),
        ({"chosen": "fp64"}, "expected gates, variants and the files they name"),
    ],
)
def test_a_manifest_not_to_be_trusted_is_refused(
    copy: Path, change: dict[str, object], said: str
) -> None:
    rewrite(copy / "manifest.json", change)
    result = ftkit("verify", copy)
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_one_changed_byte_of_an_unsigned_manifest_is_seen_wherever_it_lies(copy: Path) -> None:
    path = copy / "manifest.json"
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(120), *rng.integers(0, len(original), 200).tolist(), len(original) - 1]:
        spoiled = bytearray(original)
        spoiled[place] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(spoiled)
        with pytest.raises(BundleError, match=r"manifest\.json: expected"):
            read_manifest(copy)
    path.write_bytes(original)
    assert read_manifest(copy)["verdict"] == "passed"


def test_a_wrong_golden_answer_is_a_failed_gate_even_with_matching_hashes(copy: Path) -> None:
    path = copy / "golden" / "expected.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["logits"][3] += 0.01
    np.savez(path, **arrays)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    rewrite(copy / "manifest.json", {"files": {**files, "golden/expected.npz": sha256(path)}})
    result = ftkit("verify", copy)
    assert result.exit_code == 1
    assert "logits of 27 golden images: FAILED, worst 03.png" in result.stdout
    assert "NOT verified" in result.stdout


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_another_first_class_is_a_failed_check_also_within_the_tolerance(variant: str) -> None:
    """int8 and fp16 may differ by 5 % of the largest value, enough to change the class."""
    entries = [{"file": "00.png", "tolerance": {variant: {}}}]
    expected, limit = np.array([[0.53, 0.47]]), np.array([0.05])
    decided = partial(_decided, OneClass(), "probabilities")
    check = _compare(
        f"{variant} probabilities", entries, [np.array([0.489, 0.511])], expected, limit, decided
    )
    assert check.value < 1
    assert (check.top1_equal, check.top1_wrong, check.passed) == (0, 1, False)
    near = np.array([[0.52, 0.48]])
    tie = _compare(variant, entries, [np.array([0.49, 0.51])], near, limit, decided)
    assert (tie.top1_equal, tie.top1_wrong, tie.passed) == (0, 0, True)


def test_a_label_that_turns_is_a_failed_check_unless_it_is_a_tie() -> None:
    readout = Labels(temperatures=(1.0, 1.0), thresholds=(0.5, 0.2))
    limits = np.array([0.05, 0.05])
    expected = np.array([[0.9, 0.28], [0.9, 0.22]])
    actual = expected - [0, 0.1]
    equal, wrong = _decided(readout, "probabilities", actual, expected, limits)
    assert equal.tolist() == [False, False]
    assert wrong.tolist() == [True, False], "0.22 is as near to the threshold as the tolerance"


def test_predict_says_what_the_classifier_says(bundle: Path, photos: Path) -> None:
    image = next(iter(sorted((photos / "poly-ok").iterdir())))
    answer = Classifier(bundle)(image)
    result = ftkit("predict", bundle, image, "--json")
    assert result.exit_code == 0
    line = json.loads(result.stdout)
    assert line["label"] == answer.label
    assert line["probabilities"] == pytest.approx(answer.probabilities)
    assert len(ftkit("predict", bundle, photos).stdout.splitlines()) == 120


def test_predict_goes_on_past_a_bad_image_and_exits_2(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"junk")
    good = next(iter((photos / "mono-ok").iterdir()))
    result = ftkit("predict", bundle, bad, good)
    assert result.exit_code == 2
    assert "bad.png: expected an image" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_device_runner_needs_numpy_onnxruntime_and_pillow_only(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    """In a fresh environment with nothing else, without the training machine's Python path."""
    python = bare(tmp_path / "device", "numpy", "onnxruntime", "pillow")
    copied = shutil.copytree(bundle, tmp_path / "on the device")
    runner = copied / "device" / "classify.py"
    check = subprocess.run(
        [python, runner, "--self-check"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert check.returncode == 0, check.stderr
    assert "self-check passed" in check.stdout
    assert "p95" in check.stdout
    image = next(iter(sorted((photos / "mono-ok").iterdir())))
    one = subprocess.run(
        [python, runner, image, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(one.stdout)["probabilities"] == pytest.approx(
        Classifier(bundle)(image).probabilities, abs=1e-5
    )
    assert verify(copied).passed, (
        "running the runner must leave nothing behind in the sealed bundle"
    )
    (copied / "model.onnx").write_bytes(b"junk")
    broken = subprocess.run(
        [python, runner, "--self-check"], capture_output=True, text=True, check=False
    )
    assert broken.returncode == 2
    assert "model.onnx: expected sha256" in broken.stderr


def test_checking_itself_leaves_nothing_in_the_sealed_bundle(
    benched: tuple[Path, dict[str, Any]],
) -> None:
    assert verify(benched[0]).passed


def test_a_name_that_leads_outside_the_bundle_is_refused(copy: Path) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    rewrite(copy / "manifest.json", {"files": {**files, "../outside": "0"}})
    result = ftkit("verify", copy)
    assert (result.exit_code, "expected names inside the bundle" in result.stderr) == (2, True)


def test_what_a_killed_export_left_goes_and_what_a_living_one_builds_stays(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from ftkit_export.bundle.seal import begin_bundle\n"
    )
    script += f"print(begin_bundle(Path({str(tmp_path / 'bundle')!r})), flush=True); time.sleep(60)"
    killed, living = (
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in "ab"
    )
    assert killed.stdout and living.stdout
    left, built = (
        Path(process.stdout.readline().strip()) for process in (killed, living) if process.stdout
    )
    killed.kill()
    killed.communicate()
    mine = begin_bundle(tmp_path / "bundle")
    living.kill()
    living.communicate()
    assert (left.exists(), built.exists(), mine.exists()) == (False, True, True)


def test_the_same_run_gives_the_same_bytes_but_for_timings(
    run: Path,
    bundle: Path,
    keys: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / bundle.name
    monkeypatch.setattr(export, "Trace", Trace)  # convert again
    result = ftkit(
        "export", run, "--out", out, "--quick", "--c", "--ort", "--handoff", "--sign", keys[0]
    )
    assert result.exit_code == 0, result.output
    told = [json.loads((folder / "manifest.json").read_text()) for folder in (bundle, out)]
    assert told[0]["chosen"] == told[1]["chosen"]
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for folder in (bundle, out)
    ]
    assert names[0] == names[1]
    timed = {"manifest.json", "manifest.sig", "report.html", "MODEL_CARD.md"}
    # ONNX Runtime's converter writes hash maps in a different order each time
    timed.add("device/ort/model.ort")
    kept = [[row["kept"] for row in each["evidence"]["decision"]] for each in told]
    if kept[0] != kept[1]:  # how many operators stay in float is measured
        timed |= {name for name in names[0] if "int8" in name or name == "golden/expected.npz"}
        timed.add("golden/golden.json")  # which has int8's tolerances, too
        assert _without_int8(bundle) == _without_int8(out)
    assert [
        name
        for name in sorted(names[0] - timed)
        if (bundle / name).read_bytes() != (out / name).read_bytes()
    ] == []


def _without_int8(folder: Path) -> dict[str, Any]:
    """golden.json but for the tolerances of the 8-bit variant."""
    told: dict[str, Any] = json.loads((folder / "golden" / "golden.json").read_text())
    for image in told["images"]:
        image["tolerance"].pop("int8")
    return told


def test_latencies_of_the_device_decide_for_a_target_that_is_not_here(
    run: Path, benched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Device latencies count only for the same file, run and target, with one thread.

    Without them nothing is proven.
    """
    other, latency = ("x86" if here() == "arm64" else "arm64"), tmp_path / "device.json"
    told = [
        "--quick",
        "--target",
        other,
        "--latency",
        latency,
        "--set",
        "export.max_accuracy_drop=0.9",
    ]
    measured = benched[1]
    others = dict.fromkeys(measured["sha256"], "0")
    latency.write_text(json.dumps({**measured, "target": other, "sha256": others}))
    result = ftkit(
        "export", run, "--out", tmp_path / "unproven", *told, "--set", "export.p95_ms=9999"
    )
    assert result.exit_code == 3, result.output
    assert "unproven" in result.stdout, "another file's latency proves nothing"
    assert "not measured on the target: try --latency" in result.stderr
    runner = tmp_path / "unproven.inconclusive" / "device" / "classify.py"
    command = [sys.executable, runner, "--bench", "--quick", "--threads", "1"]
    measured = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (measured["raced"]["fp32"]["ratio"], measured["target"], measured["threads"]) == (
        1,
        here(),
        1,
    )
    latency.write_text(json.dumps(measured))
    result = ftkit("export", run, "--out", tmp_path / "x", *told)
    assert (result.exit_code, f"expected latencies of ('cpu', 1, '{other}')" in result.stderr) == (
        2,
        True,
    )
    fast = {"ratio": 0.5, "ratio_high": 0.6, "p50_ms": measured["raced"]["fp32"]["p50_ms"] / 2}
    measured["raced"]["int8"] |= fast  # as a device with fast 8-bit kernels would report
    latency.write_text(json.dumps({**measured, "target": other}))
    result = ftkit("export", run, "--out", tmp_path / "proven", *told)
    assert "0.50x" in result.stdout, result.output
    assert "chosen: int8" in result.stdout, "by the device's time, whatever this machine's"
    assert verify(tmp_path / "proven").passed
    for content, said in (
        (
            json.dumps({**measured, "target": other, "run": "another"}),
            "expected latencies of this run",
        ),
        ("[]", "expected what `device/classify.py --bench` prints"),
    ):
        latency.write_text(content)
        result = ftkit("export", run, "--out", tmp_path / "x", *told)
        assert (result.exit_code, said in result.stderr) == (2, True)


@pytest.mark.parametrize(("lost", "passes"), [(0, True), (1, True), (20, False)])
def test_one_image_that_changes_sides_fails_no_gate_and_many_do(lost: int, passes: bool) -> None:
    """One changed image of 60 is 1.7 points, where 1 point is allowed."""
    against = paired(np.ones(60, bool), np.arange(60) >= lost)
    chosen = Row(name="fp32", precision="fp32", verdict="reference", reason="", accuracy=0.9)
    metrics = asdict(evaluate(np.eye(2)[[0] * 60], np.zeros(60, int), "ab"))
    measured = evidence.Evidence(
        parity=[], chosen=chosen, metrics=metrics, against=against, out_of_order=0
    )
    gates = evidence.judge_gates(Export(), measured)
    assert all(gate.passed for gate in gates) == passes
