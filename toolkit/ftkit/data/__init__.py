"""Image data: reading, decoding once, augmentation, audit and cleaning."""
