"""What the NVIDIA driver tells of the first GPU, through its management library; nothing where there is none.

facts()         {"gpu": "NVIDIA H200", "driver": "580.65"}
used_bytes()    memory in use on it, by all processes
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@lru_cache
def _opened() -> tuple[Any, Any] | None:
    """The library and the handle of GPU 0, or None."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    return library, handle


def facts() -> dict[str, str]:
    """The first GPU's name and the driver's version; empty without one."""
    found = _opened()
    if found is None:
        return {}
    library, handle = found
    name, version = ctypes.create_string_buffer(NAME_BYTES), ctypes.create_string_buffer(NAME_BYTES)
    if library.nvmlDeviceGetName(handle, name, NAME_BYTES) or library.nvmlSystemGetDriverVersion(version, NAME_BYTES):
        return {}
    return {"gpu": name.value.decode(), "driver": version.value.decode()}


def used_bytes() -> int | None:
    """Bytes of the first GPU's memory in use; None without one."""
    found, memory = _opened(), _Memory()
    if found is None or found[0].nvmlDeviceGetMemoryInfo(found[1], ctypes.byref(memory)):
        return None
    return int(memory.used)
