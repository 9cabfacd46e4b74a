"""Several processes with gloo: same global batches, same weights; a dead rank ends the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import COMMAND, TINY, ftkit, settings, steps_done

from ftkit.cli.main import main
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.recipe import Augment, Recipe, Stage
from ftkit.training.stage_loaders import StageLoaders
from ftkit.utils import distributed
from ftkit.utils.distributed import FRESH_STORE, Ranks
from ftkit_export.runtime.preprocess import MAX_PIXELS, Preprocess

# SGD: Adam would turn gradient noise where the true gradient is zero
# (a bias before a BatchNorm) into steps.
PLAN = settings(
    *TINY, "stages.0.optimizer=sgd", "stages.1.optimizer=sgd", "stages.0.lr=0.1", "stages.1.lr=0.01"
)
pytestmark = pytest.mark.usefixtures("every_core")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan, trained by a single process."""
    out = tmp_path_factory.mktemp("ranks") / "alone"
    result = ftkit("train", photos, "--out", out, *PLAN)
    assert result.exit_code == 0, result.output
    return out


def assert_same_within_rounding(one: Path, other: Path) -> None:
    first, second = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other)
    )
    worst = max(
        float((first[name] - second[name]).abs().max()) / max(1e-9, float(first[name].abs().max()))
        for name in first
    )
    assert worst < 2e-3, (
        "BatchNorm over few values multiplies the last bit's rounding; local statistics are off by 0.1"
    )
    traces = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (one, other)
    ]
    for left, right in zip(*traces, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        for same in ("epoch", "lr", "train_accuracy", "val_accuracy"):
            assert left[same] == right[same]


def test_four_ranks_end_with_the_weights_of_one(alone: Path, photos: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from ftkit.utils.distributed import launch; sys.exit(launch(4, sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "train",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        *PLAN,
    ]
    environment = {**os.environ, "FTKIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "4 ranks, 4 on this machine" in done.stdout
    assert done.stdout.count("test accuracy") == done.stdout.count("next: ftkit export") == 1, (
        "one rank speaks"
    )
    assert "frozen prefix computed once: 2 views x 92" in done.stdout
    assert done.stdout.count("img/s a rank") == 2
    assert_same_within_rounding(alone, tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(last["images_per_s_by_rank"]) == 4
    assert sum(last["images_per_s_by_rank"]) == pytest.approx(last["images_per_s"])


def rank_processes(agent: int) -> dict[str, int]:
    """Map rank to process among torchrun's children."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if entry.startswith("RANK="):
                found[entry.removeprefix("RANK=")] = int(child)
    return found


def kill_rank_1(photos: Path, out: Path, script: Path, *more: str) -> tuple[int, str]:
    """Run two ranks, saving each step, and kill rank 1 in the second stage.

    Returns torchrun's exit code and stderr.
    """
    script.write_text(COMMAND)
    command = [*TORCHRUN, *more, str(script), "train", str(photos), "--out", str(out), *PLAN]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **dict([FRESH_STORE.split("=")])},
    )
    while process.poll() is None and steps_done(out) < 1002:
        time.sleep(0.005)
    os.kill(rank_processes(process.pid)["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(
    alone: Path, photos: Path, tmp_path: Path
) -> None:
    code, errors = kill_rank_1(
        photos, tmp_path / "run", tmp_path / "each_step_saved.py", "--max-restarts", "1"
    )
    assert code == 0, errors
    assert_same_within_rounding(alone, tmp_path / "run")


def test_a_killed_rank_ends_the_run_and_one_process_goes_on(
    alone: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, errors = kill_rank_1(photos, out, tmp_path / "each_step_saved.py")
    assert code != 0
    # Either rank 1 stops answering first, or torchrun asks rank 0 to stop first.
    told = re.findall(
        r"^(?:error: rank 0: expected every rank to answer, found one gone \(.+\)|stopped; go on with)",
        errors,
        re.M,
    )
    assert len(told) == 1, errors
    assert "[rank" not in errors, "no traceback of a rank"
    result = ftkit("train", photos, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "expected ranks 2 as before the interruption, found 1" in result.stderr
    assert_same_within_rounding(alone, out)


CHECKS = """
import json, sys
import torch
from torch import nn
from ftkit.utils.distributed import GlobalBatchNorm, joined
from ftkit_export.runtime.errors import FtkitError

with joined("cpu") as (device, ranks):
    found = {"gather": ranks.gather({"rank": ranks.rank}), "first": ranks.first(lambda: "of rank 0"),
             "largest": ranks.largest(ranks.rank), "sum": ranks.sum(torch.ones(2)).tolist()}
    given = {"a": torch.arange(3.0), "n": torch.tensor(7)} if ranks.main else {}
    found["tensors"] = {name: value.tolist() for name, value in ranks.tensors(given).items()}
    def fails():
        if ranks.rank == 1:
            raise FtkitError("rank 1 has no images")
    try:
        ranks.together(fails)
    except FtkitError as error:
        found["failed"] = str(error)
    torch.manual_seed(0)
    whole, net = torch.randn(5, 4, 3, 3, dtype=torch.float64), nn.BatchNorm2d(4).double()
    expected, part = nn.BatchNorm2d(4).double(), ranks.part(5)
    mine, all_ = whole[part].clone().requires_grad_(), whole.clone().requires_grad_()
    with GlobalBatchNorm(2):
        (net(mine) ** 3).sum().backward()
    (expected(all_) ** 3).sum().backward()
    found["gradient"] = float((mine.grad - all_.grad[part]).abs().max())
    found["statistics"] = float((net.running_var - expected.running_var).abs().max())
    with GlobalBatchNorm(2):
        found["evaluation"] = torch.equal(net.eval()(whole), nn.functional.batch_norm(
            whole, net.running_mean, net.running_var, net.weight, net.bias))
    open(f"{sys.argv[1]}/{ranks.rank}.json", "w").write(json.dumps(found))
"""


def test_ranks_of_another_mind_end_with_one_sentence(photos: Path, tmp_path: Path) -> None:
    """A different seed on the second machine, or a time limit on one alone, which ends a stage there."""
    script = tmp_path / "each_its_own.py"
    script.write_text(
        "import os, sys; from ftkit.cli.main import main; rank = os.environ['RANK']; "
        "own = ['--minutes', '9'] if 'minutes' in sys.argv[-1] and rank == '1' else []; "
        "main([*sys.argv[1:-1], *own, *(['--seed', rank] if 'seed' in sys.argv[-1] else [])])"
    )
    for differ, said in (
        ("seed", "expected the same recipe, seed, images, labels and splits on every machine"),
        ("minutes", "--minutes: expected the same on every machine, found others"),
    ):
        command = [
            *TORCHRUN,
            str(script),
            "train",
            str(photos),
            "--out",
            str(tmp_path / "run"),
            *PLAN,
            differ,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0
        assert done.stderr.count("error: ") - done.stderr.count("ChildFailedError") <= 2, (
            done.stderr
        )
        assert done.stderr.count(said) == 1, done.stderr


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    subprocess.run(
        [*TORCHRUN, str(tmp_path / "checks.py"), str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    for rank, said in ((0, ""), (1, "rank 1 has no images")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert (found["first"], found["largest"], found["sum"]) == ("of rank 0", 1, [2.0, 2.0])
        assert found["tensors"] == {"a": [0.0, 1.0, 2.0], "n": 7}
        assert found["failed"] == said, "all fail, and the one that met it tells"
        assert found["gradient"] < 1e-12
        assert found["statistics"] < 1e-12
        assert found["evaluation"]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_parts_are_the_whole_batch_and_nearly_equal(count: int) -> None:
    parts = [Ranks(rank, count, rank, count).part(64) for rank in range(count)]
    assert [i for part in parts for i in range(64)[part]] == list(range(64))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_part_of_a_batch_is_that_part_of_the_whole(photos: Path, cache: str) -> None:
    """Including random draws: views, crops, flips, images mixed in from another rank."""
    preprocess = Preprocess(size=48, resize=64)
    augment = Augment(hflip=True, scale=0.5, mixup=0.4, cutmix=1.0)
    recipe = Recipe(
        name="x", backbone="resnet18", augment=augment, stages=(Stage(views=3, cache=cache),)
    )
    canvases = build_canvases(read_images(photos), preprocess)
    torch.manual_seed(0)
    loader = StageLoaders(
        build("resnet18", 4, "none"), recipe, canvases, preprocess, 0, torch.device("cpu")
    ).stage(0)
    assert loader.how.startswith("live") is (cache == "off")

    def batch(part: slice) -> Sequence[torch.Tensor]:
        made = loader.prepare(
            loader.fetch(np.arange(40, 57), torch.Generator().manual_seed(3), part)
        )
        return [
            value
            for value in (*made.inputs, made.targets, made.others, made.share)
            if value is not None
        ]

    parts = [batch(Ranks(rank, 3, rank, 3).part(17)) for rank in range(3)]
    for whole, *pieces in zip(batch(slice(0, 17)), *parts, strict=True):
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-6)


def test_gpus_that_are_not_there_are_named(photos: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command, more, what in (
        ("train", ["--gpus", "2"], "--device cuda: expected a GPU torch can use, found none"),
        ("train", ["--gpus", "2", "--device", "cpu"], "--gpus: expected --device cuda, found cpu"),
        ("search", ["--gpus", "2"], "--device cuda: expected a GPU torch can use, found none"),
    ):
        result = ftkit(command, photos, "--out", tmp_path / "run", *more)
        assert (result.exit_code, result.stderr.count("error:"), what in result.stderr) == (
            2,
            1,
            True,
        ), result.stderr
    assert not (tmp_path / "run").exists()


def test_every_process_gets_the_very_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The launcher is replaced, since GPUs are missing; only the command line is checked."""
    started: list[object] = []
    monkeypatch.setattr(distributed, "pick_device", lambda *_: None)
    monkeypatch.setattr(distributed, "launch", lambda *given: started.append(given) or 7)
    monkeypatch.setenv(MAX_PIXELS, "1")  # so that it is as before in the end
    said = [
        "--recipe",
        "gentle",
        "--set",
        "stages.0.epochs=2",
        "--set",
        "augment.hflip=true",
        "--seed",
        "3",
        "--deterministic",
        "--max-pixels",  # by the environment
        "50000000",
    ]
    result = ftkit(
        "train", tmp_path / "my photos", "--gpus", "4", "--out", tmp_path / "a run", *said
    )
    assert result.exit_code == 7
    ((count, words),) = started  # type: ignore[misc]
    assert (count, words[:4]) == (4, ["train", str(tmp_path / "my photos"), "--device", "cuda"])
    again = (
        main.commands["train"].make_context("train", words[1:], parent=click.Context(main)).params
    )
    expected = {
        "recipe": "gentle",
        "settings": ("stages.0.epochs=2", "augment.hflip=true"),
        "seed": 3,
        "weights": None,
        "deterministic": True,
        "resume": False,
        "gpus": None,
        "out": tmp_path / "a run",
    }
    assert {name: again[name] for name in expected} == expected
    assert os.environ[MAX_PIXELS] == "50000000"


def test_ranks_that_cannot_meet_say_so(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    result = ftkit("train", photos, "--device", "cpu")
    assert (result.exit_code, "rank 1: expected to meet 1 others" in result.stderr) == (2, True), (
        result.stderr
    )
    assert "Start them with torchrun" in result.stderr


def test_more_ranks_than_images_in_a_batch_are_refused(photos: Path) -> None:
    from ftkit.training.precision import Compute
    from ftkit.training.step import run_as
    from ftkit_export.runtime.errors import FtkitError

    with pytest.raises(
        FtkitError, match="expected an image for each of 4 ranks, found 2 in a step"
    ):
        run_as(None, Stage(), Compute(device=torch.device("cpu")), Ranks(0, 4, 0, 4), 2, None, 1)  # type: ignore[arg-type]
