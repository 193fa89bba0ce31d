"""Normalised features of the nodes of the heterogeneous graph: the arrived request, the experts and their requests.

The arrays are dense. Every expert has the same number of request slots, and masks mark the slots that hold a request.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.encoder.flat import (
    FLAT_ARRIVED,
    FLAT_EXPERT,
    arrived_columns,
    arrived_limit_s,
    clipped_limit_s,
    expert_columns,
    log_tokens,
)
from qos_jax.errors import InputError
from qos_jax.impact.estimate import impact
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, Observation, Preferences

FEATURE_LIMIT = 5.0
ARRIVED_FEATURES = FLAT_ARRIVED
EXPERT_FEATURES = FLAT_EXPERT
PREFERENCE_FEATURES = tuple(Preferences.__dataclass_fields__)
SESSION_FEATURES = ("cached_prompt",)
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


class GraphFeatures(struct.PyTreeNode):
    """Features of the nodes and the edges between them; batched instances have further axes in front."""

    arrived: Array  # [Fa] float32, ``ARRIVED_FEATURES`` with or without recent rates, and ``PREFERENCE_FEATURES``
    experts: Array  # [N, Fe] float32, ``EXPERT_FEATURES``, with sessions ``SESSION_FEATURES``, and ``IMPACT_FEATURES``
    requests: Array  # [N, S, Fr] float32, ``REQUEST_FEATURES``; 0 in empty slots
    running: Array  # [N, S] bool
    waiting: Array  # [N, S] bool
    legal: Array  # [N + 1] bool, legal actions; the last action drops the request


def graph_features(
    obs: Observation,
    *,
    with_impact: bool = True,
    later_prompts: bool = False,
    with_rates: bool = True,
    with_preferences: bool = False,
    with_sessions: bool = False,
    slots: int | None = None,
) -> GraphFeatures:
    """Returns the features of the observation of one environment.

    Features of the arrived request and the experts are the columns of ``flat_view``. Of ``SESSION_FEATURES``,
    ``cached_prompt`` is the share of the prompt that each expert has cached. Of ``IMPACT_FEATURES``,
    ``own_latency`` is a fraction of the latency limit, and sums over requests are compressed to sign(x) log(1 + |x|).
    Every value is finite and clipped to +-``FEATURE_LIMIT``. Of ``REQUEST_FEATURES``:

    * ``age`` is the elapsed share of the allowed time (latency limit times predicted tokens).
    * ``slack`` is the remaining allowed time per predicted remaining token, as a fraction of the limit: 1 is on
      schedule, below 0 the limit is violated already.
    * ``latency_limit`` is relative to the limit of the arrived request.
    * ``kv_share`` is the share of the expert's KV memory that the request holds.
    * ``computed`` is the share of its prompt and generated tokens whose keys and values are cached.

    Args:
      obs: the observation.
      with_impact: adds ``IMPACT_FEATURES`` to the experts.
      later_prompts: their estimate counts the prompts that take freed places, see ``impact``.
      with_rates: adds the recent arrival rates to the arrived request.
      with_preferences: adds ``preference_features`` to the arrived request.
      with_sessions: adds ``SESSION_FEATURES`` to the experts, which are 0 in a world without sessions.
      slots: number of requests of each expert to keep, the first to arrive; None keeps all slots.

    Raises:
      InputError: ``slots`` is below 1.
    """
    if slots is not None and slots < 1:
        raise InputError(f"slots is {slots}, must be at least 1")
    obs = jax.tree.map(jnp.asarray, obs)
    arrived, experts = arrived_columns(obs), expert_columns(obs)
    expert_names: tuple[str, ...] = EXPERT_FEATURES
    if with_sessions:
        cached_tokens = 0 if obs.arrived.cached_tokens is None else obs.arrived.cached_tokens
        share = cached_tokens / jnp.maximum(obs.arrived.prompt_tokens, 1)
        experts["cached_prompt"] = jnp.broadcast_to(share, obs.experts.running.shape)
        expert_names += SESSION_FEATURES
    if with_impact:
        experts |= _impact_columns(obs, later_prompts)
        expert_names += IMPACT_FEATURES
    running, waiting = obs.requests.running, obs.requests.waiting
    present = running | waiting
    requests = jnp.where(present[..., None], _stacked(_request_columns(obs), REQUEST_FEATURES), 0.0)
    if slots is not None and slots < present.shape[-1]:
        first, exists = _first_requests(present, slots)
        requests = jnp.where(exists[..., None], jnp.take_along_axis(requests, first[..., None], -2), 0.0)
        running, waiting = (jnp.take_along_axis(mask, first, -1) & exists for mask in (running, waiting))
    features = _stacked(arrived, ARRIVED_FEATURES if with_rates else ARRIVED_FEATURES[: -len(RATE_WINDOWS_S)])
    return GraphFeatures(
        arrived=jnp.append(features, preference_features(obs)) if with_preferences else features,
        experts=_stacked(experts, expert_names),
        requests=requests,
        running=running,
        waiting=waiting,
        legal=obs.action_mask,
    )


def preference_features(obs: Observation) -> Array:
    """Returns the features [4] float32 of the observed preferences: the score's weight w, and log(1 + w) of the others.

    Raises:
      InputError: none are observed.
    """
    if obs.preferences is None:
        raise InputError("preferences is None, must be observed by a network that reads them")
    columns = {name: jnp.asarray(weight) for name, weight in vars(obs.preferences).items()}
    costs = {name: jnp.log1p(weight) for name, weight in columns.items() if name != "score"}
    return _stacked(columns | costs, PREFERENCE_FEATURES)


def _impact_columns(obs: Observation, later_prompts: bool) -> dict[str, Array]:
    # The estimate divides by the number of predicted tokens.
    tokens = jnp.maximum(obs.arrived.predicted_tokens, 1.0)
    obs = obs.replace(arrived=obs.arrived.replace(predicted_tokens=tokens))
    estimate = impact(obs, later_prompts=later_prompts)
    return {
        "own_latency": estimate.latency_per_token_s / arrived_limit_s(obs),
        "in_time": estimate.in_time,
        "qos": estimate.qos,
        "qos_change": _compressed(estimate.qos_change),
        "violations_change": _compressed(estimate.violations_change),
        "net": _compressed(estimate.net),
    }


def _request_columns(obs: Observation) -> dict[str, Array]:
    """Returns the columns [N, S] of the requests, before clipping; values in empty slots have no meaning."""
    requests = obs.requests
    predicted_tokens = jnp.maximum(requests.predicted_tokens, 1.0)
    limit_s = clipped_limit_s(requests, predicted_tokens)
    remaining_tokens = jnp.maximum(predicted_tokens - requests.generated_tokens.astype(predicted_tokens.dtype), 1.0)
    due_tokens = requests.age_s / limit_s  # a request on schedule has generated as many
    known_tokens = jnp.maximum(requests.prompt_tokens + requests.generated_tokens, 1)
    blocks = blocks_of(requests.computed_tokens, BLOCK_SIZE_TOKENS)
    return {
        "prompt_tokens": log_tokens(requests.prompt_tokens),
        "predicted_score": requests.predicted_score,
        "predicted_tokens": log_tokens(predicted_tokens),
        "generated_tokens": log_tokens(requests.generated_tokens),
        "age": due_tokens / predicted_tokens,
        "slack": (predicted_tokens - due_tokens) / remaining_tokens,
        "latency_limit": limit_s / arrived_limit_s(obs),
        "kv_share": blocks / obs.experts.profile.kv_blocks[..., None],
        "computed": requests.computed_tokens / known_tokens,
    }


def _first_requests(present: Array, count: int) -> tuple[Array, Array]:
    """Returns the slots [N, count] of the first requests of each expert, and whether these requests exist.

    Finished requests leave empty slots, so the first slots need not hold the first requests.
    """
    before = jnp.cumsum(present, -1)[..., None, :] <= jnp.arange(count)[None, :, None]  # [N, count, S] slots to skip
    slot = jnp.sum(before, -1)
    return jnp.minimum(slot, present.shape[-1] - 1), slot < present.shape[-1]


def _stacked(columns: dict[str, Array], names: tuple[str, ...]) -> Array:
    features = jnp.stack([columns[name].astype(jnp.float32) for name in names], -1)
    return jnp.clip(features, -FEATURE_LIMIT, FEATURE_LIMIT)


def _compressed(x: Array) -> Array:
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))
