"""Code that runs on a device, copied into every bundle: numpy, Pillow and ONNX Runtime only."""
