"""Routers in the manner of serving systems of 2026, each reduced to what one decision at a time can express.

They see what every router sees. What was simplified stands in each docstring. Their parameters were tuned on paper-3,
edge-8 and edge-2026 by ``python -m experiments.tune_routers``, with as many trials for each, on training seeds.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.impact.estimate import Impact, impact
from qos_jax.routers.base import Router, best_legal, by_value, key_for_ties
from qos_jax.routers.heuristics import kv_share, num_requests
from qos_jax.routers.impact_greedy import PRICE
from qos_jax.sim.service_level import per_token_limit_s
from qos_jax.sim.types import Observation

_FAR = 1e6  # of values, to rank what a filter left out below all that passes it


def with_admission(router: Router, price: float = PRICE) -> Router:
    """Returns a router that refuses what ``impact_greedy`` would refuse, and otherwise decides as before.

    The request is dropped, where this is legal, if it adds less than ``price`` to the expected QoS of all requests on
    the expert that the router takes. It separates what refusing is worth from what routing is worth.
    """

    def act(key: Array, obs: Observation, memory: Any) -> tuple[Array, Any]:
        action, memory = router.act(key, obs, memory)
        drop = action.dtype.type(obs.action_mask.shape[0] - 1)
        refused = (jnp.append(impact(obs).net, jnp.inf)[action] < price) & obs.action_mask[-1]
        return jnp.where(refused, drop, action), memory

    return Router(f"{router.name}+admission", router.kind, router.init, act, router.information)


def without_drop(router: Router) -> Router:
    """Returns a router that is told that it may not drop, so that it places whatever an expert can take."""

    def act(key: Array, obs: Observation, memory: Any) -> tuple[Array, Any]:
        place = jnp.any(obs.action_mask[:-1])  # where no expert can take it, the drop is all that is left
        return router.act(key, obs.replace(action_mask=obs.action_mask.at[-1].set(~place)), memory)

    return Router(f"{router.name}+no_drop", router.kind, router.init, act, router.information)


def route_balance(latency_weight: float = 0.3, least_probability: float = 0.5) -> Router:
    """Takes the best predicted score less weighted latency, among experts that are likely enough in time.

    After RouteBalance (arXiv 2606.17949). Its filters on the distributions of TTFT and TPOT are one on the probability
    to meet all limits, its batches dispatched longest first are single requests, and its price of tokens is left out,
    as these worlds have none.

    Args:
      latency_weight: QoS that an answer at its limit is worth less than an instant one.
      least_probability: to be in time, of experts that pass the filter.
    """

    def value(obs: Observation) -> Array:
        estimate = impact(obs)
        value = obs.arrived.predicted_score - latency_weight * _used_share(obs, estimate)
        return jnp.where(_any_or_all(obs, estimate.in_time >= least_probability), value, value - _FAR)

    return by_value("route_balance", value)


def multi_factor(tolerance: float = 0.1, most_kv: float = 0.9) -> Router:
    """Takes, below hard ceilings, the least loaded of the experts whose predicted scores are nearly the best.

    After the multi_factor selection of vLLM's semantic router: ceilings first, then quality, then load, each only among
    what the one before it left. Ceilings are the limits of the request and the share of KV memory.

    Args:
      tolerance: below the best predicted score, within which scores count as equal.
      most_kv: share of KV memory in use above which an expert is avoided.
    """

    def value(obs: Observation) -> Array:
        allowed = _any_or_all(obs, (_used_share(obs, impact(obs)) <= 1.0) & (kv_share(obs) <= most_kv))
        score = jnp.where(allowed, obs.arrived.predicted_score, -_FAR)
        good = allowed & (score >= jnp.max(score) - tolerance)
        load = _real(num_requests(obs)) / _real(obs.experts.profile.max_running)
        return jnp.where(good, -load, score - _FAR)

    return by_value("multi_factor", value)


def score_threshold(threshold: float = 0.08) -> Router:
    """Takes the expert with the best predicted score if it leads the cheapest one by a threshold, else the cheapest.

    After RouteLLM, which decides between a strong and a weak LLM without regard to load. The weak one is here the
    expert with the shortest step.

    Args:
      threshold: lead in predicted score.
    """

    def value(obs: Observation) -> Array:
        score, legal = obs.arrived.predicted_score, obs.action_mask[:-1]
        step_s = jnp.where(legal, obs.experts.profile.step_base_s, jnp.inf)
        is_cheapest = step_s <= jnp.min(step_s)
        cheapest_score = jnp.max(jnp.where(is_cheapest, score, -jnp.inf))
        leads = jnp.max(jnp.where(legal, score, -jnp.inf)) > cheapest_score + threshold
        return jnp.where(leads, score, jnp.where(is_cheapest, score, score - _FAR))

    return by_value("score_threshold", value)


def prefix_affinity(least_share: float = 0.6, most_ahead: int = 4) -> Router:
    """Takes the expert that has most of the prompt cached, or the one with the fewest requests.

    After SGLang's cache-aware router: where enough of the prompt is cached and loads are balanced it follows the cache,
    else the shortest queue. Its tree of texts is here the cached prefix of the session, as far as it is observed.

    Args:
      least_share: of the prompt that must be cached.
      most_ahead: requests that the busiest expert may have more than the idlest, for loads to be balanced.
    """

    def value(obs: Observation) -> Array:
        requests, shortest = num_requests(obs), -_real(num_requests(obs))
        if obs.arrived.cached_tokens is None:
            return shortest
        share = _real(obs.arrived.cached_tokens) / _real(jnp.maximum(obs.arrived.prompt_tokens, 1))
        balanced = jnp.max(requests) - jnp.min(requests) <= most_ahead
        follows = balanced & jnp.any((share >= least_share) & obs.action_mask[:-1])
        return jnp.where(follows, share, shortest)

    return by_value("prefix_affinity", value)


class LatencyModel(struct.PyTreeNode):
    """Factors of the four parts of a latency per token: the weights' step, the batch, the KV memory and the queue."""

    factors: Array  # [4]


