"""Closed forms of a decode stretch against sums over its iterations, up to the largest numbers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qos_jax.sim.cost import (
    Batch,
    blocks_of,
    decode_s,
    fits_in_memory,
    iteration_s,
    longest_iteration_s,
    max_kv_blocks,
    mean_blocks,
)
from qos_jax.sim.types import ExpertProfile
from qos_jax.sim.validation import checked_experts
from tests.helpers.workloads import KINDS, NUM_EXPERTS, profile

MOST = 2**31 - 1


@given(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from([1, 2, 7, 16, 1024]))
def test_the_mean_of_the_blocks_held_in_a_stretch(tokens: int, iterations: int, block_size: int) -> None:
    expected = np.mean([-(-(tokens + i) // block_size) for i in range(1, iterations + 1)])
    mean = mean_blocks(jnp.int32(tokens), jnp.int32(iterations), block_size, jnp.float32)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


@pytest.mark.parametrize("block_size", [1, 16, 2**24])
def test_the_mean_of_a_stretch_of_half_a_billion_iterations(block_size: int) -> None:
    tokens, iterations = 2**29, 2**29
    with jax.enable_x64(True):
        mean = mean_blocks(jnp.int32(tokens), jnp.int32(iterations), block_size, jnp.float64)
    full = iterations // block_size  # the first block is full, so each further one is held for as long as the others
    assert float(mean) == tokens // block_size + (full + 1) / 2


@given(st.integers(0, MOST), st.sampled_from([1, 16, 2**24]))
def test_blocks_of_any_number_of_tokens(tokens: int, block_size: int) -> None:
    assert int(blocks_of(jnp.int32(tokens), block_size)) == -(-tokens // block_size)


@given(st.integers(1, MOST), st.integers(1, MOST), st.integers(1, 2**30 // 16))
def test_what_fits_in_memory(prompt_tokens: int, output_tokens: int, kv_blocks: int) -> None:
    experts = profile(step_base_s=0.01, kv_blocks=np.int32(kv_blocks))
    fits = fits_in_memory(experts, jnp.int32(prompt_tokens), jnp.int32(output_tokens), 16)
    assert bool(fits[0]) == (-(-(prompt_tokens + output_tokens) // 16) <= kv_blocks)


def test_memory_beyond_the_largest_counts_as_the_largest() -> None:
    experts = profile(step_base_s=0.01, kv_blocks=np.array([100, 2**26, 10**9], np.int32))
    assert max_kv_blocks(experts, 16).tolist() == [100, 2**26, 2**26]


stretch_s, longest_of = jax.jit(decode_s), jax.jit(longest_iteration_s)
times_s = jax.jit(jax.vmap(iteration_s, in_axes=(None, 0)))  # of many batches


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0))
def decoding_s(experts: ExpertProfile, requests: jax.Array, kv_tokens: jax.Array) -> jax.Array:
    return iteration_s(experts, Batch.of_decodes(requests, kv_tokens))


def with_tables(seed: int) -> ExpertProfile:
    return jax.tree.map(jnp.asarray, checked_experts(KINDS["measured"](np.random.default_rng(seed)).experts))


@pytest.mark.parametrize("seed", range(3))
def test_a_decode_stretch_on_tables_grows_by_the_same_time_in_each_iteration(seed: int) -> None:
    with jax.enable_x64(True):
        experts = with_tables(seed)
        requests, kv_tokens = jnp.array([1, 7, 40]), jnp.array([5, 900, 3000])
        first_s, growth_s = stretch_s(experts, requests, kv_tokens)
        iterations = np.array([[1], [10]])
        found_s = decoding_s(experts, requests, kv_tokens + iterations * requests)
        np.testing.assert_allclose(found_s, first_s + iterations * growth_s, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_no_iteration_on_tables_exceeds_the_longest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget, requests, kv_tokens = 500, 16, 4000
    with jax.enable_x64(True):
        experts = with_tables(seed).replace(token_budget=jnp.full(NUM_EXPERTS, budget))
        most = jnp.full(NUM_EXPERTS, requests), jnp.full(NUM_EXPERTS, kv_tokens)
        longest_s = longest_of(experts, *most)
        of_prompt, of_decodes, of_cached, of_prefix = rng.choice([0.0, 0.5, 1.0], (4, 200, 1)) * np.ones(NUM_EXPERTS)
        decodes = np.floor(of_decodes * (requests - 1))
        prompt = np.floor(of_prompt * (budget - decodes))
        prefix = np.floor(of_prefix * kv_tokens) * (prompt > 0)
        cached = np.floor(of_cached * (kv_tokens - prefix)) * (decodes > 0)
        pairs = prompt * (prefix + prompt / 2)
        batches = Batch(decodes + (prompt > 0), prompt, cached, decodes, prefix, pairs)
        assert (times_s(experts, batches) <= longest_s * (1 + 1e-12)).all()
