"""A ring of rows that the learner draws from; where it stands is counted outside, see ``learner``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Rows = Any  # a pytree whose leaves share their first axis


def empty(row: Rows, capacity: int) -> Rows:
    """Returns room for ``capacity`` rows like ``row``, which may be abstract."""
    return jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)


def insert(replay: Rows, rows: Rows, at: Array) -> Rows:
    """Writes ``rows`` from index ``at`` on; they must not reach beyond the end."""
    return jax.tree.map(lambda ring, new: lax.dynamic_update_slice_in_dim(ring, new, at, 0), replay, rows)


def rows_at(replay: Rows, index: Array) -> Rows:
    """Returns the rows at ``index`` [B]."""
    return jax.tree.map(lambda ring: ring[index], replay)


def to_half_precision(features: Any) -> Any:
    """Returns features in half precision; what is not a float32 stays as it is."""
    return jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, features)


def to_single_precision(features: Any) -> Any:
    """Returns half-precision features in single precision."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, features)


def num_bytes(replay: Rows) -> int:
    """Returns the size of a ring, also of one that is not allocated yet (``jax.eval_shape``)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(replay))
