"""The duration of an iteration, and closed forms for a stretch of iterations with the same batch.

In a decode stretch the same ``B`` requests decode in every iteration, and each iteration adds ``B`` cached tokens.
Iteration ``i`` therefore takes ``alpha + beta i`` seconds, and ``k`` iterations take ``alpha k + beta k (k - 1) / 2``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qos_jax.sim.types import ExpertProfile


def iteration_s(experts: ExpertProfile, prefill_tokens: Array, requests: Array, kv_tokens: Array) -> Array:
    """Returns the duration of one iteration of each expert.

    Args:
      experts: profile of the experts, fields [N] or [].
      prefill_tokens: [N] int, prompt tokens computed in the iteration.
      requests: [N] int, requests in the batch.
      kv_tokens: [N] int, cached tokens of the decoding requests.

    Returns:
      [N] s.
    """
    prefill_s = jnp.where(
        prefill_tokens > 0, experts.prefill_base_s + experts.prefill_per_token_s * prefill_tokens, 0.0
    )
    step_s = jnp.maximum(experts.step_base_s, prefill_s)
    return step_s + experts.per_sequence_s * requests + experts.per_kv_token_s * kv_tokens


def iteration_bounds_s(experts: ExpertProfile, token_budget: int, block_size: int) -> tuple[Array, Array]:
    """Returns the shortest and the longest duration [N] s that an iteration of each expert can have."""
    one, full = jnp.ones_like(experts.max_running), experts.max_running
    shortest_s = iteration_s(experts, 0 * one, one, 0 * one)
    return shortest_s, iteration_s(experts, token_budget * one, full, experts.kv_blocks * block_size)


def stretch_s(first_s: Array, growth_s: Array, iterations: Array) -> Array:
    """Returns the duration [s] of a decode stretch in which iteration i takes ``first_s + growth_s i`` seconds."""
    return first_s * iterations + growth_s * (iterations * (iterations - 1.0) / 2.0)


def iterations_started(first_s: Array, growth_s: Array, duration_s: Array, max_iterations: Array) -> Array:
    """Returns how many iterations of a decode stretch start before ``duration_s`` (> 0), at most ``max_iterations``.

    The count is the root of a quadratic; comparing it with ``stretch_s`` corrects a rounding error of one iteration.
    All arguments and the result have one shape; ``max_iterations`` and the result are int32.
    """
    slope = first_s - growth_s / 2.0
    root = 2.0 * duration_s / (slope + jnp.sqrt(slope**2 + 2.0 * growth_s * duration_s))
    count = jnp.ceil(jnp.minimum(root, max_iterations))
    count = jnp.where(stretch_s(first_s, growth_s, count - 1.0) >= duration_s, count - 1.0, count)
    count = jnp.where(stretch_s(first_s, growth_s, count) < duration_s, count + 1.0, count)
    return jnp.minimum(count.astype(jnp.int32), max_iterations)


def blocks_of(tokens: Array, block_size: int) -> Array:
    """Returns the number of KV blocks that ``tokens`` take; the last block may be partly filled."""
    return (tokens + (block_size - 1)) // block_size


def blocks_summed(tokens: Array, block_size: int) -> Array:
    """Returns the sum of ``blocks_of(t)`` over t = 1 .. tokens."""
    full = tokens // block_size
    return block_size * (full * (full + 1) // 2) + (full + 1) * (tokens - block_size * full)
