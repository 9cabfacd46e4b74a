"""ftkit turns a folder of images into a model file that is proven to work on a device."""

from ftkit.api import bench, export, load, train, verify
from ftkit_export.runtime.errors import FtkitError

__version__ = "0.1.0"
__all__ = ["FtkitError", "bench", "export", "load", "train", "verify"]
