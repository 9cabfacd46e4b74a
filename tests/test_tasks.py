"""Several labels, and numbers, from the CSV to the device; what is planted is caught."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from conftest import ftkit, settings
from PIL import Image

import ftkit as api
from ftkit.exporting import candidates, evidence, export
from ftkit.training.run import Run, open_run
from ftkit_export.conversion import graph
from ftkit_export.runtime.predict import Classifier, MultiLabelClassifier, Regressor
from ftkit_export.runtime.readout import KEY, OneClass

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
    done = ftkit("export", run, "--out", bundle, "--quick", "--set", "export.variants=fp32")
    assert bundle.is_dir() or Path(f"{bundle}.failed").is_dir(), done.output
    return run, bundle


@pytest.fixture(scope="module")
def values(folder: Path) -> tuple[Path, Path]:
    """A regression run, with a val split, and its bundle, which may have an 8-bit variant."""
    run, bundle = folder / "values", folder / "values-bundle"
    options = ("--recipe", "lite0_regression", "--folds", "0", *QUICK)
    trained = ftkit("train", folder / "values.csv", "--out", run, *options)
    assert trained.exit_code == 0, trained.output
    done = ftkit("export", run, "--out", bundle, "--quick", "--set", "export.max_error_rise=1")
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
    assert not (bundle / "device" / "cpp").exists(), "it would read a softmax"


def test_what_is_made_for_classes_refuses_labels_in_one_sentence(
    labels: tuple[Path, Path], folder: Path, photos: Path, tmp_path: Path
) -> None:
    run, bundle = labels
    picture = next(photos.rglob("*.png"))
    for command in (
        ("eval", bundle, photos),
        ("drift", bundle, tmp_path),
        ("enroll", bundle, "new", photos / "mono-ok", "--out", tmp_path / "new"),
        ("predict", bundle, picture, "--explain"),
        ("predict", bundle, picture, "--trace"),
        ("search", folder / "labels.csv", "--out", tmp_path / "search"),
        ("export", run, "--out", tmp_path / "c", "--c"),
        ("train", folder / "labels.csv", "--set", "stages.0.lr=auto", "--out", tmp_path / "r"),
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


def _softmax_for_sigmoid(real: Any, core: Any, preprocess: Any, _: Any, *rest: Any) -> Any:
    return real(core, preprocess, OneClass(), *rest)


def _half_the_scale(real: Any, *arguments: Any) -> onnx.ModelProto:
    model: onnx.ModelProto = real(*arguments)
    (scale,) = [item for item in model.graph.initializer if item.name == "calibration/const_0"]
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) / 2).tobytes()
    return model


def _with_metadata(change: Callable[[dict[str, Any]], None]) -> Any:
    def altered(run: Run) -> dict[str, str]:
        data = json.loads(json.dumps(run.readout.as_json()))
        change(data)
        return {KEY: json.dumps(data)}

    return patch.object(export, "_readout_metadata", altered)


def _gate_of(run: Path, out: Path, planted: Any) -> str:
    """The first gate that a planted fault fails."""
    with planted:
        done = export.export(
            open_run(run), out, settings=export.Export(variants="fp32"), quick=True
        )
    assert done.verdict == "failed"
    return next(gate.name for gate in done.gates if gate.verdict == "failed")


def test_planted_faults_of_labels_are_caught(labels: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = labels
    real = graph.image_form
    softmax = patch.object(
        candidates, "image_form", lambda *given: _softmax_for_sigmoid(real, *given)
    )
    assert "parity" in _gate_of(run, tmp_path / "softmax", softmax)
    swapped = _with_metadata(lambda data: data["thresholds"].reverse())
    assert "misread" in _gate_of(run, tmp_path / "thresholds", swapped)


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
    assert "parity" in _gate_of(run, tmp_path / "scale", scale)
    margins = _with_metadata(lambda data: data.update(margins=[m / 2 for m in data["margins"]]))
    assert "misread" in _gate_of(run, tmp_path / "margins", margins)
