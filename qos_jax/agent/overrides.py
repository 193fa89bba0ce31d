"""Other values for some fields of an agent, given as text: ``learning_rate=3e-4``, ``han.layers=3``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qos_jax.agent import configs
from qos_jax.agent.configs import AgentConfig
from qos_jax.errors import InputError


def overridden(config: AgentConfig, settings: Mapping[str, str]) -> AgentConfig:
    """Returns an agent with other values for some of its fields.

    Args:
      config: the agent.
      settings: text of the value by name of the field, with as much of the path before it as makes it the only one:
        ``num_envs``, ``han.layers``, ``learning_rate``. Numbers of a tuple have an x between them.

    Raises:
      InputError: a field is unknown or not the only one of this name, or a value is not of its kind.
    """
    values = configs.to_dict(config)
    known = dict(leaves(values))
    for given, text in settings.items():
        name = ".".join(configs.OLD_FIELDS.get(part, part) for part in given.split("."))
        found = [path for path in known if f".{path}".endswith(f".{name}")]
        if len(found) != 1:
            reason = "could be any of" if found else "is unknown; choose from"
            raise InputError(f"--set={given}={text}: field {given!r} {reason} {', '.join(found or known)}")
        *tables, field = found[0].split(".")
        table = values
        for each in tables:
            table = table[each]
        table[field] = _parsed(name, text, table[field])
    return configs.from_dict(values)


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the path, with dots, and the value of each field of nested tables."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def _parsed(name: str, text: str, before: Any) -> Any:
    """Returns the value that a text stands for, of the kind of the value before."""
    try:
        if isinstance(before, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(before, tuple | list):
            return tuple(int(number) for number in text.split("x"))
        if isinstance(before, int) or (before is None and text.isdigit()):
            return int(text)
        return float(text) if before is None or isinstance(before, float) else text
    except (KeyError, ValueError):
        shown = tuple(before) if isinstance(before, list) else before
        kind = "number" if before is None else f"value of the kind of {shown!r}"
        raise InputError(f"--set={name}={text}: give a {kind}") from None
