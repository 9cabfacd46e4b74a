"""Is the exported file equal to what was trained? Framework in float64 against ONNX Runtime, per provider.

The tolerance is a principle, not a wish. Per input group (photographs, noise and extremes differ by orders of
magnitude) let f = max|torch32 - torch64| be the framework's own float32 error and s = max|logit|. Logits pass at
max|ONNX - torch64| <= max(20 f, 1e-5 s); probabilities at that over the temperature, and the rounding of a float32
softmax; top-1 must be equal outside ties (top-2 margin < 2 tolerances). Measured over 30 groups on 6 backbones: worst
8 f, no false alarm.
CUDA in float32 with TF32 off: 1e-3 s. What rounds to TF32 or float16 is held to AGREEMENT instead.

    parity = compare(reference, core_path, image_path, canvases, photographs, preprocess, temperature, layers)
    parity.passed
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ftkit_export.graph import pixel_model
from ftkit_export.predict import softmax
from ftkit_export.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.session import PROVIDERS, Session

Array = np.ndarray[Any, Any]

FLOAT64_IMAGES = 64  # images per group that the float64 reference sees
RELATIVE = {"cpu": 1e-5, "cuda": 1e-3}  # of s, by provider; any other provider is held to CUDA's
IMAGE_FORM_IMAGES = 16  # end to end; the core form has shown the network equal on four times as many
FLOORS = 20.0
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # exp, sum, quotient; smaller logits do not make it smaller
AGREEMENT = {"tf32": (0.9999, 0.999), "fp16": (0.999, 0.99)}  # least cosine of the logits, least share of equal top-1
CHUNK = 32
DECADES = np.arange(-12, 1.25, 0.25)  # edges of the histogram of errors: powers of ten


@dataclass(frozen=True, kw_only=True)
class Check:
    """One compared quantity: `value` must not exceed `limit`. `floor` is the framework's own float32 error."""

    name: str
    group: str
    value: float
    limit: float
    floor: float | None = None
    inputs: int = 0

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return bool(self.value <= self.limit)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Every check on one provider, and the first diverging layer where one failed. errors: how many logits of the
    photographs differ from float64 by how much, between the powers of ten in DECADES; smaller ones count as the first.
    """

    provider: str
    checks: tuple[Check, ...]
    first_divergence: str = ""
    errors: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        """True when every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check nearest to, or furthest beyond, its limit."""
        return max(self.checks, key=lambda check: np.inf if np.isnan(check.value) else check.value / (check.limit or 1))


class Reference:
    """The framework's answers: `model` on CPU in eval mode, in float32, and a float64 copy of it.

    An image is computed once in each dtype, however often it is asked for: float64 is slow.
    """

    def __init__(self, model: torch.nn.Module):
        self.float32 = model.eval()
        self.float64 = copy.deepcopy(model).double()
        self._known: dict[tuple[torch.dtype, bytes], tuple[Array, Array]] = {}

    def logits(self, pixels: Array, dtype: torch.dtype) -> Array:
        """(N, 3, S, S) float32 -> logits (N, classes) in float32 or float64."""
        return self.answers(pixels, dtype)[0]

    def answers(self, pixels: Array, dtype: torch.dtype) -> tuple[Array, Array]:
        """Logits (N, classes), and what enters the last linear layer, (N, features), averaged over space."""
        keys = [(dtype, hashlib.sha256(item.tobytes()).digest()) for item in pixels]
        missing = list({key: place for place, key in enumerate(keys) if key not in self._known}.values())
        for start in range(0, len(missing), CHUNK):
            places = missing[start : start + CHUNK]
            for place, logits, embedding in zip(places, *self._run(pixels[places], dtype), strict=True):
                self._known[keys[place]] = logits, embedding
        found = [self._known[key] for key in keys]
        return np.stack([logits for logits, _ in found]), np.stack([embedding for _, embedding in found])

    def _run(self, pixels: Array, dtype: torch.dtype) -> tuple[Array, Array]:
        model = self.float64 if dtype == torch.float64 else self.float32
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
        seen: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
        try:
            with torch.inference_mode():
                logits = model(torch.from_numpy(pixels).to(dtype))
        finally:
            hook.remove()
        embedding = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
        return logits.numpy(), embedding.numpy()


def edge_images(size: int) -> dict[str, list[Array]]:
    """Formula-made uint8 images by group: noise, and the extremes in value and in shape. Same on every machine."""
    rng = np.random.default_rng(20250101)
    noise = [rng.integers(0, 256, shape, np.uint8) for shape in [(size, size, 3)] * 4 + [(427, 640, 3)]]
    checker = np.uint8(255) * (np.indices((size, size)).sum(0) % 2).astype(np.uint8)[..., None].repeat(3, 2)
    shapes = [(1, 1, 3), (2000, 10, 3), (2, 8000, 3)]
    odd = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    flat = [np.full((size, size, 3), level, np.uint8) for level in (0, 255)]
    return {"noise": noise, "extremes": [*flat, checker, *odd]}


def tolerance(logits32: Array, logits64: Array, provider: str) -> tuple[float, float]:
    """(tolerance, floor) for core logits: max(20 f, relative s) on CPU, relative s elsewhere."""
    floor, scale = float(np.abs(logits32 - logits64).max()), float(np.abs(logits64).max())
    relative = RELATIVE.get(provider, RELATIVE["cuda"])
    return max(FLOORS * floor, relative * scale), floor


def probability_limit(limit: float, temperature: float) -> float:
    """Of logits that pass at `limit`, what their softmax at `temperature` passes at."""
    return limit / temperature + ROUNDING


def _run(session: Session, batch: Array, output: int = 0) -> Array:
    return np.concatenate([session.run(batch[i : i + CHUNK])[output] for i in range(0, len(batch), CHUNK)])


def compare(
    reference: Reference,
    core: Path,
    image: Path,
    canvases: Array,
    photographs: Sequence[Array],
    preprocess: Preprocess,
    temperature: float,
    layers: Mapping[str, str],
    provider: str = "cpu",
    input_format: str = "rgb",
) -> Parity:
    """Compare both exported forms with the framework on one provider.

    canvases: (N, R, R, 3) uint8 of held-out photographs, for the core form. photographs: some of them as decoded, each
    (H, W, 3) uint8, for the image form, where the provider runs it. layers: value name -> module path (convert.Core).
    Raises ProviderError when the provider cannot be proven.
    """
    core_session = Session(core, provider=provider)
    image_sessions = None
    if PROVIDERS[provider].form == "image":
        pixel_form = pixel_model(preprocess, input_format).SerializeToString()
        image_sessions = Session(image, provider=provider), Session(pixel_form, provider=provider)
    checks: list[Check] = []
    errors: tuple[int, ...] = ()
    failing = None  # pixels of the first group whose logits differ: a fault may not show on another
    for group, images in {"photographs": photographs, **edge_images(preprocess.size)}.items():
        drawn = canvases if group == "photographs" else np.stack([preprocess.canvas(item) for item in images])
        pixels = preprocess.pixels(drawn)
        logits = _run(core_session, pixels)
        found = _core_checks(reference, logits, pixels, group, provider)
        errors = errors or _histogram(logits, reference.logits(pixels[:FLOAT64_IMAGES], torch.float64))
        if failing is None and not all(check.passed for check in found):
            failing = pixels[:2]
        checks += found
        if image_sessions is None:
            continue
        frames = [to_frame(item, input_format) for item in images]
        pillow = [preprocess.canvas(from_frame(frame, input_format)) for frame in frames]
        checks += _image_checks(reference, *image_sessions, frames, pillow, preprocess, temperature, group)
    elsewhere = sum(n for name, n in core_session.assignment().items() if name != PROVIDERS[provider].name)
    checks.append(Check(name="core nodes on another provider", group="graph", value=elsewhere, limit=0))
    diverging = "" if failing is None else first_divergence(reference, core, failing, layers, provider)
    return Parity(provider=provider, checks=tuple(checks), first_divergence=diverging, errors=errors)


def _histogram(found: Array, expected: Array) -> tuple[int, ...]:
    apart = np.abs(found[: len(expected)] - expected)
    apart = apart[np.isfinite(apart)]
    logs = np.log10(np.maximum(apart, 1e-300)).clip(DECADES[0], DECADES[-1])
    return tuple(map(int, np.histogram(logs, DECADES)[0]))


def _core_checks(reference: Reference, found: Array, pixels: Array, group: str, provider: str) -> list[Check]:
    logits32 = reference.logits(pixels, torch.float32)
    logits64 = reference.logits(pixels[:FLOAT64_IMAGES], torch.float64)
    if precision := PROVIDERS[provider].precision:
        return agreement(logits32, found, precision, group)
    limit, floor = tolerance(logits32[: len(logits64)], logits64, provider)
    value = float(np.abs(found[: len(logits64)] - logits64).max())
    top = np.sort(logits32, -1)
    clear = top[:, -1] - top[:, -2] >= 2 * limit  # outside ties
    disagree = int((found.argmax(-1) != logits32.argmax(-1))[clear].sum())
    return [
        Check(name="core logits", group=group, value=value, limit=limit, floor=floor, inputs=len(logits64)),
        Check(name="core top-1 disagreements", group=group, value=disagree, limit=0, inputs=len(pixels)),
    ]


def _image_checks(
    reference: Reference, session: Session, pixel_session: Session, frames: Sequence[Array],
    pillow: Sequence[Array], preprocess: Preprocess, temperature: float, group: str,
) -> list[Check]:  # fmt: skip
    """End to end on odd sizes: the graph's pixels against Pillow's canvases, its probabilities against float64."""
    start = (preprocess.resize - preprocess.size) // 2
    inside = slice(start, start + preprocess.size)
    off, graph_pixels, found = [], [], []
    for frame, canvas in zip(frames, pillow, strict=True):
        levels, pixels = pixel_session.run(frame[None])
        off.append(np.abs(levels[0].astype(np.int16) - canvas[inside, inside]) > (1 if group == "photographs" else 2))
        graph_pixels.append(pixels)
        found.append(session.run(frame[None])[0])
    stacked = np.concatenate(graph_pixels[:IMAGE_FORM_IMAGES])
    logits32 = reference.logits(stacked, torch.float32)
    logits64 = reference.logits(stacked, torch.float64)
    limit = probability_limit(tolerance(logits32, logits64, session.provider)[0], temperature)
    expected = softmax(logits64 / temperature)
    value = float(np.abs(np.concatenate(found[: len(stacked)]) - expected).max())
    batches = [np.repeat(frames[0][None], size, 0) for size in (2, 7)]
    spread = max(float(np.abs(session.run(batch)[0] - found[0]).max()) for batch in batches)
    return [
        Check(name="share of pixels off", group=group, value=float(np.mean(off)), limit=1e-3, inputs=len(frames)),
        Check(name="probabilities", group=group, value=value, limit=limit, inputs=len(stacked)),
        Check(name="batch 1 against 2 and 7", group=group, value=spread, limit=limit, inputs=9),
    ]


def agreement(expected: Array, found: Array, precision: str, group: str) -> list[Check]:
    """Checks of a lower precision (a key of AGREEMENT) on the same inputs: logits (N, classes) against float32's."""
    cosine, share = AGREEMENT[precision]
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    with np.errstate(invalid="ignore"):  # infinite values: the check fails as NaN
        worst = float((1 - (expected * found).sum(1) / np.maximum(lengths, 1e-30)).max())
    broken = int((np.isfinite(expected) & ~np.isfinite(found)).sum())
    other = float((expected.argmax(1) != found.argmax(1)).mean())
    return [
        Check(name=f"{precision} new NaN or Inf", group=group, value=broken, limit=0, inputs=len(found)),
        Check(name=f"{precision} 1 - cosine of logits", group=group, value=worst, limit=1 - cosine, inputs=len(found)),
        Check(name=f"{precision} top-1 changed", group=group, value=other, limit=1 - share, inputs=len(found)),
    ]


