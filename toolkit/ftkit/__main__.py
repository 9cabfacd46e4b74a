"""`python -m ftkit` is `ftkit`."""

from ftkit.cli import main

main()
