"""Spaces of actions and observations, with the names and methods of gymnax 1.0.

gymnax's wrappers check spaces with ``isinstance``. ``space_class`` therefore returns gymnax's own class once a program
has imported gymnax, and the class below otherwise, so that qos_jax does not depend on gymnax.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers from 0 to n - 1."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample: none."""
        return ()

    @property
    def dtype(self) -> Any:
        """Type of a sample."""
        return jnp.dtype(jnp.int32)

    def sample(self, key: Array) -> Array:
        """Returns a uniformly random member [] int32."""
        return jax.random.randint(key, (), 0, self.n)

    def contains(self, x: Any) -> Array:
        """Returns whether ``x`` is a member, [] bool."""
        x = jnp.asarray(x)
        return (x >= 0) & (x < self.n)


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays of one shape and type, each element between ``low`` and ``high``."""

    low: float
    high: float
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def sample(self, key: Array) -> Array:
        """Returns a uniformly random member; NaN where the bounds are infinite."""
        return jax.random.uniform(key, self.shape, minval=self.low, maxval=self.high).astype(self.dtype)

    def contains(self, x: Any) -> Array:
        """Returns whether all elements of ``x`` are within the bounds, [] bool."""
        x = jnp.asarray(x)
        return jnp.all((x >= self.low) & (x <= self.high))


@dataclasses.dataclass(frozen=True)
class Dict:
    """Structs with one space for each named field; spaces may be nested."""

    spaces: dict[str, Any]

    def sample(self, key: Array) -> dict[str, Any]:
        """Returns a random member of each space, by name."""
        keys = jax.random.split(key, len(self.spaces))
        return {name: space.sample(key) for key, (name, space) in zip(keys, self.spaces.items(), strict=True)}

    def contains(self, x: Any) -> Array:
        """Returns whether every field of the struct ``x`` is in its space, [] bool."""
        return jnp.all(jnp.stack([space.contains(getattr(x, name)) for name, space in self.spaces.items()]))


def space_class(own: type) -> Any:
    """Returns gymnax's class of the name of ``own`` where gymnax has been imported, else ``own``."""
    return getattr(sys.modules.get("gymnax.environments.spaces"), own.__name__, own)


def space_of(x: Any) -> Any:
    """Returns the space of a pytree of structs: a ``Dict`` of each struct, and a ``Box`` of each array; None has none.

    Args:
      x: arrays or ``jax.ShapeDtypeStruct``s. Booleans are bounded by 0 and 1, other numbers by their type.
    """
    if not hasattr(x, "dtype"):
        return space_class(Dict)({name: space_of(value) for name, value in vars(x).items() if value is not None})
    low, high = -jnp.inf, jnp.inf
    if x.dtype == bool:
        low, high = 0, 1
    elif jnp.issubdtype(x.dtype, jnp.integer):
        low, high = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
    return space_class(Box)(low, high, x.shape, x.dtype)
