"""Every label is evidence: out-of-fold predictions decide, and the shipped weights are a refit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from conftest import COMMAND, SMALL, ftkit, settings
from PIL import Image

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.evaluation.model import Inference, familiar
from ftkit.exporting.export import is_folded, judged_parts
from ftkit.recipe import load_recipe
from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training import loader
from ftkit.training.closed_form import default_folds
from ftkit.training.fold_decision import losses_of, verdict_of
from ftkit.training.folds import make_folds, read_with_folds
from ftkit.training.run import fold_models, open_run
from ftkit_export.conversion.convert import Trace
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.out_of_distribution import OutOfDistribution
from ftkit_export.runtime.preprocess import Preprocess

FOLDED = ("--folds", "3", "--group-by", "cell(...)", *settings(*SMALL))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folded(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three folds; its output in trace.txt."""
    out = tmp_path_factory.mktemp("folds") / "run"
    result = ftkit("train", photos, "--out", out, *FOLDED)
    assert result.exit_code == 0, result.output
    (out / "trace.txt").write_text(result.stdout)
    return out


def _csv(path: Path, rows: list[tuple[Path, str, str, str]]) -> Path:
    lines = ["path,label,split,group", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_groups_and_identical_files_are_never_split_and_classes_are_spread(tmp_path: Path) -> None:
    rows = []
    for number in range(120):
        same = number - 1 if number % 10 == 1 else number  # every tenth file has a copy
        image = Image.fromarray(np.random.default_rng(same).integers(0, 255, (24, 24, 3), np.uint8))
        image.save(tmp_path / f"{number:03d}.png")
        group = f"g{number // 4}" if number < 80 else ""
        rows.append((tmp_path / f"{number:03d}.png", "ab"[number % 2], "train", group))
    rows += [(path, label, "test", "") for path, label, _, _ in rows[-4:]]
    images = read_images(_csv(tmp_path / "data.csv", rows), cut_val=False)
    canvases = build_canvases(images, Preprocess(size=24, resize=24))
    folds = make_folds(canvases, 5, seed=0)

    train = [images.images[row] for row in canvases.rows("train")]
    groups = np.array([image.group for image in train])
    assert all(len(set(folds.of[groups == group])) == 1 for group in set(groups) - {""})
    copies = [number for number in range(120) if number % 10 == 1]
    assert all(folds.of[number] == folds.of[number - 1] for number in copies)
    assert folds.count == 5
    assert sorted(np.concatenate([folds.held(fold) for fold in range(5)])) == list(range(120))
    labels = np.array([image.label for image in train])
    shares = [labels[folds.held(fold)].mean() for fold in range(5)]
    assert np.abs(np.array(shares) - labels.mean()).max() < 0.15


def test_fewer_groups_than_folds_give_as_many_folds_and_too_few_are_refused(
    photos: Path, tmp_path: Path
) -> None:
    rows = [
        (path, path.parent.name, "train" if number % 5 else "test", f"g{number % 3}")
        for folder in sorted(photos.glob("*-*"))
        for number, path in enumerate(sorted(folder.glob("*.png"))[:15])
    ]
    preprocess = Preprocess(size=24, resize=24)
    three = build_canvases(read_images(_csv(tmp_path / "3.csv", rows), cut_val=False), preprocess)
    assert make_folds(three, 5, seed=0).count == 3
    one = [(path, label, split, "all") for path, label, split, _ in rows]
    single = build_canvases(read_images(_csv(tmp_path / "1.csv", one), cut_val=False), preprocess)
    with pytest.raises(FtkitError, match="expected every class in at least two groups"):
        make_folds(single, 5, seed=0)


def test_a_value_that_is_not_known_takes_no_folds_away(tmp_path: Path) -> None:
    """Regression: one gap in the first quantity was a class of its own, of one image."""
    lines = ["path,width [mm],height [mm]"]
    for number in range(60):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number if number != 7 else ''},{number % 9}")
    table = tmp_path / "data.csv"
    table.write_text("\n".join(lines) + "\n")
    recipe = load_recipe("lite0_regression")
    images = read_with_folds(recipe, table, 0, "", None)
    assert images.made == ("test",), "folds take the place of a val split"
    canvases = build_canvases(images, Preprocess(size=24, resize=24))
    assert make_folds(canvases, 4, seed=0).count == 4
    rows = canvases.rows("train")
    assert len(default_folds(canvases.labels[rows], canvases.groups(rows))) > 1


