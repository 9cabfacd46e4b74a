"""ftkit turns a folder of images into a model file that is proven to work on a device."""

from ftkit.api import bench, export, load, train, verify

__version__ = "0.1.0"
__all__ = ["bench", "export", "load", "train", "verify"]
