"""Options of a stage: trained parts, learning rates, loss, and what ends a stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, ftkit, settings
from torch import nn

from ftkit.data.augment import evaluation
from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.models.freezing import trainable
from ftkit.recipe import Augment, Recipe, Stage
from ftkit.tasks.losses import Batch, class_loss, class_weights, label_loss, value_loss
from ftkit.tasks.task import SINGLE_LABEL
from ftkit.training import lr_search, work
from ftkit.training.distillation import Teacher
from ftkit.training.loader import ahead
from ftkit.training.optimizer import StepState, gradients, make_optimizer
from ftkit.training.run import open_run
from ftkit.training.stage_loaders import StageLoaders
from ftkit.training.step import fresh_gradients
from ftkit.training.validate import Held, Validation, validate
from ftkit.utils.distributed import SOLO
from ftkit_export.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(size=64, resize=64)


def test_first_last_all_and_patterns_name_what_trains() -> None:
    lite = build("efficientnet_lite0", 3, "none")
    assert trainable(lite, "first:2") == ("conv_stem", "bn1", "blocks.0", "blocks.1", "classifier")
    assert trainable(lite, r"blocks\.[56]|head|classifier") == (
        "blocks.5",
        "blocks.6",
        "conv_head",
        "classifier",
    )
    assert all(name.endswith("conv_dw") for name in trainable(lite, "conv_dw$"))
    vit = build("vit_tiny_patch16_224", 3, "none")
    assert {"cls_token", "pos_embed"} <= set(trainable(vit, "all")) & set(trainable(vit, "first:1"))


def test_layer_decay_slows_each_block_further_from_the_head() -> None:
    backbone = build("resnet18", 3, "none")
    groups = make_optimizer(backbone, Stage(train="all", layer_decay=0.5)).param_groups
    scales = {group["name"].removesuffix(" without decay"): group["scale"] for group in groups}
    assert scales == {
        "stem": 0.5**5,
        "layer1": 0.5**4,
        "layer2": 0.5**3,
        "layer3": 0.25,
        "layer4": 0.5,
        "head": 1.0,
    }


def test_class_weights_make_every_class_count_the_same() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    weights = class_weights(labels, 3)
    assert torch.allclose(torch.bincount(labels) * weights, torch.full((3,), 100 / 3))
    logits = torch.zeros(100, 3)
    loss = class_loss(logits, Batch(inputs=(), targets=labels), Stage(), weights)
    assert float(loss[labels == 1].sum()) == pytest.approx(float(loss[labels == 0].sum()))


def test_mixed_images_learn_both_labels_by_share() -> None:
    logits, own, other = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    share = torch.tensor([1.0, 0.25, 0.0, 0.5])
    found = class_loss(
        logits, Batch(inputs=(), targets=own, others=other, share=share), Stage(), None
    )
    expected = -(
        torch.log_softmax(logits, 1)
        * (share[:, None] * F.one_hot(own, 3) + (1 - share)[:, None] * F.one_hot(other, 3))
    ).sum(1)
    assert torch.allclose(found, expected)


def test_a_teacher_pulls_towards_its_own_answers() -> None:
    teacher, targets = torch.tensor([[4.0, 1.0, -2.0]]), torch.tensor([2])
    student = torch.zeros(1, 3, requires_grad=True)
    class_loss(
        student, Batch(inputs=(), targets=targets, teacher=teacher), Stage(), None
    ).sum().backward()
    hard = torch.zeros(1, 3, requires_grad=True)
    F.cross_entropy(hard, targets).backward()
    soft = student.grad - 0.5 * hard.grad  # type: ignore[operator]
    assert float(soft[0, 0]) < 0 < float(soft[0, 2])


def test_a_teacher_fills_in_what_is_not_known() -> None:
    nan = float("nan")
    teacher = torch.tensor([[3.0, -3.0]])
    for loss in (
        lambda logits, batch: label_loss(logits, batch, Stage(), None),
        value_loss,
    ):
        student = torch.zeros(1, 2, requires_grad=True)
        batch = Batch(inputs=(), targets=torch.tensor([[1.0, nan]]), teacher=teacher)
        loss(student, batch).sum().backward()
        assert student.grad is not None
        assert float(student.grad[0, 0]) < 0 < float(student.grad[0, 1])


class _Small(nn.Module):
    """Raises out-of-memory above `limit` images per call, as a GPU would."""

    def __init__(self, limit: int):
        super().__init__()
        self.linear, self.limit = nn.Linear(6, 3), limit

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError
        out: torch.Tensor = self.linear(inputs)
        return out


def test_out_of_memory_halves_the_step_and_the_gradients_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    net, targets = _Small(limit=100), torch.randint(3, (20,))
    batch = Batch(
        inputs=(torch.randn(20, 6),), targets=targets, others=targets.flip(0), share=torch.rand(20)
    )
    moving = StepState(net, lambda name: True, Stage(), torch.optim.SGD(net.parameters(), lr=1.0))
    gradients(net, batch, moving, None, 20)
    whole = net.linear.weight.grad.clone()  # type: ignore[union-attr]
    net.limit = 6
    # Module used so far; it is dropped, because it accepts only whole batches
    captured = nn.Sequential(net)
    _, left, micro = fresh_gradients(captured, net, batch, moving, None, 20)
    assert (micro, left) == (5, net)
    assert "in steps of 5 images that add up" in capsys.readouterr().out
    assert torch.allclose(net.linear.weight.grad, whole, atol=1e-6)  # type: ignore[arg-type]


def test_clipping_bounds_a_step_and_the_average_starts_fast() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    moving = StepState(
        net, lambda name: True, Stage(clip=0.1, ema=0.99), torch.optim.SGD(net.parameters(), lr=1.0)
    )
    (1000 * net(torch.ones(1, 4)).sum()).backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    moving.step(1, torch.zeros(3, dtype=torch.float64))
    moved = torch.cat(
        [(value - before[name]).flatten() for name, value in net.state_dict().items()]
    )
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-3)
    expected = before["weight"].lerp(net.weight.detach(), 1 - 2 / 11)  # decay (1 + 1) / (10 + 1)
    assert torch.allclose(moving.mean["weight"], expected)


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(ahead(range(7), lambda n: n * n)) == [(n, n * n) for n in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0, 2], lambda n: 1 // n))


def test_auto_takes_the_rate_whose_head_ends_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_search, "RATES", (1e-9, 3e-3, 1e3))
    changes = settings(*TINY, "stages.0.lr=auto", "stages.1.epochs=1")
    result = ftkit("train", photos, "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    assert "head: rate 3e-03, the best of a fan" in result.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"][0]["lr"] == 3e-3
    live = ftkit(
        "train", photos, "--out", tmp_path / "live", *changes, "--set", "stages.0.cache=off"
    )
    assert (live.exit_code, "auto expected a cached head stage" in live.stderr) == (2, True)


def test_patience_ends_a_stage_with_its_best_epoch(photos: Path, tmp_path: Path) -> None:
    changes = settings(
        *TINY,
        "stages.0.patience=2",
        "stages.0.epochs=60",
        "stages.0.lr=0.05",
        "stages.1.epochs=1",
        "stages.1.lr=1e-9",
        "stages.0.balance=sample",
        "stages.1.balance=loss",
    )
    result = ftkit("train", photos, "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    head = [(line["val_accuracy"], -line["val_nll"]) for line in lines if line["stage"] == 0]
    assert len(head) < 60
    assert head.index(max(head)) == len(head) - 3, "two epochs after the best, none of them better"
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["stages"][0]
    assert (ended["val_accuracy"], -ended["val_nll"]) == pytest.approx(max(head))


def test_something_frozen_that_moves_aborts_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.validate

    def meddling(backbone, *rest, **more):  # type: ignore[no-untyped-def]
        backbone.model.bn1.running_mean.add_(1e-7)
        return real(backbone, *rest, **more)

    monkeypatch.setattr(work, "validate", meddling)
    result = ftkit("train", photos, "--out", tmp_path / "run", *settings(*TINY))
    assert (
        result.exit_code,
        "expected frozen weights to stay, found them changed" in result.stderr,
    ) == (2, True)


def test_a_head_stage_leaves_features_in_place_and_a_deeper_one_moves_them(run: Path) -> None:
    head, deeper = json.loads((run / "run.json").read_text())["stages"]
    assert head["drift"] == pytest.approx(1.0, abs=1e-6)
    assert 0.1 < deeper["drift"] < 0.9999


class _Branching(nn.Module):
    """A model that torch.fx cannot trace: it branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.pretrained_cfg = 1000, {"input_size": (3, 64, 64), "crop_pct": 1.0}
        self.stem, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 1000)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x.relu() if x.mean() > 0 else x.abs()
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


