"""Objects that a user names in a flag, as in ``--routers=package.module:factory``."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from qos_jax.errors import InputError


def import_named(reference: str) -> Any:
    """Imports what ``package.module:name`` refers to.

    Importing executes code. A reference must therefore come from the user's own call or command line, never from a
    file.

    Raises:
      InputError: the reference is not of this form, or importing it fails.
    """
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise InputError(f"{reference!r} must be of the form package.module:name")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        raise InputError(f"{reference!r} cannot be imported: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Returns the type and the message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
