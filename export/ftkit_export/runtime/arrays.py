"""The type of a numpy array whose shape and dtype the comment or docstring beside it gives, and even
sampling of one."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def spread_evenly(values: Array, count: int) -> Array:
    """At most `count` of the values (n, ...), evenly spaced, the first and the last among them.

    Rows that lie in order of class are then sampled from all classes.
    """
    spaced = np.linspace(0, len(values) - 1, min(count, len(values)))
    picked: Array = values[np.unique(spaced.round().astype(int))]
    return picked
