"""The text of a law of failures."""

from __future__ import annotations

import jax.numpy as jnp

from qos_jax.errors import InputError
from qos_jax.io.text_files import parse_number
from qos_jax.sim.constants import MAX_SOJOURN_S
from qos_jax.sim.failures import FailureLaw


def check_failures(text: str) -> tuple[float, float]:
    """Returns the mean seconds of ``UP:DOWN``.

    Raises:
      InputError: the text is not of that form, or a number is out of range.
    """
    try:
        up_s, down_s = map(parse_number, text.split(":"))
        if 0 < up_s <= MAX_SOJOURN_S and 0 < down_s <= MAX_SOJOURN_S:
            return up_s, down_s
    except ValueError:
        pass  # raises the same error as numbers out of range
    raise InputError(
        f"failures {text!r} must be UP:DOWN, mean seconds above 0 and up to {MAX_SOJOURN_S:g} that an expert is up and "
        "down in turn, such as 600:30"
    )


def parse_failures(text: str, num_experts: int) -> FailureLaw:
    """Builds the law ``UP:DOWN`` of N experts, for example ``600:30``.

    Raises:
      InputError: see ``check_failures``.
    """
    return FailureLaw(*(jnp.full(num_experts, mean_s, jnp.float32) for mean_s in check_failures(text)))
