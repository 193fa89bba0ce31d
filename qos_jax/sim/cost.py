"""How long iterations take, and the closed forms over stretches of equal batches.

A decode stretch is a run of iterations with the same ``B`` requests, all decoding, so that each adds ``B`` cached
tokens to the next: iteration ``i`` takes ``alpha + beta i`` seconds, and ``k`` of them ``alpha k + beta k (k - 1) /
2``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qos_jax.sim.types import ExpertProfile


def iteration_s(experts: ExpertProfile, prefill_tokens: Array, requests: Array, kv_tokens: Array) -> Array:
    """Returns the duration [s] of one iteration; all arguments have the shape of the experts, counts as integers."""
    prefill_s = jnp.where(
        prefill_tokens > 0, experts.prefill_base_s + experts.prefill_per_token_s * prefill_tokens, 0.0
    )
    step_s = jnp.maximum(experts.step_base_s, prefill_s)
    return step_s + experts.per_sequence_s * requests + experts.per_kv_token_s * kv_tokens


def stretch_s(first_s: Array, growth_s: Array, iterations: Array) -> Array:
    """Returns the duration [s] of a decode stretch whose iteration i takes ``first_s + growth_s i``."""
    return first_s * iterations + growth_s * (iterations * (iterations - 1.0) / 2.0)


def iterations_started(first_s: Array, growth_s: Array, duration_s: Array, most: Array) -> Array:
    """Returns how many iterations of a decode stretch start before ``duration_s`` (> 0), ``most`` (int32) at most.

    The root of the quadratic is exact but for rounding; one step of correction against ``stretch_s`` removes that.
    """
    slope = first_s - growth_s / 2.0
    root = 2.0 * duration_s / (slope + jnp.sqrt(slope**2 + 2.0 * growth_s * duration_s))
    count = jnp.ceil(jnp.minimum(root, most))
    count = jnp.where(stretch_s(first_s, growth_s, count - 1.0) >= duration_s, count - 1.0, count)
    count = jnp.where(stretch_s(first_s, growth_s, count) < duration_s, count + 1.0, count)
    return jnp.minimum(count.astype(jnp.int32), most)


def blocks_of(tokens: Array, block_size: int) -> Array:
    """Returns the KV blocks that so many tokens fill, the last one perhaps in part."""
    return (tokens + (block_size - 1)) // block_size


def blocks_summed(tokens: Array, block_size: int) -> Array:
    """Returns the sum of ``blocks_of(t)`` over t = 1 .. tokens."""
    full = tokens // block_size
    return block_size * (full * (full + 1) // 2) + (full + 1) * (tokens - block_size * full)
