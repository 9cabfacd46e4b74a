"""A small search on photographs, from the command line to a trained and exported pick."""

import json
import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import PER_CLASS, SMALL, ftkit, settings

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.models.inference import WithEmbedding
from ftkit.recipe import load_recipe
from ftkit.searching.candidates import Candidate, backbone_of, candidates
from ftkit.searching.corners import near_front
from ftkit.searching.features import features
from ftkit.searching.judge import judge_of
from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training.run import open_run
from ftkit_export.runtime.targets import here

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ASKED = (
    *("--timed", 3, "--finalists", 1),
    *("--p50-ms", 1000, "--size-mb", 50, "--frame", "320x240"),
)
CHANGES = [change for change in SMALL if not change.startswith("preprocess")]


def _search(photos: Path, out: Path, *arguments: object) -> Result:
    ask = ("search", photos, "--out", out, "--sizes", "64,96", "--backbones", "efficientnet_lite0")
    return ftkit(*ask, *arguments, *settings(*CHANGES))


@pytest.fixture(scope="module")
def searched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("searches") / "a search"
    done = _search(photos, out, *ASKED)
    assert done.exit_code == 0, done.output
    return out, done.output


def test_all_depths_are_scored_the_near_ones_timed_and_the_best_trained(
    searched: tuple[Path, str],
) -> None:
    out, printed = searched
    told = json.loads((out / "search.json").read_text())
    assert told["scored"] == 36
    timed = [point for point in told["points"] if point["p50_ms"]]
    assert {point["precision"] for point in timed} == {"fp32", "int8"}
    assert len({point["name"] for point in timed if not point["trained"]}) == 6
    assert sum(point["pick"] for point in told["points"]) == 1
    assert told["pick"]["trained"]
    table = printed[printed.index("\nfront ") : printed.index("\nreport: ")]
    assert [line for line in table.splitlines() if len(line) > 80] == []

    folder = out / told["pick"]["run"]
    run = open_run(folder)
    assert run.recipe.cut == told["pick"]["cut"]
    assert run.preprocess.size == told["pick"]["size"]
    with np.load(folder / "oof.npz") as stored:
        right = (
            stored["logits"].argmax(1)
            == np.array([image.label for image in _images(run.data["data"])])[stored["rows"]]
        )
    assert told["pick"]["figure"] == pytest.approx(right.mean())
    trained = {point["precision"] for point in told["points"] if point["trained"]}
    assert trained == {"fp32", "int8"}, "each with the answers of its own"
    front = [point for point in told["points"] if point["front"]]
    assert all(0 < point["core_ms"] <= point["p50_ms"] * 1.2 for point in front)
    assert told["timed_on"]["cpu"] == told["machine"]["cpu"]
    assert told["frame"] == "320x240"

    page = (out / "report.html").read_text()
    assert page.index("<svg") < page.index("<table")
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert chart.count("<title>") == len(timed), "a mark for each that was timed"
    assert chart.count('stroke-dasharray="5 4"') == 1, "the budget of p50"
    assert escape(told["pick"]["name"]) in chart
    assert f">{told['pick']['size']}</text>" in chart


def _images(data: str) -> list:  # type: ignore[type-arg]
    return list(read_images(data, 0, cut_val=False).images)


