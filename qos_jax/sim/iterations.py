"""A log of every iteration of one expert in a time window, with the activity of each request.

``replay`` runs a stretch of decode iterations as one closed form. ``iterations_of`` steps through them one at a time on
the host, with the same engine. It is slow and serves pictures and the analysis of a schedule.
"""

from __future__ import annotations

import enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from qos_jax.errors import InputError
from qos_jax.sim import engine, scheduler
from qos_jax.sim.cost import longest_iteration_s
from qos_jax.sim.engine import EngineSpec, ExpertState, Slots
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, RequestTrace
from qos_jax.sim.validation import checked_assignment, checked_experts, checked_trace, checked_whole


class Activity(enum.IntEnum):
    """What a request does in one iteration."""

    ABSENT = 0  # not arrived yet, or finished
    WAITING = 1  # gets no tokens: the batch, the memory or the budget is full
    PREFILL = 2  # computes tokens of its prompt, or recomputes tokens that a preemption discarded
    DECODE = 3  # computes its newest token and emits the next
    PREEMPTED = 4  # lost its KV blocks and waits to start over


@struct.dataclass
class IterationLog:
    """The I iterations of one expert that start in a window, and the R requests on it during these iterations."""

    expert: int
    start_s: np.ndarray  # [I] s
    duration_s: np.ndarray  # [I] s
    request: np.ndarray  # [R] positions in the trace, in order of arrival
    arrival_s: np.ndarray  # [R] s
    activity: np.ndarray  # [I, R] int8, an Activity
    tokens: np.ndarray  # [I, R] int32 tokens computed: prompt tokens in PREFILL, 1 in DECODE, else 0
    cached_tokens: np.ndarray  # [I, R] int32 tokens in the KV memory at the end


