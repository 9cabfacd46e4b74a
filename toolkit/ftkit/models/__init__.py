"""Backbones, their weights, and where they are cut into a frozen prefix and a trained suffix."""