def test_the_pick_a_cut_network_goes_the_whole_way(
    searched: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "search"
    shutil.copytree(searched[0], out)
    asked = json.loads((out / "recipe.json").read_text())
    asked["export"]["size_mb"] = 49.0  # by a later search, which kept the finalist's run
    (out / "recipe.json").write_text(json.dumps(asked))
    bundle = tmp_path / "bundle"
    done = ftkit("export", out, "--out", bundle, "--quick", *settings("export.variants=fp32"))
    assert done.exit_code == 0, done.output
    told = json.loads((out / "search.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["preprocess"]["size"] == told["pick"]["size"]
    limits = {gate["name"][:4]: gate["limit"] for gate in manifest["gates"]}
    assert (limits["p50 "], limits["size"], manifest["frame"]) == (1000, 49, "320x240")
    assert told["pick"]["cut"]
    parameters = sum(part["parameters"] for part in manifest["pipeline"])
    core = bundle / "variants" / "fp32-core.onnx"
    assert core.stat().st_size < 4.2 * parameters + 100_000, "dead weights"
    assert ftkit("verify", bundle).exit_code == 0

    photograph = min(photos.rglob("*.png"))
    shown = ftkit("predict", bundle, photograph, "--explain", "--out", tmp_path / "why")
    assert shown.exit_code == 0, shown.output


@pytest.mark.usefixtures("every_core")
def test_ranks_share_the_passes_and_find_what_one_finds(
    searched: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    """And train the finalist together."""
    alone, _ = searched
    out = tmp_path / "together"
    ask = ("search", photos, "--out", out, "--sizes", "64,96", "--backbones", "efficientnet_lite0")
    script = tmp_path / "noting.py"
    script.write_text(
        "import os, sys; from ftkit.searching import features as f; from ftkit.cli.main import main\n"
        "run = f.runner\n"
        "def noted(*given): open(sys.argv[1] + os.environ['RANK'], 'a').write('x'); return run(*given)\n"
        "f.runner = noted\n"
        "main(sys.argv[2:])"
    )
    done = subprocess.run(
        [
            *TORCHRUN,
            str(script),
            str(tmp_path / "passes-"),
            *map(str, ask),
            *("--timed", "1", "--finalists", "1"),
            *settings(*CHANGES, "stages.1.epochs=1"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "FTKIT_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("candidates scored") == 1, "one rank speaks"
    passes = [len((tmp_path / f"passes-{rank}").read_text()) for rank in (0, 1)]
    assert passes == [2, 2], "of two sizes, one each: a third of the images, and the rest"

    one, two = (json.loads((place / "search.json").read_text()) for place in (alone, out))
    scores = [
        {
            point["name"]: point["figure"]
            for point in told["points"]
            if point["precision"] == "fp32" and not point["trained"]
        }
        for told in (one, two)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=0.02)
    run = out / two["pick"]["run"]
    assert two["pick"]["trained"]
    assert (run / "run.json").is_file()
    assert "2 ranks, 2 on this machine" in done.stdout, "the finalist was trained by both"


def test_a_searchs_folder_is_a_recipe(searched: tuple[Path, str]) -> None:
    out, _ = searched
    told = json.loads((out / "search.json").read_text())["pick"]
    recipe = load_recipe(str(out))
    assert load_recipe(str(out / "recipe.py")) == recipe, "the same, for people"
    assert (recipe.backbone, recipe.cut, recipe.pooling) == (
        told["backbone"],
        told["cut"],
        told["pooling"],
    )


def test_a_second_search_computes_no_features_and_budgets_may_fail(
    searched: tuple[Path, str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*arguments: object) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr("ftkit.searching.features.runner", computed)
    quick = ("--timed", 2, "--finalists", 2, "--p95-ms", 0.001, "--memory-mb", 1)
    done = _search(photos, tmp_path / "again", *quick)
    assert done.exit_code == 1, done.output
    assert "nothing meets the budgets" in done.output
    assert not list((tmp_path / "again").glob("finalist-*")), "training would not help"
    told = json.loads((tmp_path / "again" / "search.json").read_text())
    assert told["pick"]["missed"]["p95_ms"] > 1
    assert told["pick"]["missed"]["memory_mb"] > 20, "a process alone takes more"
    assert told["pick"]["cold_ms"] > told["pick"]["p50_ms"]
    done = ftkit("export", tmp_path / "again")
    assert done.exit_code == 2
    assert "found one without finalists" in done.output


def test_added_images_are_searched_too(
    searched: tuple[Path, str], photos: Path, elpv: list[tuple[Path, str]], tmp_path: Path
) -> None:
    more = [path for path, label in elpv if label == "mono-ok"][PER_CLASS : PER_CLASS + 9]
    table = tmp_path / "more.csv"
    table.write_text("\n".join(["path,label", *(f"{path},mono-ok" for path in more)]))
    out = tmp_path / "again"
    quick = ("--timed", 1, "--finalists", 0, "--sizes", 64, "--add", table)
    done = ftkit("search", photos, "--out", out, "--backbones", "efficientnet_lite0", *quick)
    assert done.exit_code == 0, done.output
    before, after = (
        json.loads((folder / "search.json").read_text())["images"] for folder in (searched[0], out)
    )
    assert after == before + 9

    audit = ftkit("data", photos, "--add", table, "--json", "-")
    assert json.loads(audit.stdout)["counts"]["mono-ok"]["train"] == 26 + 9, audit.stdout


def test_a_device_that_cannot_be_reached_times_a_folder(
    searched: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    other = "x86" if here() == "arm64" else "arm64"
    out = tmp_path / "far"
    ask = (photos, out, "--timed", 2, "--finalists", 0, "--target", other)
    done = _search(*ask)
    assert done.exit_code == 0, done.output
    told = json.loads((out / "search.json").read_text())
    assert told["target"] == other
    assert not any(point["p50_ms"] for point in told["points"])
    assert told["pick"]["size_bytes"] > 0
    assert "million" in (out / "report.html").read_text()

    script = out / "to-time" / "time_candidates.py"
    hidden = ("torch", "onnx", "scipy", "click")
    run = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden!r})); "
        f"sys.path.insert(0, {str(script.parent)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    printed = subprocess.run([sys.executable, "-c", run], capture_output=True, check=True).stdout
    times = tmp_path / "times.json"
    times.write_bytes(printed)
    wrong = _search(*ask, "--latency", times)
    assert (wrong.exit_code, f"found times of {here()}" in wrong.output) == (2, True), wrong.output

    there = json.loads(printed)
    times.write_text(json.dumps({**there, "target": other}))  # as the device itself prints it
    done = _search(*ask, "--latency", times, "--p50-ms", 1000)
    assert done.exit_code == 0, done.output
    told = json.loads((out / "search.json").read_text())
    timed = {point["name"]: point["p50_ms"] for point in told["points"] if point["p50_ms"]}
    assert timed == {name: each["p50_ms"] for name, each in there["times"].items()}

    framed = _search(*ask, "--latency", times, "--frame", "4000x3000")
    assert (framed.exit_code, "those of another search" in framed.output) == (2, True), (
        framed.output
    )
    for wrong in (("--p50-ms", 5), ("--latency", tmp_path / "none.json")):
        assert _search(*ask, *wrong).exit_code == 2


def test_what_was_found_stands_when_a_finalist_is_interrupted(
    searched: tuple[Path, str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ftkit.searching.search.train", stopped)
        done = _search(photos, tmp_path, "--timed", 2, "--finalists", 1)
    assert done.exit_code == 130, done.output
    told = json.loads((tmp_path / "search.json").read_text())
    assert told["scored"] == 36
    assert told["pick"]["p50_ms"] > 0
    assert not told["pick"]["trained"]

    out = tmp_path / "again"
    shutil.copytree(searched[0], out)
    before = json.loads((out / "search.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("ftkit.searching.search.train", stopped)
        assert _search(photos, out, *ASKED).exit_code == 130
    assert json.loads((out / "search.json").read_text()) == before, (
        "until the finalist is there again"
    )


def test_a_late_finalist_is_judged_on_what_it_answered(
    searched: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "late"
    shutil.copytree(searched[0], out)
    told = json.loads((out / "search.json").read_text())
    answers = out / told["pick"]["run"] / "oof.npz"
    with np.load(answers) as stored:
        held = dict(stored)
    kept = np.isin(held["fold"], (0, 1))[np.isin(held["train_rows"], held["rows"])]
    for name in ("rows", "logits", "embedding", "foreign"):
        held[name] = held[name][kept]
    np.savez(answers, **held)  # as where two of four folds were trained in time

    done = _search(photos, out, *ASKED)
    assert done.exit_code == 0, done.output
    assert f"trained in time to answer {kept.sum()} of {len(kept)}" in " ".join(done.output.split())
    again = json.loads((out / "search.json").read_text())
    run = open_run(out / told["pick"]["run"])
    labels = np.array([image.label for image in _images(run.data["data"])])
    right = held["logits"].argmax(1) == labels[held["rows"]]
    assert (again["pick"]["run"], again["compared_on"]) == (told["pick"]["run"], kept.sum())
    assert again["images"] == len(kept), "the others were scored on all"
    assert again["pick"]["figure"] == pytest.approx(right.mean())


def test_features_are_those_of_the_network(photos: Path) -> None:
    backbone = backbone_of("efficientnet_lite0")
    preprocess = backbone.preprocess.at(64)
    canvases = build_canvases(read_images(photos, 0), preprocess)
    rows = canvases.rows("train")[:11]
    found = features(backbone, canvases, preprocess, rows)
    again = features(backbone, canvases, preprocess, rows)
    seen = {}
    for name in ("blocks.2", "blocks.6"):
        backbone.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    with torch.inference_mode():
        backbone.model(torch.from_numpy(preprocess.pixels(canvases.array(rows))))
    for name, value in seen.items():
        expected = torch.cat([value.mean((2, 3)), value.amax((2, 3))], 1).numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(found[name], again[name])

    together = [each for each in candidates(backbone, 64) if "+" in each.cut]
    assert [each.cut.count("+") for each in together] == [1, 2, 2]
    cut = together[1].cut
    shorter = build("efficientnet_lite0", 2, cut=cut, pooling=together[1].pooling)
    pixels = torch.from_numpy(preprocess.pixels(canvases.array(rows)))
    with torch.inference_mode():
        _, embedding = WithEmbedding(shorter)(pixels)
    expected = np.concatenate([found[name] for name in cut.split("+")], axis=1)
    np.testing.assert_allclose(embedding, expected, rtol=1e-3, atol=1e-3)


def test_a_network_of_one_input_size_and_a_val_split_are_told(photos: Path, tmp_path: Path) -> None:
    ask = ("search", photos, "--out", tmp_path / "none", "--finalists", 0, "--timed", 1)
    weights = settings("weights=none")
    done = ftkit(*ask, "--backbones", "vit_tiny_patch16_224", "--sizes", 96, *weights)
    assert done.exit_code == 2, done.output
    assert "vit_tiny_patch16_224 at 96 px: expected an input size that it takes" in done.output

    split = tmp_path / "split"
    for place in ("train", "val", "test"):
        shutil.copytree(photos, split / place)
    done = ftkit("search", split, *ask[2:])
    assert done.exit_code == 2, done.output
    assert "expected no val split" in done.output


def test_images_that_no_finalist_can_be_trained_on_are_told_before_anything_is_scored(
    photos: Path, tmp_path: Path
) -> None:
    rows = ["path,label,group"]
    for folder in sorted(photos.glob("*-*"))[:2]:
        for number, path in enumerate(sorted(folder.glob("*.png"))[:12]):
            group = "all" if folder.name == "mono-defect" else f"{folder.name}{number}"
            rows.append(f"{path},{folder.name},{group}")
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    asked = _search(tmp_path / "data.csv", tmp_path / "out")
    assert asked.exit_code == 2
    assert "or --finalists 0" in asked.output or "training images of class" in asked.output
    assert "candidates scored" not in asked.output


def test_the_smallest_and_the_most_accurate_are_always_timed() -> None:
    judge = judge_of(SINGLE_LABEL, np.zeros(1000, np.int64), [""] * 1000, outputs=2)
    points = [
        judge.point(
            Candidate(backbone="b", size=96, cut=f"{n}", pooling="mean", multiplications=n),
            np.arange(1000) < 500 + 10 * n,
        )
        for n in range(1, 33)
    ]
    picked = near_front(points, 16, judge.near)
    assert points[-1] in picked
    assert points[0] in picked, "the smallest: it may be the only one that meets a budget"
    assert len(picked) == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sizes", "small"), "--sizes: expected whole numbers"),
        (("--sizes", "16"), "search.sizes: expected 32 to"),
        (("--backbones", "efficientnet_lite9"), "expected a timm or torchvision model"),
        (("--frame", "wide"), "frame"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    photos: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = ftkit("search", photos, "--out", tmp_path / "none", *arguments)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "none" / "search.json").exists()
