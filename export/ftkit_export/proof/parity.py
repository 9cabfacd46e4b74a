"""Parity of the exported file with the trained model: framework in float64 against ONNX Runtime.

Tolerances are derived per provider and input group (photographs, noise and extremes differ by
orders of magnitude). Let f = max|torch32 - torch64| be the framework's own float32 error and s =
max|logit|. Logits pass at max|ONNX - torch64| <= max(20 f, 1e-5 s); answers at what the readout
makes of that (probabilities: over the temperature), plus its own rounding in float32; what is
decided must be equal outside ties (closer than 2 tolerances). Measured over 30 groups on 6 backbones:
worst 8 f, no false alarm. CUDA in float32 with TF32 off: 1e-3 s. TF32 and float16 are limited to
ROUNDINGS times the effect of that rounding on this very model, emulated in the framework in both
modes (to nearest, towards zero), and to CEILING times s.

The reference for the image form's pixels is Preprocess, in Pillow and numpy, never the graph under
test. The graph's pixels are compared with it after normalisation, in grey levels: they may differ
by at most RESAMPLED_LEVELS, by MEAN_LEVELS on average, and by whole levels only, since two resizers
round differently but nothing may differ after that. The effect of these allowed differences on a
probability is measured; it is not added to any other tolerance. It may reach RESAMPLED_PROBABILITY
or, if that is more, REPLACED times the effect of the same differences at random places: a model that
any rounding moves is not made unequal by this one (digits of 64 pixels, enlarged: 5.6 and 8.1 %; at
random places up to 28 %).

    reference = Reference(module)
    parity = measure_parity(reference, ExportedModel(core=core_path, ...), canvases, photographs)
    parity.passed
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ftkit_export.conversion.graph import pixel_model
from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.runtime.readout import Readout
from ftkit_export.runtime.session import PROVIDERS, Session

FLOAT64_IMAGES = 64  # images per group that the float64 reference sees
RELATIVE = {"cpu": 1e-5, "cuda": 1e-3}  # of s, by provider; other providers: as CUDA
IMAGE_FORM_IMAGES = 16  # end to end; the core form is compared on four times as many
FLOORS = 20.0
ROUNDINGS = 4.0  # a GPU accumulates in another order, and may round where the emulation does not
# Of the largest logit: a model more sensitive to rounding must not run in that precision
CEILING = 0.1
# Differences between the two resizers. Measured on three fits, eight sizes, photographs, enlarged
# digits, noise and odd shapes: at most these grey levels, except for 1 in 1,000 values, which are
# never further apart than FARTHEST_LEVELS; 0.043 on average over a channel of an image; 1e-5 from a
# whole level.
RESAMPLED_LEVELS = {"photographs": 1, "noise": 2, "extremes": 2}
RESAMPLED_SHARE = 1e-3
FARTHEST_LEVELS = 2
MEAN_LEVELS = 0.1
WHOLE_LEVELS = 1e-3
RESAMPLED_PROBABILITY = 0.05
# Of the largest effect of REPLACEMENTS draws. Simulated on 16 of 450 digits, 4,000 times, for two
# networks: no false alarm; with 1 instead of 2, 3.7 %.
REPLACED = 2.0
REPLACEMENTS = 4
REFERENCE_BATCH = 32
DECADES = np.arange(-12, 1.25, 0.25)  # edges of the error histogram: powers of ten


@dataclass(frozen=True, kw_only=True)
class Check:
    """One compared quantity: `value` must not exceed `limit`.

    floor: the framework's own float32 error.
    """

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
    """All checks on one provider, and the first diverging layer if one failed.

    errors: histogram of the photographs' logit errors against float64, as exponents with edges
    DECADES; smaller ones count in the first bin. placement: where the core form's operators ran, as
    text (session.Session.placement).
    """

    provider: str
    checks: tuple[Check, ...]
    first_divergence: str = ""
    errors: tuple[int, ...] = ()
    placement: str = ""

    @property
    def passed(self) -> bool:
        """True when every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check with the largest value relative to its limit, of those that failed if any did."""

        def beyond(check: Check) -> tuple[bool, float]:
            ratio = np.inf if np.isnan(check.value) else check.value / (check.limit or 1)
            return not check.passed, ratio

        return max(self.checks, key=beyond)


class Reference:
    """Reference outputs of `model` on CPU in eval mode: in float32, and in float64 from a copy.

    Results are cached by image and dtype: float64 is slow.
    """

    def __init__(self, model: torch.nn.Module):
        self.float32 = model.eval()
        self.float64 = copy.deepcopy(model).double()
        self._known: dict[tuple[torch.dtype, bytes], tuple[Array, Array]] = {}

    def logits(self, pixels: Array, dtype: torch.dtype) -> Array:
        """(N, 3, S, S) float32 -> logits (N, classes) in float32 or float64."""
        return self.answers(pixels, dtype)[0]

    def answers(self, pixels: Array, dtype: torch.dtype) -> tuple[Array, Array]:
        """Logits (N, classes) and embedding (N, features).

        The embedding is the input of the last linear layer, averaged over space where it is a
        feature map.
        """
        keys = [(dtype, hashlib.sha256(item.tobytes()).digest()) for item in pixels]
        missing = list(
            {key: place for place, key in enumerate(keys) if key not in self._known}.values()
        )
        for start in range(0, len(missing), REFERENCE_BATCH):
            places = missing[start : start + REFERENCE_BATCH]
            for place, logits, embedding in zip(
                places, *self._run(pixels[places], dtype), strict=True
            ):
                self._known[keys[place]] = logits, embedding

        answered = [self._known[key] for key in keys]
        return np.stack([logits for logits, _ in answered]), np.stack(
            [embedding for _, embedding in answered]
        )

    def rounding(self, pixels: Array, precision: str) -> float:
        """max|emulated - float64| of the logits, with products of values rounded to `precision`.

        precision: "tf32" or "fp16". Of the first FLOAT64_IMAGES of pixels (N, 3, S, S); the larger
        error of rounding to nearest and towards zero.
        """
        pixels = pixels[:FLOAT64_IMAGES]
        exact = self.logits(pixels, torch.float64)

        worst = 0.0
        for towards_zero in (False, True):
            with Emulated(precision, towards_zero=towards_zero), torch.inference_mode():
                parts = [
                    self.float32(torch.from_numpy(pixels[i : i + REFERENCE_BATCH]))
                    for i in range(0, len(pixels), REFERENCE_BATCH)
                ]
            worst = max(worst, float(np.abs(torch.cat(parts).numpy() - exact).max()))

        return worst

    def _run(self, pixels: Array, dtype: torch.dtype) -> tuple[Array, Array]:
        model = self.float64 if dtype == torch.float64 else self.float32
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][
            -1
        ]
        seen: list[torch.Tensor] = []

        hook = linear.register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0].detach())
        )
        try:
            with torch.inference_mode():
                logits = model(torch.from_numpy(pixels).to(dtype))
        finally:
            hook.remove()

        embedding = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
        return logits.numpy(), embedding.numpy()


def edge_images(size: int) -> dict[str, list[Array]]:
    """Synthetic uint8 images by group: noise, and extremes in value and in shape.

    The same on every machine.
    """
    rng = np.random.default_rng(20250101)
    noise = [
        rng.integers(0, 256, shape, np.uint8) for shape in [(size, size, 3)] * 4 + [(427, 640, 3)]
    ]
    checker = np.uint8(255) * (np.indices((size, size)).sum(0) % 2).astype(np.uint8)[
        ..., None
    ].repeat(3, 2)
    shapes = [(1, 1, 3), (2000, 10, 3), (2, 8000, 3)]
    odd = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    flat = [np.full((size, size, 3), level, np.uint8) for level in (0, 255)]

    return {"noise": noise, "extremes": [*flat, checker, *odd]}


def tolerance(logits32: Array, logits64: Array, provider: str) -> tuple[float, float]:
    """(tolerance, floor) for core logits: max(20 f, relative s) on CPU, relative s elsewhere."""
    floor = float(np.abs(logits32 - logits64).max())
    scale = float(np.abs(logits64).max())
    relative = RELATIVE.get(provider, RELATIVE["cuda"])
    return max(FLOORS * floor, relative * scale), floor


def _run(session: Session, batch: Array, output: int = 0) -> Array:
    return np.concatenate(
        [
            session.run(batch[i : i + REFERENCE_BATCH])[output]
            for i in range(0, len(batch), REFERENCE_BATCH)
        ]
    )


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The exported files under test, and their settings.

    layers: value name -> module path (convert.Core).
    """

    core: Path
    image: Path
    preprocess: Preprocess
    readout: Readout
    layers: Mapping[str, str] = field(default_factory=dict)
    input_format: str = "rgb"


