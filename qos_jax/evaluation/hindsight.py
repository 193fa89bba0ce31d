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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.evaluation.hindsight_moves import improved
from qos_jax.evaluation.hindsight_window import Payload, Scope, Window
from qos_jax.evaluation.metrics import qos_of
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile, RequestTrace
from qos_jax.sim.validation import MAX_SEED, checked_assignment, checked_experts, checked_trace, checked_whole

PRICES = (0.3, 0.2, 0.15, 0.1, 0.04)  # of slack, one for each sweep
_WINDOW, _LOOKAHEAD, _APART, _NEAR = 0.7, 2.2, 0.45, 1.4  # in units of the mean allowed time of a request
_MAX_MOVABLE = 256  # requests of a window
_PERTURBED = 0.02  # share of the requests that a restart moves at random


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
        self.ranges = _ranges(self.trace.arrival_s, allowed_s)
        width = _round_up(max(hi - lo for lo, _, hi in self.ranges))
        self.scope = Scope(
            self.spec, self.trace, self.num_experts, width, apart_s=_APART * allowed_s, near_s=_NEAR * allowed_s
        )

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
            states = engine.init_state(self.spec, (self.num_experts,), Payload(zero, zero), float)
            for (lo, movable, hi), (next_lo, *_) in itertools.pairwise([*self.ranges, (self.num_requests, 0, 0)]):
                window = Window(self.scope, experts, states, price, lo, movable, hi)
                assignment[lo:hi] = improved(window, assignment[lo:hi])
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
