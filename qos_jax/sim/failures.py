"""Experts that fail and return. A failed one loses its requests and its cache, and takes no request until it is back.

An iteration that has begun is still finished. Each expert is up and down in turn, for exponential times that do not
depend on the requests, so that all routers meet the same failures. Of an expert that changes more than once between two
arrivals, the later changes wait for the next arrival. A health check is never late: no router may send a request to an
expert that is down.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim import engine
from qos_jax.sim.engine_state import EngineSpec, ExpertState, total
from qos_jax.sim.sessions import forget
from qos_jax.sim.types import ExpertProfile

_STREAM = 0x6661696C  # folded into a key for a stream of its own: small numbers give those of ``jax.random.split``


class FailureLaw(struct.PyTreeNode):
    """How long experts are up and down on average; infinite for one that never fails."""

    mean_up_s: Array  # [N] s
    mean_down_s: Array  # [N] s


class Failures(struct.PyTreeNode):
    """The law, and which experts are down."""

    law: FailureLaw
    seed: Array  # [] uint32
    changes: Array  # [] int32 intervals so far, in each of which an expert may change once
    left_s: Array  # [N] s until each expert changes
    down: Array  # [N] bool
    failed_after_s: Array  # [N] s into the last interval at which each expert failed; infinite if it did not
    lost: Array  # [] int32 requests lost since they were last counted


class Interval(struct.PyTreeNode):
    """What happens to each expert in an interval."""

    until_s: Array  # [N] s from its beginning, how long the expert works on
    rest_s: Array  # [N] s after that, in which it has no request
    fails: Array  # [N] bool


def all_up(law: FailureLaw, key: Array) -> Failures:
    """Returns the state in which every expert is up.

    Args:
      law: of N experts.
      key: random key, which decides about all failures to come; it may have other uses.
    """
    seed = _seed(key, ())
    zeros = jnp.zeros_like(law.mean_up_s)
    left_s = _sojourns_s(seed, jnp.int32(0), law.mean_up_s)
    return Failures(law, seed, jnp.int32(0), left_s, zeros > 0, zeros + jnp.inf, jnp.int32(0))


def next_interval(state: Failures, duration_s: Array) -> tuple[Interval, Failures]:
    """Returns what happens within ``duration_s`` [] s, and the state at its end."""
    duration_s = duration_s.astype(state.left_s.dtype)
    changes = state.left_s < duration_s
    fails, down = changes & ~state.down, state.down ^ changes
    until_s = jnp.where(changes, state.left_s, duration_s)
    number, law = state.changes + 1, state.law
    next_s = _sojourns_s(state.seed, number, jnp.where(down, law.mean_down_s, law.mean_up_s))
    left_s = jnp.where(changes, jnp.maximum(next_s - (duration_s - until_s), 0.0), state.left_s - duration_s)
    failed_after_s = jnp.where(fails, until_s, jnp.inf)
    after = state.replace(changes=number, left_s=left_s, down=down, failed_after_s=failed_after_s)
    return Interval(until_s, duration_s - until_s, fails), after


def run(
    spec: EngineSpec, profile: ExpertProfile, experts: ExpertState, interval: Interval
) -> tuple[ExpertState, Array]:
    """Runs the experts through an interval; returns them, and how many requests were lost [] int32."""
    experts = engine.advance(spec, profile, experts, interval.until_s)
    experts, lost = without_requests(experts, interval.fails)
    return engine.rebase(forget(experts, interval.fails), interval.rest_s), lost


def without_requests(experts: ExpertState, which: Array) -> tuple[ExpertState, Array]:
    """Returns the experts, of which ``which`` [L] bool have lost their requests, and how many were lost [] int32."""
    slots = experts.slots
    lost = slots.live & which[..., None]
    slots = jax.tree.map(lambda x: jnp.where(lost, jnp.zeros_like(x), x), slots)

    def stopped(values: Array) -> Array:
        return jnp.where(which, jnp.zeros_like(values), values)

    experts = experts.replace(
        slots=slots,
        clock_s=stopped(experts.clock_s),
        scheduled_s=stopped(experts.scheduled_s),
        standby_left_s=stopped(experts.standby_left_s),
        running=stopped(experts.running),
        waiting=stopped(experts.waiting),
        steady=stopped(experts.steady),
    )
    return experts, jnp.sum(total(lost), dtype=jnp.int32)


def reseeded(state: Failures | None, key: Array) -> Failures | None:
    """Returns the same state with another future, for a world that is set back to it; None where none fails."""
    return None if state is None else state.replace(seed=_seed(key, state.seed.shape))


def _seed(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.bits(jax.random.fold_in(jax.random.clone(key), _STREAM), shape, jnp.uint32)


def _sojourns_s(seed: Array, number: Array, mean_s: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    unit = jax.random.exponential(key, mean_s.shape, mean_s.dtype)
    return jnp.where(jnp.isinf(mean_s), jnp.inf, unit * mean_s)
