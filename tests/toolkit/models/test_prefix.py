"""Splitting the model into prefix and suffix changes nothing; the frozen part runs once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ftkit.data.canvas import build_canvases
from ftkit.data.dataset import read_images
from ftkit.models.backbones import build
from ftkit.models.freezing import set_mode, trainable, under
from ftkit.models.inference import runner
from ftkit.models.prefix import frontier, frozen_part, trace, trained_part
from ftkit.recipe import Recipe, Stage
from ftkit.training.stage_loaders import StageLoaders
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess

BACKBONES = (
    "efficientnet_lite0",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "resnet18",
    "resnet50",
    "repvit_m0_9",
    "fastvit_t8",
    "convnext_nano",
    "vit_tiny_patch16_224",
    "tiny_vit_5m_224",
    "ghostnetv2_100",
    "regnetx_002",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "mnasnet1_0",
)
PREPROCESS = Preprocess(size=64, resize=64)


@pytest.mark.parametrize("name", BACKBONES)
def test_prefix_then_suffix_is_the_model(name: str) -> None:
    torch.manual_seed(0)
    backbone = build(name, 5, "none")
    pixels = torch.randn(2, 3, backbone.preprocess.size, backbone.preprocess.size)
    for train in ("head", "last:2"):
        inside = under(trainable(backbone, train))
        graph = trace(backbone.model.eval())
        assert graph is not None
        cut = frontier(graph, inside)
        assert cut
        prefix, suffix = frozen_part(graph, [cut]), trained_part(graph, cut)
        with torch.inference_mode():
            assert torch.equal(suffix(*prefix(pixels)), backbone.model(pixels))
        frozen = {name for name, _ in prefix.named_parameters()}
        assert frozen == {name for name, _ in backbone.model.named_parameters() if not inside(name)}
        set_mode(backbone.model, trainable(backbone, train), batchnorm=True)
        training = trace(backbone.model)
        assert training is not None
        assert [node.name for node in frontier(training, inside)] == [node.name for node in cut]


def test_several_tensors_may_cross_the_cut() -> None:
    backbone = build("ghostnetv2_100", 5, "none")
    graph = trace(backbone.model)
    assert graph is not None
    assert len(frontier(graph, under(trainable(backbone, "last:2")))) > 1


def test_two_headed_backbones_keep_one_head_and_odd_ones_are_refused() -> None:
    assert build("levit_128s", 5, "none").head == "head.linear"
    with pytest.raises(
        FtkitError, match=r"expected logits of shape \(1, 5\) for an image of 240 x 240"
    ):
        build("crossvit_tiny_240", 5, "none")


def test_training_the_suffix_trains_the_model() -> None:
    backbone = build("resnet18", 3, "none")
    set_mode(backbone.model, trainable(backbone, "head"), batchnorm=True)
    graph = trace(backbone.model)
    assert graph is not None
    suffix = trained_part(graph, frontier(graph, under(("fc",))))
    before = backbone.model.fc.weight.clone()
    suffix(torch.ones(2, 512)).sum().backward()
    torch.optim.SGD([p for p in backbone.model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(backbone.model.fc.weight, before)


def test_frozen_modules_are_in_eval_mode_and_the_rest_trains() -> None:
    backbone = build("resnet18", 3, "none")
    set_mode(backbone.model, trainable(backbone, "last:1"), batchnorm=True)
    assert not backbone.model.layer3[0].bn1.training
    assert backbone.model.layer4[0].bn1.training
    set_mode(backbone.model, trainable(backbone, "last:1"), batchnorm=False)
    assert not backbone.model.layer4[0].bn1.training
    assert backbone.model.layer4[0].bn1.weight.requires_grad


@pytest.fixture(scope="module")
def loaders(photos: Path) -> StageLoaders:
    torch.manual_seed(0)
    recipe = Recipe(
        name="x",
        backbone="resnet18",
        stages=(
            Stage(train="head", views=2),
            Stage(train="last:1", views=2),
            Stage(train="all"),
            Stage(train="head"),
        ),
    )
    canvases = build_canvases(read_images(photos), PREPROCESS)
    return StageLoaders(
        build("resnet18", 4, "none"),
        recipe,
        canvases,
        PREPROCESS,
        seed=0,
        device=torch.device("cpu"),
    )


def test_one_pass_serves_head_and_last_blocks(
    loaders: StageLoaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftkit.training.stage_loaders

    passes: list[object] = []
    real = ftkit.training.stage_loaders.fill
    monkeypatch.setattr(
        ftkit.training.stage_loaders, "fill", lambda *a, **k: (passes.append(a), real(*a, **k))[1]
    )
    loaders.share()
    assert "computed once" in loaders.stage(0).how
    second = loaders.stage(1)
    assert "frozen prefix" in second.how
    assert len(passes) == 1
    assert loaders.stage(2).how == "live: nothing is frozen"


def test_cached_logits_are_the_live_ones(loaders: StageLoaders) -> None:
    """float16 activations change the logits by less than a thousandth of their magnitude."""
    loader = loaders.stage(1)
    loaders.backbone.model.eval()
    rows = loaders.canvases.rows("val")
    pixels = torch.from_numpy(PREPROCESS.pixels(loaders.canvases.array(rows)))
    with torch.inference_mode():
        live = loaders.backbone.model(pixels)
        cached = loader.eval_net(*loader.val(np.arange(len(rows))))
    assert float((live - cached).abs().max()) < 1e-3 * float(live.abs().max())


def test_a_second_run_finds_the_first_ones_activations(loaders: StageLoaders) -> None:
    loaders.stage(0)
    again = StageLoaders(
        loaders.backbone, loaders.recipe, loaders.canvases, PREPROCESS, 0, torch.device("cpu")
    )
    again.share()
    assert "found in the cache" in again.stage(0).how


def test_a_head_stage_after_a_deeper_one_gets_a_prefix_of_its_own(loaders: StageLoaders) -> None:
    """Once the body has been trained, the shared activations are stale."""
    loaders.stage(0)
    with torch.no_grad():
        loaders.backbone.model.layer1[0].conv1.weight.mul_(1.5)
    loader = loaders.stage(3)
    assert "computed once" in loader.how
    rows = loaders.canvases.rows("val")
    loaders.backbone.model.eval()
    with torch.inference_mode():
        live = loaders.backbone.model(
            torch.from_numpy(PREPROCESS.pixels(loaders.canvases.array(rows)))
        )
        cached = loader.eval_net(*loader.val(np.arange(len(rows))))
    assert float((live - cached).abs().max()) < 1e-3 * float(live.abs().max())


def test_a_cache_larger_than_the_disk_is_not_begun(
    loaders: StageLoaders, monkeypatch: pytest.MonkeyPatch
) -> None:

    import ftkit.training.feature_cache

    monkeypatch.setattr(ftkit.training.feature_cache, "DISK_SHARE", 0.0)
    fresh = StageLoaders(
        loaders.backbone, loaders.recipe, loaders.canvases, PREPROCESS, 99, torch.device("cpu")
    )
    fresh.share()
    assert "live: its cache would take" in fresh.stage(0).how


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_100", "resnet18"])
def test_on_a_cpu_the_prefix_runs_in_onnx_runtime(name: str) -> None:
    backbone = build(name, 4, "none")
    graph = trace(backbone.model)
    assert graph is not None
    prefix = frozen_part(
        graph, [frontier(graph, under(trainable(backbone, train))) for train in ("head", "last:2")]
    )
    pixels = torch.randn(8, 3, 64, 64)
    run, how = runner(prefix, pixels)
    assert how == "onnxruntime"
    expected = [value.detach().numpy() for value in prefix(pixels)]
    assert not any(module.training for module in prefix.modules()), (
        "exporting leaves the modes alone"
    )
    prefix.forward = None  # from here on only ONNX Runtime can run it
    found = run(pixels)
    assert all(
        np.abs(a - b).max() < 1e-4 * np.abs(b).max() for a, b in zip(found, expected, strict=True)
    )
