"""Routers that follow a rule, from chance to the paper's baselines; the first expert wins a tie.

Loads are counted in requests, in predicted tokens or in KV memory, whatever the scores; the BERT routers look at
scores, and at latency only if they care for what is feasible.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.impact.estimate import impact
from qos_jax.routers.base import Router, best_legal, by_value
from qos_jax.sim.types import Observation


def requests_on(obs: Observation) -> Array:
    """Returns the requests on each expert [N], running and waiting."""
    return obs.experts.running + obs.experts.waiting


def tokens_left(obs: Observation) -> Array:
    """Returns the work that is predicted to be left on each expert [N]: prompt tokens to compute and tokens to emit."""
    seen = obs.requests
    to_compute = seen.prompt_tokens + seen.generated_tokens - seen.computed_tokens
    to_emit = seen.predicted_tokens - seen.generated_tokens
    return jnp.sum(jnp.where(seen.running | seen.waiting, to_compute + to_emit, 0.0), -1)


def kv_share(obs: Observation) -> Array:
    """Returns the share of each expert's KV memory that is held [N]."""
    return obs.experts.kv_used_blocks / obs.experts.profile.kv_blocks


def random() -> Router:
    """Draws an expert by lot."""
    return Router("random", "heuristic", tuple, lambda key, obs, _: (best_legal(obs, _lots(key, obs)), ()))


def round_robin() -> Router:
    """Takes the experts in turn, passing over those that are full."""

    def act(key: Array, obs: Observation, turn: Array) -> tuple[Array, Array]:
        del key
        num_experts = obs.action_mask.shape[0] - 1
        chosen = best_legal(obs, -((jnp.arange(num_experts) - turn) % num_experts))
        return chosen, jnp.where(chosen < num_experts, (chosen + 1) % num_experts, turn)

    return Router("round_robin", "heuristic", lambda: jnp.int32(0), act)


def power_of_two() -> Router:
    """Draws two experts by lot and takes the one with fewer requests; a tie is broken by lot, too."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        lots = jnp.where(obs.action_mask[:-1], _lots(key, obs), -1.0)
        drawn = lots >= jnp.sort(lots)[-2] if lots.shape[0] > 1 else lots >= 0
        return best_legal(obs, jnp.where(drawn, 0.5 * lots - requests_on(obs), -jnp.inf)), memory

    return Router("power_of_two", "heuristic", tuple, act)


def shortest_queue() -> Router:
    """Takes the expert with the fewest requests."""
    return by_value("shortest_queue", lambda obs: -requests_on(obs))


def shortest_tokens() -> Router:
    """Takes the expert with the least predicted work left."""
    return by_value("shortest_tokens", lambda obs: -tokens_left(obs))


def least_kv() -> Router:
    """Takes the expert with the largest share of KV memory free."""
    return by_value("least_kv", lambda obs: -kv_share(obs))


def vllm_dp() -> Router:
    """Takes the lowest 4 waiting + running, as vLLM does among its data-parallel engines."""
    return by_value("vllm_dp", lambda obs: -(4 * obs.experts.waiting + obs.experts.running))


def latency_headroom() -> Router:
    """Takes the expert that is predicted to stay furthest below the latency limit."""
    return by_value("latency_headroom", lambda obs: -impact(obs).latency_per_token_s)


def bert_router(name: str = "bert_router", **fields: Any) -> Router:
    """Takes the best predicted score; the paper's BERT Router."""
    return by_value(name, lambda obs: obs.arrived.predicted_score, **fields)


def bert_router_feasible() -> Router:
    """Takes the best predicted score among the experts predicted to meet the limit, else the most headroom."""

    def value(obs: Observation) -> Array:
        margin_s = obs.arrived.latency_limit_s - impact(obs).latency_per_token_s
        feasible = (margin_s >= 0) & obs.action_mask[:-1]
        return jnp.where(jnp.any(feasible), jnp.where(feasible, obs.arrived.predicted_score, -1e9), margin_s)

    return by_value("bert_router_feasible", value)


def single_expert(expert: int) -> Router:
    """Sends everything to one expert, and drops what that one cannot take."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        del key
        return jnp.where(obs.action_mask[expert], expert, obs.action_mask.shape[0] - 1).astype(jnp.int32), memory

    return Router(f"expert_{expert}", "heuristic", tuple, act)


def _lots(key: Array, obs: Observation) -> Array:
    return jax.random.uniform(key, (obs.action_mask.shape[0] - 1,))
