"""A world whose experts answer immediately: it has no engine, so programs on it compile fast."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qos_jax.agent import AGENTS, Learner, make_learner
from qos_jax.agent.networks import NetworkConfig
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.world import Completions, World, WorldSpec


class InstantEnvironment(Environment):
    """The reward of a decision is the score of the request on the chosen expert."""

    def _serve(
        self, state: EnvState, action: Array, gap_s: Array, params: EnvParams
    ) -> tuple[World, Completions, Array]:
        qos = jnp.append(state.request.score, 0.0)[action]
        zero, none, each = jnp.float32(0), jnp.int32(0), jnp.zeros(self.spec.num_experts)
        answers = Completions(jnp.int32(1), qos, qos, zero, none, each, each, each, none)
        return state.world, answers, action == self.spec.num_experts


def instant_env(num_experts: int = 3) -> InstantEnvironment:
    return InstantEnvironment(WorldSpec(num_experts, EngineSpec(slots=8)))


def small_learner(num_experts: int = 3, **fields: Any) -> Learner:
    """A learner with a few weights on the flat view."""
    fields = {
        "network": NetworkConfig("flat", "arrived", actor=True, with_impact=False, residual=False, hidden=(8,)),
        "num_envs": 4,
        "chunk": 8,
        "updates": 2,
        "batch_size": 16,
        "capacity": 64,
        "warm_up": 4,
    } | fields
    return make_learner(instant_env(num_experts), dataclasses.replace(AGENTS["baseline_rl"], **fields))


def assert_equal(one: Any, other: Any) -> None:
    """Compares two pytrees bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path), strict=True)
