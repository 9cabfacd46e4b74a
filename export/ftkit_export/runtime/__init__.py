"""Code that runs on a device: copied whole into every bundle; numpy, Pillow and ONNX Runtime only."""
