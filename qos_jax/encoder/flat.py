"""The flat view: an observation as a vector of fixed length, with the same columns for every expert.

The requests on an expert are summarised in a few columns. ``encoder.graph`` and ``encoder.jraph_views`` have a node for
each request instead.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.sim.service_level import Limited, per_token_limit_s
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, Observation, RequestView

FLAT_LIMIT = 5.0
FLAT_ARRIVED = ("prompt_tokens", "latency_limit", "rate_2_s", "rate_10_s", "rate_60_s")
FLAT_EXPERT = (
    "predicted_score",
    "predicted_tokens",
    "running",
    "waiting",
    "kv_used",
    "step_time",
    "prefill_time",
    "sequences_time",
    "kv_time",
    "network_time",
    "running_tokens_left",
    "running_latency",
    "running_score",
    "waiting_tokens_left",
    "waiting_latency",
    "waiting_score",
)

_LATENCY_LIMIT_S = 0.03  # s/token; a limit of this size is 1 in the flat view
_UNIT_TOKENS = 1024  # tokens that are 1 in the flat view, on a logarithmic scale
_PREFILL_TOKENS = 256  # prompt tokens of the prefill whose time is a column
_MIN_TIME_S, _MAX_TIME_S = 1e-6, 1e6  # clips of limits and divisors, so that ratios are finite


def flat_size(num_experts: int) -> int:
    """Returns F, the length of ``flat_view``."""
    return len(FLAT_ARRIVED) + num_experts * len(FLAT_EXPERT)


def flat_view(obs: Observation) -> Array:
    """Returns the observation of one environment as float32 [F]: ``FLAT_ARRIVED``, then ``FLAT_EXPERT`` by expert.

    * Rates are log(1 + requests/s per expert) over about the last 2, 10 and 60 s.
    * Numbers of requests and memory are fractions of the expert's capacity.
    * Tokens are on a logarithmic scale, see ``log_tokens``.
    * Times are fractions of the arrived request's latency limit: the lower bound of an iteration, the prefill of 256
      tokens, what a full batch and what full memory add to an iteration, and the network delay.
    * ``tokens_left``, ``latency`` and ``score`` summarise the running (waiting) requests on the expert: their predicted
      remaining tokens, the mean of their age relative to the allowed time (latency limit times predicted tokens), and
      the mean of their predicted scores; 0 without requests.

    Every value is finite and clipped to +-``FLAT_LIMIT``.
    """
    shared, each = arrived_columns(obs), expert_columns(obs)
    flat = jnp.concatenate(
        [
            jnp.stack([shared[name] for name in FLAT_ARRIVED]),
            jnp.stack([each[name] for name in FLAT_EXPERT], -1).ravel(),
        ]
    )
    return jnp.clip(flat.astype(jnp.float32), -FLAT_LIMIT, FLAT_LIMIT)


def arrived_columns(obs: Observation) -> dict[str, Array]:
    """Returns the columns of the arrived request, scalars by the names of ``FLAT_ARRIVED``, before clipping."""
    arrived = jax.tree.map(jnp.asarray, obs.arrived)
    rates = jnp.log1p(arrived.recent_rate_per_s / obs.experts.running.shape[-1])
    return {
        "prompt_tokens": log_tokens(arrived.prompt_tokens),
        "latency_limit": arrived_limit_s(obs) / _LATENCY_LIMIT_S,
        **{name: rates[k] for k, name in enumerate(FLAT_ARRIVED[-len(RATE_WINDOWS_S) :])},
    }


def expert_columns(obs: Observation) -> dict[str, Array]:
    """Returns the columns of the experts, [N] each by the names of ``FLAT_EXPERT``, before clipping."""
    obs = jax.tree.map(jnp.asarray, obs)
    arrived, experts, requests = obs.arrived, obs.experts, obs.requests
    profile = experts.profile
    limit_s = arrived_limit_s(obs)
    max_running = profile.max_running.astype(jnp.float32)
    kv_tokens = BLOCK_SIZE_TOKENS * profile.kv_blocks.astype(jnp.float32)
    columns = {
        "predicted_score": arrived.predicted_score,
        "predicted_tokens": log_tokens(arrived.predicted_tokens),
        "running": experts.running / profile.max_running,
        "waiting": experts.waiting / jnp.maximum(profile.max_waiting, 1),
        "kv_used": experts.kv_used_blocks / profile.kv_blocks,
        "step_time": profile.step_base_s / limit_s,
        "prefill_time": (profile.prefill_base_s + profile.prefill_per_token_s * _PREFILL_TOKENS) / limit_s,
        "sequences_time": profile.per_sequence_s * max_running / limit_s,
        "kv_time": profile.per_kv_token_s * kv_tokens / limit_s,
        "network_time": profile.network_s / limit_s,
        **_summary("running", requests, requests.running),
        **_summary("waiting", requests, requests.waiting),
    }
    return {name: jnp.broadcast_to(column, experts.running.shape) for name, column in columns.items()}


def arrived_limit_s(obs: Observation) -> Array:
    """Returns the latency per token [] that the limits of the arrived request allow an answer of the mean length."""
    tokens = None if obs.arrived.limits is None else jnp.mean(obs.arrived.predicted_tokens)
    return clipped_limit_s(obs.arrived, tokens)


def clipped_limit_s(of: Limited, tokens: Array | None) -> Array:
    """Returns ``per_token_limit_s``, clipped so that ratios of limits are finite."""
    return jnp.clip(jnp.asarray(per_token_limit_s(of, tokens)), _MIN_TIME_S, _MAX_TIME_S)


def log_tokens(tokens: Array) -> Array:
    """Returns numbers of tokens on a logarithmic scale, on which 1024 tokens are 1."""
    return jnp.log1p(tokens) / math.log1p(_UNIT_TOKENS)


def _summary(name: str, requests: RequestView, mask: Array) -> dict[str, Array]:
    """Returns the columns [N] that summarise the requests where ``mask`` [N, S] is set."""
    count = jnp.maximum(jnp.sum(mask, -1), 1).astype(jnp.float32)
    dtype = requests.predicted_tokens.dtype
    remaining_tokens = requests.predicted_tokens - requests.generated_tokens.astype(dtype)
    limit_s = clipped_limit_s(requests, requests.predicted_tokens)
    allowed_s = jnp.maximum(limit_s * requests.predicted_tokens, _MIN_TIME_S)
    latency = jnp.minimum(requests.age_s / allowed_s, FLAT_LIMIT)
    return {
        f"{name}_tokens_left": log_tokens(jnp.sum(jnp.where(mask, remaining_tokens, 0.0), -1)),
        f"{name}_latency": jnp.sum(jnp.where(mask, latency, 0.0), -1) / count,
        f"{name}_score": jnp.sum(jnp.where(mask, requests.predicted_score, 0.0), -1) / count,
    }
