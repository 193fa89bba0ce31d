"""What is known of each node of the heterogeneous graph, as normalised features that a network can read.

The arrays are dense: every expert has the same number of request slots, and masks tell which of them hold a request.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.encoder.flat import FLAT_ARRIVED, FLAT_EXPERT, arrived_columns, expert_columns, log_tokens
from qos_jax.errors import InputError
from qos_jax.impact.estimate import impact
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, Observation

FEATURE_LIMIT = 5.0
ARRIVED_FEATURES = FLAT_ARRIVED
EXPERT_FEATURES = FLAT_EXPERT
IMPACT_FEATURES = ("own_latency", "in_time", "qos", "qos_change", "violations_change", "net")
REQUEST_FEATURES = (
    "prompt_tokens",
    "predicted_score",
    "predicted_tokens",
    "generated_tokens",
    "age",
    "slack",
    "latency_limit",
    "kv_share",
    "computed",
)

_SHORTEST_LIMIT_S, _LONGEST_LIMIT_S = 1e-6, 1e6  # s/token, so that ratios of limits of 0 or infinity are numbers


class GraphFeatures(struct.PyTreeNode):
    """The nodes of the graph and where they hang together; any leading batch axes may stand in front."""

    arrived: Array  # [Fa] float32, ``ARRIVED_FEATURES``, or without the recent rates those before them
    experts: Array  # [N, Fe] float32, ``EXPERT_FEATURES`` and perhaps ``IMPACT_FEATURES``
    requests: Array  # [N, S, Fr] float32, ``REQUEST_FEATURES``; 0 where there is no request
    running: Array  # [N, S] bool
    waiting: Array  # [N, S] bool
    legal: Array  # [N + 1] bool, legal actions; the last one drops the request


def graph_features(
    obs: Observation, *, with_impact: bool = True, with_rates: bool = True, slots: int | None = None
) -> GraphFeatures:
    """Returns the nodes of the observation of one environment.

    Arrived and expert features are the columns of ``flat_view``. The impact estimate's own latency is a fraction of the
    request's limit, and what it says of many requests is compressed to sign(x) log(1 + |x|). Of a request, ``age`` is
    the part of its allowed time (latency limit times predicted tokens) that has gone by, ``slack`` is the allowed time
    left per predicted token left, as a fraction of its limit (1: on schedule, below 0: lost), ``latency_limit`` is
    relative to the arrived request's, ``kv_share`` is the part of its expert's KV memory that it holds and ``computed``
    the part of its known tokens whose keys and values are cached. Every value is finite and cut to +-``FEATURE_LIMIT``.

    Args:
      obs: what the router sees.
      with_impact: gives the experts ``IMPACT_FEATURES`` too.
      with_rates: gives the arrived request the recent rates of arrivals too.
      slots: keeps only this many requests of each expert, the first to arrive; all slots without it.

    Raises:
      InputError: ``slots`` is below 1.
    """
    if slots is not None and slots < 1:
        raise InputError(f"slots is {slots}, must be at least 1")
    obs = jax.tree.map(jnp.asarray, obs)
    arrived, experts = arrived_columns(obs), expert_columns(obs)
    if with_impact:
        experts |= _impact_columns(obs)
    running, waiting = obs.requests.running, obs.requests.waiting
    here = running | waiting
    requests = jnp.where(here[..., None], _stacked(_request_columns(obs), REQUEST_FEATURES), 0.0)
    if slots is not None and slots < here.shape[-1]:
        first, there = _first_requests(here, slots)
        requests = jnp.where(there[..., None], jnp.take_along_axis(requests, first[..., None], -2), 0.0)
        running, waiting = (jnp.take_along_axis(mask, first, -1) & there for mask in (running, waiting))
    return GraphFeatures(
        arrived=_stacked(arrived, ARRIVED_FEATURES if with_rates else ARRIVED_FEATURES[: -len(RATE_WINDOWS_S)]),
        experts=_stacked(experts, EXPERT_FEATURES + IMPACT_FEATURES if with_impact else EXPERT_FEATURES),
        requests=requests,
        running=running,
        waiting=waiting,
        legal=obs.action_mask,
    )


def _impact_columns(obs: Observation) -> dict[str, Array]:
    # An answer has a token at least, and the estimate divides by their number.
    tokens = jnp.maximum(obs.arrived.predicted_tokens, 1.0)
    estimate = impact(obs.replace(arrived=obs.arrived.replace(predicted_tokens=tokens)))
    return {
        "own_latency": estimate.latency_per_token_s / _limit_s(obs.arrived.latency_limit_s),
        "in_time": estimate.in_time,
        "qos": estimate.qos,
        "qos_change": _compressed(estimate.qos_change),
        "violations_change": _compressed(estimate.violations_change),
        "net": _compressed(estimate.net),
    }


def _request_columns(obs: Observation) -> dict[str, Array]:
    """Returns the columns [N, S] of the requests, not cut yet and without meaning where there is none."""
    seen = obs.requests
    limit_s = _limit_s(seen.latency_limit_s)
    predicted_tokens = jnp.maximum(seen.predicted_tokens, 1.0)
    left_tokens = jnp.maximum(predicted_tokens - seen.generated_tokens, 1.0)
    age_tokens = seen.age_s / limit_s  # tokens that should have come by now
    known_tokens = jnp.maximum(seen.prompt_tokens + seen.generated_tokens, 1)
    return {
        "prompt_tokens": log_tokens(seen.prompt_tokens),
        "predicted_score": seen.predicted_score,
        "predicted_tokens": log_tokens(predicted_tokens),
        "generated_tokens": log_tokens(seen.generated_tokens),
        "age": age_tokens / predicted_tokens,
        "slack": (predicted_tokens - age_tokens) / left_tokens,
        "latency_limit": limit_s / _limit_s(obs.arrived.latency_limit_s),
        "kv_share": blocks_of(seen.computed_tokens, BLOCK_SIZE_TOKENS) / obs.experts.profile.kv_blocks[..., None],
        "computed": seen.computed_tokens / known_tokens,
    }


def _first_requests(here: Array, count: int) -> tuple[Array, Array]:
    """Returns the slots [N, count] of the first requests, and whether there are so many; there may be gaps in between.

    Finished requests leave their slots empty, so the first slots need not hold the first requests.
    """
    before = jnp.cumsum(here, -1)[..., None, :] <= jnp.arange(count)[:, None]  # [N, count, S] slots to pass over
    slot = jnp.sum(before, -1)
    return jnp.minimum(slot, here.shape[-1] - 1), slot < here.shape[-1]


def _stacked(columns: dict[str, Array], names: tuple[str, ...]) -> Array:
    features = jnp.stack([columns[name].astype(jnp.float32) for name in names], -1)
    return jnp.clip(features, -FEATURE_LIMIT, FEATURE_LIMIT)


def _limit_s(limit_s: Array) -> Array:
    return jnp.clip(limit_s, _SHORTEST_LIMIT_S, _LONGEST_LIMIT_S)


def _compressed(x: Array) -> Array:
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))