def measure_parity(
    reference: Reference,
    model: ExportedModel,
    canvases: Array,
    photographs: Sequence[Array],
    provider: str = "cpu",
) -> Parity:
    """Compare both exported forms with the framework on one provider.

    canvases: (N, R, R, 3) uint8 of held-out photographs, for the core form. photographs: some of
    them as decoded, each (H, W, 3) uint8, for the image form, where the provider runs it. Raises
    ProviderError as Session.
    """
    preprocess = model.preprocess
    core_session = Session(model.core, provider=provider)
    image_sessions = None
    if PROVIDERS[provider].form == "image":
        resizer = pixel_model(preprocess, model.input_format).SerializeToString()
        image_sessions = (
            Session(model.image, provider=provider),
            Session(resizer, provider=provider),
        )

    checks: list[Check] = []
    errors: tuple[int, ...] = ()
    failing = None  # pixels of the first group that fails: others may not show the fault
    for group, images in {"photographs": photographs, **edge_images(preprocess.size)}.items():
        drawn = canvases
        if group != "photographs":
            drawn = np.stack([preprocess.canvas(item) for item in images])

        pixels = preprocess.pixels(drawn)
        logits = _run(core_session, pixels)
        core_checks = _core_checks(reference, model.readout, logits, pixels, group, provider)
        errors = errors or _histogram(
            logits, reference.logits(pixels[:FLOAT64_IMAGES], torch.float64)
        )
        if failing is None and not all(check.passed for check in core_checks):
            failing = pixels[:2]

        checks += core_checks
        if image_sessions:
            checks += _image_checks(reference, model, *image_sessions, images, group)

    diverging = ""
    if failing is not None:
        diverging = first_divergence(reference, model.core, failing, model.layers, provider)

    return Parity(
        provider=provider,
        checks=tuple(checks),
        first_divergence=diverging,
        errors=errors,
        placement=core_session.placement,
    )


