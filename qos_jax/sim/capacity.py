"""The saturation rate of a fleet: the rate at which it finishes requests while every expert has some waiting."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import replay
from qos_jax.sim.sessions import contexts_of
from qos_jax.sim.types import Request, RequestTrace, Workload
from qos_jax.sim.validation import MAX_SEED, checked_experts, checked_whole


@partial(jax.jit, static_argnums=2)
def sample_requests(workload: Workload, key: Array, num_requests: int) -> tuple[Array, Request]:
    """Samples requests from a workload.

    Args:
      workload: to sample from.
      key: random key.
      num_requests: J.

    Returns:
      The gap before each request [J] s, and the requests, leaves [J, ...].
    """
    key_init, key_next = jax.random.split(key)

    def sample(state: Any, key: Array) -> tuple[Any, tuple[Array, Request]]:
        gap_s, request, state = workload.next(key, state)
        return state, (gap_s, request)

    return lax.scan(sample, workload.init(key_init), jax.random.split(key_next, num_requests))[1]


def saturation_rate(env: Environment, params: EnvParams, *, requests_per_expert: int = 4000, seed: int = 0) -> float:
    """Returns the saturation rate of the fleet [requests/s], the sum of ``saturation_rates``.

    Of LLMs that share a card, the fastest counts. At load rho, requests arrive at rho times this rate.
    """
    rates = saturation_rates(env, params, requests_per_expert=requests_per_expert, seed=seed)
    if params.experts.cards is None:
        return sum(rates)
    number = np.asarray(params.experts.cards.number)
    return sum(float(np.max(rates, where=number == card, initial=0.0)) for card in np.unique(number))


def saturation_rates(
    env: Environment, params: EnvParams, *, requests_per_expert: int = 4000, seed: int = 0
) -> list[float]:
    """Returns the rate at which each expert finishes requests while its queue is never empty.

    The rates are measured by simulation, of each as if it had its card alone. Each expert is offered requests at twice
    the rate that it could finish without prefill and KV reads, and drops those for which its queue has no place. The
    middle 80 % of its completions give its rate. Sessions stay with one expert each, which finds their whole context in
    its cache.

    Args:
      env: gives the number of experts and the engine's integers.
      params: gives the experts and the workload; its arrival rate is not used.
      requests_per_expert: requests offered to each expert.
      seed: of the sampled requests.

    Returns:
      N rates [requests/s].

    Raises:
      InputError: the profile is not legal, or a number is out of range.
    """
    num_experts = env.spec.num_experts
    requests_per_expert = checked_whole("requests_per_expert", requests_per_expert, 2)
    seed = checked_whole("seed", seed, 0, MAX_SEED)
    experts = checked_experts(params.experts.replace(cards=None))
    count = requests_per_expert * num_experts
    _, requests = sample_requests(params.workload, jax.random.key(seed), count)
    output_tokens = np.asarray(requests.output_tokens)
    min_service_s = (experts.step_base_s / experts.max_running + experts.per_sequence_s) * output_tokens.mean(0)

    arrival_s = (np.arange(requests_per_expert)[:, None] * min_service_s / 2.0).ravel()
    order = np.argsort(arrival_s, kind="stable")
    assignment = (np.arange(count) % num_experts)[order]
    prompt_tokens, contexts = np.asarray(requests.prompt_tokens), np.zeros(count, np.int64)
    if requests.turn is not None:
        contexts = contexts_of(jax.tree.map(np.asarray, requests.turn), prompt_tokens, output_tokens, assignment)
    trace = RequestTrace(arrival_s[order], prompt_tokens + contexts, output_tokens, shared_tokens=contexts)
    log = replay(experts, trace, assignment, block_size=env.spec.engine.block_size)
    return [_middle_rate(log.finish_s[assignment == expert]) for expert in range(num_experts)]


def _middle_rate(finish_s: np.ndarray) -> float:
    """Returns the rate [1/s] of the middle 80 % of completions; NaN times are dropped requests."""
    finish_s = np.sort(finish_s[np.isfinite(finish_s)])
    first, last = int(0.1 * len(finish_s)), int(0.9 * len(finish_s))
    return (last - first) / float(finish_s[last] - finish_s[first])
