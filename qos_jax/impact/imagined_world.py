"""Belief states: what a router observes, with sampled or expected lengths in place of the hidden true ones.

How far an expert is within its iteration is not seen; an imagined one may start the next at once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr, ndtri

from qos_jax.sim.engine import ExpertState, Slots
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, Observation, Request, RequestView
from qos_jax.sim.world import SlotPayload, Telemetry, World

LENGTH_CV = 1.1  # of an output length given its prediction: a lognormal with 3/4 of a log variance of 1 unexplained
_LONGEST_TOKENS = 2.0**30


def sample_belief(obs: Observation, length_cv: float = LENGTH_CV, key: Array | None = None) -> World:
    """Returns a world with the requests that the router observes, in the slots where it sees them.

    Their scores are the predicted ones: what to expect, however long they are.

    Args:
      obs: what the router sees; if it sees late, the world is that of the snapshot.
      length_cv: coefficient of variation of an output length given its prediction; at 0 predictions are the truth.
      key: draws the output lengths; without it they are the expected ones.
    """
    seen = obs.requests
    emitted = seen.generated_tokens
    if key is None:
        total = emitted + tokens_left(seen, length_cv)
    else:
        total = _drawn_tokens(key, seen.predicted_tokens, emitted, length_cv)
    # A request is taken only if all of it fits in memory, so one that is there does; an endless one would never end.
    room = jnp.asarray(obs.experts.profile.kv_blocks)[:, None] * BLOCK_SIZE_TOKENS - seen.prompt_tokens
    output_tokens = jnp.minimum(_whole(total, emitted + 1), room)

    no_tokens, no_time_s = jnp.zeros_like(emitted), jnp.zeros_like(seen.age_s)
    slots = Slots(
        prompt_tokens=seen.prompt_tokens,
        output_tokens=output_tokens,
        generated=emitted,
        computed=jnp.where(seen.running, seen.computed_tokens, 0),
        preemptions=no_tokens,
        arrival_s=-seen.age_s,
        first_token_s=no_time_s,
        finish_s=no_time_s,
        payload=SlotPayload(seen.predicted_score, seen.latency_limit_s, seen.predicted_score, seen.predicted_tokens),
    )
    taken = (seen.running | seen.waiting) & (output_tokens > emitted)
    slots = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), slots)
    idle_s, passes = no_time_s[:, 0], no_tokens[:, 0]
    arrivals = obs.arrived.recent_rate_per_s * jnp.array(RATE_WINDOWS_S)
    return World(ExpertState(slots, idle_s, idle_s, idle_s, passes), Telemetry(arrivals, None))


def sample_request(obs: Observation, length_cv: float = LENGTH_CV, key: Array | None = None) -> Request:
    """Returns the arrived request with an expected or sampled length, the same on all experts."""
    arrived = obs.arrived
    tokens = arrived.predicted_tokens
    if key is not None:
        tokens = _drawn_tokens(key, tokens, jnp.zeros(1, jnp.int32), length_cv)
    return Request(
        prompt_tokens=arrived.prompt_tokens,
        output_tokens=_whole(tokens, 1),
        score=arrived.predicted_score,
        latency_limit_s=arrived.latency_limit_s,
        predicted_score=arrived.predicted_score,
        predicted_tokens=arrived.predicted_tokens,
    )


def tokens_left(seen: RequestView, length_cv: float) -> Array:
    """Returns how many more tokens [N, S] each request is expected to emit: the more, the longer it has run."""
    emitted = seen.generated_tokens.astype(jnp.float32)
    return jnp.hypot(seen.predicted_tokens - emitted, length_cv * emitted)


def _drawn_tokens(key: Array, predicted_tokens: Array, emitted_tokens: Array, length_cv: float) -> Array:
    """Draws lengths from lognormals with the predictions as means, given that each is more than was emitted."""
    if length_cv == 0:
        return predicted_tokens
    log_sd = math.sqrt(math.log1p(length_cv**2))
    log_mean = jnp.log(predicted_tokens) - log_sd**2 / 2.0
    longer = ndtr((log_mean - jnp.log(emitted_tokens + 0.5)) / log_sd)  # half a token more, as lengths are rounded
    tail = jax.random.uniform(key, emitted_tokens.shape, minval=jnp.finfo(jnp.float32).tiny) * longer
    return jnp.exp(log_mean - log_sd * ndtri(tail))


def _whole(tokens: Array, least: Array | int) -> Array:
    return jnp.clip(jnp.round(tokens), least, _LONGEST_TOKENS).astype(jnp.int32)
