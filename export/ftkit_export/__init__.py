"""Everything on the way to the device: preprocessing, conversion, parity, latency, bundles.

Independent of the training code.
"""
