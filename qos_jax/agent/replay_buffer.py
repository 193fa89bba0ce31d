"""A replay buffer: a ring of rows, as pure functions; the learner counts where the next row goes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Rows = Any  # a pytree whose leaves have the same first axis


def empty(row: Rows, capacity: int) -> Rows:
    """Returns an empty buffer of ``capacity`` rows with the shapes and types of ``row``, which may be abstract."""
    return jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)


def insert(buffer: Rows, rows: Rows, start: Array) -> Rows:
    """Writes ``rows`` from index ``start`` [] on; they must not extend beyond the end of the buffer."""

    def put(ring: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), start, 0)

    return jax.tree.map(put, buffer, rows)


def rows_at(buffer: Rows, index: Array) -> Rows:
    """Returns the rows at ``index`` [B]."""
    return jax.tree.map(lambda ring: ring[index], buffer)


def to_half_precision(features: Any) -> Any:
    """Returns features with float32 arrays converted to float16."""
    return jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, features)


def to_single_precision(features: Any) -> Any:
    """Returns features with float16 arrays converted to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, features)


def num_bytes(buffer: Rows) -> int:
    """Returns the size of a buffer, also of an abstract one (``jax.eval_shape``)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))
