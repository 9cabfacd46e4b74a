"""Facts from the NVIDIA driver (NVML) about the first GPU that this process may use.

Empty without a GPU, or where it is unknown which of several it is.

facts()         {"gpu": "NVIDIA H200", "driver": "580.65"}
used_bytes()    memory in use on it, by all processes
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from typing import Any

NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@lru_cache
def _opened() -> tuple[Any, Any] | None:
    """The NVML library and the handle of the GPU, or None."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None

    handle = ctypes.c_void_p()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    if first.isdigit() and not same_numbers(count.value):
        return None  # unknown which of them is the first for CUDA

    if first.isdigit():
        failed = library.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(handle))
    else:
        failed = library.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))

    return None if failed else (library, handle)


def same_numbers(gpus: int) -> bool:
    """Whether CUDA and NVML number the GPUs alike.

    NVML counts in PCI bus order; CUDA counts the fastest first, unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID. The variable is left to the user, since it changes which GPU is
    used.
    """
    return gpus == 1 or os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") == "PCI_BUS_ID"


def facts() -> dict[str, str]:
    """The first GPU's name and the driver's version; empty without one."""
    opened = _opened()
    if opened is None:
        return {}

    library, handle = opened
    name = ctypes.create_string_buffer(NAME_BYTES)

    version = ctypes.create_string_buffer(NAME_BYTES)
    if library.nvmlDeviceGetName(handle, name, NAME_BYTES) or library.nvmlSystemGetDriverVersion(
        version, NAME_BYTES
    ):
        return {}

    return {"gpu": name.value.decode(), "driver": version.value.decode()}


def used_bytes() -> int | None:
    """Bytes of the first GPU's memory in use; None without one."""
    library = _opened()
    memory = _Memory()
    if library is None or library[0].nvmlDeviceGetMemoryInfo(library[1], ctypes.byref(memory)):
        return None
    return int(memory.used)
