"""The order of names."""

from __future__ import annotations

import re


def natural(text: str) -> list[tuple[int, int, str]]:
    """Natural sort key: class2 before class10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.lower())
        for part in re.split(r"(\d+)", text)
        if part
    ]
