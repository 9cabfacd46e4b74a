"""Precision and step modes: faster modes must give equal results; no step synchronises."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, ftkit, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit.data import augment
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.data.prefetch import Source, array_source, free_bytes
from ftkit.models.backbones import build
from ftkit.recipe import Augment, Recipe, Stage
from ftkit.tasks.losses import Batch, class_loss
from ftkit.training import precision
from ftkit.training.optimizer import StepState, gradients
from ftkit.training.precision import Compute, Way, fastest
from ftkit.training.stage_loaders import StageLoaders
from ftkit_export.runtime.nvidia import same_numbers
from ftkit_export.runtime.preprocess import Preprocess

CPU = Compute(device=torch.device("cpu"))


class _Slow(nn.Module):
    """A network whose forward pass takes 50 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        out: torch.Tensor = self.norm(self.linear(inputs))
        return out


def _way(name: str, net: nn.Module, worth: float = 0.0) -> Way:
    return Way(name=name, make=lambda: net, worth=worth)


@pytest.mark.parametrize(
    ("device", "deterministic", "wanted"),
    [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_cudnn_searches_in_training_steps_alone(
    device: str, deterministic: bool, wanted: bool
) -> None:
    compute = Compute(device=torch.device(device), deterministic=deterministic)
    with compute.searching():
        assert torch.backends.cudnn.benchmark == wanted
    assert not torch.backends.cudnn.benchmark


def test_a_faster_way_is_taken_when_it_is_equal_and_worth_its_making() -> None:
    torch.manual_seed(0)
    net, inputs = _Slow(), (torch.randn(8, 6),)
    quick = nn.Sequential(net.linear, net.norm)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found, said = fastest(net, inputs, [_way("quick", quick)], CPU, steps=1000)
    assert found is quick
    eager, faster = (float(word) for word in re.findall(r"([\d.]+) ms", said))
    assert eager >= 50 > faster
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    minutes = fastest(net, inputs, [_way("quick", quick, worth=900)], CPU, steps=1000)
    assert minutes == (net, ""), "50 seconds are saved, and it would take 900 to make"
    assert fastest(net, inputs, [], CPU, steps=1000) == (net, "")


def test_a_way_that_fails_or_answers_otherwise_is_left_and_said() -> None:
    torch.manual_seed(0)
    net, inputs = _Slow(), (torch.randn(8, 6),)

    def fails() -> nn.Module:
        raise RuntimeError("cannot be captured\nwith a long story")

    ways = [
        _way("other", nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))),
        Way(name="graph", make=fails, worth=0.0),
    ]
    found, said = fastest(net, inputs, ways, CPU, steps=1000)
    assert found is net
    assert ", but other answers, " in said
    assert said.endswith("graph failed: cannot be captured")


def test_rows_that_stay_on_the_device_are_the_rows_that_are_read() -> None:
    array, rows = (
        np.random.default_rng(0).normal(size=(1300, 2, 3)).astype(np.float16),
        np.array([7, 1299, 0, 7]),
    )
    kept = Source(lambda picks: array[picks], 1300, 12, CPU.device, room=2 * 1300 * 12)
    streamed = array_source(array, CPU.device)
    assert (kept.resident, streamed.resident) == (True, False)
    assert not Source(
        lambda picks: array[picks], 1300, 12, CPU.device, room=2 * 1300 * 12 - 1
    ).resident
    for source in (kept, streamed):
        assert torch.equal(source.take(source.fetch(rows)), torch.from_numpy(array[rows]))