def _histogram(actual: Array, expected: Array) -> tuple[int, ...]:
    apart = np.abs(actual[: len(expected)] - expected)
    apart = apart[np.isfinite(apart)]
    logs = np.log10(np.maximum(apart, 1e-300)).clip(DECADES[0], DECADES[-1])
    return tuple(map(int, np.histogram(logs, DECADES)[0]))


def _core_checks(
    reference: Reference,
    readout: Readout,
    actual: Array,
    pixels: Array,
    group: str,
    provider: str,
) -> list[Check]:
    logits32 = reference.logits(pixels, torch.float32)
    if precision := PROVIDERS[provider].precision:
        rounding = reference.rounding(pixels, precision)
        return agreement(logits32, actual, rounding, precision, group, readout)

    logits64 = reference.logits(pixels[:FLOAT64_IMAGES], torch.float64)
    limit, floor = tolerance(logits32[: len(logits64)], logits64, provider)
    value = float(np.abs(actual[: len(logits64)] - logits64).max())
    checks = [
        Check(
            name="core logits",
            group=group,
            value=value,
            limit=limit,
            floor=floor,
            inputs=len(logits64),
        )
    ]
    if readout.decided:
        checks.append(
            Check(
                name=f"core {readout.decided} disagreements",
                group=group,
                value=decided_otherwise(readout, logits32, actual, limit),
                limit=0,
                inputs=len(pixels),
            )
        )
    return checks


def decided_otherwise(readout: Readout, expected: Array, actual: Array, limit: float) -> int:
    """Number of decisions that differ between logits (N, K), outside ties."""
    differ = readout.decisions(actual) != readout.decisions(expected)
    return int(differ[readout.clear(expected, limit)].sum())


def _image_checks(
    reference: Reference,
    model: ExportedModel,
    session: Session,
    resizer: Session,
    images: Sequence[Array],
    group: str,
) -> list[Check]:
    """End to end on odd sizes: graph's pixels against Pillow's, answers against float64."""
    preprocess = model.preprocess
    readout = model.readout
    frames = [to_frame(item, model.input_format) for item in images]
    canvases = [preprocess.canvas(from_frame(frame, model.input_format)) for frame in frames]
    made = [resizer.run(frame[None])[1][0] for frame in frames]
    checks = pixel_checks(np.stack(made), np.stack(canvases), preprocess, group)

    pillow = preprocess.pixels(np.stack(canvases[:IMAGE_FORM_IMAGES]))
    allowed = resampled(
        np.stack(made[:IMAGE_FORM_IMAGES]),
        np.stack(canvases[:IMAGE_FORM_IMAGES]),
        preprocess,
    )

    logits32 = reference.logits(allowed, torch.float32)
    logits64 = reference.logits(allowed, torch.float64)
    expected = readout.answers(logits64)
    limit = readout.answer_limit(tolerance(logits32, logits64, session.provider)[0])

    actual = np.concatenate([session.run(frame[None])[0] for frame in frames[:IMAGE_FORM_IMAGES]])
    value = readout.apart(actual, expected)
    moved, movable = moved_by_resampling(reference, readout, pillow, allowed)
    batches = [np.repeat(frames[0][None], size, 0) for size in (2, 7)]
    spread = max(readout.apart(session.run(batch)[0], actual[:1]) for batch in batches)

    return [
        *checks,
        Check(name=readout.output, group=group, value=value, limit=limit, inputs=len(actual)),
        Check(
            name=f"{readout.output} moved by resampling",
            group=group,
            value=moved,
            limit=movable,
            inputs=len(actual),
        ),
        Check(name="batch 1 against 2 and 7", group=group, value=spread, limit=limit, inputs=9),
    ]


