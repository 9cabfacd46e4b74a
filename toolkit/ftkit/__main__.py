"""Run `python -m ftkit` as `ftkit`."""

from ftkit.cli.main import main

main()
