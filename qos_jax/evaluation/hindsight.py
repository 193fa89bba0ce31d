"""The hindsight planner: the best assignment found for a trace that is fully known in advance.

No router knows the true lengths and scores of future requests, so the planner's QoS is out of reach for routers. The
difference between the best heuristic and the planner is what foresight could still gain. The plan is found by local
search on the exact engine and not proven to be optimal. ``qos_jax.evaluation.upper_bound`` is a proven bound for every
plan.

The search proceeds along the trace in windows. At the start of a window the state of the experts is known exactly, as
all earlier requests are assigned. The requests of the window can be moved. Those of a lookahead after it follow the
current plan.

* Given an assignment, the experts do not interact. A move changes few experts, so its gain is the sum of the changes of
  their lanes. A lane is one expert with a list of requests from the start of the window on. Many lanes run in one call
  of the engine.
* In a move, one request is moved to another expert, dropped, or assigned again; or a request replaces another one,
  which is moved to a third expert or to the first request's expert, or is dropped. Improving moves that are far apart
  in time or concern different experts are made together, if the engine confirms that they improve the plan together.
* A QoS that is a step function of the latency has plateaus: the search fills experts up to the limit, where the next
  request delays many others beyond it. An answer in time is therefore worth its score plus a price times its remaining
  share of the limit. Each sweep over the trace lowers the price. The result is the plan with the best replayed QoS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.evaluation.metrics import qos_of
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile, RequestTrace
from qos_jax.sim.validation import MAX_SEED, checked_assignment, checked_experts, checked_trace, checked_whole
from qos_jax.sim.world import slot_latency_per_token_s

PRICES = (0.3, 0.2, 0.15, 0.1, 0.04)  # of slack, one for each sweep
_WINDOW, _LOOKAHEAD, _APART, _NEAR = 0.7, 2.2, 0.45, 1.4  # in units of the mean allowed time of a request
_MAX_MOVABLE = 256  # requests of a window
_LANES = 64  # in one call of the engine; their state fits the cache
_PAIRS = 256  # exchanges tried where no single move improves the window
_PERTURBED = 0.02  # share of the requests that a restart moves at random
_ROUNDING = 1e-9


class Plan(NamedTuple):
    """An assignment and its QoS."""

    assignment: np.ndarray  # [J] int32 expert, -1 for a drop
    qos: float  # mean over the requests, of the exact replay


def plan(
    experts: ExpertProfile,
    trace: RequestTrace,
    starts: Sequence[AnyArray] = (),
    *,
    prices: Sequence[float] = PRICES,
    restarts: int = 0,
    seed: int = 0,
    block_size: int = BLOCK_SIZE_TOKENS,
    progress: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Searches for the assignment of a known trace with the highest QoS.

    Args:
      experts: profile of the N experts.
      trace: J requests in order of arrival, with scores and latency limits.
      starts: assignments [J] to improve, for example those of routers; the plan is at least as good as each of them.
      prices: of slack, one for each sweep over the trace.
      restarts: number of further searches, from the best plan so far with some requests moved at random.
      seed: of these random moves.
      block_size: tokens per KV block.
      progress: called with the best plan so far after each sweep.

    Raises:
      InputError: a field of the arguments is not usable, or LLMs share a card: plans move one request at a time.
    """
    if experts.cards is not None:
        raise InputError("experts.cards is given, must be None: plans in hindsight know no shared cards")
    restarts, seed = checked_whole("restarts", restarts, 0), checked_whole("seed", seed, 0, MAX_SEED)
    search = _Search(experts, trace, block_size)
    best = max((search.evaluated(start) for start in (*starts, search.best_scores())), key=lambda plan: plan.qos)
    rng = np.random.default_rng(seed)
    for restart in range(restarts + 1):
        assignment = best.assignment if restart == 0 else search.perturbed(best.assignment, rng)
        assignment = search.without_violators(assignment)
        for price in prices:
            assignment = search.sweep(assignment, price)
            best = max(best, search.evaluated(assignment), key=lambda plan: plan.qos)
            progress(best)
    return best


