"""The search for the largest rate within the limits, against queueing theory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from qos_jax import InputError, Request, make_router
from qos_jax.evaluation.capacity import capacities
from qos_jax.sim.env import EnvParams
from tests.helpers.small_env import SmallWorkload, small_env, small_experts

SERVICE_S = 2.0  # of each request


@struct.dataclass
class OneAtATime(SmallWorkload):
    """Poisson arrivals of equal requests, which must end within twice their service."""

    def next(self, key: jax.Array, state: Any) -> tuple[jax.Array, Request, Any]:
        gap_s, request, state = super().next(key, state)
        tokens = jnp.full(1, 20, jnp.int32)
        limit_s = jnp.float32(2 * SERVICE_S * (1 + 1e-4) / 20)
        request = request.replace(output_tokens=tokens, prompt_tokens=jnp.int32(1), latency_limit_s=limit_s)
        return gap_s, request, state

    def with_rate(self, rate_per_s: Any) -> OneAtATime:
        return dataclasses.replace(self, rate_per_s=rate_per_s)


def one_at_a_time() -> EnvParams:
    step_s = SERVICE_S / 20
    experts = small_experts(
        1, step_base_s=step_s, prefill_base_s=0.0, prefill_per_token_s=0.0, per_sequence_s=0.0, per_kv_token_s=0.0,
        network_s=0.0, max_running=1, max_waiting=14,
    )  # fmt: skip
    workload = OneAtATime(jnp.float32(0.1), jnp.float32(1.0), jnp.ones(1), jnp.arange(1))
    return EnvParams(experts, workload, 1000, jnp.float32(0.0), saturation_per_s=1 / SERVICE_S)


@pytest.mark.slow
def test_it_is_that_of_a_queue_with_constant_service() -> None:
    """In an M/D/1 queue the wait is at most one service with probability (1 - rho) exp(rho)."""
    env, params = small_env(1), one_at_a_time()
    routers = [make_router("round_robin", env, params)]
    (found,) = capacities(env, params, routers, range(1000, 1016), 2000, share=0.95, warmup=100)
    low, high = 0.0, 1.0
    for _ in range(50):
        rho = (low + high) / 2
        low, high = (rho, high) if (1 - rho) * math.exp(rho) > 0.95 else (low, rho)
    mean, half = found.interval["mean"], found.interval["high"] - found.interval["mean"]
    assert abs(mean - low / SERVICE_S) < 1.6 * half  # the interval of 99.7 %
    assert half < 0.05 * mean
    assert found.good_per_s == pytest.approx(0.95 * mean, rel=0.01)


@pytest.mark.slow
def test_where_no_rate_is_low_enough_it_is_0() -> None:
    env, params = small_env(1), one_at_a_time()
    params = params.replace(experts=params.experts.replace(network_s=jnp.full(1, 10.0)))
    (found,) = capacities(env, params, [make_router("round_robin", env, params)], [1000, 1001], 3000)
    assert not np.any(found.rates_per_s)
    assert math.isnan(found.metrics["qos"])


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_a_share_that_cannot_be_met_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"share is .*, must be a number between 0 and 1"):
        capacities(small_env(1), one_at_a_time(), [], [0], 10, share=share)
