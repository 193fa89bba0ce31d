"""How many requests a fleet can serve, found by simulating it with work always at hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import replay
from qos_jax.sim.types import Request, RequestTrace, Workload
from qos_jax.sim.validation import checked_experts


@partial(jax.jit, static_argnums=2)
def sample_requests(workload: Workload, key: Array, num_requests: int) -> tuple[Array, Request]:
    """Draws requests from a workload: gaps [J] s and the requests, leaves [J, ...]."""
    key_init, key_next = jax.random.split(key)

    def draw(state: Any, key: Array) -> tuple[Any, tuple[Array, Request]]:
        gap_s, request, state = workload.next(key, state)
        return state, (gap_s, request)

    return lax.scan(draw, workload.init(key_init), jax.random.split(key_next, num_requests))[1]


def saturation_rate(env: Environment, params: EnvParams, *, requests_per_expert: int = 4000, seed: int = 0) -> float:
    """Returns the rate [requests/s] at which the fleet finishes requests when every expert always has some waiting.

    It is the sum of ``saturation_rates``. A load rho means arrivals at rho times this rate.
    """
    return sum(saturation_rates(env, params, requests_per_expert=requests_per_expert, seed=seed))


def saturation_rates(
    env: Environment, params: EnvParams, *, requests_per_expert: int = 4000, seed: int = 0
) -> list[float]:
    """Returns the rate [requests/s] at which each expert finishes requests when it always has some waiting.

    Measured by simulation: each expert is offered its share of the workload at twice the rate that it could finish
    without prefill and KV reads, and drops what its queue does not hold; the middle 80 % of its completions give its
    rate.
    """
    num_experts = env.spec.num_experts
    experts = checked_experts(params.experts)
    count = requests_per_expert * num_experts
    _, requests = sample_requests(params.workload, jax.random.key(seed), count)
    output_tokens = np.asarray(requests.output_tokens)
    fastest_s = (experts.step_base_s / experts.max_running + experts.per_sequence_s) * output_tokens.mean(0)

    arrival_s = (np.arange(requests_per_expert)[:, None] * fastest_s / 2.0).ravel()
    order = np.argsort(arrival_s, kind="stable")
    assignment = (np.arange(count) % num_experts)[order]
    trace = RequestTrace(arrival_s[order], np.asarray(requests.prompt_tokens), output_tokens)
    spec = env.spec.engine
    log = replay(experts, trace, assignment, token_budget=spec.token_budget, block_size=spec.block_size)
    return [_middle_rate(log.finish_s[assignment == expert]) for expert in range(num_experts)]


def _middle_rate(finish_s: np.ndarray) -> float:
    finish_s = np.sort(finish_s[np.isfinite(finish_s)])
    first, last = int(0.1 * len(finish_s)), int(0.9 * len(finish_s))
    return (last - first) / float(finish_s[last] - finish_s[first])
