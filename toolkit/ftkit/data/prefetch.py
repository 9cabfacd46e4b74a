"""Fetch rows of stored arrays as tensors on the training device, without stalling it.

    source = Source(canvases.array, rows=2223, row_bytes=150_528, device=device)
    batch = source.take(source.fetch(rows))      # fetch on any thread, take on the device's own

On a GPU all rows stay resident if they fit in half of its free memory; otherwise each batch is read
ahead into pinned memory and copied while the previous step runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ftkit_export.runtime.arrays import Array

RESIDENT_SHARE = 0.5  # of the device's free memory
ROWS_PER_COPY = 512  # rows per copy to the device


def free_bytes(device: torch.device) -> int:
    """GPU memory available to a new tensor: free by the driver, or reserved by torch but unused."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + max(0, idle)


class Source:
    """Rows of a stored array, by row number, on a device.

    read(rows) -> (n, ...), for row numbers below `rows`. room: free bytes on the device; by default
    as the device reports, and 0 on a CPU, which shares the memory of the stored arrays.
    """

    def __init__(
        self,
        read: Callable[[Array], Array],
        rows: int,
        row_bytes: int,
        device: torch.device,
        room: int | None = None,
    ):
        self._read = read
        self.device = device
        if room is None:
            room = free_bytes(device) if device.type == "cuda" else 0
        self._resident = self._all(rows) if rows * row_bytes <= RESIDENT_SHARE * room else None

    @property
    def resident(self) -> bool:
        """Whether all rows are on the device."""
        return self._resident is not None

    def _all(self, rows: int) -> torch.Tensor | None:
        if not rows:
            return None
        first = torch.from_numpy(self._read(np.arange(1)))
        whole = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=self.device)
        for start in range(0, rows, ROWS_PER_COPY):
            part = torch.from_numpy(self._read(np.arange(start, min(start + ROWS_PER_COPY, rows))))
            whole[start : start + len(part)] = part.to(self.device)
        return whole

    def fetch(self, rows: Array) -> torch.Tensor:
        """Read rows (n,), or only pass on their numbers if resident; pinned if there is a GPU."""
        return pinned(
            torch.from_numpy(np.ascontiguousarray(rows) if self.resident else self._read(rows)),
            self.device,
        )

    def take(self, fetched: torch.Tensor) -> torch.Tensor:
        """Move the result of `fetch` to the device, (n, ...), asynchronously."""
        moved = fetched.to(self.device, non_blocking=True)
        return moved if self._resident is None else self._resident[moved]


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pin a host tensor so that copies to `device` need not wait; unchanged for a CPU."""
    if device.type == "cpu":
        return host
    with torch.cuda.device(device):  # a new thread starts on the first GPU, whatever the rank's is
        return host.pin_memory()


def array_source(array: Array, device: torch.device) -> Source:
    """A Source over one stored array, rows first."""
    return Source(lambda rows: array[rows], len(array), array[:1].nbytes, device)
