"""Errors of a command that runs as several processes."""

from __future__ import annotations

from ftkit_export.runtime.errors import FtkitError


class ToldElsewhereError(FtkitError):
    """A rank ends because another one failed: that one tells why."""