def test_a_batch_is_made_on_the_gpu_without_the_host_waiting(photos: Path) -> None:
    """Uses fake CUDA tensors that refuse to mix with host tensors or to reveal their values."""
    preprocess = Preprocess(size=48, resize=64)
    everything = Augment(
        hflip=True,
        vflip=True,
        scale=0.5,
        rotate=20,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        erase=0.5,
        mixup=0.4,
        cutmix=1.0,
    )
    recipe = Recipe(name="x", backbone="resnet18", augment=everything, stages=(Stage(cache="off"),))
    canvases = build_canvases(read_images(photos), preprocess)
    loaders = StageLoaders(
        build("resnet18", 4, "none"), recipe, canvases, preprocess, 0, CPU.device
    )
    loader = loaders.stage(0)
    fetched = loader.fetch(np.arange(16), torch.Generator().manual_seed(0), slice(0, 16))
    loader._device = loaders.pixels.device = torch.device("cuda")
    augment._constants.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            batch = loader.prepare(fetched)
            loss = class_loss(
                torch.zeros(16, 4, device="cuda"), batch, Stage(label_smoothing=0.1), None
            )
            with pytest.raises(Exception, match=r"item|_local_scalar_dense"):
                float(loss.sum())
    finally:
        augment._constants.cache_clear()
    assert batch.others is not None
    assert {value.device.type for value in (*batch.inputs, batch.targets, batch.others, loss)} == {
        "cuda"
    }
    assert batch.inputs[0].shape == (16, 3, 48, 48)
    assert batch.inputs[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
def test_float16_learns_with_a_scaled_loss_and_goes_on_from_its_scale() -> None:
    torch.manual_seed(0)
    half = Compute(device=torch.device("cpu"), dtype=torch.float16)
    net, stage = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), Stage(clip=1.0)
    inputs = torch.randn(64, 8)
    batch = Batch(inputs=(inputs,), targets=inputs[:, :3].argmax(1))
    moving = StepState(
        net, lambda name: True, stage, torch.optim.SGD(net.parameters(), lr=0.5), half
    )
    # The scale is too large: the first steps are skipped
    moving.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses = []
    for step in range(80):
        moving.optimizer.zero_grad()
        tally = gradients(net, batch, moving, None, 64)
        losses.append(float(tally[0]) / 64)
        moving.step(step + 1, tally)
    assert losses[0] == losses[1], "infinite gradients moved nothing"
    assert losses[-1] < 0.5 * losses[0]
    saved = {name: value.clone() for name, value in moving.tensors().items()}
    fresh = StepState(
        net, lambda name: True, stage, torch.optim.SGD(net.parameters(), lr=0.5), half
    )
    fresh.load(saved)
    assert fresh.scaler.get_scale() == moving.scaler.get_scale() < 2.0**40


def test_an_operation_without_a_deterministic_form_is_one_sentence(
    photos: Path, tmp_path: Path
) -> None:
    said = RuntimeError(
        "max_pool_backward_cuda does not have a deterministic implementation, but you set ...\nmore"
    )
    assert "found max_pool_backward_cuda. Try another backbone" in str(
        precision.deterministic_or_say(said)
    )
    assert precision.deterministic_or_say(RuntimeError("CUDA error")) is None
    small = settings(*TINY, "stages.0.epochs=1", "stages.1.epochs=1")
    try:
        assert (
            ftkit("train", photos, "--out", tmp_path / "run", "--deterministic", *small).exit_code
            == 0
        )
    finally:
        torch.use_deterministic_algorithms(False)


PREPARED = """
import torch
from ftkit.training.precision import prepare
from ftkit.models.backbones import build
from ftkit_export.conversion.convert import export_core
def told():
    b = torch.backends
    parts = [part.fp32_precision for part in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn)]
    return parts, b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32
prepare(torch.device("cuda"), False)
before = told()
export_core(build("resnet18", 3, "none").model.eval(), 32)
assert told() == before == (["ieee"] * 3, False, False), (before, told())
"""


def test_an_export_after_cuda_training_works_and_leaves_tf32_off() -> None:
    """Regression: torch.export read the legacy TF32 switch and failed; it also resets the new ones.

    Runs in a separate process, with the CUDA policy set on a machine that may have no GPU.
    """
    done = subprocess.run(
        [sys.executable, "-c", PREPARED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(torch.device("cuda")) == 43


def test_a_gpu_is_described_only_where_its_number_means_the_same_to_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA orders GPUs by speed, the driver by bus, so the wrong one of several was described."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert (same_numbers(1), same_numbers(2)) == (True, False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert same_numbers(2)
