"""Configure malloc to keep freed memory in the process.

keep_freed_memory()      # once, before heavy work
"""

from __future__ import annotations

import ctypes

# mallopt parameters M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, and their values
THRESHOLDS = (
    (-3, 32 << 20),
    (-1, 2**31 - 1),
    (-2, 64 << 20),
)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory; does nothing with another C library.

    Otherwise PyTorch's tensors are returned to the kernel at every step and faulted in again, page
    by page (7 % of a lite0 step on 2 cores).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for name, value in THRESHOLDS:
            libc.mallopt(name, value)
    except (OSError, AttributeError):
        return