@pytest.mark.filterwarnings("error")
def test_a_handful_of_images_gives_as_many_folds_as_they_can(photos: Path, tmp_path: Path) -> None:
    """Regression: fewer images in every class than folds was a traceback; in one class, a warning."""
    preprocess = Preprocess(size=24, resize=24)
    for few, many, count in ((3, 3, 3), (2, 30, 4)):
        rows = [
            (path, folder.name, "train", "")
            for folder, most in zip(sorted(photos.glob("*-*"))[:2], (few, many), strict=True)
            for path in sorted(folder.glob("*.png"))[:most]
        ]
        rows += [(path, label, "test", "") for path, label, _, _ in (rows[0], rows[-1])]
        table = _csv(tmp_path / f"{few}-{many}.csv", rows)
        folds = make_folds(build_canvases(read_images(table, cut_val=False), preprocess), 4, seed=0)
        assert folds.count == count
        labels = np.array([0] * few + [1] * many)
        assert all(set(labels[folds.train(fold)]) == {0, 1} for fold in range(count))


def test_every_image_is_predicted_by_a_model_that_never_saw_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    real = loader.CachedLoader.fetch

    def watched(self: Any, positions: Any, *rest: Any) -> Any:
        seen[-1].update(map(int, positions))
        return real(self, positions, *rest)

    from ftkit.training import folded as module

    begin = module.StageTraining

    def begun(*given: Any) -> Any:
        seen.append(set())
        return begin(*given)

    monkeypatch.setattr(loader.CachedLoader, "fetch", watched)
    monkeypatch.setattr(module, "StageTraining", begun)
    result = ftkit("train", photos, "--out", tmp_path / "run", *FOLDED)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "run" / "oof.npz") as stored:
        of = stored["fold"]
    for fold in range(3):
        assert not seen[fold] & set(np.flatnonzero(of == fold))
        assert seen[fold] <= set(np.flatnonzero(of != fold))


def test_the_kept_folds_models_give_the_kept_answers(folded: Path, photos: Path) -> None:
    """What an export decides on: each fold's weights, and its answers for images it never saw."""
    run = open_run(folded)
    images = read_images(photos, run.data["seed"], run.data["group_by"], cut_val=False)
    canvases = build_canvases(images, run.preprocess)
    with np.load(folded / "oof.npz") as stored:
        rows, logits = stored["rows"], stored["logits"]
    assert len(rows) == run.data["splits"]["train"], "every training image"
    assert run.data["splits"]["val"] == 0
    answers = dict(zip(rows, logits, strict=True))
    held_by_all: list[int] = []
    for model, held, trained_on in fold_models(run):
        backbone = run.backbone()
        backbone.model.load_state_dict(model.state_dict())
        found = Inference(backbone, canvases, run.preprocess)(held, "again")[0]
        expected = np.stack([answers[row] for row in held])
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        assert not set(held) & set(trained_on)
        held_by_all += list(held)
    assert sorted(held_by_all) == sorted(rows)


def test_what_is_fitted_is_fitted_on_the_answers_out_of_fold(folded: Path) -> None:
    run = open_run(folded).data
    with np.load(folded / "oof.npz") as stored:
        right = stored["logits"].argmax(1)
    assert run["metrics"]["val"]["images"] == len(right)
    assert run["metrics"]["val"]["accuracy"] == pytest.approx(
        np.average(run["folds"]["accuracy"], weights=run["folds"]["images"])
    )
    assert run["folds"]["count"] == 3
    trace = (folded / "trace.txt").read_text()
    assert trace.count("fold ") >= 3
    assert "val image" not in trace
    report = (folded / "report.html").read_text()
    assert "Out-of-fold accuracy of each fold" in report
    (row,) = re.findall(r"folds&#39; models, out of fold</td>(.*?)</tr>", report, re.S)
    assert f"{run['metrics']['val']['accuracy_low']:.3f} to " in row
    for stage in run["stages"]:
        gain, low, high = (100 * value for value in stage["gain"])
        assert low <= gain <= high
        assert f"{gain:+.1f} [{low:+.1f} to {high:+.1f}]" in report


def test_foreign_images_are_judged_in_the_space_of_each_folds_own_model(
    folded: Path, photos: Path
) -> None:
    """Regression: the embeddings of four models were scored by the statistics of a fifth; nothing
    was foreign."""
    run = open_run(folded)
    images = read_images(photos, run.data["seed"], run.data["group_by"], cut_val=False)
    canvases = build_canvases(images, run.preprocess)
    scores = []
    for model, held, seen in fold_models(run):
        backbone = run.backbone()
        backbone.model.load_state_dict(model.state_dict())
        answers = Inference(backbone, canvases, run.preprocess)
        embedding = answers(held, "held out")[1]
        scores += list(familiar(answers, canvases, seen, embedding).score(embedding))
    kept = OutOfDistribution.from_text(run.data["foreign"])
    assert kept.threshold == pytest.approx(np.quantile(scores, kept.kept), rel=0.1)


