"""Trained routers that are part of the package, each with a card that says how it was made and what it reached."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from qos_jax.errors import InputError

PREFIX = "pretrained:"
"""Before the name of a shipped router, where the folder of a run is asked for."""
_FOLDER = pathlib.Path(__file__).with_name("pretrained")
CARD = "card.json"


def shipped_names() -> list[str]:
    """Returns the names of the shipped routers, which are those of the presets that they were trained on."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{CARD}"))


def is_shipped(text: str | os.PathLike[str]) -> bool:
    """Tells whether a text means a shipped router rather than a folder."""
    return isinstance(text, str) and text.startswith(PREFIX)


def shipped_folder(text: str) -> pathlib.Path:
    """Returns the folder of ``pretrained:NAME``, which is that of a run without its training state.

    Raises:
      InputError: there is no such router.
    """
    name = text.removeprefix(PREFIX)
    if name not in shipped_names():
        known = ", ".join(f"{PREFIX}{name}" for name in shipped_names()) or "none, as this copy has none"
        raise InputError(f"router {text!r} is unknown; choose from {known}")
    return _FOLDER / name


def shipped_label(text: str) -> str:
    """Returns the name of the router of ``pretrained:NAME`` in results."""
    return f"pretrained_{text.removeprefix(PREFIX).replace('-', '_')}"


def shipped_card(text: str) -> dict[str, Any]:
    """Returns the card of ``pretrained:NAME``.

    It holds the commands by which it was ``trained`` and ``evaluated``, ``versions``, and by load the mean ``qos`` of
    each of the ``seeds`` over ``requests`` without the ``warmup``.
    """
    return json.loads((shipped_folder(text) / CARD).read_text(encoding="utf-8"))
