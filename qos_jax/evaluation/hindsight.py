"""The hindsight planner: the best assignment found for a trace of which everything is known beforehand.

No router can know the true lengths and scores of requests that have not arrived, so what the planner earns is out of
reach. It is the yardstick: between the best heuristic and the planner lies what foresight could still gain. It is found
by local search on the exact engine, and is not proven to be the best; ``qos_jax.evaluation.upper_bound`` says what no plan can exceed.

The search goes along the trace in windows. At the start of a window the experts' states are known exactly, for all
before it is decided. The requests of the window may be moved, a lookahead behind it follows the plan as it stands.

* Given an assignment the experts do not see each other. A move changes the few experts that it touches, so what it is
  worth is the difference of one lane each: an expert that serves a list of requests from the start of the window on.
  Many lanes run in one call of the engine.
* Moves are: one request goes to another expert, is dropped or is taken back; a request takes the place of another one,
  which goes elsewhere, to the first one's expert, or is dropped. Improving moves that are far apart in time or touch
  other experts are made together, if the engine says that they are better together.
* An answer counts only as in time or late, which leaves the search on a plateau: it packs experts to the limit, where
  the next request breaks many. So an answer in time is worth its score and a price times its share of the limit left
  over. Sweeps over the trace lower the price. What counts in the end is the QoS of the replayed plan.
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
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, AnyArray, ExpertProfile, RequestTrace
from qos_jax.sim.validation import checked_assignment, checked_experts, checked_trace
from qos_jax.sim.world import slot_latency_per_token_s

PRICES = (0.3, 0.2, 0.15, 0.1, 0.04)  # of slack, one for each sweep
_WINDOW, _LOOKAHEAD, _APART, _NEAR = 0.7, 2.2, 0.45, 1.4  # in times that a request may take on average
_LARGEST_WINDOW = 256  # requests that may be moved
_LANES = 64  # in one call of the engine: few enough that their state stays in cache
_PAIRS = 256  # that are tried where no single move improves
_PERTURBED = 0.02  # share of the requests that a restart moves at random
_ROUNDING = 1e-9


class Plan(NamedTuple):
    """An assignment and what it earns."""

    assignment: np.ndarray  # [J] int32, -1 drops
    qos: float  # mean over the requests, as ``replay`` says


def plan(
    experts: ExpertProfile,
    trace: RequestTrace,
    starts: Sequence[AnyArray] = (),
    *,
    prices: Sequence[float] = PRICES,
    restarts: int = 0,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
    progress: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Searches for the assignment of a known trace that earns the most QoS.

    Args:
      experts: profile of the N experts.
      trace: J requests in order of arrival, with scores and latency limits.
      starts: assignments [J] to improve on, of routers as a rule; the plan is never worse than the best of them.
      prices: of slack, one for each sweep over the trace.
      restarts: how often to go on from the best plan so far with a part of its requests moved at random.
      seed: of these moves.
      token_budget: tokens that one iteration may take.
      block_size: tokens per KV block.
      progress: called with the best plan so far after each sweep.

    Raises:
      InputError: a field of the arguments is not usable.
    """
    search = _Search(experts, trace, token_budget, block_size)
    best = max((search.judged(start) for start in (*starts, search.best_scores())), key=lambda plan: plan.qos)
    rng = np.random.default_rng(seed)
    for restart in range(restarts + 1):
        assignment = best.assignment if restart == 0 else search.perturbed(best.assignment, rng)
        assignment = search.without_violators(assignment)
        for price in prices:
            assignment = search.sweep(assignment, price)
            best = max(best, search.judged(assignment), key=lambda plan: plan.qos)
            progress(best)
    return best


