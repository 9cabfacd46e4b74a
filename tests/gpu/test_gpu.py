"""Tests that need a GPU, run by `make gpu`; skipped, with a reason, where there is none."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, ftkit, settings

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.models.freezing import under
from ftkit.recipe import Augment, Recipe, Stage
from ftkit.training.checkpoint import Stopped
from ftkit.training.optimizer import StepState, make_optimizer
from ftkit.training.precision import fastest, prepare, ways
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.step import fresh_gradients
from ftkit.training.work import Work
from ftkit_export.runtime.latency import Condition, measure
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small plan trained on the GPU; its second stage runs on live pixels."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    result = ftkit(
        "train", photos, "--out", out, "--device", "cuda", *settings(*TINY, "stages.1.cache=off")
    )
    assert result.exit_code == 0, result.output
    (out / "trace.txt").write_text(result.stdout)
    return out


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Its bundle, verified on both providers."""
    out = trained.parent / "bundle"
    result = ftkit("export", trained, "--out", out, "--quick", "--providers", "cpu,cuda,cuda-tf32")
    assert result.exit_code == 0, result.output
    return out


def test_a_gpu_learns_what_a_cpu_learns(trained: Path, run: Path) -> None:
    said = (trained / "trace.txt").read_text()
    assert "autocast, float32 elsewhere (TF32 off), channels_last" in said
    accuracy = [
        json.loads((folder / "run.json").read_text())["metrics"]["val"]["accuracy"]
        for folder in (trained, run)
    ]
    assert accuracy[0] > accuracy[1] - 0.25, "12 images of val"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[5]["loss"] < lines[0]["loss"]


def test_deterministic_gives_the_same_weights_twice(photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = ftkit(
            "train",
            photos,
            "--out",
            tmp_path / name,
            "--device",
            "cuda",
            "--deterministic",
            *settings(*TINY, "stages.1.cache=off"),
        )
        assert result.exit_code == 0, result.output
    torch.use_deterministic_algorithms(False)
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "two")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


