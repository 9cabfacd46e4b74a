"""The type of a numpy array whose shape and dtype the comment or docstring beside it gives."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
