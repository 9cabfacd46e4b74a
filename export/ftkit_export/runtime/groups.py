"""Groups of images that belong together, named by their paths.

group_names(["part1_0.jpg", "part1_1.jpg", "x.jpg"], "([^/]+)_[0-9]+")     # ["part1", "part1", ""]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ftkit_export.runtime.errors import FtkitError


def group_names(paths: Sequence[str], group_by: str) -> list[str]:
    """The group of each path: the first capture group of the regular expression `group_by`, or its
    whole match; "" where it matches nothing.

    Raises FtkitError where it is no regular expression, or matches no path.
    """
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise FtkitError(
            f"--group-by {group_by}: expected a regular expression, found {error}. Try '([^/]+)_[0-9]+'"
        ) from None

    matches = [pattern.search(path) for path in paths]
    if not any(matches):
        raise FtkitError(
            f"--group-by {group_by}: expected it to match paths such as {paths[0]}, found no match. Try "
            "'([^/]+)_[0-9]+'"
        )
    return [(match[1 if pattern.groups else 0] or "") if match else "" for match in matches]
