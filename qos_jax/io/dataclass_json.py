"""Conversion of frozen dataclasses to plain values for JSON, and back, with one kind of error for illegal values."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qos_jax.errors import InputError
from qos_jax.io.text_files import shown

_MAX_WHOLE = 2**63 - 1  # larger ones have no array, and some no floating-point number

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass, including nested ones, as plain values for JSON."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(default: Config, values: Any, path: str) -> Config:
    """Rebuilds a dataclass from the result of ``to_dict``.

    Args:
      default: an instance; a value must have the type of the instance's value.
      values: a value for each field and no others.
      path: of the values within their file, for messages.

    Raises:
      InputError: a field is unknown, missing or has a wrong type; the message names it by its path.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{path} is {shown(values)}, must be a table of fields")
    fields = {field.name for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    for name in sorted(fields.symmetric_difference(values)):
        raise InputError(f"{path}.{name} is {'unknown' if name in values else 'missing'}")
    rebuilt = {name: _value(getattr(default, name), values[name], f"{path}.{name}") for name in fields}
    return type(default)(**rebuilt)


def check_types(config: Any) -> None:
    """Checks the values of a dataclass of plain fields against their declared types; a list may stand for a tuple.

    Raises:
      InputError: a value has another type.
    """
    for name, declared in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _has_type(value, declared):
            raise InputError(f"{name} is {value!r}, must be {_in_words(declared)}")


def _has_type(value: Any, declared: Any) -> bool:
    inner = get_args(declared)
    if get_origin(declared) is types.UnionType:
        return any(_has_type(value, each) for each in inner)
    if get_origin(declared) is tuple:
        return isinstance(value, tuple | list) and all(_has_type(each, inner[0]) for each in value)
    if isinstance(value, bool):
        return declared is bool
    return isinstance(value, int | float if declared is float else declared)


def _in_words(declared: Any) -> str:
    inner = get_args(declared)
    if get_origin(declared) is types.UnionType:
        return " or ".join(_in_words(each) for each in inner)
    if get_origin(declared) is tuple:
        return f"a tuple, each {_in_words(inner[0])}"
    return {str: "a string", float: "a number", bool: "True or False", types.NoneType: "None"}[declared]


def _check_size(value: Any, path: str) -> None:
    if isinstance(value, int) and abs(value) > _MAX_WHOLE:
        raise InputError(f"{path} is {shown(value)}, must be a number of 64 bits")


def _value(default: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(default):
        return from_dict(default, value, path)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        for index, each in enumerate(value):
            _check_size(each, f"{path}[{index}]")
        return tuple(value)
    _check_size(value, path)
    number = (int, float)
    may_be = (*number, type(None)) if default is None else number if isinstance(default, float) else type(default)
    if not isinstance(value, may_be) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise InputError(f"{path} is {shown(value)}, must be of the kind of {default!r}")
    return value