def moved_by_resampling(
    reference: Reference, readout: Readout, pixels: Array, resized: Array
) -> tuple[float, float]:
    """(largest change of an answer from `pixels` to `resized`, how much is allowed), in the readout's
    units.

    pixels: Pillow's; resized: with the graph's rounding (`resampled`); both (N, 3, S, S) float32.
    """
    before, after = (
        readout.answers(reference.logits(item, torch.float64)) for item in (pixels, resized)
    )
    moved = readout.apart(before, after)
    if not moved > RESAMPLED_PROBABILITY:  # NaN, too, which passes no limit
        return moved, RESAMPLED_PROBABILITY
    elsewhere = _moved_elsewhere(reference, readout, pixels, resized)
    return moved, max(RESAMPLED_PROBABILITY, REPLACED * elsewhere)


def _moved_elsewhere(
    reference: Reference, readout: Readout, pixels: Array, resized: Array
) -> float:
    """The largest change of an answer when the differences of `resized` from `pixels` are put at
    other places of their channel, drawn at random. Both (N, 3, S, S) float32.
    """
    plain = readout.answers(reference.logits(pixels, torch.float32))
    steps = (resized - pixels).reshape(*pixels.shape[:2], -1)
    rng = np.random.default_rng(20261127)
    draws = [
        pixels + rng.permuted(steps, axis=-1).reshape(pixels.shape) for _ in range(REPLACEMENTS)
    ]
    return max(
        readout.apart(readout.answers(reference.logits(drawn, torch.float32)), plain)
        for drawn in draws
    )


def pixel_checks(made: Array, canvases: Array, preprocess: Preprocess, group: str) -> list[Check]:
    """Compare a graph's normalised pixels (N, 3, S, S) with Pillow's canvases (N, R, R, 3).

    Of the same images, in grey levels, after undoing the recipe's normalisation.
    """
    levels = _levels(made, preprocess)
    apart = levels - _cropped(canvases, preprocess)
    beyond = float((np.abs(apart) > RESAMPLED_LEVELS[group] + WHOLE_LEVELS).mean((1, 2, 3)).max())
    drift = float(np.abs(apart.mean((1, 2))).max())
    fraction = float(np.abs(levels - levels.round()).max())
    values = (
        ("share of pixels off", beyond, RESAMPLED_SHARE),
        ("mean of a channel", drift, MEAN_LEVELS),
        ("pixels between grey levels", fraction, WHOLE_LEVELS),
    )

    return [
        Check(name=name, group=group, value=value, limit=limit, inputs=len(made))
        for name, value, limit in values
    ]


def resampled(made: Array, canvases: Array, preprocess: Preprocess) -> Array:
    """Pillow's pixels with the graph's rounding: normalised in numpy, (N, 3, S, S) float32.

    Each grey level is the graph's, as far as FARTHEST_LEVELS allows; how many may go that far is
    for pixel_checks to judge.
    """
    exact = _cropped(canvases, preprocess)
    steps = np.nan_to_num(_levels(made, preprocess) - exact).round()
    steps = steps.clip(-FARTHEST_LEVELS, FARTHEST_LEVELS)
    inside = np.zeros_like(canvases)
    start = (preprocess.resize - preprocess.size) // 2
    inside[:, start : start + preprocess.size, start : start + preprocess.size] = (
        exact + steps
    ).clip(0, 255)

    return preprocess.pixels(inside)


def _levels(pixels: Array, preprocess: Preprocess) -> Array:
    """Normalised pixels (N, 3, S, S) -> grey levels (N, S, S, 3) float64."""
    levels: Array = (
        pixels.astype(np.float64).transpose(0, 2, 3, 1) * preprocess.std + preprocess.mean
    )
    return levels


def _cropped(canvases: Array, preprocess: Preprocess) -> Array:
    start = (preprocess.resize - preprocess.size) // 2
    inside = slice(start, start + preprocess.size)
    cropped: Array = canvases[:, inside, inside].astype(np.float64)
    return cropped


