"""What leaves for the device: preprocess, convert, parity, latency, bundle. Knows nothing of
training."""
