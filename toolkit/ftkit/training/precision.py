"""Precision, determinism, and the fastest measured way to run a stage's net on its device.

    compute = prepare(device, deterministic=False)
    with compute.autocast(): logits = net(pixels)
    net, said = fastest(net, inputs, ways(net, inputs, compute), compute, steps=3000)

On CUDA the trained part runs under bfloat16 autocast (float16 with loss scaling where the GPU lacks
bfloat16). Weights, updates, losses, frozen prefixes and validation stay in float32 with TF32 off,
so that cached activations and val scores do not depend on the kernel used. On a CPU: float32
throughout.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftkit.models.inference import Tensors
from ftkit_export.conversion.convert import exact_float32
from ftkit_export.runtime.errors import FtkitError

# cuBLAS is deterministic only with a fixed workspace; torch reads this once, at the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# steps
WARM_UP = 3
TIMED = 7
GAIN = 0.95  # an alternative must take at most this share of the best time so far
# Largest difference of logits, relative to the largest: bfloat16 rounds each value by up to 0.4 %
AGREE = 0.05


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute: device, dtype of the autocast (None = float32 throughout), deterministic.

    deterministic: training twice gives the same weights.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    deterministic: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast context for the forward pass of a training net.

        Casts are not cached: a cached one would outlive its CUDA graph.
        """
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Let cuDNN try its algorithms for each new shape, which steps of one shape repay.

        Not so a frozen prefix and validation: a search for each size of batch would take longer than
        they do (bench/gpu.md).
        """
        torch.backends.cudnn.benchmark = self.device.type == "cuda" and not self.deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaler, active only for float16, whose range would lose small gradients."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def __str__(self) -> str:
        if self.device.type == "cpu":
            return "cpu"
        words = f"{torch.cuda.get_device_name(self.device)}\n{str(self.dtype).removeprefix('torch.')} autocast, "
        words += "float32 elsewhere (TF32 off), channels_last"
        return f"{words}, deterministic" if self.deterministic else words


def prepare(device: torch.device, deterministic: bool) -> Compute:
    """Choose the precision for a device, and set torch's global switches accordingly."""
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cpu":
        return Compute(device=device, deterministic=deterministic)

    exact_float32()
    dtype = (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )

    return Compute(device=device, dtype=dtype, deterministic=deterministic)


@dataclass(frozen=True, kw_only=True)
class Way:
    """An alternative way to run a net.

    make: builds it, once. worth: seconds that the rest of the stage must take for it to be tried; a
    guess until a GPU has measured the cost of making it.
    """

    name: str
    make: Callable[[], nn.Module]
    worth: float


def ways(net: nn.Module, inputs: Tensors, compute: Compute) -> list[Way]:
    """Alternatives to eager execution: on CUDA a captured graph, then torch.compile.

    None on a CPU, where compiling gained a fifth and cost up to 45 s, nor in deterministic mode.
    """
    if compute.device.type != "cuda" or compute.deterministic:
        return []
    return [
        Way(name="CUDA graph", make=lambda: _Captured(net, inputs, compute), worth=5.0),
        Way(name="torch.compile", make=lambda: torch.compile(net, dynamic=False), worth=300.0),  # type: ignore[arg-type,return-value]
    ]


class _Shell(nn.Module):
    """Wrapper module around the same net."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.net(*inputs)
        return output


class _Captured(nn.Module):
    """The net's forward and backward pass as CUDA graphs, with one launch each.

    Kernel launches dominate the time of a small net.
    """

    def __init__(self, net: nn.Module, inputs: Tensors, compute: Compute):
        super().__init__()
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            # Gradients arrive on the capture's stream
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

        # Capturing replaces the module's forward, and the net itself is used elsewhere
        shell = _Shell(net)
        with compute.autocast():
            self.run: Any = torch.cuda.make_graphed_callables(
                shell, inputs, allow_unused_input=True
            )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.run(*inputs)
        return output


def release(net: nn.Module) -> None:
    """Free the memory of a captured graph, which holds whole batches of activations."""
    if isinstance(net, _Captured):
        net.run = None
        gc.collect()  # the capture contains reference cycles
        torch.cuda.empty_cache()


def fastest(
    net: nn.Module, inputs: Tensors, others: Sequence[Way], compute: Compute, steps: int
) -> tuple[nn.Module, str]:
    """Return the net or a faster way to run it, and a text for the log, "" where none was tried.

    inputs: a batch like those of every step. An alternative is tried if the remaining steps last
    long enough to repay its cost, and taken if it is measurably faster and its outputs agree with
    the net's. BatchNorm statistics are restored, and no gradient is left.
    """
    if not others:
        return net, ""

    best: nn.Module = net
    held: dict[str, Any] = {name: value.clone() for name, value in net.named_buffers()}
    try:
        expected = _answer(net, inputs, compute)
        taken = eager = _step_seconds(net, inputs, compute)
        said = [f"eager {eager * 1e3:.1f} ms a step"]

        for way in others:
            if taken * steps < way.worth:
                break

            try:
                candidate = _made(way, compute)
                off = float(
                    (_answer(candidate, inputs, compute) - expected).abs().max()
                    / expected.abs().max()
                )
                seconds = _step_seconds(candidate, inputs, compute)
            except Exception as error:  # capturing and compiling may raise anything; keep eager
                said.append(
                    f"{way.name} failed: {(str(error) or type(error).__name__).splitlines()[0][:60]}"
                )
                break

            wrong = not off <= AGREE
            said.append(
                f"{way.name} {seconds * 1e3:.1f} ms" + (", but other answers" if wrong else "")
            )

            if not wrong and seconds <= GAIN * taken:
                candidate, best, taken = best, candidate, seconds

            release(candidate)
    except torch.OutOfMemoryError:  # the first step will hit it too, and halve the batch
        torch.cuda.empty_cache()
        return net, ""
    finally:
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(held[name])
        net.zero_grad(set_to_none=True)

    return best, ", ".join(said) if len(said) > 1 else ""


def _made(way: Way, compute: Compute) -> nn.Module:
    if compute.device.type == "cpu":
        return way.make()
    # A failed capture leaves another stream current
    with torch.cuda.stream(torch.cuda.current_stream(compute.device)):
        return way.make()


def _answer(net: nn.Module, inputs: Tensors, compute: Compute) -> torch.Tensor:
    torch.manual_seed(0)  # for dropout
    with compute.autocast():
        output: torch.Tensor = net(*inputs)
    return output.detach().float().clone()


def _step_seconds(net: nn.Module, inputs: Tensors, compute: Compute) -> float:
    """Median seconds of forward and backward."""
    times = []
    for _ in range(WARM_UP + TIMED):
        net.zero_grad(set_to_none=True)  # a training's step does not add to gradients
        _finish(compute)
        begun = time.perf_counter()
        with compute.autocast():
            output = net(*inputs)
        output.float().square().mean().backward()
        _finish(compute)
        times.append(time.perf_counter() - begun)

    return sorted(times[WARM_UP:])[TIMED // 2]


def _finish(compute: Compute) -> None:
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)


def deterministic_or_say(error: RuntimeError) -> FtkitError | None:
    """Turn torch's error about a nondeterministic operation into an FtkitError.

    Returns None for any other error.
    """
    said = (str(error) or " ").splitlines()[0]
    if "does not have a deterministic implementation" not in said:
        return None
    return FtkitError(
        f"--deterministic: expected only operations with a deterministic form, found {said.split()[0]}. "
        "Try another backbone, or leave --deterministic out"
    )
