"""Ranges of the numbers of arrival processes, and their check."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from qos_jax.errors import InputError

RATE_RANGE_PER_S = (1e-6, 1e6)


def check_within(name: str, value: ArrayLike, low: float, high: float) -> None:
    """Checks one or more numbers.

    Raises:
        InputError: one of them is below ``low``, above ``high`` or not a number.
    """
    if not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
        raise InputError(f"{name} must lie in [{low:g}, {high:g}], got {value}")


def checked_rate(rate_per_s: ArrayLike, dtype: DTypeLike) -> Array:
    """Returns a mean rate [requests/s] as a JAX array of this type.

    Raises:
        InputError: the rate is outside ``RATE_RANGE_PER_S``; a traced rate is not checked.
    """
    if not isinstance(rate_per_s, jax.core.Tracer):
        check_within("rate_per_s", rate_per_s, *RATE_RANGE_PER_S)
    return jnp.asarray(rate_per_s, dtype)
