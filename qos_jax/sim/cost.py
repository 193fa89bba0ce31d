"""The duration of an iteration, and closed forms for a stretch of iterations with the same batch.

In a decode stretch the same ``B`` requests decode in every iteration, and each iteration adds ``B`` cached tokens.
Iteration ``i`` therefore takes ``alpha + beta i`` seconds, and ``k`` iterations take ``alpha k + beta k (k - 1) / 2``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from qos_jax.sim.types import AnyArray, ExpertProfile

_MAX_KV_TOKENS = 2**30


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
    step_base_s = jnp.asarray(experts.step_base_s)
    prefill, batch, cached = (x.astype(step_base_s.dtype) for x in (prefill_tokens, requests, kv_tokens))
    prefill_s = jnp.where(prefill > 0, experts.prefill_base_s + experts.prefill_per_token_s * prefill, 0.0)
    return jnp.maximum(step_base_s, prefill_s) + experts.per_sequence_s * batch + experts.per_kv_token_s * cached


def iteration_bounds_s(experts: ExpertProfile, block_size: int) -> tuple[Array, Array]:
    """Returns the shortest and the longest duration [N] s that an iteration of each expert can have."""
    one, full = jnp.ones_like(experts.max_running), experts.max_running
    shortest_s = iteration_s(experts, 0 * one, one, 0 * one)
    kv_tokens = max_kv_blocks(experts, block_size) * block_size
    return shortest_s, iteration_s(experts, jnp.asarray(experts.token_budget), full, kv_tokens)


def excess_energy_j(experts: ExpertProfile, busy_s: AnyArray, standby_s: AnyArray) -> AnyArray:
    """Returns the energy [N] J that the experts use beyond ``idle_w`` in seconds of iterations and of standby [N]."""
    return busy_s * (experts.busy_w - experts.idle_w) + standby_s * (experts.standby_w - experts.idle_w)


def stretch_s(first_s: Array, growth_s: Array, iterations: Array) -> Array:
    """Returns the duration [s] of a decode stretch in which iteration i takes ``first_s + growth_s i`` seconds."""
    iterations = iterations.astype(first_s.dtype)
    return first_s * iterations + growth_s * (iterations * (iterations - 1.0) / 2.0)


def iterations_started(first_s: Array, growth_s: Array, duration_s: Array, max_iterations: Array) -> Array:
    """Returns how many iterations of a decode stretch start before ``duration_s`` (> 0), at most ``max_iterations``.

    The count is the root of a quadratic; comparing it with ``stretch_s`` corrects a rounding error of one iteration.
    All arguments and the result have one shape; ``max_iterations`` and the result are int32.
    """
    slope = first_s - growth_s / 2.0
    root = 2.0 * duration_s / (slope + jnp.sqrt(slope**2 + 2.0 * growth_s * duration_s))
    count = jnp.ceil(jnp.minimum(root, max_iterations.astype(root.dtype)))
    count = jnp.where(stretch_s(first_s, growth_s, count - 1.0) >= duration_s, count - 1.0, count)
    count = jnp.where(stretch_s(first_s, growth_s, count) < duration_s, count + 1.0, count)
    return jnp.minimum(count.astype(jnp.int32), max_iterations)


def blocks_of(tokens: Array, block_size: int) -> Array:
    """Returns the number of KV blocks that ``tokens`` take; the last block may be partly filled."""
    return (tokens - 1) // block_size + 1  # a sum with the size of a block could exceed int32


def mean_blocks(tokens: Array, iterations: Array, block_size: int, dtype: Any) -> Array:
    """Returns the mean of ``blocks_of(tokens + i)`` over i = 1 .. iterations, at least 1; in floating point.

    Arguments are int32 of one shape. The sum of these blocks grows with the square of the iterations, and exceeds int32
    at 262,144 of them, so the mean is computed without it.
    """
    held = blocks_of(tokens, block_size)
    beyond = jnp.maximum(iterations - (held * block_size - tokens), 0)  # iterations after the last block is full
    full = beyond // block_size
    beyond, full, held, iterations = (x.astype(dtype) for x in (beyond, full, held, iterations))
    return held + (full + 1.0) * ((beyond - full * (block_size / 2.0)) / iterations)


def max_kv_blocks(experts: ExpertProfile, block_size: int) -> Array:
    """Returns the KV blocks [N] of each expert, at most those of 2^30 tokens, so that tokens in memory fit in int32."""
    return jnp.minimum(jnp.asarray(experts.kv_blocks), _MAX_KV_TOKENS // block_size)


def fits_in_memory(experts: ExpertProfile, tokens: Array, more_tokens: Array | int, block_size: int) -> Array:
    """Returns [N] bool: the KV memory of each expert can hold ``tokens + more_tokens``, two int32 of any size."""
    return more_tokens <= max_kv_blocks(experts, block_size) * block_size - tokens
