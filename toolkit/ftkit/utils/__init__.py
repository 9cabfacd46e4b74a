"""Utilities for all packages: console, locks, cache folder, memory, processes, compatibility."""