def rounding_limit(rounding: float, scale: float) -> float:
    """Tolerance of logits in a lower precision.

    rounding: emulated error (Reference.rounding); scale: largest logit.
    """
    return min(ROUNDINGS * rounding, CEILING * scale) if np.isfinite(rounding) else 0.0


def agreement(
    expected: Array,
    actual: Array,
    rounding: float,
    precision: str,
    group: str,
    readout: Readout,
) -> list[Check]:
    """Check logits (N, K) of a lower precision against float32's on the same inputs.

    rounding: error of the logits when rounding to that precision is emulated (Reference.rounding).
    Decisions may differ in a tie, which logits closer than twice the limit can turn.
    """
    expected = expected.astype(np.float64)
    actual = actual.astype(np.float64)
    limit = rounding_limit(rounding, float(np.abs(expected).max()))
    broken = int((np.isfinite(expected) & ~np.isfinite(actual)).sum())
    values = [
        (f"{precision} new NaN or Inf", broken, 0.0),
        (f"{precision} logits", float(np.abs(actual - expected).max()), limit),
    ]
    if readout.decided:
        changed = decided_otherwise(readout, expected, actual, limit)
        values.append((f"{precision} {readout.decided} changed, not in ties", changed, 0.0))

    return [
        Check(name=name, group=group, value=value, limit=most, inputs=len(actual))
        for name, value, most in values
    ]


class Emulated(TorchFunctionMode):
    """Emulate a GPU's TF32 or float16 on the CPU, within the block.

    Products use values rounded as tensor cores do; float16 also rounds the result of every
    operation. towards_zero: truncate, else round to nearest.
    """

    def __init__(self, precision: str, *, towards_zero: bool):
        super().__init__()
        self._half = precision == "fp16"
        self._towards_zero = towards_zero

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation on rounded values."""
        if function in PRODUCTS:
            args = [self._rounded(item) for item in args]
        result = function(*args, **(kwargs or {}))
        return (
            self._rounded(result)
            if self._half and getattr(function, "__name__", "") in ROUNDED_FUNCTIONS
            else result
        )

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not self._half:
            return _tf32(value, towards_zero=self._towards_zero)

        half = value.half()
        if self._towards_zero:
            half = torch.where(
                half.float().abs() > value.abs(),
                torch.nextafter(half, torch.zeros_like(half)),
                half,
            )

        return half.float()


PRODUCTS = (
    F.conv2d,
    F.linear,
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    F.scaled_dot_product_attention,
)
ROUNDED_FUNCTIONS = {function.__name__ for function in PRODUCTS} | {
    "add",
    "mul",
    "__add__",
    "__mul__",
    "iadd",
    "imul",
    "hardtanh",
    "relu",
    "relu6",
    "gelu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "layer_norm",
    "batch_norm",
    "softmax",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "mean",
}


def _tf32(value: torch.Tensor, *, towards_zero: bool) -> torch.Tensor:
    """float32 rounded to the 10 mantissa bits of TF32."""
    bits = value.contiguous().view(torch.int32)
    if not towards_zero:
        bits = bits + 0xFFF + ((bits >> 13) & 1)  # half a unit, ties to even
    return (bits & ~0x1FFF).view(torch.float32)


def first_divergence(
    reference: Reference, core: Path, pixels: Array, layers: Mapping[str, str], provider: str
) -> str:
    """Name the first layer whose output is out of tolerance, with error and magnitude.

    pixels: (N, 3, S, S) float32. Every value of the core file is made an output of ONE session
    (0.06 s) and compared with the output of its layer's module.
    """
    truth = _module_outputs(reference.float64, pixels, torch.float64)
    floors = _module_outputs(reference.float32, pixels, torch.float32)
    model = onnx.load(core)
    makers = last_values(model, layers, set(truth))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in makers)

    outputs = Session(model.SerializeToString(), provider=provider).run(pixels)
    for layer, value in zip(makers.values(), outputs, strict=True):
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


def last_values(
    model: onnx.ModelProto, layers: Mapping[str, str], modules: set[str]
) -> dict[str, str]:
    """Value -> the module whose output it is, in graph order.

    It is the last value computed inside that module.
    """
    last: dict[str, str] = {}
    for node in model.graph.node:
        for value in node.output:
            path = layers.get(value, "")
            while path:
                last[path] = value
                path = path.rpartition(".")[0]

    order = {value: number for number, node in enumerate(model.graph.node) for value in node.output}
    modules_by_value: dict[str, str] = {}
    # The innermost module that ends with this value names it
    for module in sorted(modules & set(last), key=len):
        modules_by_value[last[module]] = module

    return dict(sorted(modules_by_value.items(), key=lambda item: order[item[0]]))


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