def test_a_run_killed_in_a_fold_and_in_the_refit_ends_with_the_same_bits(
    folded: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def stands(stage: int, fold: int) -> bool:
        try:
            data = json.loads((out / "state" / "state.json").read_text())
        except (OSError, ValueError):
            return False
        return bool((data["stage"], data["fold"], data["step"]) > (stage, fold, 2))

    for stage, fold in ((0, 1), (0, 2), (1, 0)):
        command = [sys.executable, "-c", COMMAND, "train", str(photos), "--out", str(out)]
        more = ["--resume"] if out.exists() else list(FOLDED)
        process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, env=os.environ)
        while process.poll() is None and not stands(stage, fold):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)

    # What stands can be exported, says what it lacks, and the run still goes on
    so_far = ftkit("export", out, "--quick", "--set", "export.variants=fp32")
    assert so_far.exit_code == 0, so_far.output
    bundle = tmp_path / "run-bundle"
    assert json.loads((bundle / "manifest.json").read_text())["not_trained"] == ["last:1"]
    for page in ("MODEL_CARD.md", "report.html"):
        assert "training was interrupted" in (bundle / page).read_text()

    result = ftkit("train", photos, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert not (out / "so-far").exists()
    one, other = (safetensors.torch.load_file(run / "model.safetensors") for run in (folded, out))
    assert all(one[name].equal(other[name]) for name in one)
    with np.load(folded / "oof.npz") as first, np.load(out / "oof.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files)


@pytest.mark.parametrize("folds", ["3", "0"])
def test_minutes_end_a_training_with_what_stands(photos: Path, tmp_path: Path, folds: str) -> None:
    """No time at all: the ridge head, judged and reported. Little time: no more than that."""
    plan = ("--folds", folds, *settings(*SMALL))
    none = ftkit("train", photos, "--out", tmp_path / "none", "--minutes", "0", *plan)
    assert none.exit_code == 0, none.output
    run = open_run(tmp_path / "none").data
    assert [stage["verdict"] for stage in run["stages"]] == ["late", "late"]
    assert run["metrics"]["test"]["accuracy"] > 0.6
    assert [part["stages"] for part in run["pipeline"]][-1] == ["ridge"]
    if folds != "0":
        assert run["metrics"]["val"]["accuracy"] == pytest.approx(run["head_start"]["accuracy"])

    long = settings("stages.1.epochs=40000")  # hours, seen to be too long within seconds
    little = ftkit("train", photos, "--out", tmp_path / "little", "--minutes", "5", *plan, *long)
    assert little.exit_code == 0, little.output
    stages = open_run(tmp_path / "little").data["stages"]
    assert [stage["verdict"] == "late" for stage in stages] == [False, True]
    assert not stages[1]["kept"]


@pytest.mark.usefixtures("every_core")
def test_two_ranks_give_the_answers_of_one(folded: Path, photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        *TORCHRUN,
        "-m",
        "ftkit",
        "train",
        photos,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*map(str, command), *FOLDED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(folded / "oof.npz") as one, np.load(tmp_path / "run" / "oof.npz") as two:
        assert np.array_equal(one["fold"], two["fold"])
        assert np.abs(one["logits"] - two["logits"]).max() < 0.05 * np.abs(one["logits"]).max()


def test_a_stage_that_breaks_or_is_surely_worse_costs_a_fold_and_is_left_out(
    photos: Path, tmp_path: Path
) -> None:
    """What stood before it ships: the head from the ridge, then the head stage's."""
    small = ("preprocess.size=96", "preprocess.resize=96", "stages.0.optimizer=sgd")
    folds = ("--folds", "3", "--group-by", "cell(...)", "--recipe", "gentle")
    broken = settings(*small, "stages.0.lr=3e38")
    done = ftkit("train", photos, "--out", tmp_path / "broken", *folds, *broken)
    assert done.exit_code == 0, done.output
    run = open_run(tmp_path / "broken").data
    assert [(stage["kept"], stage["folds"]) for stage in run["stages"]] == [(False, 0)]
    assert "the loss is no longer finite" in done.stdout
    assert run["metrics"]["val"]["accuracy"] == pytest.approx(run["head_start"]["accuracy"])

    worse = settings(*SMALL, "stages.1.lr=5", "stages.1.optimizer=sgd", "stages.1.clip=1")
    command = ("train", photos, "--out", tmp_path / "worse", "--folds", "5", *worse)
    done = ftkit(*command, *settings("stages.1.weight_decay=0"))
    assert done.exit_code == 0, done.output
    stages = open_run(tmp_path / "worse").data["stages"]
    assert stages[1]["kept"] is False
    assert stages[1]["folds"] < 5, "a whole training is not spent on it"
    assert stages[1]["gain"][2] < 0 or stages[1]["folds"] == 0


def test_a_gain_that_is_open_is_decided_by_the_loss() -> None:
    """The better of two models is found more often than by the accuracy of the same images."""
    random = np.random.default_rng(0)
    found = {"loss": 0, "accuracy": 0}
    for _ in range(100):
        labels = random.integers(4, size=150)
        signal = np.eye(4)[labels]
        noise = random.normal(0, 1, (150, 4))
        before = 1.5 * signal + noise  # 72 % right
        after = 4 * (1.7 * signal + noise + random.normal(0, 0.3, (150, 4)))  # 76 %, and too sure
        compared = SINGLE_LABEL.compare(before, after, labels, [""] * 150, 1)
        verdict = verdict_of(compared, 0.01)
        losses = losses_of(SINGLE_LABEL, verdict, before, after, labels)
        assert (losses is None) == (verdict in ("better", "worse"))
        found["loss"] += losses[1] < losses[0] if losses else verdict == "better"
        found["accuracy"] += compared.drop < 0
    assert found["loss"] >= 90 > found["accuracy"], found


def test_a_stage_that_is_surely_better_is_trained_on_as_many_images_as_8_bits_need(
    photos: Path, tmp_path: Path
) -> None:
    """A few folds settle the stage, but not what is decided on its answers later."""
    plan = settings(
        *SMALL, "stages.0.init=random", "stages.0.lr=1e-7", "stages.0.epochs=1", "stages.1.lr=3e-3"
    )
    folds = []
    for limit in ("0.2", "0.01"):
        changes = settings(f"export.max_accuracy_drop={limit}")
        done = ftkit("train", photos, "--out", tmp_path / limit, *plan, *changes)
        assert done.exit_code == 0, done.output
        stage = open_run(tmp_path / limit).data["stages"][1]
        assert stage["verdict"] == "better"
        folds.append(stage["folds"])
    assert folds[0] < folds[1] == 4


def test_a_val_split_that_is_given_decides_and_patience_needs_one(
    photos: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(photos.glob("*-*/*.png"))):
        place = tmp_path / "data" / ("train", "val", "test")[number % 3] / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.name)
    quick = settings(*SMALL, "stages.0.epochs=1", "stages.1.epochs=1")
    given = ftkit("train", tmp_path / "data", "--folds", "3", "--out", tmp_path / "run", *quick)
    assert given.exit_code == 0, given.output
    assert "no folds are made" in given.stderr
    assert open_run(tmp_path / "run").data["folds"] is None
    patient = ftkit(
        "train", photos, "--out", tmp_path / "other", *FOLDED, *settings("stages.0.patience=2")
    )
    assert (patient.exit_code, "expected 0 with folds" in patient.stderr) == (2, True)


def test_a_run_that_one_fold_settled_is_judged_as_folded(folded: Path, tmp_path: Path) -> None:
    """Regression: the shipped file was then not compared with the fold's."""
    run = Path(shutil.copytree(folded, tmp_path / "run"))
    with np.load(run / "oof.npz") as stored:
        held = stored["train_rows"][stored["fold"] == 0]
        known = np.isin(stored["rows"], held)
        cut = {
            name: stored[name][known]
            if name in ("rows", "logits", "embedding", "foreign")
            else stored[name]
            for name in stored.files
        }
    np.savez(run / "oof.npz", **cut)
    opened = open_run(run)
    trace = Trace(opened.backbone().model, opened.preprocess.size)
    core = trace.core(opened.backbone().model)
    images = read_images(opened.data["data"], group_by=opened.data["group_by"], cut_val=False)
    canvases = build_canvases(images, opened.preprocess)
    parts = judged_parts(opened, trace, core, canvases)
    assert (len(parts), is_folded(parts, core)) == (1, True)


def test_an_export_decides_on_the_folds_and_checks_the_shipped_file_against_them(
    folded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    first = settings("export.max_accuracy_drop=0.9")  # the first int8 form will do
    done = ftkit("export", folded, "--out", out, "--quick", "--handoff", *first)
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "manifest.json").read_text())
    fp32, int8 = manifest["evidence"]["decision"][:2]
    images = open_run(folded).data["metrics"]["val"]["images"]
    assert fp32["accuracy"] == pytest.approx(
        open_run(folded).data["metrics"]["val"]["accuracy"], abs=0.02
    )
    assert int8["paired"]["images"] == images
    chosen = [row for row in manifest["evidence"]["decision"] if row["chosen"]]
    assert [row["precision"] for row in chosen] == [manifest["chosen"]]
    assert f"{chosen[0]['name']} (chosen)" in (out / "report.html").read_text()
    checks = {item["name"]: item for item in manifest["evidence"]["agreement"][int8["name"]]}
    assert checks["dB lost to ONNX Runtime's optimiser"]["passed"]
    check = checks["answers changed by the shipped file"]
    assert check["inputs"] == open_run(folded).data["splits"]["test"]
    assert 0 <= check["floor"] <= 1
    assert ftkit("verify", out).exit_code == 0
