"""The one error that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag, field or value from outside is not usable; the message names it and says what is legal."""
