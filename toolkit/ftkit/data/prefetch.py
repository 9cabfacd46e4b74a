"""Rows of stored arrays as tensors on the training device, without the device waiting for them.

    source = Source(canvases.array, rows=2223, row_bytes=150_528, device=device)
    batch = source.take(source.fetch(rows))      # fetch on any thread, take on the device's own

On a GPU all rows stay resident where they fit in half of its free memory; else each batch is read
ahead into pinned memory, and copied while the step before it runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ftkit_export.runtime.arrays import Array

RESIDENT_SHARE = 0.5  # of the free memory
ROWS_PER_COPY = 512  # rows a copy to the device


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that a tensor could get: what the driver calls free, and what torch holds and
    does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + max(0, idle)


class Source:
    """read(rows) -> (n, ...) of the first `rows` row numbers. room: free bytes on the device; by
    default as it tells, none on a CPU, whose memory the stored arrays share already."""

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
        """Whether every row lies on the device."""
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
        """(n,) row numbers -> their values, or, resident, the numbers themselves; pinned where
        there is a GPU."""
        return pinned(
            torch.from_numpy(np.ascontiguousarray(rows) if self.resident else self._read(rows)),
            self.device,
        )

    def take(self, fetched: torch.Tensor) -> torch.Tensor:
        """Move what `fetch` returned to the device, (n, ...); queued, not awaited."""
        moved = fetched.to(self.device, non_blocking=True)
        return moved if self._resident is None else self._resident[moved]


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor where a copy to `device` need not wait for it; as it is for a CPU."""
    if device.type == "cpu":
        return host
    with torch.cuda.device(device):  # a thread begins on the first GPU, whatever its rank's is
        return host.pin_memory()


def array_source(array: Array, device: torch.device) -> Source:
    """Of one stored array, rows first."""
    return Source(lambda rows: array[rows], len(array), array[:1].nbytes, device)
