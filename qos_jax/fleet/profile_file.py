"""Files of fitted timing: JSON that ``qos-jax fit-profile`` writes. Nothing here imports JAX."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, write_whole
from qos_jax.io.text_files import number_or_nan, read_text, shown
from qos_jax.sim.constants import ATTENTION_TERMS

TIMING_UNITS = {
    "step_base_s": "s",
    "prefill_base_s": "s",
    "prefill_per_token_s": "s/token",
    "per_sequence_s": "s/request",
    "per_kv_token_s": "s/token",
}
PROFILE_VERSION = 2  # of the file; version 1 has no tables
CURVES = ("dense_tokens", "dense_s", "head_requests", "head_s")


def save_profile(path: str, profile: dict[str, Any]) -> None:
    """Writes a profile as JSON; the file appears whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    write_whole(path, json.dumps(profile, indent=2, allow_nan=False) + "\n")


def read_profile(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what is in the file, of which only the version is checked.

    Raises:
      InputError: the file cannot be read, or its version is unknown.
    """
    profile = parse_json(read_text(path), str(path), parse_int=float)
    if not isinstance(profile, dict):
        raise InputError(f"{path}: has no object 'timing', must have one with {', '.join(TIMING_UNITS)}")
    version = profile.get("version", 1.0)
    if version not in (1.0, PROFILE_VERSION):
        raise InputError(f"{path}: version is {version!r}, must be 1 or {PROFILE_VERSION}")
    return profile


def load_profile(path: str | os.PathLike[str]) -> dict[str, float]:
    """Returns the timing coefficients in a file that ``save_profile`` wrote, by field of ``ExpertProfile``.

    Raises:
      InputError: the file cannot be read, or a coefficient is missing, not a finite number, or negative.
    """
    return _numbers(path, "timing", read_profile(path), tuple(TIMING_UNITS))


def load_kernels(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the tables in a file that ``save_profile`` wrote, as lists; ``attention_s`` by name of its terms.

    Raises:
      InputError: the file cannot be read, is of version 1, which has no tables, or a field is missing or illegal.
    """
    profile = read_profile(path)
    kernels: dict[str, Any] = _numbers(path, "kernels", profile, ("host_s", "host_per_sequence_s"))
    for name in CURVES:
        values = profile["kernels"].get(name)
        if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
            raise InputError(f"{path}: kernels.{name} is {shown(str(values))}, must be a list of numbers")
        kernels[name] = values
    kernels["attention_s"] = _numbers(path, "attention_s", profile["kernels"], ATTENTION_TERMS, "kernels.")
    return kernels


def errors_in(profile: dict[str, Any], path: str | os.PathLike[str], form: str) -> tuple[float | None, float | None]:
    """Returns the relative errors to expect of a step and of a prompt; None for one that the file does not give.

    Args:
      profile: what ``read_profile`` returned.
      path: of the file, for messages.
      form: of the timing: tables or hinge.

    Raises:
      InputError: the file says something else where an error may be.
    """
    errors = []
    for kind in ("decode", "prefill"):
        found, place = profile, ""
        for name in ("errors", form, kind):
            found, place = {} if found.get(name) is None else found[name], f"{place}.{name}".lstrip(".")
            if not isinstance(found, dict):
                raise InputError(f"{path}: {place} is {shown(found)}, must be an object")
        error = found.get("mape")
        if error is not None and not number_or_nan(error) >= 0:
            raise InputError(f"{path}: {place}.mape is {shown(error)}, must be a finite number >= 0")
        errors.append(error)
    return errors[0], errors[1]


def source_in(profile: dict[str, Any], path: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the origin of the timing, measured or fitted, and its basis: from what.

    Args:
      profile: what ``read_profile`` returned.
      path: of the file, for messages.

    Raises:
      InputError: one of them is another value.
    """
    origin, basis = profile.get("origin", "measured"), profile.get("basis", "kernels of the pair")
    if origin not in ("measured", "fitted"):
        raise InputError(f"{path}: origin is {shown(origin)}, must be measured or fitted")
    if not isinstance(basis, str):
        raise InputError(f"{path}: basis is {shown(basis)}, must be a text")
    return origin, basis


def _numbers(
    path: str | os.PathLike[str], key: str, within: dict[str, Any], names: Sequence[str], prefix: str = ""
) -> dict[str, float]:
    """Returns the numbers of these names in the object ``within[key]``; each is finite and not negative."""
    values = within.get(key)
    if not isinstance(values, dict):
        raise InputError(f"{path}: has no object '{prefix}{key}', must have one with {', '.join(names)}")
    for name in names:
        value = values.get(name)
        if not isinstance(value, float) or not 0 <= value < math.inf:
            found = f"is {value!r}" if name in values else "is missing"
            raise InputError(f"{path}: {prefix}{key}.{name} {found}, must be a finite number >= 0")
    return {name: values[name] for name in names}