def known_trace(trace: RequestTrace, num_experts: int) -> RequestTrace:
    """Returns the trace of ``checked_trace`` with scores and latency limits as float64.

    Raises:
      InputError: the trace is empty, or scores or limits are missing, of a wrong shape or not finite, or there are
        limits beside that on the latency per token, or sessions, in which prompts depend on who answered before.
    """
    if trace.turn is not None or np.any(trace.shared_tokens):
        raise InputError("the trace has sessions, must have none: their prompts depend on who answered before")
    trace = checked_trace(trace, num_experts)
    num_requests = len(trace.arrival_s)
    if num_requests == 0:
        raise InputError("trace has no request, must have at least one")
    if trace.limits is not None:
        raise InputError("trace.limits is given, must be None: plans in hindsight know the limit per token only")
    known = {}
    for name, shape in (("score", (num_requests, num_experts)), ("latency_limit_s", (num_requests,))):
        value = getattr(trace, name)
        if value is None:
            raise InputError(f"trace.{name} is None, must be known for each request")
        known[name] = np.asarray(value, np.float64)
        if known[name].shape != shape or not (np.isfinite(known[name]) & (known[name] >= 0)).all():
            raise InputError(f"trace.{name} must be {list(shape)} finite numbers that are not negative")
    return trace.replace(**known)


class _Payload(struct.PyTreeNode):
    score: AnyArray  # [L, S]
    latency_limit_s: AnyArray  # [L, S] s/token


class _Requests(struct.PyTreeNode):
    """The requests of a window and its lookahead, padded at the end."""

    arrival_s: AnyArray  # [W] s
    prompt_tokens: AnyArray  # [W] int32
    output_tokens: AnyArray  # [W, N] int32
    score: AnyArray  # [W, N]
    latency_limit_s: AnyArray  # [W] s/token


