"""Heuristic routers, from uniformly random to the paper's baselines; a tie is broken at random.

They compare experts by requests, predicted tokens, KV memory, predicted latency or predicted scores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.impact.estimate import impact
from qos_jax.routers.base import Router, best_legal, by_value, key_for_ties
from qos_jax.sim.types import RATE_WINDOWS_S, Observation

_WINDOW = 1  # of RATE_WINDOWS_S: gaps up to 150 s follow from its rate in single precision
_MOST_SENT = 64  # requests remembered, as many as worlds keep snapshots by default


def num_requests(obs: Observation) -> Array:
    """Returns the number of requests [N] on each expert, running and waiting."""
    return obs.experts.running + obs.experts.waiting


def predicted_work_tokens(obs: Observation) -> Array:
    """Returns the predicted remaining work [N] of each expert: prompt tokens to compute plus tokens to generate."""
    requests = obs.requests
    as_predicted = partial(jnp.asarray, dtype=requests.predicted_tokens.dtype)
    to_compute = as_predicted(requests.prompt_tokens + requests.generated_tokens - requests.computed_tokens)
    to_generate = requests.predicted_tokens - as_predicted(requests.generated_tokens)
    return jnp.sum(jnp.where(requests.running | requests.waiting, to_compute + to_generate, 0.0), -1)


def kv_share(obs: Observation) -> Array:
    """Returns the share [N] of each expert's KV memory that is in use."""
    return obs.experts.kv_used_blocks / obs.experts.profile.kv_blocks


def random() -> Router:
    """Takes a uniformly random legal expert."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        return best_legal(key_for_ties(key), obs, _uniform(key, obs)), memory

    return Router("random", "heuristic", tuple, act)


def round_robin() -> Router:
    """Takes the experts in turn and skips those that are full."""

    def act(key: Array, obs: Observation, turn: Array) -> tuple[Array, Array]:
        num_experts = obs.action_mask.shape[0] - 1
        chosen = best_legal(key, obs, -((jnp.arange(num_experts) - turn) % num_experts))
        return chosen, jnp.where(chosen < num_experts, (chosen + 1) % num_experts, turn)

    return Router("round_robin", "heuristic", lambda: jnp.int32(0), act)


def power_of_two() -> Router:
    """Samples two legal experts and takes the one with fewer requests."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        uniform = jnp.where(obs.action_mask[:-1], _uniform(key, obs), -1.0)
        sampled = uniform >= jnp.sort(uniform)[-2] if uniform.shape[0] > 1 else uniform >= 0
        value = jnp.where(sampled, -num_requests(obs).astype(uniform.dtype), -jnp.inf)
        return best_legal(key_for_ties(key), obs, value), memory

    return Router("power_of_two", "heuristic", tuple, act)


def shortest_queue() -> Router:
    """Takes the expert with the fewest requests."""
    return by_value("shortest_queue", lambda obs: -num_requests(obs))


def shortest_tokens() -> Router:
    """Takes the expert with the least predicted remaining work."""
    return by_value("shortest_tokens", lambda obs: -predicted_work_tokens(obs))


def least_kv() -> Router:
    """Takes the expert with the smallest share of KV memory in use."""
    return by_value("least_kv", lambda obs: -kv_share(obs))


def vllm_dp() -> Router:
    """Takes the expert with the lowest 4 waiting + running, the rule of vLLM 0.9 to mid 2026 for data parallelism."""
    return by_value("vllm_dp", lambda obs: -(4 * obs.experts.waiting + obs.experts.running))


class Sent(struct.PyTreeNode):
    """The last requests that a router sent, latest first."""

    expert: Array  # [M] int32; -1 where none was sent, N where it was dropped
    next_age_s: Array  # [M] s since the request after it arrived, inf where none was sent
    arrivals: Array  # [] requests so far, discounted by age, as in the last observation


