"""Command-line interface: one file per group of commands, assembled in main.py."""
