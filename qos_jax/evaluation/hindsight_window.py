"""A window of the hindsight planner: what its requests are worth on lanes of the exact engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.types import AnyArray, ExpertProfile, RequestTrace
from qos_jax.sim.world import slot_latency_per_token_s

_LANES = 64  # in one call of the engine; their state fits the cache
ROUNDING = 1e-9


class Scope(NamedTuple):
    """What all windows of a trace share."""

    spec: EngineSpec
    trace: RequestTrace  # of all requests
    num_experts: int
    width: int  # W, requests for which a window with its lookahead has room
    apart_s: float  # between moves that may be made together
    near_s: float  # between requests that may replace each other


class Payload(struct.PyTreeNode):
    """What the engine carries along with each request."""

    score: AnyArray  # [L, S]
    latency_limit_s: AnyArray  # [L, S] s/token


class _Requests(struct.PyTreeNode):
    """The requests of a window and its lookahead, padded at the end."""

    arrival_s: AnyArray  # [W] s
    prompt_tokens: AnyArray  # [W] int32
    output_tokens: AnyArray  # [W, N] int32
    score: AnyArray  # [W, N]
    latency_limit_s: AnyArray  # [W] s/token


class Window:
    """The experts at the arrival of a request, and the requests from this one to the end of the lookahead."""

    def __init__(
        self, scope: Scope, experts: ExpertProfile, states: ExpertState, price: float, lo: int, movable: int, hi: int
    ) -> None:
        """Takes the requests from ``lo`` to ``hi``, of which the first ``movable`` may be moved.

        Args:
          scope: what all windows share.
          experts: profile of the N experts.
          states: of the experts at the first arrival, [N].
          price: of slack, see ``qos_jax.evaluation.hindsight``.
          lo: the first request.
          movable: how many requests may be moved.
          hi: the end of the lookahead.
        """

        def part(values: np.ndarray) -> Array:
            padding = scope.width - (hi - lo)
            return jnp.asarray(np.pad(values[lo:hi], ((0, padding), *((0, 0),) * (values.ndim - 1))))

        trace = scope.trace
        self.spec, self.experts, self.states, self.price = scope.spec, experts, states, price
        self.num_experts, self.width = scope.num_experts, scope.width
        self.movable, self.apart_s, self.near_s = movable, scope.apart_s, scope.near_s
        self.arrival_s, self.score = trace.arrival_s[lo:hi], trace.score[lo:hi]
        self.requests = _Requests(**{name: part(getattr(trace, name)) for name in _Requests.__dataclass_fields__})

    def values(self, expert: np.ndarray, assigned: np.ndarray) -> np.ndarray:
        """Returns the value [M] of lanes: experts ``expert`` [M] that serve the requests ``assigned`` [M, W]."""
        order = np.lexsort((assigned.sum(1), expert))  # similar lanes in one call finish at similar times
        values = np.empty(len(expert))
        for first in range(0, len(expert), _LANES):
            part = order[first : first + _LANES]
            full = np.resize(part, _LANES)
            values[part] = _lane_values(self.spec, self._lanes(expert[full], assigned[full]), self.price)[: len(part)]
        return values

    def totals(self, assignments: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the value [R] of all experts under each of the assignments [R, W]."""
        assigned = np.asarray(assignments)[:, None] == np.arange(self.num_experts)[:, None]
        expert = np.tile(np.arange(self.num_experts), len(assignments))
        return self.values(expert, assigned.reshape(len(expert), -1)).reshape(assigned.shape[:2]).sum(1)

    def states_after(self, count: int, assignment: np.ndarray) -> ExpertState:
        """Returns the experts at the arrival of request ``count``, with the requests before it assigned."""
        expert = np.arange(self.num_experts)
        assigned = (assignment == expert[:, None]) & (np.arange(len(assignment)) < count)
        return _state_at(self.spec, self._lanes(expert, assigned), self.arrival_s[count])

    def _lanes(self, expert: np.ndarray, assigned: np.ndarray) -> _Lanes:
        assigned = np.pad(assigned, ((0, 0), (0, self.width - assigned.shape[1])))
        return _Lanes(self.experts, self.states, self.arrival_s[0], self.requests, expert, assigned)