def vllm_dp_2026() -> Router:
    """Takes the expert with the fewest requests in flight, and avoids queues where KV memory is short.

    The rule of vLLM since vllm-project/vllm#49204 of July 2026 is the lowest max(in flight, waiting + running) +
    6 waiting max(0, KV share - 0.5), where requests sent since the metrics were taken count as waiting. vLLM's router
    sees every answer end. This one learns of ends from the metrics only: in flight is what they tell and what it sent
    since, so both sides of the maximum are the same.
    """

    def init() -> Sent:
        never_s = jnp.full(_MOST_SENT, jnp.inf, jnp.float32)
        return Sent(jnp.full(_MOST_SENT, -1, jnp.int32), never_s, jnp.float32(0.0))

    def act(key: Array, obs: Observation, sent: Sent) -> tuple[Array, Sent]:
        sent = _later(sent, obs)
        unseen = jnp.where(sent.next_age_s < obs.staleness_s, sent.expert, -1)
        since = jnp.sum(unseen[None] == jnp.arange(obs.action_mask.shape[0] - 1)[:, None], -1)
        waiting, running = ((obs.experts.waiting + since).astype(float), obs.experts.running.astype(float))
        pressure = jnp.maximum(kv_share(obs) - 0.5, 0.0)
        action = best_legal(key, obs, -(waiting + running + 6.0 * waiting * pressure))
        return action, sent.replace(expert=jnp.append(action, sent.expert[:-1]))

    return Router("vllm_dp_2026", "heuristic", init, act)


def latency_headroom() -> Router:
    """Takes the expert with the lowest predicted latency, which is the furthest below the latency limit."""
    return by_value("latency_headroom", lambda obs: -impact(obs).latency_per_token_s)


def bert_router(name: str = "bert_router", **fields: Any) -> Router:
    """Takes the expert with the best predicted score: the BERT Router of the paper."""
    return by_value(name, lambda obs: obs.arrived.predicted_score, **fields)


def bert_router_feasible() -> Router:
    """Takes the best predicted score among experts that are predicted to meet the limit, else the most headroom."""

    def value(obs: Observation) -> Array:
        estimate = impact(obs)
        if obs.arrived.limits is None:
            margin_s = obs.arrived.latency_limit_s - estimate.latency_per_token_s
        else:
            margin_s = estimate.in_time - 0.5  # rather met than missed
        feasible = (margin_s >= 0) & obs.action_mask[:-1]
        return jnp.where(jnp.any(feasible), jnp.where(feasible, obs.arrived.predicted_score, -1e9), margin_s)

    return by_value("bert_router_feasible", value)


def single_expert(expert: int) -> Router:
    """Sends every request to one expert, and drops the requests that this expert cannot take."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        del key
        return jnp.where(obs.action_mask[expert], expert, obs.action_mask.shape[0] - 1).astype(jnp.int32), memory

    return Router(f"expert_{expert}", "heuristic", tuple, act)


def _later(sent: Sent, obs: Observation) -> Sent:
    """Returns what was sent with its ages at this observation.

    A router is not told the time. The gap since the last arrival follows from the discounted number of arrivals, which
    counts the new one as 1; after the first arrival, which is not counted, the gap is taken as 0.
    """
    window_s = RATE_WINDOWS_S[_WINDOW]
    arrivals = (obs.arrived.recent_rate_per_s[_WINDOW] * window_s).astype(jnp.float32)
    gap_s = jnp.where(sent.arrivals > 0, -window_s * jnp.log(jnp.maximum(arrivals - 1.0, 0.0) / sent.arrivals), 0.0)
    next_age_s = jnp.append(0.0, sent.next_age_s[:-1] + jnp.maximum(gap_s, 0.0))
    return sent.replace(next_age_s=next_age_s.astype(jnp.float32), arrivals=arrivals)


def _uniform(key: Array, obs: Observation) -> Array:
    """Returns a uniform sample [N] for each expert."""
    return jax.random.uniform(key, (obs.action_mask.shape[0] - 1,))
