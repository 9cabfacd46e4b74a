"""Helpers for every package: files, the console, locks, seeds, processes."""