def test_a_backbone_that_cannot_be_traced_trains_live_and_says_so(
    photos: Path, tmp_path: Path
) -> None:
    def branching_net(pretrained: bool = False, **options: object) -> nn.Module:
        return _Branching()

    branching_net.__module__ = __name__
    timm.models.register_model(branching_net)
    mixing = (
        "augment.mixup=0.2",
        "augment.cutmix=1",
        "augment.erase=0.5",
        "augment.saturation=0.4",
    )
    changes = settings(
        *TINY,
        *mixing,
        "backbone=branching_net",
        "weights=none",
        "preprocess=none",
        "stages.1.train=all",
        "stages.1.clip=1",
    )
    result = ftkit("train", photos, "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    assert "head: live: torch.fx cannot trace this backbone" in result.stdout


def test_a_teacher_sees_what_the_student_sees_in_its_own_normalisation(
    run: Path, photos: Path
) -> None:
    opened = open_run(run)
    student = Preprocess(size=96, resize=96)  # ImageNet's mean and std; the run's are 127 and 128
    canvases = build_canvases(read_images(photos), opened.preprocess)
    pixels = torch.from_numpy(canvases.array(canvases.rows("val")))
    with torch.inference_mode():
        found = Teacher(opened, student, SINGLE_LABEL)(evaluation(pixels, student))
        expected = opened.backbone().model(evaluation(pixels, opened.preprocess))
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_student_learns_from_a_run(run: Path, photos: Path, tmp_path: Path) -> None:
    small = (
        "backbone=mobilenetv3_small_100",
        "weights=none",
        "stages.1.cache=off",
        f"stages.0.teacher={run}",
    )
    changes = settings(*TINY, *small, f"stages.1.teacher={run}")
    result = ftkit("train", photos, "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    recipe = Recipe(
        name="x",
        backbone="resnet18",
        augment=Augment(hflip=True),
        stages=(Stage(views=2, teacher=str(run)),),
    )
    loaders = StageLoaders(
        build("resnet18", 4, "none"),
        recipe,
        build_canvases(read_images(photos), PREPROCESS),
        PREPROCESS,
        0,
        torch.device("cpu"),
    )
    loader, generator = loaders.stage(0), torch.Generator().manual_seed(1)
    positions = np.arange(5)
    batch = loader.prepare(loader.fetch(positions, generator, slice(None)))
    views = torch.randint(2, (5,), generator=torch.Generator().manual_seed(1))
    pixels = torch.cat(
        [
            loaders.views(2).pixels(loaders.canvases.rows("train"), int(v), 0)[i : i + 1]
            for i, v in enumerate(views)
        ]
    )
    with torch.inference_mode():
        live = Teacher(open_run(run), PREPROCESS, SINGLE_LABEL)(pixels)
    assert batch.teacher is not None
    assert torch.allclose(batch.teacher, live, atol=2e-2)


def test_a_teacher_of_other_classes_is_refused_at_once(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    import shutil

    two = tmp_path / "two"
    for name in ("mono-ok", "poly-ok"):
        shutil.copytree(photos / name, two / name)
    result = ftkit("train", two, "--out", tmp_path / "run", "--set", f"stages.0.teacher={run}")
    assert (
        result.exit_code,
        "expected a run of the classes mono-ok, poly-ok" in result.stderr,
    ) == (2, True)
    assert not (tmp_path / "run").exists()


def test_stages_that_balance_their_classes_compete_on_balanced_accuracy() -> None:
    """Plain accuracy prefers a model that ignores the rare class: 0.9 against 0.8 here."""
    backbone = build("resnet18", 2, "none")
    labels, pixels = torch.tensor([0] * 18 + [1] * 2), torch.zeros(20, 3, 32, 32)
    pixels[18:], pixels[:4] = 1.0, 1.0  # the rare class is bright, and so are four of the others
    held = Held(lambda positions: (pixels[positions],), labels)
    head = backbone.model.fc

    def judged(balanced: bool, sees_brightness: bool) -> Validation:
        torch.manual_seed(0)
        with torch.no_grad():
            bright = backbone.model.eval().forward_head(
                backbone.model.forward_features(pixels[18:19]), pre_logits=True
            )
            dark = backbone.model.forward_head(
                backbone.model.forward_features(pixels[4:5]), pre_logits=True
            )
            direction = (bright - dark)[0] * sees_brightness
            head.weight.copy_(torch.stack([-direction, direction]))
            middle = float(direction @ (bright + dark)[0] / 2)
            head.bias.copy_(
                torch.tensor([middle, -middle]) if sees_brightness else torch.tensor([1.0, 0.0])
            )
        return validate(backbone, backbone.model, held, {}, SOLO, balanced=balanced)

    seeing, blind = judged(False, True), judged(False, False)
    assert (round(seeing.accuracy, 3), round(blind.accuracy, 3)) == (0.8, 0.9)
    assert blind.score > seeing.score
    seeing, blind = judged(True, True), judged(True, False)
    assert seeing.score[0] == pytest.approx((14 / 18 + 1) / 2)
    assert blind.score[0] == 0.5
    assert seeing.score > blind.score
    assert (round(seeing.accuracy, 3), round(blind.accuracy, 3)) == (0.8, 0.9), (
        "what the trace shows stays accuracy"
    )


def test_a_recipe_competes_on_balanced_accuracy_where_any_stage_balances(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = work.validate

    def spied(*rest: Any, balanced: bool, **more: Any) -> Any:
        asked.append(balanced)
        return real(*rest, balanced=balanced, **more)

    monkeypatch.setattr(work, "validate", spied)
    for change, expected in (("stages.0.balance=loss", True), ("stages.0.balance=none", False)):
        asked.clear()
        result = ftkit(
            "train",
            photos,
            "--out",
            tmp_path / change,
            *settings(*TINY, "stages.0.epochs=1", change),
        )
        assert result.exit_code == 0, result.output
        assert set(asked) == {expected}
