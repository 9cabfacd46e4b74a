"""Every error ftkit raises on purpose, and the exit code each one means.

    FtkitError                2  bad usage or bad input
    ├── ImageError            2  one image file cannot be decoded
    │   └── UnavailableImageError  it cannot be read now; another time it may
    ├── ProviderError         2  an ONNX Runtime provider is unknown, absent, or not the one that answered
    └── BundleError           2  a bundle is incomplete, altered, or not a bundle

Exit codes 1 (a gate failed) and 3 (it cannot be told) are no exceptions.
The message is one sentence of the form `WHERE: expected X, found Y. TRY Z`.
"""

from __future__ import annotations

from collections.abc import Iterable


class FtkitError(Exception):
    """Bad usage or bad input: the message says where, what was expected, what was found, what to try."""

    exit_code = 2


class ImageError(FtkitError):
    """One image file cannot be decoded."""


class UnavailableImageError(ImageError):
    """One image file cannot be read now, for a reason that does not lie in its content: no memory, no permission."""


class ProviderError(FtkitError):
    """An ONNX Runtime provider is unknown, absent, or not the one that answered."""


class BundleError(FtkitError):
    """A bundle is incomplete, altered, or not a bundle."""


def choices(found: object, allowed: Iterable[object]) -> str:
    """`found 'x'. Try one of: a, b` for a wrong name; `allowed` is any iterable of names."""
    names = ", ".join(sorted(str(name) for name in allowed))
    return f"found {str(found)!r}. Try one of: {names}"
