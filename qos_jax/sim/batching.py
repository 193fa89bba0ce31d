"""Applies a function to many environments on one device, in the order that suits the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

_CPU_BATCH_SIZE = 16  # environments: few enough that their state stays in cache and that one slow lane delays few


def map_environments(function: Callable[[Any], Any], environments: Any) -> Any:
    """Applies a function of one environment to each environment.

    A CPU processes the environments in equal batches of at most 16; other devices process all of them at once.

    Args:
      function: takes and returns pytrees of one environment.
      environments: pytree with a leading axis [E] on every leaf.

    Returns:
      The results, leaves [E, ...].
    """
    count = jax.tree.leaves(environments)[0].shape[0]
    if jax.default_backend() != "cpu" or count <= _CPU_BATCH_SIZE:
        return jax.vmap(function)(environments)
    batches = -(-count // _CPU_BATCH_SIZE)
    size = -(-count // batches)
    # The last environment fills the last batch: a batch of another size would be compiled as a second program.
    filled = np.minimum(np.arange(batches * size), count - 1)
    if len(filled) > count:
        environments = jax.tree.map(lambda x: x[filled], environments)
    results = lax.map(function, environments, batch_size=size)
    return jax.tree.map(lambda x: x[:count], results)
