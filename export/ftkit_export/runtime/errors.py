"""ftkit's own exceptions and their exit codes.

    FtkitError                2  bad usage or bad input
    ├── ImageError            2  one image file cannot be decoded
    │   └── UnavailableImageError  it cannot be read now, but perhaps later
    ├── ProviderError         2  an ONNX Runtime provider is unknown, absent, or not the one in use
    └── BundleError           2  a bundle is incomplete, altered, or not a bundle

Exit codes 1 (a gate failed) and 3 (inconclusive) have no exception.
Messages have the form `WHERE: expected X, found Y. TRY Z`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FtkitError(Exception):
    """Bad usage or bad input; the message says where, what was expected and found, what to try."""

    exit_code = 2


class ImageError(FtkitError):
    """One image file cannot be decoded."""


class UnavailableImageError(ImageError):
    """An image file cannot be read now for reasons other than its content: memory, permission."""


class ProviderError(FtkitError):
    """An ONNX Runtime provider is unknown, absent, or not the one in use."""


class BundleError(FtkitError):
    """A bundle is incomplete, altered, or not a bundle."""


# Other tools' names -> ftkit's name; takes precedence over similarly spelt names.
SYNONYMS = {
    "letterbox": "pad",
    "contain": "pad",
    "padding": "pad",
    "centre": "crop",
    "center": "crop",
    "cover": "crop",
    "stretch": "squash",
    "resize": "squash",
    "gray": "grey",
    "yuv": "nv12",
    "yuv420": "nv12",
    "nv21": "nv12",
    "one_cycle": "onecycle",
    "cos": "cosine",
    "linear": "cosine",
    "class_weights": "loss",
    "weighted": "loss",
    "oversample": "sample",
    "gpu": "cuda",
    "trt": "tensorrt",
    "raspberry-pi": "arm64",
    "arm": "arm64",
    "jetson": "cuda",
    "browser": "web",
    "wasm": "web",
    "learning_rate": "lr",
    "batch": "batch_size",
    "wd": "weight_decay",
    "imgsz": "size",
    "img_size": "size",
    "image_size": "size",
    "input_size": "size",
    "resolution": "size",
    "model": "backbone",
    "arch": "backbone",
    "latency": "p95_ms",
    "latency_ms": "p95_ms",
    "p95": "p95_ms",
    "p50": "p50_ms",
    "memory": "memory_mb",
    "max_drop": "max_accuracy_drop",
    "accuracy_drop": "max_accuracy_drop",
    "recall": "min_recall",
    "ram": "memory_mb",
    "model_size": "size_mb",
    "layers": "train",
    "unfreeze": "train",
}
LIKE = 0.7  # least similarity (difflib ratio, 0 to 1) of a name that is suggested


def nearest(found: object, allowed: Iterable[object]) -> str:
    """The allowed name most likely meant, by synonym, then by spelling; "" for none."""
    word = str(found).lower().replace("-", "_")
    names = [str(name) for name in allowed]
    meant = SYNONYMS.get(word) or SYNONYMS.get(str(found).lower(), "")
    if meant in names:
        return meant
    like = difflib.get_close_matches(str(found).lower(), names, n=1, cutoff=LIKE)
    return like[0] if like else ""


def choices(found: object, allowed: Iterable[object]) -> str:
    """Error text for a wrong name: `found 'x'. Try b; there are: a, b`."""
    names = sorted(str(name) for name in allowed)
    meant = nearest(found, names)
    listed = ", ".join(names)
    return f"found {str(found)!r}. Try {f'{meant}; there are' if meant else 'one of'}: {listed}"
