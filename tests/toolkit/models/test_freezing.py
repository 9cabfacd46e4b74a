"""What a stage trains: names from a plan's words, and nothing else moves."""

import pytest
import torch
from torch import nn

from ftkit.models.backbones import blocks, build
from ftkit.models.freezing import set_mode, trainable, under
from ftkit_export.runtime.errors import FtkitError


def test_words_of_a_plan_name_modules_from_the_end_from_the_start_or_by_pattern() -> None:
    backbone = build("resnet18", 4, "none")
    assert trainable(backbone, "head") == ("fc",)
    assert set(trainable(backbone, "last:2")) == {"layer3", "layer4", "global_pool", "fc"}
    assert {"conv1", "layer1", "fc"} <= set(trainable(backbone, "first:1"))
    assert trainable(backbone, r"layer4\.1\.conv") == ("layer4.1.conv1", "layer4.1.conv2")
    everything = under(trainable(backbone, "all"))
    assert all(everything(name) for name, _ in backbone.model.named_parameters())


@pytest.mark.parametrize("train", ["last:0", "last:99", "(", "nothing_like_it"])
def test_other_words_are_refused_with_the_blocks_there_are(train: str) -> None:
    backbone = build("resnet18", 4, "none")
    with pytest.raises(FtkitError) as refused:
        trainable(backbone, train)
    assert all(block in str(refused.value) for block in blocks(backbone))


def test_a_name_is_no_prefix_of_another() -> None:
    inside = under(["layer1"])
    assert inside("layer1.conv1.weight")
    assert not inside("layer10.conv1.weight")


@pytest.mark.parametrize("batchnorm", [True, False])
def test_only_what_is_named_trains_and_statistics_move_on_demand(batchnorm: bool) -> None:
    torch.manual_seed(0)
    backbone = build("resnet18", 4, "none")
    model = backbone.model
    set_mode(model, trainable(backbone, "last:1"), batchnorm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moving = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.1)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    optimizer.step()

    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    inside = under(trainable(backbone, "last:1"))
    assert moved and all(inside(name) for name in moved)
    assert any("running_mean" in name for name in moved) is batchnorm
