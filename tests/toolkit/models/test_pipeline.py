"""The steps of a network as they were trained: every parameter is somewhere, once."""

import pytest
import torch

from ftkit.models.backbones import build
from ftkit.models.freezing import trainable
from ftkit.models.pipeline import describe


@pytest.mark.parametrize(
    "name",
    ["efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "squeezenet1_1", "convnext_nano"],
)
def test_parts_hold_every_parameter_and_the_shapes_of_the_network(name: str) -> None:
    torch.manual_seed(0)
    backbone = build(name, 5, "none")
    kept = [(train, trainable(backbone, train)) for train in ("head", "last:2")]
    parts = describe(backbone, kept, backbone.preprocess.size)
    total = sum(value.numel() for value in backbone.model.parameters())
    assert sum(part.parameters for part in parts) == total
    assert [part.name for part in parts] == ["frozen", "trained", "head"]
    assert [part.stages for part in parts] == [(), ("last:2",), ("head", "last:2")]
    assert parts[-1].shape[0] == 5
    assert parts[-1].blocks == (backbone.head,)


def test_a_stage_that_was_left_out_has_trained_nothing() -> None:
    backbone = build("resnet18", 5, "none")
    parts = describe(backbone, [("head", trainable(backbone, "head"))], 64)
    assert [(part.name, part.stages) for part in parts] == [("frozen", ()), ("head", ("head",))]
    assert parts[0].shape == (512,)