def latency_scorer(least_headroom: bool = False, admit_all: bool = False, rate: float = 0.1) -> Router:
    """Takes an expert by its headroom to the limit, predicted by a model that learns from answers under way.

    After the latency scorer of llm-d, whose models of TTFT and TPOT are trained online from finished answers of equal
    engines. Here the engines differ, so one linear model corrects the parts of the profile's latency per token by a
    factor each, from the latency per token so far of the requests that generate (normalised least mean squares).

    Args:
      least_headroom: takes the expert that just meets the limit rather than the one with most headroom.
      admit_all: sends a request that no expert is predicted to answer in time to the one with most headroom, rather
        than drop it.
      rate: of learning.
    """

    def init() -> LatencyModel:
        return LatencyModel(jnp.ones(4, jnp.float32))

    def act(key: Array, obs: Observation, model: LatencyModel) -> tuple[Array, LatencyModel]:
        model = _learned(model, obs, rate)
        predicted_s = _latency_parts_s(obs, more=1.0) @ model.factors
        headroom = per_token_limit_s(obs.arrived, obs.arrived.predicted_tokens) - predicted_s
        fits = (headroom >= 0) & obs.action_mask[:-1]
        closest = jnp.where(fits, -headroom, -_FAR) if least_headroom else headroom
        chosen = best_legal(key_for_ties(key), obs, jnp.where(jnp.any(fits), closest, headroom))
        refused = ~jnp.any(fits) & obs.action_mask[-1] & (not admit_all)
        return jnp.where(refused, jnp.int32(obs.action_mask.shape[0] - 1), chosen), model

    return Router("latency_scorer", "heuristic", init, act)


def _latency_parts_s(obs: Observation, more: float = 0.0) -> Array:
    """Returns the parts [N, 4] s/token of the latency of a request on each expert, with ``more`` requests there."""
    profile, requests = obs.experts.profile, obs.requests
    tokens = jnp.maximum(jnp.mean(obs.arrived.predicted_tokens), 1.0)
    cached = _real(jnp.sum(jnp.where(requests.running, requests.computed_tokens, 0), -1))
    waiting, prompt = _real(obs.experts.waiting) + more, _real(obs.arrived.prompt_tokens)
    prompts_s = waiting * (profile.prefill_base_s + profile.prefill_per_token_s * prompt)
    parts = (
        profile.step_base_s,
        profile.per_sequence_s * (_real(obs.experts.running) + more),
        profile.per_kv_token_s * cached,
        prompts_s / tokens,
    )
    return jnp.stack([jnp.broadcast_to(part, cached.shape).astype(jnp.float32) for part in parts], -1)


def _learned(model: LatencyModel, obs: Observation, rate: float) -> LatencyModel:
    """Returns the model after one step towards what the requests under way have taken for each token so far."""
    requests = obs.requests
    generates = requests.running & (requests.generated_tokens > 0)
    so_far_s = jnp.where(generates, requests.age_s / jnp.maximum(_real(requests.generated_tokens), 1.0), 0.0)
    count = jnp.sum(_real(generates), -1)
    observed_s = jnp.sum(so_far_s, -1) / jnp.maximum(count, 1.0)
    parts_s = _latency_parts_s(obs)
    scale_s = jnp.maximum(jnp.sum(parts_s**2, -1), 1e-12)
    error_s = jnp.where(count > 0, observed_s - parts_s @ model.factors, 0.0)
    step = jnp.mean(parts_s * (error_s / scale_s)[:, None], 0)
    return LatencyModel(jnp.clip(model.factors + rate * step, 0.0, 10.0))


def _real(numbers: Array) -> Array:
    """Returns whole numbers or a mask as float32."""
    return jnp.asarray(numbers, jnp.float32)


def _used_share(obs: Observation, estimate: Impact) -> Array:
    """Returns the predicted latency per token [N] as a share of what the limits allow."""
    return estimate.latency_per_token_s / per_token_limit_s(obs.arrived, obs.arrived.predicted_tokens)


def _any_or_all(obs: Observation, passes: Array) -> Array:
    """Returns the legal experts [N] that pass a filter, or all legal ones if none does."""
    legal = obs.action_mask[:-1]
    passes &= legal
    return jnp.where(jnp.any(passes), passes, legal)