# torch calls this mode a prototype, once a process
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_no_step_waits_for_the_gpu(photos: Path, cache: str) -> None:
    preprocess = Preprocess(size=96, resize=112)
    augment = Augment(
        hflip=True, scale=0.5, rotate=10, contrast=0.2, erase=0.3, mixup=0.2 * (cache == "off")
    )
    stage = Stage(train="last:1", cache=cache, batch_size=16, clip=1.0, ema=0.9, views=2)
    recipe = Recipe(name="x", backbone="efficientnet_lite0", augment=augment, stages=(stage,))
    backbone, compute = build("efficientnet_lite0", 4, "none"), prepare(CUDA, False)
    backbone.model.to(CUDA).to(memory_format=torch.channels_last)
    loaders = StageLoaders(
        backbone, recipe, build_canvases(read_images(photos), preprocess), preprocess, 0, CUDA
    )
    assert loaders.pixels.resident
    loader = loaders.stage(0)
    moving = StepState(
        backbone.model,
        under(loaders.trained[0]),
        stage,
        make_optimizer(backbone, stage, True),
        compute,
    )
    net = loader.net

    def step(number: int) -> None:
        fetched = loader.fetch(
            np.arange(number, number + 16), torch.Generator().manual_seed(number), slice(0, 16)
        )
        tally, _, _ = fresh_gradients(net, loader.net, loader.prepare(fetched), moving, None, 16)
        moving.step(number + 1, tally)

    for number in range(3):
        step(number)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(3, 8):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_answers_as_the_plain_step_and_learns(photos: Path) -> None:
    torch.manual_seed(0)
    compute, net = prepare(CUDA, False), build("efficientnet_lite0", 4, "none").model
    net.to(CUDA).to(memory_format=torch.channels_last).train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    inputs = (
        torch.randn(16, 3, 96, 96, device=CUDA).contiguous(memory_format=torch.channels_last),
    )
    graph = [way for way in ways(net, inputs, compute) if way.name == "CUDA graph"]
    with compute.searching():
        found, said = fastest(net, inputs, graph, compute, steps=100_000)
    assert found is not net, said
    assert "failed" not in said
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        with compute.autocast():
            loss = torch.nn.functional.cross_entropy(
                found(*inputs).float(), torch.arange(16, device=CUDA) % 4
            )
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_an_interrupted_run_goes_on(photos: Path, tmp_path: Path) -> None:
    left, changes = tmp_path / "run", [*settings(*TINY), "--device", "cuda"]

    def pause(work, moving):  # type: ignore[no-untyped-def]
        if (work.state.stage, work.state.step) == (1, 3):
            work.state.save(step=moving.tensors())
            raise Stopped(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "pause", pause)
        assert ftkit("train", photos, "--out", left, *changes).exit_code == 130
    result = ftkit("train", photos, "--out", left, "--resume", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "going on after 1 stages, 0 epochs and 3 steps of the next" in result.stdout


CHECK = """
import torch, torch.distributed as dist
from torch import nn
from ftkit.utils.distributed import GlobalBatchNorm
torch.cuda.set_device(0)
dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, init_method="tcp://127.0.0.1:29577")
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    one, other = (nn.BatchNorm2d(8).cuda() for _ in range(2))
    left = torch.randn(6, 8, 5, 5, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    right = left.clone().requires_grad_()
    left.requires_grad_()
    with GlobalBatchNorm(1):
        found = one(left)
    expected = other(right)
    for out in (found, expected):
        (out.float() ** 3).sum().backward()
    scale = float(right.grad.float().abs().max())
    assert float((found.float() - expected.float()).abs().max()) < tolerance * 5
    assert float((left.grad.float() - right.grad.float()).abs().max()) < tolerance * scale
    assert torch.allclose(one.running_var, other.running_var, rtol=tolerance)
dist.destroy_process_group()
"""


def test_batchnorm_over_ranks_is_batchnorm_where_there_is_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_file_is_equal_on_cuda_and_measured_with_and_without_copies(exported: Path) -> None:
    evidence = json.loads((exported / "manifest.json").read_text())["evidence"]
    assert {item["provider"] for item in evidence["parity"] if item["passed"]} == {
        "cpu",
        "cuda",
        "cuda-tf32",
    }
    rows = [row for row in evidence["latency"] if row["provider"] == "cuda"]
    assert {row["copies"] for row in rows} == {True, False}
    assert all(row["gpu_bytes"] > 1e7 for row in rows)
    assert "fp16" in evidence["agreement"]


def test_verify_and_predict_on_cuda_agree_with_the_cpu(exported: Path, photos: Path) -> None:
    assert ftkit("verify", exported, "--providers", "cpu,cuda,cuda-tf32").exit_code == 0
    here = [
        ftkit("predict", exported, photos, "--provider", name).stdout.splitlines()
        for name in ("cpu", "cuda")
    ]
    labels = [[line.split("  ")[1] for line in lines] for lines in here]
    assert sum(a != b for a, b in zip(*labels, strict=True)) <= 1


def test_a_captured_session_is_measured_and_answers_as_the_plain_one(exported: Path) -> None:
    core = str(next((exported / "variants").glob("fp32-core.onnx")))
    captured = measure(
        Condition(model=core, provider="cuda-graph", threads=1),
        exported / "golden" / "00.png",
        quick=True,
    )
    assert (captured.provider, captured.copies) == ("cuda-graph", False)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32)
    call = Session(core, provider="cuda-graph").bound(pixels)
    found = [call()[0].numpy() for _ in range(4)][-1]
    assert np.allclose(found, Session(core, provider="cuda").run(pixels)[0], atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_does(photos: Path, tmp_path: Path) -> None:
    plan = settings(
        *TINY,
        "stages.0.optimizer=sgd",
        "stages.1.optimizer=sgd",
        "stages.0.lr=0.1",
        "stages.1.lr=0.01",
    )
    for name, more in (("one", ["--device", "cuda"]), ("two", ["--gpus", "2"])):
        assert ftkit("train", photos, "--out", tmp_path / name, *plan, *more).exit_code == 0
    traces = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert traces[0] == pytest.approx(traces[1], rel=0.02), "bfloat16"
