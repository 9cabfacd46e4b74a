"""A framework model becomes an ONNX file that gives its answers, for any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ftkit.models.backbones import build
from ftkit_export.conversion.convert import Trace, export_core, write
from ftkit_export.conversion.graph import OPSET
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.session import Session


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1"])
def test_logits_and_embedding_are_the_models_own(name: str, tmp_path: Path) -> None:
    """SqueezeNet ends in a convolution, so its embedding is averaged over space."""
    torch.manual_seed(0)
    backbone = build(name, 3, "none")
    model = backbone.model.eval()
    head = model.get_submodule(backbone.head)
    nn.init.constant_(head.bias, 1.0)  # SqueezeNet ends in a ReLU: untrained, it would answer zero
    core = export_core(model, 64)
    write(core.model, tmp_path / "core.onnx", {"labels": "[]"})
    assert {item.domain: item.version for item in core.model.opset_import}[""] == OPSET

    session = Session(tmp_path / "core.onnx")
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 64, 64)
        seen: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.inference_mode():
            expected = model(pixels).numpy()
        hook.remove()
        embedding = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
        logits, found = session.run(pixels.numpy())
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
        assert np.abs(found - embedding.numpy()).max() < 1e-4 * float(embedding.abs().max())


def test_one_trace_serves_every_model_of_an_architecture() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = build("resnet18", 3, "none").model
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 64, 64))  # statistics of its own
        models.append(model.eval())

    trace = Trace(models[0], 64)
    ours, own = trace.core(models[1]), export_core(models[1], 64)
    content = [core.model.SerializeToString(deterministic=True) for core in (ours, own)]
    assert content[0] == content[1]
    assert ours.layers == own.layers
    first = trace.core(models[0]).model.SerializeToString(deterministic=True)
    assert first != content[0], "a trace keeps no weights"
    with pytest.raises(ValueError, match="architecture"):
        trace.core(build("resnet18", 4, "none").model)


def test_a_model_that_cannot_be_traced_is_refused_in_a_sentence() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.head(pixels.mean((2, 3)))
            return answer if pixels.sum().item() > 0 else -answer

    with pytest.raises(FtkitError, match="expected a model the ONNX exporter can follow"):
        export_core(Stubborn().eval(), 32)
