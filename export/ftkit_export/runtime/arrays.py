"""Array, the type of a numpy array, and even sampling of one.

Shape and dtype are given in the comment or docstring beside each use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def spread_evenly(values: Array, count: int) -> Array:
    """At most `count` of the values (n, ...), evenly spaced, including the first and the last.

    Rows sorted by class are thus sampled from all classes.
    """
    spaced = np.linspace(0, len(values) - 1, min(count, len(values)))
    picked: Array = values[np.unique(spaced.round().astype(int))]
    return picked