def iterations_of(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: ArrayLike,
    expert: int,
    start_s: float,
    end_s: float,
    *,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> IterationLog:
    """Returns the iterations of one expert in a window of time.

    Args:
      experts: profile of the N experts.
      trace: J requests, as for ``replay``.
      assignment: [J] int, expert of each request.
      expert: index of the expert, 0 .. N - 1.
      start_s: begin of the window; iterations that start earlier are not logged.
      end_s: end of the window; iterations that start at this time or later are not logged.
      block_size: tokens per KV block.

    Returns:
      The iterations as the engine runs them in float32, and the requests on the expert during these iterations.

    Raises:
      InputError: an argument has a wrong shape or an illegal value, or LLMs share a card: one expert is run alone.
    """
    if experts.cards is not None:
        raise InputError("experts.cards is given, must be None: iterations are those of one expert alone")
    fleet = checked_experts(experts, np.float32)
    max_running, max_waiting = np.asarray(fleet.max_running), np.asarray(fleet.max_waiting)
    trace = checked_trace(trace, len(max_running))
    arrival_s = np.asarray(trace.arrival_s)
    expert_of_request = checked_assignment(assignment, len(arrival_s), len(max_running))
    expert = checked_whole("expert", expert, 0, len(max_running) - 1)
    if not start_s < end_s:
        raise InputError(f"the window is {start_s} .. {end_s} s, must end after it starts")
    request = np.flatnonzero((expert_of_request == expert) & (arrival_s < end_s))
    max_live = min(len(request), int(max_running[expert]) + int(max_waiting[expert]))
    slots = 1 << max_live.bit_length()  # powers of two, so that few shapes are compiled
    profile = jax.tree.map(lambda x: jnp.asarray(x[expert : expert + 1]), fleet)
    stepper = _Stepper(EngineSpec(slots, block_size), profile, trace, request, expert)
    stepper.skip_to(start_s - stepper.longest_s)
    records = []
    while stepper.reach_next_iteration() and stepper.boundary_s < end_s:
        begin_s, iteration = stepper.boundary_s, stepper.iterate()
        if iteration is not None and begin_s >= start_s:
            records.append((begin_s, *iteration))
    return _log(records, expert, request, arrival_s[request])


class _Stepper:
    """The engine with one expert, to which requests are added as they arrive."""

    def __init__(
        self, spec: EngineSpec, profile: ExpertProfile, trace: RequestTrace, request: np.ndarray, expert: int
    ) -> None:
        self.spec, self.profile = spec, profile
        self.arrival_s = np.asarray(trace.arrival_s)[request]
        self.prompt_tokens = np.asarray(trace.prompt_tokens)[request]
        self.output_tokens = np.asarray(trace.output_tokens)[request, expert]
        self.shared_blocks = np.asarray(trace.shared_tokens)[request] // spec.block_size
        self.shared_blocks = self.shared_blocks * bool(profile.prefix_cache[0])
        self.num_arrived = 0  # requests
        self.now_s = float(self.arrival_s[0]) if len(request) else 0.0
        self.state = engine.init_state(spec, (1,), jnp.int32(0))
        self.is_async = bool(profile.async_scheduling[0])
        self.scheduled: tuple[np.ndarray, ...] | None = None  # asynchronously: what runs next

    @property
    def longest_s(self) -> float:
        """No iteration takes longer [s] if each is scheduled when the one before it starts; else 0."""
        if not self.is_async or len(self.arrival_s) == 0:
            return 0.0
        kv_tokens = jnp.sum(jnp.asarray(self.prompt_tokens + self.output_tokens), dtype=jnp.float32)[None]
        requests = jnp.minimum(self.profile.max_running, len(self.arrival_s))
        return float(longest_iteration_s(self.profile, requests, kv_tokens)[0])

    @property
    def boundary_s(self) -> float:
        """Start of the next iteration [s], provided that a request is live."""
        return self.now_s + float(self.state.clock_s[0])

    @property
    def idle(self) -> bool:
        """No request runs or waits."""
        return not bool(self.state.slots.live.any())

    def skip_to(self, time_s: float) -> None:
        """Runs every iteration that starts before ``time_s`` without logging it; now becomes ``time_s``."""
        while self.num_arrived < len(self.arrival_s) and self.arrival_s[self.num_arrived] < time_s:
            self.add_next_request()
        if time_s > self.now_s:
            self.state = _advance(self.spec, self.profile, self.state, np.float32(time_s - self.now_s))
            self.now_s = time_s

    def reach_next_iteration(self) -> bool:
        """Adds every request that arrives before the next iteration; returns whether there is a next iteration."""
        while self.num_arrived < len(self.arrival_s):
            gap_s = np.float32(self.arrival_s[self.num_arrived] - self.now_s)
            if gap_s > self.state.clock_s[0] and not self.idle:
                break
            self.add_next_request()
        return not self.idle

    def add_next_request(self) -> None:
        """Advances to the next arrival and adds that request to the expert if it is admissible."""
        index, self.num_arrived = self.num_arrived, self.num_arrived + 1
        gap_s, self.now_s = np.float32(self.arrival_s[index] - self.now_s), float(self.arrival_s[index])
        state = _advance(self.spec, self.profile, self.state, gap_s)
        tokens = self.prompt_tokens[index], self.output_tokens[index]
        self.state = _arrive(self.spec, self.profile, state, *tokens, index, self.shared_blocks[index])

    def iterate(self) -> tuple[Any, ...] | None:
        """Runs one iteration; returns its duration [s], the live requests, their activities, tokens and cached tokens.

        None if it ran nothing, or what was scheduled before the first call.
        """
        before = self.state
        self.state = _iterate(self.spec, self.profile, before)
        old, new = jax.tree.map(lambda x: np.asarray(x[0]), (before, self.state))
        duration_s = float(new.clock_s) - float(old.clock_s)
        scheduled = _activities(self.spec.block_size, old.slots, new.slots, self.is_async)
        if not self.is_async:
            return duration_s, *scheduled
        runs, self.scheduled = self.scheduled if old.scheduled_s > 0 else None, scheduled
        return None if runs is None else (duration_s, *runs)


@partial(jax.jit, static_argnums=0)
def _advance(spec: EngineSpec, profile: ExpertProfile, state: ExpertState, gap_s: Any) -> ExpertState:
    return engine.compact_if_full(spec, engine.advance(spec, profile, state, gap_s))


@partial(jax.jit, static_argnums=0)
def _arrive(
    spec: EngineSpec,
    profile: ExpertProfile,
    state: ExpertState,
    prompt_tokens: Any,
    output_tokens: Any,
    index: Any,
    shared_blocks: Any,
) -> ExpertState:
    admissible = engine.admissible(spec, profile, state, prompt_tokens, output_tokens)
    return engine.push(state, admissible, prompt_tokens[None], output_tokens[None], index, shared_blocks[None])


@partial(jax.jit, static_argnums=0)
def _iterate(spec: EngineSpec, profile: ExpertProfile, state: ExpertState) -> ExpertState:
    return scheduler.iterate(spec, profile, state, jnp.array([True]))


def _activities(block_size: int, before: Slots, after: Slots, is_async: bool) -> tuple[np.ndarray, ...]:
    """Returns the live requests, their activities, tokens and cached tokens, from the slots [S] before and after."""
    found = np.where(before.waiting & (after.computed > 0), after.cached_blocks * block_size, before.computed)
    tokens = np.maximum(after.computed - found, 0)
    emitted = before.generated + before.emitting
    decoding = (tokens > 0) & (emitted > 0) & (before.prompt_tokens + emitted - found == 1)
    preempted = (after.preemptions > 0) & (after.computed == 0)
    idle = np.where(preempted, Activity.PREEMPTED, Activity.WAITING)
    activity = np.where(tokens > 0, np.where(decoding, Activity.DECODE, Activity.PREFILL), idle)
    live = before.live & (after.live | (not is_async))  # those that end before the next iteration are not in it
    return before.payload[live], activity[live], tokens[live], np.asarray(after.computed)[live]


def _log(records: list[tuple[Any, ...]], expert: int, request: np.ndarray, arrival_s: np.ndarray) -> IterationLog:
    activity = np.zeros((len(records), len(request)), np.int8)
    tokens, cached = np.zeros((2, len(records), len(request)), np.int32)
    for row, (_, _, index, *columns) in enumerate(records):
        activity[row, index], tokens[row, index], cached[row, index] = columns
    present = (activity != Activity.ABSENT).any(0)
    start_s, duration_s = (np.array([record[i] for record in records], np.float64) for i in (0, 1))
    requests = (request[present], arrival_s[present], activity[:, present], tokens[:, present], cached[:, present])
    return IterationLog(expert, start_s, duration_s, *requests)
