"""Errors of commands that run as several processes."""

from __future__ import annotations

from ftkit_export.runtime.errors import FtkitError


class ToldElsewhereError(FtkitError):
    """This rank ends because another rank failed and reports the error."""
