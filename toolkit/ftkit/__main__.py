"""`python -m ftkit` is `ftkit`."""

from ftkit.cli.main import main

main()
