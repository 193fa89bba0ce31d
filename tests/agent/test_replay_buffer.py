"""The replay buffer: order of its rows, replacement of the oldest, and half precision."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.agent import replay_buffer
from qos_jax.agent.targets.counterfactual import CounterfactualTarget
from tests.helpers.decision_processes import View

CAPACITY, ROWS = 6, 2


def row() -> CounterfactualTarget:
    inputs = View(jax.ShapeDtypeStruct((3,), jnp.float16), jax.ShapeDtypeStruct((2,), jnp.bool_))
    return CounterfactualTarget(inputs, jax.ShapeDtypeStruct((), jnp.bool_), jax.ShapeDtypeStruct((2,), jnp.float32))


def rows(number: int) -> CounterfactualTarget:
    """Two rows with the values ``number`` and ``number + 0.5``."""
    value = jnp.array([number, number + 0.5], jnp.float32)[:, None] * jnp.ones(2)
    inputs = View(jnp.full((ROWS, 3), number, jnp.float16), jnp.full((ROWS, 2), number % 2 == 1))
    return CounterfactualTarget(inputs, jnp.ones(ROWS, bool), value)


def filled(count: int) -> CounterfactualTarget:
    ring, insert = replay_buffer.empty(row(), CAPACITY), jax.jit(replay_buffer.insert)
    for i in range(count):
        ring = insert(ring, rows(i + 1), jnp.int32(i * ROWS % CAPACITY))
    return ring


def test_rows_are_in_order_and_the_rest_is_empty() -> None:
    ring = filled(2)
    np.testing.assert_array_equal(ring.value[:, 0], [1, 1.5, 2, 2.5, 0, 0])
    np.testing.assert_array_equal(ring.inputs.columns[:, 2], [1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(ring.inputs.legal[:, 1], [True, True, False, False, False, False])
    chex.assert_trees_all_equal_dtypes(ring, replay_buffer.empty(row(), 1))


def test_a_full_buffer_replaces_the_oldest_rows() -> None:
    np.testing.assert_array_equal(filled(4).value[:, 1], [4, 4.5, 2, 2.5, 3, 3.5])


def test_rows_at_returns_whole_rows_and_may_repeat_them() -> None:
    sampled = replay_buffer.rows_at(filled(3), jnp.array([5, 0, 5]))
    np.testing.assert_array_equal(sampled.value[:, 0], [3.5, 1, 3.5])
    np.testing.assert_array_equal(sampled.inputs.columns[:, 0], [3, 1, 3])


def test_only_single_precision_is_converted_to_half_and_back() -> None:
    features: dict[str, Any] = {
        "float": jnp.array([1.0, 1.0 / 3.0, 5.0]),
        "int": jnp.array([70_000, -1]),
        "bool": jnp.array([True, False]),
    }
    half = replay_buffer.to_half_precision(features)
    assert {name: x.dtype.name for name, x in half.items()} == {"float": "float16", "int": "int32", "bool": "bool"}
    single = replay_buffer.to_single_precision(half)
    chex.assert_trees_all_equal_dtypes(single, features)
    np.testing.assert_allclose(single["float"], features["float"], rtol=1e-3)
    assert single["float"][1] != features["float"][1]
    for name in ("int", "bool"):
        np.testing.assert_array_equal(single[name], features[name])


def test_the_size_is_known_before_anything_is_allocated() -> None:
    abstract = jax.eval_shape(lambda: replay_buffer.empty(row(), 1_000_000))
    assert replay_buffer.num_bytes(abstract) == 1_000_000 * (3 * 2 + 2 * 1 + 1 + 2 * 4)
    assert replay_buffer.num_bytes(filled(1)) == CAPACITY * 17