class _Lanes(struct.PyTreeNode):
    """L lanes: experts that each serve a list of requests from a start time on."""

    experts: ExpertProfile  # [N]
    states: ExpertState  # [N] at the start
    start_s: AnyArray  # []
    requests: _Requests
    expert: AnyArray  # [L] int
    assigned: AnyArray  # [L, W] bool

    @property
    def profile(self) -> ExpertProfile:
        """Profile [L] of the experts of the lanes."""
        return jax.tree.map(lambda x: x[self.expert], self.experts)


@partial(jax.jit, static_argnums=0)
def _lane_values(spec: EngineSpec, lanes: _Lanes, price: float) -> Array:
    """Returns the value [L] of the lanes when all their requests are finished."""
    state, _, value = _after_arrivals(spec, lanes, price)
    return value + _value(lanes.profile, engine.drain(spec, lanes.profile, state), price)


@partial(jax.jit, static_argnums=0)
def _state_at(spec: EngineSpec, lanes: _Lanes, end_s: float) -> ExpertState:
    """Returns the state of the lanes at ``end_s``."""
    state, now_s, _ = _after_arrivals(spec, lanes, 0.0)
    return engine.compact(spec, engine.advance(spec, lanes.profile, state, end_s - now_s))


def _after_arrivals(spec: EngineSpec, lanes: _Lanes, price: Array | float) -> tuple[ExpertState, Array, Array]:
    """Returns the state, time and value so far [L] after all arrivals; requests in the state are not in the value."""
    requests, profile, (count, width) = lanes.requests, lanes.profile, lanes.assigned.shape
    state = jax.tree.map(lambda x: x[lanes.expert], lanes.states)
    place = jnp.where(lanes.assigned, jnp.cumsum(lanes.assigned, 1) - 1, width)
    lists = jnp.full((count, width), width).at[jnp.arange(count)[:, None], place].set(jnp.arange(width), mode="drop")

    def arrive(carry: tuple[Array, ExpertState, Array, Array]) -> tuple[Array, ExpertState, Array, Array]:
        i, state, now_s, value = carry
        exists = lists[:, i] < width
        request = jnp.minimum(lists[:, i], width - 1)
        arrival_s = jnp.where(exists, requests.arrival_s[request], now_s)
        state = engine.advance(spec, profile, state, arrival_s - now_s)
        state, value = lax.cond(
            jnp.any(engine.needs_compact(state)),
            lambda: (engine.compact(spec, state), value + _value(profile, state, price)),
            lambda: (state, value),
        )
        prompt_tokens = requests.prompt_tokens[request]
        output_tokens = requests.output_tokens[request, lanes.expert]
        admitted = exists & engine.admissible(spec, profile, state, prompt_tokens, output_tokens)
        payload = Payload(requests.score[request, lanes.expert], requests.latency_limit_s[request])
        return i + 1, engine.push(state, admitted, prompt_tokens, output_tokens, payload), arrival_s, value

    start = (jnp.int32(0), state, jnp.broadcast_to(lanes.start_s, (count,)), jnp.zeros(count))
    longest = jnp.max(jnp.sum(lanes.assigned, 1))
    return lax.while_loop(lambda carry: carry[0] < longest, arrive, start)[1:]


def _value(profile: ExpertProfile, state: ExpertState, price: Array | float) -> Array:
    """Returns the sum [L] over the answers in time of score plus price times the remaining share of the limit."""
    payload = state.slots.payload
    slack = 1.0 - slot_latency_per_token_s(profile, state.slots) / payload.latency_limit_s
    in_time = state.slots.finished & (slack > ROUNDING)  # a margin, as the replay may round differently
    return jnp.sum(jnp.where(in_time, payload.score + price * slack, 0.0), -1)
