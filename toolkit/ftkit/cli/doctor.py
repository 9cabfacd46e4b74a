"""Check which providers work on this machine, and why others do not.

for line in examine(): print(line)
"""

from __future__ import annotations

from importlib import metadata

from ftkit.utils.cache_folder import cache_folder
from ftkit_export.conversion.probe import does_not_open
from ftkit_export.runtime.session import PROVIDERS, cores, missing_library, offered

CHECKED_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "numpy", "pillow")
PROVIDER_PACKAGES = {
    "libcuda.so": ": install the NVIDIA driver",
    "libnvinfer": ": install TensorRT 10, and put its folder on LD_LIBRARY_PATH",
    "libcu": ": install torch built for the same CUDA, which brings it",
}
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def examine() -> list[str]:
    """One line per finding; each provider is tested by opening and running a real session."""
    lines = [f"{name} {_version(name)}" for name in CHECKED_PACKAGES]
    runtimes = [name for name in RUNTIMES if _version(name) != "absent"]
    lines += [f"{name} {_version(name)}" for name in runtimes]

    if len(runtimes) > 1:
        lines.append(f"error: {' and '.join(runtimes)} install the same module: keep one of them")

    lines.append(_torch_gpu())
    # A hyphenated name is a variant of another provider
    lines += [_provider(name) for name in PROVIDERS if "-" not in name]
    lines.append(f"{cores()} cores; cache at {cache_folder()}")

    return lines


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _torch_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        return (
            f"training: on {count} x {torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), "
            f"in {'bfloat16' if half else 'float16'}"
        )

    built = (
        f"torch was built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "torch was built without CUDA"
    )
    return f"training: on the CPU ({built}; no GPU answers)"


def _provider(name: str) -> str:
    if name not in offered():
        return f"provider {name:<9} absent: this ONNX Runtime was built without it"

    why = does_not_open(name)
    if not why:
        return f"provider {name:<9} works"

    missing = missing_library(name)
    source = next(
        (text for library, text in PROVIDER_PACKAGES.items() if missing.startswith(library)), ""
    )
    return f"provider {name:<9} does not open: " + (
        f"{missing.split(':')[0]} is missing{source}" if missing else why
    )
