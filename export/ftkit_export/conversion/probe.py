"""Check that a provider really runs a model on this machine: why = does_not_open("cuda")."""

from __future__ import annotations

import numpy as np

from ftkit_export.conversion.graph import tiny_model
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.session import Session


def does_not_open(provider: str) -> str:
    """Why a small model does not run on this provider here; empty when it does."""
    try:
        session = Session(tiny_model().SerializeToString(), provider=provider)
        session.run(np.zeros((1, 3, 8, 8), np.float32))
    except FtkitError as error:
        return str(error)
    return ""
