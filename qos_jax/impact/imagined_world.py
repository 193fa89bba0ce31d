"""Belief states: worlds that agree with an observation, with sampled or expected lengths for the hidden true ones.

A router does not observe how far an expert is within its iteration; in a belief state the next iteration starts at
once. Where iterations are scheduled one ahead, those requests take part in it that have nothing left to schedule.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr, ndtri

from qos_jax.sim.cost import decode_s, max_kv_blocks
from qos_jax.sim.engine import NEVER_TAKEN, EngineSpec, Slots, init_state
from qos_jax.sim.engine_state import slot_numbers, total
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, Observation, Request, RequestView
from qos_jax.sim.world_state import SlotPayload, Telemetry, World

# Coefficient of variation of an output length given its prediction: sqrt(exp(0.75) - 1), as predictions leave 0.75 of a
# log variance of 1 unexplained.
LENGTH_CV = 1.1
_MAX_TOKENS = 2.0**30


def sample_belief(obs: Observation, length_cv: float = LENGTH_CV, key: Array | None = None) -> World:
    """Returns a world with the observed requests, in the slots in which they are observed.

    Their scores are the predicted ones, whatever their lengths.

    Args:
      obs: one observation; with stale metrics, the world is that of the snapshot.
      length_cv: coefficient of variation of an output length given its prediction; at 0 predictions are exact.
      key: random key of the output lengths; None for the expected lengths.
    """
    requests, profile = obs.requests, obs.experts.profile
    emitted = requests.generated_tokens
    if key is None:
        all_tokens = emitted.astype(jnp.float32) + expected_remaining_tokens(requests, length_cv)
    else:
        all_tokens = _sample_tokens(key, requests.predicted_tokens, emitted, length_cv)
    # An expert admits only requests that fit in its memory; a sampled length beyond that would never finish.
    kv_tokens = max_kv_blocks(profile, BLOCK_SIZE_TOKENS) * BLOCK_SIZE_TOKENS
    max_tokens = kv_tokens[:, None] - requests.prompt_tokens
    output_tokens = jnp.minimum(_round_tokens(all_tokens, emitted + 1), max_tokens)

    cached_blocks = jnp.where(requests.waiting, requests.computed_tokens // BLOCK_SIZE_TOKENS, 0)
    no_tokens, no_time_s = jnp.zeros_like(emitted), jnp.zeros_like(requests.age_s)
    computed = jnp.where(requests.running, requests.computed_tokens, 0)
    is_async = jnp.asarray(profile.async_scheduling)[:, None]
    emitting = is_async & requests.running & (computed == requests.prompt_tokens + emitted)
    score, limit_s, tokens = requests.predicted_score, requests.latency_limit_s, requests.predicted_tokens
    slots = Slots(
        prompt_tokens=requests.prompt_tokens,
        output_tokens=output_tokens,
        generated=emitted,
        computed=computed,
        emitting=emitting,
        decoding=emitting,
        cached_blocks=cached_blocks,
        taken_at=jnp.where(cached_blocks > 0, jnp.int32(NEVER_TAKEN), 0),
        preemptions=no_tokens,
        arrival_s=-requests.age_s,
        first_token_s=no_time_s if requests.first_token_s is None else requests.first_token_s,
        finish_s=no_time_s,
        payload=SlotPayload(score, limit_s, score, tokens, requests.limits),
    )
    occupied = (requests.running | requests.waiting) & (output_tokens > emitted)
    slots = jax.tree.map(lambda x: jnp.where(occupied, x, jnp.zeros_like(x)), slots)
    scheduled = jnp.sum(slots.emitting, -1, dtype=jnp.int32)
    kv_tokens = jnp.sum(jnp.where(slots.emitting, computed - 1, 0), -1, dtype=jnp.int32)
    scheduled_s = jnp.where(scheduled > 0, decode_s(profile, scheduled, kv_tokens)[0], 0.0)
    arrivals = obs.arrived.recent_rate_per_s * jnp.array(RATE_WINDOWS_S)
    experts = init_state(EngineSpec(occupied.shape[-1]), occupied.shape[:-1], dtype=no_time_s.dtype).replace(
        slots=slots,
        used=jnp.max(jnp.where(occupied, slot_numbers(occupied) + 1, 0), -1),
        running=total(slots.running),
        waiting=total(slots.waiting),
        scheduled_s=scheduled_s,
    )
    return World(experts, Telemetry(arrivals, None))


def sample_request(obs: Observation, length_cv: float = LENGTH_CV, key: Array | None = None) -> Request:
    """Returns the arrived request with expected lengths, or with lengths at one random quantile on all experts."""
    arrived = obs.arrived
    tokens = arrived.predicted_tokens
    if key is not None:
        tokens = _sample_tokens(key, tokens, jnp.zeros(1, jnp.int32), length_cv)
    return Request(
        prompt_tokens=arrived.prompt_tokens,
        output_tokens=_round_tokens(tokens, 1),
        score=arrived.predicted_score,
        latency_limit_s=arrived.latency_limit_s,
        predicted_score=arrived.predicted_score,
        predicted_tokens=arrived.predicted_tokens,
        limits=arrived.limits,
    )


def expected_remaining_tokens(requests: RequestView, length_cv: float) -> Array:
    """Returns the expected number of tokens left [N, S] of each request, which grows with the tokens emitted."""
    emitted = requests.generated_tokens.astype(requests.predicted_tokens.dtype)
    return jnp.hypot(requests.predicted_tokens - emitted, length_cv * emitted)


def _sample_tokens(key: Array, predicted_tokens: Array, emitted_tokens: Array, length_cv: float) -> Array:
    """Samples lengths from lognormals whose means are the predictions, conditional on the tokens already emitted."""
    if length_cv == 0:
        return predicted_tokens
    log_sd = math.sqrt(math.log1p(length_cv**2))
    log_mean = jnp.log(predicted_tokens) - log_sd**2 / 2.0
    emitted = emitted_tokens.astype(predicted_tokens.dtype) + 0.5  # half a token more, as lengths are rounded
    survival = ndtr((log_mean - jnp.log(emitted)) / log_sd)
    tail = jax.random.uniform(key, emitted_tokens.shape, minval=jnp.finfo(jnp.float32).tiny) * survival
    return jnp.exp(log_mean - log_sd * ndtri(tail))


def _round_tokens(tokens: Array, min_tokens: Array | int) -> Array:
    return jnp.maximum(jnp.minimum(jnp.round(tokens), _MAX_TOKENS).astype(jnp.int32), min_tokens)
