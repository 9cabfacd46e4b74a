"""Several labels, and numbers, from the CSV to the device; what is planted is caught."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from conftest import built_cpp, ftkit, needs, needs_browser, open_page, run_, settings
from PIL import Image
from sklearn.metrics import average_precision_score

import ftkit as api
from ftkit.data.dataset import read_images
from ftkit.exporting import candidates, evidence, export, web
from ftkit.tasks.task import Regression, task_of
from ftkit.training.distillation import load_teacher
from ftkit.training.lr_search import RATES
from ftkit.training.run import Run, open_run
from ftkit_export.conversion import graph
from ftkit_export.conversion.class_activation import Explainer
from ftkit_export.runtime.predict import (
    Classifier,
    MultiLabelClassifier,
    RegressionPrediction,
    Regressor,
)
from ftkit_export.runtime.readout import KEY, OneClass
from ftkit_export.runtime.session import Session

QUICK = settings(
    "preprocess.size=96",
    "preprocess.resize=96",
    "stages.0.epochs=2",
    "stages.0.views=1",
    "stages.1.epochs=1",
    "stages.1.views=1",
    "stages.1.train=last:1",
    "stages.1.batch_size=16",
)


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labels.csv and values.csv of the photographs: their two attributes, and their mean grey level."""
    out = tmp_path_factory.mktemp("tasks")
    paths = sorted(photos.rglob("*.png"))
    with (out / "labels.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "mono", "defect"))
        for number, path in enumerate(paths):
            kind, state = path.parent.name.split("-")
            known = "" if number % 9 == 0 else int(state == "defect")
            writer.writerow((path, int(kind == "mono"), known))
    with (out / "values.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "brightness [levels]"))
        writer.writerows((path, np.asarray(Image.open(path)).mean()) for path in paths)
    return out


@pytest.fixture(scope="module")
def labels(folder: Path) -> tuple[Path, Path]:
    """A multi-label run, with folds, and its bundle."""
    run, bundle = folder / "labels", folder / "labels-bundle"
    trained = ftkit("train", folder / "labels.csv", "--out", run, *QUICK)
    assert trained.exit_code == 0, trained.output
    assert "multi-label: defect, mono; judged by macro-AP" in trained.stdout
    fp32 = settings("export.variants=fp32")
    done = ftkit("export", run, "--out", bundle, "--quick", "--c", *fp32)
    assert done.exit_code == 0, done.output
    return run, bundle


@pytest.fixture(scope="module")
def values(folder: Path) -> tuple[Path, Path]:
    """A regression run, with a val split, and its bundle, which may have an 8-bit variant."""
    run, bundle = folder / "values", folder / "values-bundle"
    searched = settings("stages.0.lr=auto")
    options = ("--recipe", "lite0_regression", "--folds", "0", *QUICK, *searched)
    trained = ftkit("train", folder / "values.csv", "--out", run, *options)
    assert trained.exit_code == 0, trained.output
    rise = settings("export.max_error_rise=1")
    done = ftkit("export", run, "--out", bundle, "--quick", "--c", *rise)
    assert done.exit_code == 0, done.output
    return run, bundle


def test_several_labels_are_learned_exported_and_answered(
    labels: tuple[Path, Path], folder: Path, photos: Path
) -> None:
    run, bundle = labels
    test = open_run(run).metrics["test"]
    assert test["macro_ap"] > 0.6
    assert [label["name"] for label in test["labels"]] == ["defect", "mono"]
    assert sum(label["images"] for label in test["labels"]) < 2 * test["images"], "some are unknown"

    assert ftkit("verify", bundle).exit_code == 0
    model = api.load(bundle)
    assert isinstance(model, MultiLabelClassifier)
    picture = next((photos / "mono-ok").glob("*.png"))
    answer = model(picture)
    said = json.loads(ftkit("predict", bundle, picture, "--json").stdout)
    assert said["probabilities"] == dict(answer.probabilities)
    assert tuple(said["labels"]) == answer.labels
    assert sum(answer.probabilities.values()) != pytest.approx(1.0), "no softmax"

    told = subprocess.run(
        [sys.executable, bundle / "device" / "classify.py", picture],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == f"{picture}  {answer.text}"


def test_what_is_made_for_classes_refuses_labels_in_one_sentence(
    labels: tuple[Path, Path], folder: Path, photos: Path, tmp_path: Path
) -> None:
    run, bundle = labels
    for command in (
        ("drift", bundle, tmp_path),
        ("enroll", bundle, "new", photos / "mono-ok", "--out", tmp_path / "new"),
        ("export", run, "--out", tmp_path / "h", "--handoff"),
        (
            "train",
            folder / "labels.csv",
            "--set",
            "stages.0.balance=sample",
            "--out",
            tmp_path / "s",
        ),
    ):
        result = ftkit(*command)
        assert result.exit_code == 2, command
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: "), line
        assert "single-label" in line or "task=multi-label" in line, line
    with pytest.raises(api.FtkitError, match="expected a single-label model"):
        Classifier(bundle)


def test_numbers_are_learned_exported_and_answered_with_an_interval(
    values: tuple[Path, Path], photos: Path
) -> None:
    run, bundle = values
    data = open_run(run).data
    (brightness,) = data["metrics"]["test"]["quantities"]
    grey = [np.asarray(Image.open(path)).mean() for path in photos.rglob("*.png")]
    guess = np.abs(grey - np.median(grey)).mean()
    assert brightness["unit"] == "levels"
    assert data["stages"][0]["lr"] in RATES
    assert brightness["mae"]["value"] < 0.7 * guess, "better than the median of all"

    assert ftkit("verify", bundle).exit_code == 0
    model = api.load(bundle)
    assert isinstance(model, Regressor)
    pictures = sorted(photos.rglob("*.png"))
    inside = 0
    for path in pictures[::5]:
        estimate = model(path).values["brightness"]
        assert estimate.low < estimate.value < estimate.high
        inside += estimate.low <= np.asarray(Image.open(path)).mean() <= estimate.high
    assert inside >= 0.7 * len(pictures[::5]), "90 % are meant"


def test_each_output_has_a_map_of_its_own_that_adds_up_to_its_logit(
    labels: tuple[Path, Path], values: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    pictures = [min((photos / name).iterdir()) for name in ("mono-defect", "poly-ok")]
    for number, (_, bundle) in enumerate((labels, values)):
        explain, model = Explainer(bundle), api.load(bundle)
        core = Session(bundle / "variants" / "fp32-core.onnx")
        decoded = [model.decode(path) for path in pictures]
        canvases = np.stack([model.preprocess.canvas(image) for image in decoded])
        first, second = core.run(model.preprocess.pixels(canvases))[0]
        for place in range(len(model.labels)):
            # The bias is the same in both
            apart = [explain(image, place)[0].mean() for image in decoded]
            assert apart[0] - apart[1] == pytest.approx(first[place] - second[place], abs=1e-4)

        out = tmp_path / f"why-{number}"
        done = ftkit("predict", bundle, pictures[0], "--explain", "--json", "--out", out)
        told = json.loads(done.stdout)
        answer = model(pictures[0])
        assert list(told["explained"]) == list(answer.explained)
        assert sorted(map(str, out.iterdir())) == sorted(told["explained"].values())

        traced = ftkit("predict", bundle, pictures[0], "--trace")
        assert traced.exit_code == 0, traced.output
        assert traced.stdout.splitlines()[-1] == answer.text


def _ppm(photos: Path, out: Path) -> Path:
    with Image.open(min((photos / "mono-defect").iterdir())) as image:
        image.convert("RGB").save(out)
    return out


@needs("cmake", "g++", "apt-get")
def test_the_cpp_runner_says_what_python_says(
    labels: tuple[Path, Path], values: tuple[Path, Path], photos: Path, sdk: Path, tmp_path: Path
) -> None:
    picture = _ppm(photos, tmp_path / "photo.ppm")
    program = built_cpp(labels[1], sdk, tmp_path / "build")
    for _, bundle in (labels, values):
        check = run_(program, "--bundle", bundle, "--self-check")
        assert check.returncode == 0, check.stdout + check.stderr
        said = run_(program, "--bundle", bundle, picture).stdout
        assert said == f"{picture}  {api.load(bundle)(picture).text}\n"
    kept = run_(program, "--bundle", values[1], "--keep", tmp_path / "kept", picture)
    assert (kept.returncode, "expected a single-label bundle" in kept.stderr) == (2, True)

    copy = Path(shutil.copytree(values[1], tmp_path / "copy"))
    golden = copy / "golden" / "raw" / "probabilities.f32"
    golden.write_bytes((np.fromfile(golden, "<f4") * 1.2).astype("<f4").tobytes())
    assert run_(program, "--bundle", copy, "--self-check").returncode == 1


@needs("make", "gcc")
def test_the_plain_c_runner_says_what_python_says(
    labels: tuple[Path, Path], values: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    picture = _ppm(photos, tmp_path / "photo.ppm")
    for number, (_, bundle) in enumerate((labels, values)):
        folder = Path(shutil.copytree(bundle / "device" / "c", tmp_path / str(number)))
        made = run_("make", "-C", folder)
        assert made.returncode == 0, made.stderr
        golden = ("--golden", bundle / "golden" / "raw")
        check = run_(folder / "classify", *golden, "--self-check")
        assert check.returncode == 0, check.stdout + check.stderr
        (said,) = run_(folder / "classify", *golden, picture).stdout.splitlines()
        fp32 = bundle / "variants" / "fp32.onnx"
        expected = api.load(fp32 if fp32.is_file() else bundle / "model.onnx")(picture).text
        numbers = r"-?\d+\.?\d*"
        assert re.sub(numbers, "#", said) == re.sub(numbers, "#", f"{picture}  {expected}")
        assert [float(n) for n in re.findall(numbers, said)] == pytest.approx(
            [float(n) for n in re.findall(numbers, f"{picture}  {expected}")], rel=0.01, abs=0.01
        )


@needs_browser
def test_the_browser_says_what_python_says(
    labels: tuple[Path, Path], values: tuple[Path, Path], photos: Path, browser: Any
) -> None:
    picture = min((photos / "mono-defect").iterdir())
    for _, bundle in (labels, values):
        with web.serving(bundle, web.runtime()) as url:
            page, wrong = open_page(browser, url)
            page.wait_for_selector("#parity.good, #parity.bad, #engine.bad", timeout=60_000)
            assert "golden vectors passed" in page.inner_text("#parity")
            page.set_input_files("#file", picture)
            page.wait_for_selector("#verdict[data-label]")
            said = page.inner_text("#verdict")
            answer = api.load(bundle)(picture)
            if isinstance(answer, RegressionPrediction):
                estimate = answer.values["brightness"]
                name, value, *_, unit = said.partition(" (in brackets")[0].split()
                assert (name, unit) == ("brightness", "levels")
                assert float(value) == pytest.approx(estimate.value, rel=0.02)
            else:
                assert page.get_attribute("#verdict", "data-label") == ", ".join(answer.labels)
            assert wrong == []


def _evaluated(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = ftkit("eval", *arguments, "--json", "-")
    assert result.exit_code in (0, 1, 3), result.output
    told = [
        line for line in result.stderr.splitlines() if ".png" not in line and ".onnx" not in line
    ]
    assert max(map(len, told)) <= 80, result.stderr
    return result.exit_code, json.loads(result.stdout)


def test_labels_are_evaluated_from_the_file_and_a_worse_release_is_refused(
    labels: tuple[Path, Path], values: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    run, bundle = labels
    code, found = _evaluated(bundle, folder / "labels.csv")
    test = open_run(run).metrics["test"]
    assert (code, found["metrics"]["images"]) == (0, test["images"])
    assert found["metrics"]["macro_ap"] == pytest.approx(test["macro_ap"], abs=0.01)

    unseen = _copied(folder / "labels.csv", tmp_path)
    same, found = _evaluated(bundle, unseen, "--against", bundle, "--max-drop", "0.2")
    assert (same, found["against"]["compared"]["drop"]) == (0, 0.0)
    swapped = tmp_path / "swapped.onnx"
    model = onnx.load(bundle / "model.onnx")
    for item in model.metadata_props:
        if item.key == "names":
            item.value = json.dumps(json.loads(item.value)[::-1])
    onnx.save(model, swapped)
    worse, found = _evaluated(swapped, unseen, "--against", bundle)
    assert (worse, found["against"]["verdict"]) == (1, "refused")
    assert {item["label"] for item in found["against"]["regressed"]} >= {"mono", "not mono"}

    (tmp_path / "other.csv").write_text(
        (folder / "labels.csv").read_text().replace("defect", "broken", 1)
    )
    for arguments, said in (
        ((bundle, tmp_path / "other.csv"), "found 'broken'"),
        ((bundle, folder / "labels.csv", "--against", values[1]), "Compare models of one task"),
    ):
        result = ftkit("eval", *arguments)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_values_are_evaluated_from_the_file_and_a_worse_release_is_refused(
    values: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    run, bundle = values
    code, found = _evaluated(bundle, folder / "values.csv")
    test = open_run(run).metrics["test"]
    assert (code, found["metrics"]["images"]) == (0, test["images"])
    assert found["metrics"]["mae"] == pytest.approx(test["mae"], rel=0.1)

    unseen = _copied(folder / "values.csv", tmp_path)
    same, found = _evaluated(bundle, unseen, "--against", bundle)
    assert (same, found["against"]["compared"]["drop"]) == (0, 0.0)
    far = tmp_path / "far.onnx"
    onnx.save(_scaled(onnx.load(bundle / "model.onnx"), 0.5), far)
    worse, found = _evaluated(far, unseen, "--against", bundle)
    assert (worse, found["against"]["verdict"]) == (1, "refused")
    assert found["against"]["parts"]["brightness"]["drop"] > 0.02

    (tmp_path / "unit.csv").write_text(
        (folder / "values.csv").read_text().replace("[levels]", "[lux]")
    )
    result = ftkit("eval", bundle, tmp_path / "unit.csv")
    assert (result.exit_code, "in levels as the model answers it" in result.stderr) == (2, True)


def _copied(table: Path, folder: Path) -> Path:
    """The same table of copies with other bytes, which no model was trained on."""
    out = folder / table.name
    with table.open(newline="") as file, out.open("w", newline="") as written:
        rows = csv.reader(file)
        writer = csv.writer(written)
        writer.writerow(next(rows))
        for number, (path, *rest) in enumerate(rows):
            copy = folder / f"{number}.png"
            with Image.open(path) as image:
                image.save(copy, compress_level=1)
            writer.writerow((copy, *rest))
    return out


def _softmax_for_sigmoid(real: Any, core: Any, preprocess: Any, _: Any, *rest: Any) -> Any:
    return real(core, preprocess, OneClass(), *rest)


def _half_the_scale(real: Any, *arguments: Any) -> onnx.ModelProto:
    return _scaled(real(*arguments), 0.5)


def _scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The image form of a regression whose values vary by another factor."""
    (scale,) = [item for item in model.graph.initializer if item.name == "calibration/const_0"]
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) * factor).astype("f4").tobytes()
    return model


def _with_metadata(change: Callable[[dict[str, Any]], None]) -> Any:
    def altered(run: Run) -> dict[str, str]:
        data = json.loads(json.dumps(run.readout.as_json()))
        change(data)
        return {KEY: json.dumps(data)}

    return patch.object(export, "_readout_metadata", altered)


def _failed_gates(run: Path, out: Path, *planted: Any) -> str:
    """The gates that planted faults fail, one after the other."""
    with ExitStack() as faults:
        for fault in planted:
            faults.enter_context(fault)
        done = export.export(
            open_run(run), out, settings=export.Export(variants="fp32"), quick=True
        )
    assert done.verdict == "failed"
    return "; ".join(gate.name for gate in done.gates if gate.verdict == "failed")


def test_planted_faults_of_labels_are_caught(labels: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = labels
    real = graph.image_form
    softmax = patch.object(
        candidates, "image_form", lambda *given: _softmax_for_sigmoid(real, *given)
    )
    swapped = _with_metadata(lambda data: data["thresholds"].reverse())
    failed = _failed_gates(run, tmp_path / "faults", softmax, swapped)
    assert "parity" in failed, "of the run's own readout"
    assert "misread" in failed, "of the file's metadata"


def test_a_label_that_is_not_known_must_not_be_counted(labels: tuple[Path, Path]) -> None:
    run = open_run(labels[0])
    canvases = export.held_out(run, None)
    rows = canvases.rows("test")
    targets = run.task.targets(canvases).numpy()[rows]
    logits = np.array(run.data["answers"])
    assert abs(run.task.figure(logits, targets) - run.metrics["test"]["macro_ap"]) < evidence.SAME
    wrong = run.task.figure(logits, np.nan_to_num(targets))
    assert abs(wrong - run.metrics["test"]["macro_ap"]) > evidence.SAME


def test_planted_faults_of_numbers_are_caught(values: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = values
    real = graph.image_form
    scale = patch.object(candidates, "image_form", lambda *given: _half_the_scale(real, *given))
    margins = _with_metadata(lambda data: data.update(margins=[m / 2 for m in data["margins"]]))
    failed = _failed_gates(run, tmp_path / "faults", scale, margins)
    assert "parity" in failed
    assert "misread" in failed


def _searched(table: Path, out: Path, *more: object) -> dict[str, Any]:
    changes = settings("stages.0.epochs=2", "stages.0.views=1", "stages.1.epochs=1")
    quick = ("--sizes", 64, "--backbones", "efficientnet_lite0", "--timed", 2, "--finalists", 1)
    done = ftkit("search", table, "--out", out, *quick, *more, *changes)
    assert done.exit_code == 0, done.output
    printed = done.output[done.output.index("\nfront ") : done.output.index("\nreport: ")]
    assert [line for line in printed.splitlines() if len(line) > 80] == []
    told: dict[str, Any] = json.loads((out / "search.json").read_text())
    return told


def test_a_search_ranks_networks_by_average_precision(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "search"
    told = _searched(folder / "labels.csv", out)
    assert (told["metric"], told["max_drop"]) == ("macro-AP", 0.01)
    linear = [point for point in told["points"] if not point["trained"]]
    assert max(point["figure"] for point in linear) > 0.6

    pick = told["pick"]
    assert pick["low"] < pick["figure"] < pick["high"]
    images = read_images(folder / "labels.csv", 0, cut_val=False)
    with np.load(out / pick["run"] / "oof.npz") as stored:
        targets = np.array([image.targets for image in images.images])[stored["rows"]]
        logits = stored["logits"]
    own = []
    for label in range(2):
        known = ~np.isnan(targets[:, label])
        own.append(average_precision_score(targets[known, label], logits[known, label]))
    assert pick["figure"] == pytest.approx(np.mean(own), abs=1e-6)

    run = open_run(out / pick["run"])
    assert (run.recipe.cut, run.recipe.pooling) == (pick["cut"], pick["pooling"])


def test_a_search_for_numbers_takes_the_lowest_error_in_its_unit(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "search"
    told = _searched(folder / "values.csv", out, "--task", "regression")
    assert (told["unit"], told["max_drop"]) == ("levels", 0.02)
    linear = [point for point in told["points"] if not point["trained"]]
    by_cost = sorted(
        (point for point in linear if point["front"]), key=lambda point: point["p50_ms"]
    )
    errors = [point["figure"] for point in by_cost]
    assert errors == sorted(errors, reverse=True), "a dearer one of the front errs less"

    pick = told["pick"]
    images = read_images(folder / "values.csv", 0, cut_val=False, task="regression")
    train = np.array([image.targets[0] for image in images.of("train")])
    with np.load(out / pick["run"] / "oof.npz") as stored:
        true = np.array([image.targets[0] for image in images.images])[stored["rows"]]
        said = stored["logits"][:, 0] * train.std() + train.mean()
    assert pick["figure"] == pytest.approx(np.abs(said - true).mean(), rel=1e-4)
    assert "levels" in (out / "report.html").read_text()


def test_a_teachers_values_are_in_the_students_units(
    values: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """The student's training images are darker, so its standardised values mean something else."""
    run = open_run(values[0])
    rows = (folder / "values.csv").read_text().splitlines()
    dark = sorted(rows[1:], key=lambda row: float(row.rsplit(",", 1)[1]))[:80]
    table = tmp_path / "dark.csv"
    table.write_text("\n".join([rows[0], *dark]))
    images = read_images(table, task="regression")
    task = task_of(images)
    assert isinstance(task, Regression)

    teacher = load_teacher(str(values[0]), run.preprocess, images, task)
    assert isinstance(run.task, Regression)
    pixels = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        taught = teacher(pixels)[:, 0] * task.spreads[0] + task.means[0]
        own = run.backbone().model(pixels)[:, 0] * run.task.spreads[0] + run.task.means[0]
    assert torch.allclose(taught, own, rtol=1e-4)

    student = ("--task", "regression", "--folds", "0", *QUICK)
    changes = settings(f"stages.0.teacher={values[0]}", f"stages.1.teacher={values[0]}")
    done = ftkit("train", table, "--out", tmp_path / "student", *student, *changes)
    assert done.exit_code == 0, done.output
    done = ftkit("train", folder / "labels.csv", "--out", tmp_path / "none", *QUICK, *changes[:2])
    assert done.exit_code == 2, done.output
    assert "expected a run of the labels defect, mono" in done.stderr
    assert "found one of the quantities brightness [levels]" in done.stderr
