"""A training run: log, folder, options, reproducibility with the same seed."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, ftkit, settings

from ftkit.models.backbones import build
from ftkit.recipe import Stage
from ftkit.training.optimizer import make_optimizer, rate
from ftkit.training.run import open_run

LINE = re.compile(
    r"^(head|last:1) +(\d+)/(\d+) +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +\d\.\de[+-]\d\d +\d+ +\d+:\d\d$"
)


def test_the_trace_has_a_line_an_epoch_within_80_columns(run: Path) -> None:
    lines = (run / "trace.txt").read_text().splitlines()
    found = [(match[1], match[2]) for match in map(LINE.match, lines) if match]
    assert found == [("head", str(n)) for n in range(1, 7)] + [("last:1", "1"), ("last:1", "2")]
    assert all(len(line) <= 80 for line in lines if LINE.match(line))


def test_the_run_folder_holds_data_only(run: Path, photos: Path) -> None:
    data = json.loads((run / "run.json").read_text())
    assert data["classes"] == ["mono-defect", "mono-ok", "poly-defect", "poly-ok"]
    assert data["splits"] == {"train": 92, "val": 12, "test": 16}
    assert data["metrics"]["test"]["images"] == 16
    assert sum(map(sum, data["metrics"]["test"]["confusion"])) == 16
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in epochs] == [(0, n) for n in range(1, 7)] + [
        (1, 1),
        (1, 2),
    ]
    assert open_run(run).backbone().model.classifier.out_features == 4


def test_training_learns(run: Path) -> None:
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs[5]["loss"] < epochs[0]["loss"]
    assert epochs[5]["train_accuracy"] > 0.6


def test_the_best_stage_by_validation_is_kept(run: Path) -> None:
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert stages[0]["kept"]
    gain, low, high = stages[1]["gain"]
    assert gain == pytest.approx(stages[1]["val_accuracy"] - stages[0]["val_accuracy"])
    assert low < gain < high, "twelve images settle little"
    assert stages[1]["verdict"] == "open"
    before, after = stages[1]["losses"]
    assert after <= stages[1]["val_nll"] + 1e-6, "at the temperature that fits best"
    assert before <= stages[0]["val_nll"] + 1e-6
    assert stages[1]["kept"] == (after < before)
    val = json.loads((run / "run.json").read_text())["metrics"]["val"]
    assert val["accuracy"] == pytest.approx(stages[int(stages[1]["kept"])]["val_accuracy"])


def test_the_frozen_part_is_the_pretrained_one_bit_for_bit(run: Path) -> None:
    trained = safetensors.torch.load_file(run / "model.safetensors")
    pretrained = build("efficientnet_lite0", 4).model.state_dict()
    frozen = [
        name for name in pretrained if name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.5"))
    ]
    assert len(frozen) > 40
    assert all(torch.equal(trained[name], pretrained[name]) for name in frozen)


def test_live_training_works_where_nothing_can_be_cached(photos: Path, tmp_path: Path) -> None:
    """A torchvision backbone trained from scratch in full, with every augmentation on."""
    changes = [
        *("backbone=squeezenet1_1", "weights=none", "preprocess.size=64", "preprocess.resize=72"),
        *(
            "augment.scale=0.6",
            "augment.rotate=10",
            "augment.brightness=0.2",
            "augment.contrast=0.2",
        ),
        *("stages.0.cache=off", "stages.0.epochs=1", "stages.0.optimizer=sgd"),
        *("stages.1.train=all", "stages.1.epochs=1", "stages.1.ema=0"),
    ]
    result = ftkit("train", photos, "--out", tmp_path / "run", *settings(*changes))
    assert result.exit_code == 0, result.output
    assert "head: live: cache = off" in result.stdout
    assert "all: live: nothing is frozen" in result.stdout


def test_a_loss_that_explodes_leaves_the_weights_before_it(photos: Path, tmp_path: Path) -> None:
    result = ftkit(
        "train",
        photos,
        "--out",
        tmp_path / "run",
        *settings(*TINY, "stages.1.lr=1e30", "stages.1.epochs=3"),
    )
    assert result.exit_code == 0, result.output
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert [stage["kept"] for stage in stages] == [True, False]
    state = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert all(
        bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()
    )


def test_weights_that_would_need_a_network_name_the_file_and_two_ways(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that refuses connections emulates a missing network on any machine."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for backbone, file in (
        ("resnet50", "resnet50.a1_in1k/model.safetensors"),
        ("shufflenet_v2_x1_0", "shufflenetv2_x1"),
    ):
        command = [
            sys.executable,
            "-m",
            "ftkit",
            "train",
            str(photos),
            "--recipe",
            "staged_resnet50",
            "--set",
            f"backbone={backbone}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2
        assert file in done.stderr
        assert "Try --weights FILE" in done.stderr
        assert "or " in done.stderr.split("Try --weights FILE")[1]
        assert "Traceback" not in done.stderr


class _Mirror(http.server.BaseHTTPRequestHandler):
    """A hub mirror that has one file."""

    content = b""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()
        self.wfile.write(self.content)

    def _answer(self) -> None:
        self.send_response(200)
        for name, value in (
            ("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"'),
            ("X-Repo-Commit", "a" * 40),
            ("Content-Length", str(len(self.content))),
        ):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_weights_come_through_a_mirror_where_the_hubs_own_name_is_unknown(tmp_path: Path) -> None:
    """Regression: resolving the hub's own name failed behind any proxy or mirror."""
    donor = build("resnet18", 1000, "none").model
    _Mirror.content = safetensors.torch.save(dict(donor.state_dict()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
        }
        script = "from ftkit.models.backbones import build\n"
        script += "print(build('resnet18', 4).model.conv1.weight[0, 0, 0, 0].item())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == donor.conv1.weight[0, 0, 0, 0].item()


def test_weights_come_from_a_file_and_must_fit(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    donor = build("resnet18", 1000, "none").model
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "donor.pth")
    model = build("resnet18", 4, str(tmp_path / "donor.pth")).model
    assert torch.equal(model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    result = ftkit("train", photos, "--recipe", "lite0", "--weights", tmp_path / "donor.pth")
    assert result.exit_code == 2
    assert "expected those of efficientnet_lite0" in result.stderr
    (tmp_path / "code.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    assert (
        "expected .safetensors, or a .pth of plain tensors"
        in ftkit("train", photos, "--weights", tmp_path / "code.pth").stderr
    )


def test_another_efficientnets_weights_and_a_size_that_is_not_taken_are_refused(
    photos: Path, tmp_path: Path
) -> None:
    state = {"_blocks.0._se_reduce.weight": torch.zeros(1)}
    safetensors.torch.save_file(state, tmp_path / "b0.safetensors")
    other = ftkit(
        "train", photos, "--out", tmp_path / "run", "--weights", tmp_path / "b0.safetensors"
    )
    assert (other.exit_code, "those of another EfficientNet" in other.stderr) == (2, True)
    small = settings("backbone=vit_tiny_patch16_224", "weights=none", "preprocess.size=160")
    unfit = ftkit("train", photos, "--out", tmp_path / "run", *small)
    assert (unfit.exit_code, "for an image of 160 x 160 pixels" in unfit.stderr) == (2, True)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_never_written_into(photos: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    result = ftkit("train", photos, "--out", run)
    assert result.exit_code == 2
    assert "expected a new folder" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_export_of_something_that_is_no_run_says_so(photos: Path, tmp_path: Path) -> None:
    result = ftkit("export", photos)
    assert result.exit_code == 2
    assert "expected a run (with run.json and model.safetensors), found none" in result.stderr
    (tmp_path / "metrics.jsonl").write_text("")
    assert "expected a run (with run.json" in ftkit("export", tmp_path).stderr
    (tmp_path / "run.json").write_text('{"schema": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert (
        "expected a run of this ftkit, found ValueError('schema 1, not 5')"
        in ftkit("export", tmp_path).stderr
    )


def test_export_refuses_images_that_changed_since(run: Path, photos: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(photos, tmp_path / "photos")
    next(iter(sorted(copy.rglob("*.png")))).unlink()
    result = ftkit("export", run, "--out", tmp_path / "bundle", "--data", copy)
    assert result.exit_code == 2
    assert "expected the images this run was trained on, found others" in result.stderr


@pytest.mark.parametrize("provider", ["gpu", "coreml"])
def test_export_with_a_provider_that_is_not_here_exits_2(
    run: Path, provider: str, tmp_path: Path
) -> None:
    result = ftkit("export", run, "--out", tmp_path / "bundle", "--providers", f"cpu,{provider}")
    assert result.exit_code == 2
    assert "cpu" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_rate_rises_falls_and_stays() -> None:
    cosine = Stage(lr=1.0, schedule="cosine", warmup=0.1)
    rates = [rate(step, 100, cosine, 1.0) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert {rate(step, 100, Stage(schedule="constant"), 0.3) for step in range(100)} == {0.3}
    assert rate(19, 100, Stage(schedule="onecycle"), 1.0) == 1.0


def test_every_parameter_that_trains_is_in_one_named_group() -> None:
    backbone = build("resnet18", 3, "none")
    model = backbone.model
    model.requires_grad_(False)
    for part in (model.layer4, model.fc):
        part.requires_grad_(True)
    optimizer = make_optimizer(backbone, Stage(weight_decay=0.1))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"blocks", "blocks without decay", "head", "head without decay"}
    assert groups["blocks without decay"]["weight_decay"] == 0
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
