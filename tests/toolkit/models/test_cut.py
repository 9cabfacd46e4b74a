"""A backbone cut behind a block: the same features, no dead weights, and the whole way to a bundle."""

import pytest
import torch

from ftkit.models.backbones import blocks, build
from ftkit.models.freezing import trainable
from ftkit.models.prefix import trace
from ftkit_export.runtime.errors import FtkitError

MODELS = [
    ("efficientnet_lite0", "blocks.4", (2, 3), "mean"),
    ("resnet18", "layer3", (2, 3), "mean+max"),
    ("vit_tiny_patch16_224", "blocks.5", (1,), "mean+max"),
    ("mobilenet_v3_small", "features.8", (2, 3), "mean"),
    ("swin_tiny_patch4_window7_224", "layers.1", (1, 2), "mean+max"),
]


@pytest.mark.parametrize(("name", "where", "axes", "pooling"), MODELS)
def test_features_are_the_whole_models_and_nothing_else_is_left(
    name: str, where: str, axes: tuple[int, ...], pooling: str
) -> None:
    torch.manual_seed(0)
    whole = build(name, 3, "none")
    torch.manual_seed(0)
    shorter = build(name, 3, "none", cut=where, pooling=pooling)
    assert shorter.preprocess == whole.preprocess

    pixels = torch.rand(2, 3, 224, 224)
    seen = {}
    keep = whole.model.get_submodule(where).register_forward_hook(
        lambda module, inputs, output: seen.update(value=output)
    )
    with torch.inference_mode():
        whole.model(pixels)
        keep.remove()
        logits = shorter.model(pixels)
        features = seen["value"].mean(axes)
        if pooling == "mean+max":
            features = torch.cat([features, seen["value"].amax(axes)], 1)
        head = shorter.model.get_submodule(shorter.head)
        torch.testing.assert_close(logits, head(features))

    kept = shorter.model.state_dict()
    assert len(kept) < len(whole.model.state_dict())
    later = blocks(whole)[blocks(whole).index(where) + 1 :]
    assert not [key for key in kept if any(key.startswith(f"{block}.") for block in later)]
    assert blocks(shorter)[-1] == where
    assert trainable(shorter, "last:1") == (where, "pool", "head")
    assert trace(shorter.model) is not None


def test_the_head_may_see_several_depths() -> None:
    shorter = build("resnet18", 3, "none", cut="layer1+layer3", pooling="mean")
    head = shorter.model.get_submodule(shorter.head)
    assert head.in_features == 64 + 256  # type: ignore[union-attr]
    with torch.inference_mode():
        assert shorter.model(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("blocks.9", "expected the name of a block"),
        ("classifier", "expected a block that gives features over space, found shape"),
    ],
)
def test_a_cut_that_is_none_is_refused(where: str, said: str) -> None:
    with pytest.raises(FtkitError, match=said):
        build("efficientnet_lite0", 3, "none", cut=where)