def first_divergence(reference: Reference, core: Path, pixels: Array, layers: Mapping[str, str], provider: str) -> str:
    """Name the first layer whose output leaves the tolerance, with both magnitudes. pixels: (N, 3, S, S) float32.

    Every value of the core file is made an output of ONE session (0.06 s) and compared with the module of its layer.
    """
    truth = _module_outputs(reference.float64, pixels, torch.float64)
    floors = _module_outputs(reference.float32, pixels, torch.float32)
    model = onnx.load(core)
    makers = _last_values(model, layers, set(truth))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in makers)
    found = Session(model.SerializeToString(), provider=provider).run(pixels)
    for layer, value in zip(makers.values(), found, strict=True):
        expected = truth[layer]
        if expected.shape != value.shape:
            continue  # the exporter fused or reshaped this module away
        limit, _ = tolerance(floors[layer], expected, provider)
        error = float(np.abs(value - expected).max())
        if not error <= limit:
            return (
                f"{layer}: max |difference| {error:.3g} where {limit:.3g} is allowed "
                f"(its values reach {float(np.abs(expected).max()):.3g})"
            )
    return "no single layer: the difference is in the last operations"


def _last_values(model: onnx.ModelProto, layers: Mapping[str, str], modules: set[str]) -> dict[str, str]:
    """Value -> the module whose output it is, in graph order: the last value made inside that module."""
    last: dict[str, str] = {}
    for node in model.graph.node:
        for value in node.output:
            path = layers.get(value, "")
            while path:
                last[path] = value
                path = path.rpartition(".")[0]
    order = {value: number for number, node in enumerate(model.graph.node) for value in node.output}
    found: dict[str, str] = {}
    for module in sorted(modules & set(last), key=len):  # the innermost module that ends with this value names it
        found[last[module]] = module
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _module_outputs(model: torch.nn.Module, pixels: Array, dtype: torch.dtype) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    hooks = []
    for name, module in model.named_modules():
        if name:

            def keep(_module: object, _inputs: object, output: object, name: str = name) -> None:
                if isinstance(output, torch.Tensor):
                    outputs[name] = output.detach().clone().numpy()

            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.inference_mode():
            model(torch.from_numpy(pixels).to(dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
