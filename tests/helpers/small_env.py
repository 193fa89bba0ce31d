"""A small world for tests of the environment: a few experts, and requests from simple independent distributions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax import ExpertProfile, Request
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.world import WorldSpec


@struct.dataclass
class SmallWorkload:
    """Poisson arrivals of short requests; its state counts them."""

    rate_per_s: Array
    latency_limit_s: Array
    quality: Array  # [N] the largest score of each expert
    order: Array  # [N] int32: expert n has the answer number order[n] of the sampled ones

    def init(self, key: Array) -> Array:
        return jnp.int32(0)

    def next(self, key: Array, state: Array) -> tuple[Array, Request, Array]:
        gap_key, prompt_key, output_key, score_key = jax.random.split(key, 4)
        output_tokens = jax.random.randint(output_key, self.order.shape, 1, 60)[self.order]
        score = (self.quality * jax.random.uniform(score_key, self.order.shape, minval=0.5))[self.order]
        request = Request(
            prompt_tokens=jax.random.randint(prompt_key, (), 1, 120),
            output_tokens=output_tokens,
            score=score,
            latency_limit_s=self.latency_limit_s,
            predicted_score=0.9 * score,
            predicted_tokens=1.1 * output_tokens.astype(score.dtype),
        )
        return jax.random.exponential(gap_key) / self.rate_per_s, request, state + 1


def small_experts(num_experts: int = 3, **fields: Any) -> ExpertProfile:
    """Experts of which each is slower than the one before."""
    slower = 1.0 + 0.3 * np.arange(num_experts)
    fields = {
        "step_base_s": 0.02 * slower,
        "prefill_base_s": 0.01 * slower,
        "prefill_per_token_s": 1e-4 * slower,
        "per_sequence_s": 1e-3 * slower,
        "per_kv_token_s": 1e-6 * slower,
        "kv_blocks": 40,
        "max_running": 4,
        "max_waiting": 3,
        "network_s": 0.01,
    } | fields
    return jax.tree.map(lambda x: jnp.asarray(np.broadcast_to(x, num_experts)), ExpertProfile(**fields))


def small_params(
    num_experts: int = 3,
    *,
    rate_per_s: float = 6.0,
    latency_limit_s: float = 0.05,
    max_steps_in_episode: int = 1000,
    staleness_s: float = 0.0,
    **fields: Any,
) -> EnvParams:
    workload = SmallWorkload(rate_per_s, latency_limit_s, np.linspace(0.4, 0.9, num_experts), np.arange(num_experts))
    params = EnvParams(small_experts(num_experts, **fields), workload, max_steps_in_episode, staleness_s)
    return jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), params)  # without weak types


def small_env(num_experts: int = 3, *, slots: int = 16, check: bool = False, **spec: Any) -> Environment:
    return Environment(WorldSpec(num_experts, EngineSpec(slots), **spec), check=check)
