"""ftkit: fine-tune an image classifier, export it to ONNX, and prove the file on a device."""

from ftkit.api import bench, export, load, search, train, verify
from ftkit_export.runtime.errors import FtkitError

__version__ = "0.1.0"
__all__ = ["FtkitError", "bench", "export", "load", "search", "train", "verify"]
