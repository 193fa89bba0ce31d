"""The duration of an iteration, and closed forms for a stretch of iterations with the same batch.

In a decode stretch the same ``B`` requests decode in every iteration, and each iteration adds ``B`` cached tokens.
Iteration ``i`` therefore takes ``alpha + beta i`` seconds, and ``k`` iterations take ``alpha k + beta k (k - 1) / 2``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim.types import ATTENTION_TERMS, EARLY_PROMPT_TOKENS, AnyArray, ExpertProfile, IterationTables

_MAX_KV_TOKENS = 2**30


class Batch(struct.PyTreeNode):
    """What one iteration computes, as sums over its requests; those without a default serve every profile."""

    requests: AnyArray  # [N]
    prefill_tokens: AnyArray  # [N] prompt tokens computed
    kv_tokens: AnyArray  # [N] cached tokens of the decoding requests
    decodes: AnyArray = 0  # [N] decoding requests
    prefix_tokens: AnyArray = 0  # [N] tokens of its prompts that are cached already
    pairs: AnyArray = 0.0  # [N] for each of these prompts, tokens computed x (tokens cached + half of those computed)

    @classmethod
    def of_decodes(cls, requests: Array, kv_tokens: Array) -> Batch:
        """Returns the batch in which all ``requests`` [N] decode."""
        return cls(requests, jnp.zeros_like(requests), kv_tokens, requests)


def iteration_s(experts: ExpertProfile, batch: Batch) -> Array:
    """Returns the duration [N] s of one iteration of each expert; fields of the profile are [N] or [].

    With ``experts.kernels`` all fields of the batch count, else only those without a default.
    """
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(experts.step_base_s).dtype), batch)
    if experts.kernels is not None:
        return _tabulated_s(experts.kernels, batch)
    prefill_s = experts.prefill_base_s + experts.prefill_per_token_s * batch.prefill_tokens
    step_s = jnp.maximum(experts.step_base_s, jnp.where(batch.prefill_tokens > 0, prefill_s, 0.0))
    return step_s + experts.per_sequence_s * batch.requests + experts.per_kv_token_s * batch.kv_tokens


def _tabulated_s(kernels: IterationTables, batch: Batch) -> Array:
    dense_s = _interpolated(kernels.dense_tokens, kernels.dense_s, batch.prefill_tokens + batch.decodes)
    head_s = _interpolated(kernels.head_requests, kernels.head_s, batch.requests)
    attention_s = jnp.sum(kernels.attention_s * attention_terms(batch), -1)
    return dense_s + head_s + attention_s + kernels.host_s + kernels.host_per_sequence_s * batch.requests


def attention_terms(batch: Batch) -> Array:
    """Returns what multiplies the coefficients of ``ATTENTION_TERMS``, [N, 12]; fields of the batch are floats [N]."""
    decodes, kv_tokens, prefill_tokens = batch.decodes, batch.kv_tokens, batch.prefill_tokens
    some_decode, some_prefill = decodes > 0, prefill_tokens > 0
    mixed = some_decode & some_prefill
    terms = {
        "decode": ~some_prefill,
        "decode_per_request": jnp.where(mixed, 0.0, decodes),
        "decode_per_kv_token": jnp.where(mixed, 0.0, kv_tokens),
        "prompt": some_prefill & ~mixed,
        "mixed": mixed & (batch.prefix_tokens <= 0),
        "mixed_chunked": mixed & (batch.prefix_tokens > 0),
        "mixed_per_request": jnp.where(mixed, decodes, 0.0),
        "mixed_per_kv_token": jnp.where(mixed, kv_tokens, 0.0),
        "per_early_prompt_token": jnp.minimum(prefill_tokens, EARLY_PROMPT_TOKENS),
        "per_late_prompt_token": jnp.maximum(prefill_tokens - EARLY_PROMPT_TOKENS, 0.0),
        "per_pair": batch.pairs,
        "per_prefix_token": batch.prefix_tokens,
    }
    shape, dtype = jnp.shape(prefill_tokens), jnp.result_type(prefill_tokens)
    return jnp.stack([jnp.broadcast_to(terms[name], shape).astype(dtype) for name in ATTENTION_TERMS], -1)


def _interpolated(knots: AnyArray, values: AnyArray, at: Array) -> Array:
    """Returns the piecewise linear function through ``values`` [N, K] at ``knots`` [N, K], evaluated ``at`` [N].

    A sum over the pieces; on many lanes this is much faster than to look up the piece of each.
    """
    width = jnp.diff(knots, axis=-1)
    slope = jnp.diff(values, axis=-1) / width
    width = width.at[..., -1].set(jnp.inf)
    return values[..., 0] + jnp.sum(slope * jnp.clip(at[..., None] - knots[..., :-1], 0.0, width), -1)


def decode_s(experts: ExpertProfile, requests: Array, kv_tokens: Array) -> tuple[Array, Array]:
    """Returns the duration [N] s of an iteration of only ``requests`` [N] that decode, and what the next takes more."""
    first_s = iteration_s(experts, Batch.of_decodes(requests, kv_tokens))
    per_kv_token_s = experts.per_kv_token_s
    if experts.kernels is not None:
        per_kv_token_s = experts.kernels.attention_s[..., ATTENTION_TERMS.index("decode_per_kv_token")]
    return first_s, per_kv_token_s * requests.astype(first_s.dtype)


def longest_iteration_s(experts: ExpertProfile, requests: Array, kv_tokens: Array) -> Array:
    """Returns what no iteration [N] s of at most ``requests`` [N] with ``kv_tokens`` [N] cached tokens exceeds."""
    budget = jnp.asarray(experts.token_budget)
    if experts.kernels is None:
        return iteration_s(experts, Batch(requests, budget, kv_tokens))
    kernels, dtype = experts.kernels, jnp.asarray(experts.step_base_s).dtype
    requests, budget, kv_tokens = (jnp.asarray(x, dtype) for x in (requests, budget, kv_tokens))
    dense_s, head_s = (
        jnp.maximum(jnp.max(values, -1), _interpolated(knots, values, at))  # a table may fall between two knots
        for knots, values, at in (
            (kernels.dense_tokens, kernels.dense_s, budget),
            (kernels.head_requests, kernels.head_s, requests),
        )
    )
    largest = Batch(requests, budget, kv_tokens, requests, kv_tokens, budget * (kv_tokens + budget / 2))
    one_sided = ({"prefix_tokens": 0 * kv_tokens}, {"decodes": 0 * requests}, {"prefill_tokens": 0 * budget})
    terms = [attention_terms(largest.replace(**fields)) for fields in ({}, *one_sided)]
    attention_s = jnp.sum(kernels.attention_s * functools.reduce(jnp.maximum, terms), -1)
    return dense_s + head_s + attention_s + kernels.host_s + kernels.host_per_sequence_s * requests


def iteration_bounds_s(experts: ExpertProfile, block_size: int) -> tuple[Array, Array]:
    """Returns the shortest and the longest duration [N] s that an iteration of each expert can have.

    The shortest is that of one request with an empty cache; the longest is an upper bound.
    """
    one = jnp.ones_like(experts.max_running)
    kv_tokens = max_kv_blocks(experts, block_size) * block_size
    shortest_s, _ = decode_s(experts, one, 0 * one)
    return shortest_s, longest_iteration_s(experts, experts.max_running, kv_tokens)


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
