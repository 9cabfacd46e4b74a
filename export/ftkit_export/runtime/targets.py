"""Deployment targets, and whether a model file can run on one.

    target = TARGETS["x86-vnni"]
    why = unshippable("int8.onnx", target)       # "" or the reason

Integer types per target: on x86, unsigned activations with signed weights, one scale per channel;
without VNNI such products saturate in 16 bits, so weights use 7 bits (reduce_range); on ARM both
are signed. CUDA: float16.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.onnxfile import inspect

Precision = Literal["fp32", "int8", "fp16"]

LARGEST_PROTOBUF = 2**31  # bytes of one protobuf file


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a model shall run, and what its file must be like.

    variants: precisions tried besides fp32. activations: "uint8" or "int8". oldest: oldest ONNX
    Runtime that must load the file, which determines opset and IR (1.15 and 1.17 refuse opset 20
    with IR 10; measured).
    """

    provider: str = "cpu"
    variants: tuple[Precision, ...] = ("int8",)
    activations: str = "uint8"
    reduce_range: bool = False
    oldest: str = "1.15"
    opset: int = 18
    ir: int = 8


TARGETS: dict[str, Target] = {
    "x86-vnni": Target(),
    "x86": Target(reduce_range=True),
    "arm64": Target(activations="int8"),
    "cuda": Target(provider="cuda", variants=("fp16",)),
    "web": Target(oldest="1.17"),
}


def here() -> str:
    """Name of the target that matches this machine's processor."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm64"
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "x86-vnni" if "vnni" in flags else "x86"


def unshippable(model: Path, target: Target) -> str:
    """Why `model` cannot run on the target's oldest ONNX Runtime as one file; empty if it can."""
    try:
        facts = inspect(model)
    except BundleError as error:
        return str(error).split(": ", 1)[1].split(". ")[0]  # the advice is for untrusted files

    if facts.opset > target.opset:
        return f"expected opset {target.opset} at most, found {facts.opset}"
    if facts.ir > target.ir:
        return f"expected IR {target.ir} at most, found {facts.ir}"
    if model.stat().st_size >= LARGEST_PROTOBUF:
        return f"expected a file below 2 GB, found {model.stat().st_size} bytes"
    return ""