class _Search:
    """The data that all sweeps over one trace share."""

    def __init__(self, experts: ExpertProfile, trace: RequestTrace, block_size: int) -> None:
        self.experts = checked_experts(experts)
        self.num_experts = len(self.experts.step_base_s)
        self.trace = known_trace(trace, self.num_experts)
        self.num_requests = len(self.trace.arrival_s)
        capacity = int((self.experts.max_running + self.experts.max_waiting).max())
        self.spec = EngineSpec(_round_up(min(capacity, self.num_requests)), block_size)
        allowed_s = float(np.mean(self.trace.latency_limit_s[:, None] * self.trace.output_tokens))
        self.apart_s, self.near_s = _APART * allowed_s, _NEAR * allowed_s
        self.ranges = _ranges(self.trace.arrival_s, allowed_s)
        self.width = _round_up(max(hi - lo for lo, _, hi in self.ranges))

    def evaluated(self, assignment: AnyArray) -> Plan:
        """Returns an assignment [J] with the QoS of its replay."""
        assignment = checked_assignment(assignment, self.num_requests, self.num_experts)
        return Plan(assignment, float(self._qos(assignment).mean()))

    def best_scores(self) -> np.ndarray:
        """Returns the assignment [J] to the best scores, which needs no router but often overloads experts."""
        return np.argmax(self.trace.score, axis=1)

    def perturbed(self, assignment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the assignment with some requests moved to random experts or dropped."""
        moved = rng.choice(self.num_requests, math.ceil(_PERTURBED * self.num_requests), replace=False)
        assignment = assignment.copy()
        assignment[moved] = rng.integers(-1, self.num_experts, len(moved))
        return assignment

    def without_violators(self, assignment: np.ndarray) -> np.ndarray:
        """Drops the requests without QoS, again and again until nothing changes or the total QoS would fall."""
        qos = self._qos(assignment)
        while True:
            reduced = np.where(qos > 0, assignment, -1)
            reduced_qos = self._qos(reduced)
            if (reduced == assignment).all() or reduced_qos.sum() < qos.sum():
                return assignment
            assignment, qos = reduced, reduced_qos

    def sweep(self, assignment: np.ndarray, price: float) -> np.ndarray:
        """Improves an assignment [J] window by window."""
        assignment = assignment.copy()
        with jax.enable_x64(True):
            experts = jax.tree.map(jnp.asarray, self.experts)
            zero = jnp.zeros((), float)
            states = engine.init_state(self.spec, (self.num_experts,), _Payload(zero, zero), float)
            for (lo, movable, hi), (next_lo, *_) in itertools.pairwise([*self.ranges, (self.num_requests, 0, 0)]):
                window = _Window(self, experts, states, price, lo, movable, hi)
                assignment[lo:hi] = _improved(window, assignment[lo:hi])
                if next_lo < self.num_requests:
                    states = window.states_after(next_lo - lo, assignment[lo:hi])
        return assignment

    def _qos(self, assignment: np.ndarray) -> np.ndarray:
        """Returns the QoS [J] of each request in an exact replay."""
        (replayed,) = replay_many(self.experts, [self.trace], [assignment], block_size=self.spec.block_size)
        return qos_of(self.experts, self.trace, assignment, replayed).astype(np.float64)


def _round_up(count: int) -> int:
    """Returns the next power of two, at least 16, so that few shapes are compiled."""
    return 1 << max(count - 1, 15).bit_length()


def _ranges(arrival_s: np.ndarray, allowed_s: float) -> list[tuple[int, int, int]]:
    """Returns for each window its first request, its number of movable requests, and the end of its lookahead."""
    ranges, lo = [], 0
    while lo < len(arrival_s):
        ends_s = arrival_s[lo] + allowed_s * np.array([_WINDOW, _WINDOW + _LOOKAHEAD])
        window_end, hi = (int(each) for each in np.searchsorted(arrival_s, ends_s, side="right"))
        movable = min(window_end - lo, _MAX_MOVABLE)
        ranges.append((lo, movable, hi))
        lo += (movable + 1) // 2
    return ranges


class _Window:
    """The experts at the arrival of a request, and the requests from this one to the end of the lookahead."""

    def __init__(
        self, search: _Search, experts: ExpertProfile, states: ExpertState, price: float, lo: int, movable: int, hi: int
    ) -> None:
        def part(values: np.ndarray) -> Array:
            padding = search.width - (hi - lo)
            return jnp.asarray(np.pad(values[lo:hi], ((0, padding), *((0, 0),) * (values.ndim - 1))))

        trace = search.trace
        self.spec, self.experts, self.states, self.price = search.spec, experts, states, price
        self.num_experts, self.width = search.num_experts, search.width
        self.movable, self.apart_s, self.near_s = movable, search.apart_s, search.near_s
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
        payload = _Payload(requests.score[request, lanes.expert], requests.latency_limit_s[request])
        return i + 1, engine.push(state, admitted, prompt_tokens, output_tokens, payload), arrival_s, value

    start = (jnp.int32(0), state, jnp.broadcast_to(lanes.start_s, (count,)), jnp.zeros(count))
    longest = jnp.max(jnp.sum(lanes.assigned, 1))
    return lax.while_loop(lambda carry: carry[0] < longest, arrive, start)[1:]


def _value(profile: ExpertProfile, state: ExpertState, price: Array | float) -> Array:
    """Returns the sum [L] over the answers in time of score plus price times the remaining share of the limit."""
    payload = state.slots.payload
    slack = 1.0 - slot_latency_per_token_s(profile, state.slots) / payload.latency_limit_s
    in_time = state.slots.finished & (slack > _ROUNDING)  # a margin, as the replay may round differently
    return jnp.sum(jnp.where(in_time, payload.score + price * slack, 0.0), -1)


class _Move(NamedTuple):
    gain: float
    changes: tuple[tuple[int, int], ...]  # (request, expert or -1)


class _Gains(NamedTuple):
    """Gains of single moves of the M movable requests; those of an expert are valid until its list changes."""

    value: np.ndarray  # [N] of each expert's list
    leave: np.ndarray  # [M] gain of the request's expert without the request; 0 for dropped requests
    join: np.ndarray  # [M, N + 1] gain of each expert with the request; -inf for its current expert; last: the drop


def _improved(window: _Window, assignment: np.ndarray) -> np.ndarray:
    """Returns an assignment [W] that none of the tried moves improves."""
    shape = (window.movable, window.num_experts + 1)
    gains = _Gains(np.zeros(window.num_experts), np.zeros(shape[0]), np.zeros(shape))
    changed = np.ones(window.num_experts, bool)
    while True:
        gains = _single_gains(window, assignment, gains, changed)
        moves = _single_moves(gains) or _exchanges(window, assignment, gains)
        chosen = _chosen(window, assignment, moves)
        if not chosen:
            return assignment
        candidates = [_moved(assignment, chosen[: max(len(chosen) // parts, 1)]) for parts in (1, 2, len(chosen))]
        best = candidates[int(np.argmax(window.totals(candidates)))] if len(chosen) > 1 else candidates[0]
        differs = assignment != best
        changed = np.isin(np.arange(window.num_experts), [assignment[differs], best[differs]])
        assignment = best


def _single_gains(window: _Window, assignment: np.ndarray, known: _Gains, changed: np.ndarray) -> _Gains:
    """Returns the gains of single moves; only those of experts that have ``changed`` [N] are computed anew."""
    experts, current = np.arange(window.num_experts), assignment[: window.movable]
    assigned = assignment == experts[:, None]
    bases = np.flatnonzero(changed)
    leavers = np.flatnonzero((current >= 0) & changed[current])
    joiners, joined = np.nonzero((current[:, None] != experts) & changed)
    lane = np.concatenate([bases, current[leavers], joined])
    lists = assigned[lane]
    lists[np.arange(len(bases), len(bases) + len(leavers)), leavers] = False
    lists[np.arange(len(bases) + len(leavers), len(lane)), joiners] = True
    values = window.values(lane, lists)

    value, leave, join = known.value.copy(), np.where(current < 0, 0.0, known.leave), known.join.copy()
    value[bases] = values[: len(bases)]
    values -= value[lane]
    leave[leavers] = values[len(bases) : len(bases) + len(leavers)]
    join[joiners, joined] = values[len(bases) + len(leavers) :]
    join[:, -1] = 0.0
    join[np.arange(window.movable), current] = -np.inf
    return _Gains(value, leave, join)


def _single_moves(gains: _Gains) -> list[_Move]:
    """Returns the improving moves of one request."""
    gain = gains.leave[:, None] + gains.join
    drop = len(gains.value)
    return [
        _Move(float(gain[request, expert]), ((int(request), int(expert) if expert < drop else -1),))
        for request, expert in np.argwhere(gain > _ROUNDING)
    ]


def _exchanges(window: _Window, assignment: np.ndarray, gains: _Gains) -> list[_Move]:
    """Returns the improving moves among the most promising ones in which one request replaces another."""
    current, arrival_s = assignment[: window.movable], window.arrival_s[: window.movable]
    near = np.abs(arrival_s[:, None] - arrival_s) < window.near_s
    new, old = np.nonzero((current[:, None] != current) & (current >= 0) & near)
    expert, before = current[old], current[new]
    # The loss of the other requests by the new one may be compensated by the absence of the old one: half is assumed.
    crowding = window.score[new, expert] - gains.join[new, expert]
    promise = gains.leave[new] + gains.join[new, expert] + gains.leave[old] + gains.join[old].max(1) + crowding / 2
    best = np.argsort(-promise)[:_PAIRS]
    new, old, expert, before = new[best], old[best], expert[best], before[best]
    lists = assignment == expert[:, None]
    lists[np.arange(len(new)), new], lists[np.arange(len(old)), old] = True, False
    replaced = window.values(expert, lists) - gains.value[expert]

    # The old request goes to a third expert, is dropped, or goes to the new one's expert if that was tried as well.
    elsewhere = gains.join[old]
    elsewhere[before >= 0, before[before >= 0]] = -np.inf
    third = elsewhere.argmax(1)
    gain = replaced + gains.leave[new] + elsewhere.max(1)
    third = np.where(third < window.num_experts, third, -1)
    both_ways = np.full((window.movable,) * 2, -np.inf)
    both_ways[new, old] = replaced
    swap = replaced + both_ways[old, new]
    return [
        _Move(float(g), ((int(j), int(n)), (int(k), int(m))))
        for gains_of, place in ((gain, third), (swap, before))
        for g, j, n, k, m in zip(gains_of, new, expert, old, place, strict=True)
        if g > _ROUNDING
    ]


def _chosen(window: _Window, assignment: np.ndarray, moves: Sequence[_Move]) -> list[_Move]:
    """Returns the best move, and the next best moves that concern other experts or other times."""
    chosen: list[_Move] = []
    occupied: list[tuple[int, float]] = []  # experts and times that the chosen moves concern
    moved: set[int] = set()
    for move in sorted(moves, key=lambda move: -move.gain):
        concerned = [
            (expert, window.arrival_s[request])
            for request, after in move.changes
            for expert in (assignment[request], after)
            if expert >= 0
        ]
        clashes = any(a == b and abs(s - t) < window.apart_s for a, s in concerned for b, t in occupied)
        requests = {request for request, _ in move.changes}
        if not clashes and moved.isdisjoint(requests):
            chosen.append(move)
            occupied += concerned
            moved |= requests
    return chosen


def _moved(assignment: np.ndarray, moves: Sequence[_Move]) -> np.ndarray:
    """Returns the assignment after some moves."""
    assignment = assignment.copy()
    for request, expert in (change for move in moves for change in move.changes):
        assignment[request] = expert
    return assignment
