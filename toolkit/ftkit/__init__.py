"""ftkit turns a folder of images into a model file that is proven to work on a device."""

__version__ = "0.1.0"