def known_trace(trace: RequestTrace, num_experts: int) -> RequestTrace:
    """Returns the checked trace as ``checked_trace`` does, with scores and latency limits as float64.

    Raises:
      InputError: the trace has no request, or scores or limits are missing, of a wrong shape or not finite.
    """
    trace = checked_trace(trace, num_experts)
    num_requests = len(trace.arrival_s)
    if num_requests == 0:
        raise InputError("trace has no request, must have at least one")
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
    """The requests of a window and its lookahead, padded behind."""

    arrival_s: AnyArray  # [W] s
    prompt_tokens: AnyArray  # [W] int32
    output_tokens: AnyArray  # [W, N] int32
    score: AnyArray  # [W, N]
    latency_limit_s: AnyArray  # [W] s/token


class _Search:
    """What all sweeps over one trace share."""

    def __init__(self, experts: ExpertProfile, trace: RequestTrace, token_budget: int, block_size: int) -> None:
        self.experts = checked_experts(experts)
        self.num_experts = len(self.experts.step_base_s)
        self.trace = known_trace(trace, self.num_experts)
        self.num_requests = len(self.trace.arrival_s)
        held = int((self.experts.max_running + self.experts.max_waiting).max())
        self.spec = EngineSpec(_round_up(min(held, self.num_requests)), token_budget, block_size)
        allowed_s = float(np.mean(self.trace.latency_limit_s[:, None] * self.trace.output_tokens))
        self.apart_s, self.near_s = _APART * allowed_s, _NEAR * allowed_s
        self.ranges = _ranges(self.trace.arrival_s, allowed_s)
        self.width = _round_up(max(hi - lo for lo, _, hi in self.ranges))

    def judged(self, assignment: AnyArray) -> Plan:
        """Replays an assignment [J] and says what it earns."""
        assignment = checked_assignment(assignment, self.num_requests, self.num_experts)
        return Plan(assignment, float(self._qos(assignment).mean()))

    def best_scores(self) -> np.ndarray:
        """Returns the assignment [J] to the best scores: as a rule an overload, but it needs no router."""
        return np.argmax(self.trace.score, axis=1)

    def perturbed(self, assignment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the assignment with a part of the requests on any expert, or dropped."""
        moved = rng.choice(self.num_requests, math.ceil(_PERTURBED * self.num_requests), replace=False)
        assignment = assignment.copy()
        assignment[moved] = rng.integers(-1, self.num_experts, len(moved))
        return assignment

    def without_violators(self, assignment: np.ndarray) -> np.ndarray:
        """Drops the requests that earn nothing, and those that then earn nothing, as long as the others do not lose."""
        earned = self._qos(assignment)
        while True:
            fewer = np.where(earned > 0, assignment, -1)
            then_earned = self._qos(fewer)
            if (fewer == assignment).all() or then_earned.sum() < earned.sum():
                return assignment
            assignment, earned = fewer, then_earned

    def sweep(self, assignment: np.ndarray, price: float) -> np.ndarray:
        """Improves an assignment [J] window by window."""
        assignment = assignment.copy()
        with jax.enable_x64(True):
            experts = jax.tree.map(jnp.asarray, self.experts)
            zero = jnp.zeros((), float)
            states = engine.init_state(self.spec, (self.num_experts,), _Payload(zero, zero), float)
            for (lo, movable, hi), (following, *_) in itertools.pairwise([*self.ranges, (self.num_requests, 0, 0)]):
                window = _Window(self, experts, states, price, lo, movable, hi)
                assignment[lo:hi] = _improved(window, assignment[lo:hi])
                if following < self.num_requests:
                    states = window.states_after(following - lo, assignment[lo:hi])
        return assignment

    def _qos(self, assignment: np.ndarray) -> np.ndarray:
        (replayed,) = replay_many(
            self.experts, [self.trace], [assignment],
            token_budget=self.spec.token_budget, block_size=self.spec.block_size,
        )  # fmt: skip
        return qos_of(self.experts, self.trace, assignment, replayed).astype(np.float64)


def _round_up(count: int) -> int:
    """Returns a power of two, so that few shapes are compiled."""
    return 1 << max(count - 1, 15).bit_length()


def _ranges(arrival_s: np.ndarray, allowed_s: float) -> list[tuple[int, int, int]]:
    """Returns for each window its first request, how many of them may be moved, and the end of its lookahead."""
    ranges, lo = [], 0
    while lo < len(arrival_s):
        ends_s = arrival_s[lo] + allowed_s * np.array([_WINDOW, _WINDOW + _LOOKAHEAD])
        moved, hi = (int(each) for each in np.searchsorted(arrival_s, ends_s, side="right"))
        movable = min(moved - lo, _LARGEST_WINDOW)
        ranges.append((lo, movable, hi))
        lo += (movable + 1) // 2
    return ranges


class _Window:
    """The experts at the arrival of a request, the requests from there on, and what lists of them are worth."""

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

    def worth(self, lane: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Returns what experts ``lane`` [M] earn that serve the requests ``mine`` [M, W], until all are done."""
        order = np.lexsort((mine.sum(1), lane))  # lanes side by side should be as alike as can be
        values = np.empty(len(lane))
        for first in range(0, len(lane), _LANES):
            part = order[first : first + _LANES]
            full = np.resize(part, _LANES)
            values[part] = _worth(self.spec, self._lanes(lane[full], mine[full]), self.price)[: len(part)]
        return values

    def totals(self, assignments: Sequence[np.ndarray]) -> np.ndarray:
        """Returns what the experts earn together under each of the assignments [R, W]."""
        mine = np.asarray(assignments)[:, None] == np.arange(self.num_experts)[:, None]
        lane = np.tile(np.arange(self.num_experts), len(assignments))
        return self.worth(lane, mine.reshape(len(lane), -1)).reshape(mine.shape[:2]).sum(1)

    def states_after(self, count: int, assignment: np.ndarray) -> ExpertState:
        """Returns the experts when the first ``count`` requests are on them and the next one arrives."""
        lane = np.arange(self.num_experts)
        mine = (assignment == lane[:, None]) & (np.arange(len(assignment)) < count)
        return _state_at(self.spec, self._lanes(lane, mine), self.arrival_s[count])

    def _lanes(self, lane: np.ndarray, mine: np.ndarray) -> _Lanes:
        mine = np.pad(mine, ((0, 0), (0, self.width - mine.shape[1])))
        return _Lanes(self.experts, self.states, self.arrival_s[0], self.requests, lane, mine)


class _Lanes(struct.PyTreeNode):
    """Experts that each serve a list of requests from a time on."""

    experts: ExpertProfile  # [N]
    states: ExpertState  # [N] at the start
    start_s: AnyArray  # []
    requests: _Requests
    expert: AnyArray  # [L] int
    mine: AnyArray  # [L, W] bool

    @property
    def profile(self) -> ExpertProfile:
        """[L]."""
        return jax.tree.map(lambda x: x[self.expert], self.experts)


@partial(jax.jit, static_argnums=0)
def _worth(spec: EngineSpec, lanes: _Lanes, price: float) -> Array:
    """Returns what the lanes earn [L] until all is done."""
    state, _, earned = _served(spec, lanes, price)
    return earned + _earned(lanes.profile, engine.drain(spec, lanes.profile, state), price)


@partial(jax.jit, static_argnums=0)
def _state_at(spec: EngineSpec, lanes: _Lanes, end_s: float) -> ExpertState:
    """Returns the lanes as they are at ``end_s``."""
    state, now_s, _ = _served(spec, lanes, 0.0)
    return engine.compact(spec, engine.advance(spec, lanes.profile, state, end_s - now_s))


def _served(spec: EngineSpec, lanes: _Lanes, price: Array | float) -> tuple[ExpertState, Array, Array]:
    """Lets all requests arrive; returns the state, the time and what is earned so far but for ``state``, [L] each."""
    requests, profile, (count, width) = lanes.requests, lanes.profile, lanes.mine.shape
    state = jax.tree.map(lambda x: x[lanes.expert], lanes.states)
    place = jnp.where(lanes.mine, jnp.cumsum(lanes.mine, 1) - 1, width)
    lists = jnp.full((count, width), width).at[jnp.arange(count)[:, None], place].set(jnp.arange(width), mode="drop")

    def arrive(carry: tuple[Array, ExpertState, Array, Array]) -> tuple[Array, ExpertState, Array, Array]:
        i, state, now_s, earned = carry
        there = lists[:, i] < width
        request = jnp.minimum(lists[:, i], width - 1)
        arrival_s = jnp.where(there, requests.arrival_s[request], now_s)
        state = engine.advance(spec, profile, state, arrival_s - now_s)
        state, earned = lax.cond(
            jnp.any(engine.needs_compact(state)),
            lambda: (engine.compact(spec, state), earned + _earned(profile, state, price)),
            lambda: (state, earned),
        )
        prompt_tokens = requests.prompt_tokens[request]
        output_tokens = requests.output_tokens[request, lanes.expert]
        taken = there & engine.admissible(spec, profile, state, prompt_tokens, output_tokens)
        payload = _Payload(requests.score[request, lanes.expert], requests.latency_limit_s[request])
        return i + 1, engine.push(state, taken, prompt_tokens, output_tokens, payload), arrival_s, earned

    start = (jnp.int32(0), state, jnp.broadcast_to(lanes.start_s, (count,)), jnp.zeros(count))
    longest = jnp.max(jnp.sum(lanes.mine, 1))
    return lax.while_loop(lambda carry: carry[0] < longest, arrive, start)[1:]


def _earned(profile: ExpertProfile, state: ExpertState, price: Array | float) -> Array:
    """Returns the scores of the answers in time [L], and the price of what they left over of their limits."""
    payload = state.slots.payload
    slack = 1.0 - slot_latency_per_token_s(profile, state.slots) / payload.latency_limit_s
    in_time = state.slots.finished & (slack > _ROUNDING)  # lest the replay find it late
    return jnp.sum(jnp.where(in_time, payload.score + price * slack, 0.0), -1)


class _Move(NamedTuple):
    gain: float
    changes: tuple[tuple[int, int], ...]  # (request, expert or -1)


class _Gains(NamedTuple):
    """What single moves change; an expert's part stays true as long as its list does."""

    worth: np.ndarray  # [N] of each expert's list
    leave: np.ndarray  # [M] of a movable request's expert, without it; 0 where it has none
    join: np.ndarray  # [M, N + 1] of each expert, with it; -inf where it is already; the last is the drop


def _improved(window: _Window, assignment: np.ndarray) -> np.ndarray:
    """Returns an assignment [W] of which no move that is tried improves the window."""
    shape = (window.movable, window.num_experts + 1)
    gains = _Gains(np.zeros(window.num_experts), np.zeros(shape[0]), np.zeros(shape))
    changed = np.ones(window.num_experts, bool)
    while True:
        gains = _single_gains(window, assignment, gains, changed)
        moves = _single_moves(gains) or _exchanges(window, assignment, gains)
        chosen = _chosen(window, assignment, moves)
        if not chosen:
            return assignment
        better = [_moved(assignment, chosen[: max(len(chosen) // parts, 1)]) for parts in (1, 2, len(chosen))]
        best = better[int(np.argmax(window.totals(better)))] if len(chosen) > 1 else better[0]
        differs = assignment != best
        changed = np.isin(np.arange(window.num_experts), [assignment[differs], best[differs]])
        assignment = best


def _single_gains(window: _Window, assignment: np.ndarray, known: _Gains, changed: np.ndarray) -> _Gains:
    """Returns the gains of single moves, of which those of experts that have not ``changed`` [N] are known."""
    experts, here = np.arange(window.num_experts), assignment[: window.movable]
    mine = assignment == experts[:, None]
    bases = np.flatnonzero(changed)
    leavers = np.flatnonzero((here >= 0) & changed[here])
    joiners, joined = np.nonzero((here[:, None] != experts) & changed)
    lane = np.concatenate([bases, here[leavers], joined])
    lists = mine[lane]
    lists[np.arange(len(bases), len(bases) + len(leavers)), leavers] = False
    lists[np.arange(len(bases) + len(leavers), len(lane)), joiners] = True
    values = window.worth(lane, lists)

    worth, leave, join = known.worth.copy(), np.where(here < 0, 0.0, known.leave), known.join.copy()
    worth[bases] = values[: len(bases)]
    values -= worth[lane]
    leave[leavers] = values[len(bases) : len(bases) + len(leavers)]
    join[joiners, joined] = values[len(bases) + len(leavers) :]
    join[:, -1] = 0.0
    join[np.arange(window.movable), here] = -np.inf
    return _Gains(worth, leave, join)


def _single_moves(gains: _Gains) -> list[_Move]:
    gain = gains.leave[:, None] + gains.join
    drop = len(gains.worth)
    return [
        _Move(float(gain[request, expert]), ((int(request), int(expert) if expert < drop else -1),))
        for request, expert in np.argwhere(gain > _ROUNDING)
    ]


def _exchanges(window: _Window, assignment: np.ndarray, gains: _Gains) -> list[_Move]:
    """Returns the improving ones among the most promising moves by which one request takes the place of another."""
    here, arrival_s = assignment[: window.movable], window.arrival_s[: window.movable]
    near = np.abs(arrival_s[:, None] - arrival_s) < window.near_s
    new, old = np.nonzero((here[:, None] != here) & (here >= 0) & near)
    expert, before = here[old], here[new]
    # What its neighbours lose by the new request may be what they get back without the old one: half is taken for that.
    crowding = window.score[new, expert] - gains.join[new, expert]
    promise = gains.leave[new] + gains.join[new, expert] + gains.leave[old] + gains.join[old].max(1) + crowding / 2
    best = np.argsort(-promise)[:_PAIRS]
    new, old, expert, before = new[best], old[best], expert[best], before[best]
    lists = assignment == expert[:, None]
    lists[np.arange(len(new)), new], lists[np.arange(len(old)), old] = True, False
    taken = window.worth(expert, lists) - gains.worth[expert]

    # The old one goes to a third expert or is dropped, or to the new one's expert if that was tried the other way, too.
    elsewhere = gains.join[old]
    elsewhere[before >= 0, before[before >= 0]] = -np.inf
    third = elsewhere.argmax(1)
    gain = taken + gains.leave[new] + elsewhere.max(1)
    third = np.where(third < window.num_experts, third, -1)
    both_ways = np.full((window.movable,) * 2, -np.inf)
    both_ways[new, old] = taken
    swap = taken + both_ways[old, new]
    return [
        _Move(float(g), ((int(j), int(n)), (int(k), int(m))))
        for gains_of, place in ((gain, third), (swap, before))
        for g, j, n, k, m in zip(gains_of, new, expert, old, place, strict=True)
        if g > _ROUNDING
    ]


def _chosen(window: _Window, assignment: np.ndarray, moves: Sequence[_Move]) -> list[_Move]:
    """Returns the best move, and the next best ones that touch other experts or do so at another time."""
    chosen: list[_Move] = []
    touched: list[tuple[int, float]] = []
    moved: set[int] = set()
    for move in sorted(moves, key=lambda move: -move.gain):
        touches = [
            (expert, window.arrival_s[request])
            for request, after in move.changes
            for expert in (assignment[request], after)
            if expert >= 0
        ]
        clashes = any(a == b and abs(s - t) < window.apart_s for a, s in touches for b, t in touched)
        requests = {request for request, _ in move.changes}
        if not clashes and moved.isdisjoint(requests):
            chosen.append(move)
            touched += touches
            moved |= requests
    return chosen


def _moved(assignment: np.ndarray, moves: Sequence[_Move]) -> np.ndarray:
    assignment = assignment.copy()
    for request, expert in (change for move in moves for change in move.changes):
        assignment[request] = expert
    return assignment
