"""Replay: the outcome of each request of a known trace under a fixed assignment to experts.

Each expert is a lane that replays its own requests. On a CPU a few lanes run side by side in each of several threads;
other devices run all of them at once. When a lane has no free slot left, the finished requests of all are collected and
their slots are compacted. Experts do not interact, but for those that share a card: there a request for which an LLM is
loaded waits until the lane of the LLM before it has ended.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.sim import engine
from qos_jax.sim.cost import fits_in_memory
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.failures import without_requests
from qos_jax.sim.shared_cards import CardTurns, card_turns
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile, RequestLog, RequestTrace
from qos_jax.sim.validation import MAX_SIZE, checked_assignment, checked_experts, checked_trace, checked_whole

_MIN_LIVE = 32  # requests on one expert, for which slots are allocated first, and as many for finished ones
_MIN_ROWS = 64  # requests of one lane, for which a program is compiled
_SHARED_ROWS = 4096  # no more rows are compiled than needed for the sake of sharing a program
_CPU_LANES = 16  # side by side: few, so that their state stays in cache and that one slow lane delays few
_NEVER_S = 1e30  # s


class ReplayResult(struct.PyTreeNode):
    """The log of a trace, and the resources that the experts used."""

    log: RequestLog
    busy_s: np.ndarray  # [N] s of iterations
    standby_s: np.ndarray  # [N] s of standby up to ``run_end_s``
    kv_block_s: np.ndarray  # [N] blocks x s held


class LaneRequests(struct.PyTreeNode):
    """The requests of L lanes in order of arrival, padded at the end; the request axis is first, for ``lax.scan``."""

    gap_s: AnyArray  # [J, L] s since the lane's previous request
    prompt_tokens: AnyArray  # [J, L] int32
    output_tokens: AnyArray  # [J, L] int32, 0 for padding
    shared_tokens: AnyArray  # [J, L] int32, of the prompt
    fails: AnyArray | None  # [J, L] bool: no request, but a failure in which the lane loses all; None if none fails
    turns: CardTurns | None = None  # [J, L] each; None where each expert has a card of its own


class LaneLog(struct.PyTreeNode):
    """What happened on each lane; times are relative to the arrival of the request."""

    finish_s: np.ndarray  # [J, L] s, NaN for dropped requests and padding
    first_token_s: np.ndarray  # [J, L] s, NaN for dropped requests and padding
    preemptions: np.ndarray  # [J, L] int32
    dropped: np.ndarray  # [J, L] bool
    busy_s: np.ndarray  # [L] s of iterations
    standby_s: np.ndarray  # [L] s of standby, that after the last token included
    kv_block_s: np.ndarray  # [L] blocks x s held


def replay(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: AnyArray,
    *,
    token_budget: int | None = None,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
) -> RequestLog:
    """Replays ``trace`` with request j on expert ``assignment[j]``.

    Args:
      experts: profile of the N experts, NumPy or JAX arrays [N].
      trace: J requests in order of arrival; only arrivals and tokens are read. An expert with a prefix cache does not
        compute whole blocks of ``shared_tokens``; they never leave the cache, and count as memory of each request. On a
        shared card, a request for an LLM that is leaving waits until it is loaded again.
      assignment: [J] int, expert of each request; -1 drops the request.
      token_budget: maximum tokens per iteration of all experts, 1 .. 2^24, in place of their own.
      block_size: tokens per KV block, 1 .. 2^24.
      dtype: of the engine's times, float64 or float32, independent of ``jax_enable_x64``. In float32, as in an
        environment, rounding may shift a request to the iteration before or after.

    Returns:
      The log of the J requests; absolute times are added on the host in float64.

    Raises:
      InputError: an argument has a wrong shape or an illegal value.
    """
    (result,) = replay_many(
        experts, [trace], [assignment], token_budget=token_budget, block_size=block_size, dtype=dtype
    )
    return result.log


def run_end_s(trace: RequestTrace, log: RequestLog) -> float:
    """Returns when a run of at least one request ends [s]: at its last token or arrival, whichever is later."""
    return float(np.fmax.reduce(log.finish_s, initial=trace.arrival_s[-1]))


def replay_many(
    experts: ExpertProfile,
    traces: Sequence[RequestTrace],
    assignments: Sequence[AnyArray],
    *,
    token_budget: int | None = None,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
    failures: Sequence[Sequence[np.ndarray]] | None = None,
) -> list[ReplayResult]:
    """Replays several traces, each with its own assignment, on copies of the same experts in one program.

    Args:
      experts: profile of the N experts.
      traces: see ``replay``; traces may differ in length.
      assignments: one for each trace.
      token_budget: maximum tokens per iteration of all experts, in place of their own.
      block_size: tokens per KV block.
      dtype: see ``replay``.
      failures: for each trace, the times [s] at which each of the N experts loses its requests, in order.

    Returns:
      The result of each trace.

    Raises:
      InputError: an argument has a wrong shape or an illegal value.
    """
    if len(traces) != len(assignments):
        raise InputError(f"assignments has {len(assignments)} entries, must have {len(traces)}, one for each trace")
    if token_budget is not None:
        experts = experts.replace(token_budget=checked_whole("token_budget", token_budget, 1, MAX_SIZE))
    experts = checked_experts(experts)
    num_experts = len(experts.step_base_s)
    if failures is not None and experts.cards is not None:
        raise InputError("failures are given, must be None where experts share a card")
    traces = [checked_trace(trace, num_experts) for trace in traces]
    assignments = [
        checked_assignment(assignment, len(trace.arrival_s), num_experts)
        for trace, assignment in zip(traces, assignments, strict=True)
    ]
    if experts.cards is not None:  # a request that never fits has no LLM loaded
        assignments = [
            _that_fit(experts, trace, assignment, block_size)
            for trace, assignment in zip(traces, assignments, strict=True)
        ]
    never = [[np.zeros(0)] * num_experts] * len(traces)
    failures = never if failures is None else failures
    positions = [_positions(*args) for args in zip(traces, assignments, failures, strict=True)]
    length = 1 + max(
        (int(of.max(initial=-1)) for position in positions for of in (position[0], *position[1])), default=0
    )
    lanes = [_sort_into_lanes(*args, length) for args in zip(traces, assignments, positions, failures, strict=True)]
    if experts.cards is not None:
        lanes = [
            lane.replace(turns=card_turns(experts.cards, trace.arrival_s, assignment, position, length))
            for lane, trace, assignment, (position, _) in zip(lanes, traces, assignments, positions, strict=True)
        ]
    requests = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *lanes)
    if failures is never:
        requests = requests.replace(fails=None)
    fleets = jax.tree.map(lambda x: np.concatenate([x] * len(traces)), experts)
    # Another assignment of the same requests does not recompile.
    min_rows = min(max((len(trace.arrival_s) for trace in traces), default=1), _SHARED_ROWS)
    together = None if experts.cards is None else num_experts
    log = replay_lanes(fleets, requests, block_size=block_size, dtype=dtype, min_rows=min_rows, together=together)
    fleet_logs = [
        jax.tree.map(lambda x, i=i: x[..., i * num_experts : (i + 1) * num_experts], log) for i in range(len(traces))
    ]
    requests_rows = [of_requests for of_requests, _ in positions]
    results = [
        _in_trace_order(experts, *args)
        for args in zip(fleet_logs, traces, assignments, requests_rows, failures, strict=True)
    ]
    if failures is never:
        return results
    return [_with_losses(*args) for args in zip(results, assignments, strict=True)]


def _with_losses(result: ReplayResult, assignment: np.ndarray) -> ReplayResult:
    """Returns a result in which the requests that never ended are lost."""
    log = result.log
    lost = (assignment >= 0) & ~log.dropped & np.isnan(log.finish_s)
    return result.replace(log=log.replace(dropped=log.dropped | lost, lost=lost))


def _that_fit(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, block_size: int) -> np.ndarray:
    """Returns the assignment without the requests that never fit in the memory of their experts."""
    tokens = trace.prompt_tokens[:, None], trace.output_tokens
    fits = np.asarray(fits_in_memory(experts.replace(kernels=None, cards=None), *tokens, block_size))
    return np.where(fits[np.arange(len(assignment)), assignment], assignment, -1)


Rows = tuple[np.ndarray, list[np.ndarray]]
"""Number of its row in the lane of its expert: of each request [J], -1 if it was dropped; and of each failure."""


def _positions(trace: RequestTrace, assignment: np.ndarray, failures: Sequence[np.ndarray]) -> Rows:
    position, of_failures = np.full(len(assignment), -1, np.int64), []
    for expert, fails_s in enumerate(failures):
        on_expert = assignment == expert
        arrival_s = trace.arrival_s[on_expert]
        position[on_expert] = np.arange(len(arrival_s)) + np.searchsorted(fails_s, arrival_s)
        of_failures.append(np.arange(len(fails_s)) + np.searchsorted(arrival_s, fails_s, side="right"))
    return position, of_failures


def _sort_into_lanes(
    trace: RequestTrace, assignment: np.ndarray, rows: Rows, failures: Sequence[np.ndarray], length: int
) -> LaneRequests:
    """Sorts the requests and failures of a trace into one lane per expert; gaps are computed in float64."""
    sent, num_experts, position = assignment >= 0, len(failures), rows[0]
    cell = (position[sent], assignment[sent])
    fails = np.zeros((length, num_experts), bool)
    arrival_s = np.zeros((length, num_experts))
    prompt_tokens, output_tokens, shared_tokens = np.zeros((3, length, num_experts), np.int32)
    arrival_s[cell] = trace.arrival_s[sent]
    prompt_tokens[cell] = trace.prompt_tokens[sent]
    output_tokens[cell] = trace.output_tokens[sent, assignment[sent]]
    shared_tokens[cell] = trace.shared_tokens[sent]
    for expert, (row, fails_s) in enumerate(zip(rows[1], failures, strict=True)):
        arrival_s[row, expert], fails[row, expert] = fails_s, True
    gap_s = np.diff(arrival_s, axis=0, prepend=arrival_s[:1])
    return LaneRequests(np.maximum(gap_s, 0.0), prompt_tokens, output_tokens, shared_tokens, fails)


def _in_trace_order(
    experts: ExpertProfile,
    log: LaneLog,
    trace: RequestTrace,
    assignment: np.ndarray,
    position: np.ndarray,
    failures: Sequence[np.ndarray],
) -> ReplayResult:
    """Returns the logs of the lanes in the order of the trace, and the standby without that after the run."""
    sent = assignment >= 0
    cell = (position[sent], assignment[sent])
    finish_s, first_token_s = np.full((2, len(sent)), np.nan)
    preemptions, dropped = np.zeros(len(sent), np.int32), np.ones(len(sent), bool)
    finish_s[sent] = trace.arrival_s[sent] + log.finish_s[cell]
    first_token_s[sent] = trace.arrival_s[sent] + log.first_token_s[cell]
    preemptions[sent], dropped[sent] = log.preemptions[cell], log.dropped[cell]
    requests = RequestLog(finish_s, first_token_s, preemptions, dropped)
    last_token_s = np.full(len(log.standby_s), -np.inf)
    np.fmax.at(last_token_s, assignment[sent], finish_s[sent])
    end_s = run_end_s(trace, requests) if len(sent) else 0.0
    standby_ends_s = last_token_s + experts.standby_s
    for expert, fails_s in enumerate(failures):
        later_s = fails_s[fails_s > last_token_s[expert]]
        standby_ends_s[expert] = np.minimum(standby_ends_s[expert], later_s.min(initial=np.inf))
    standby_s = log.standby_s - np.maximum(standby_ends_s - end_s, 0.0)
    return ReplayResult(requests, log.busy_s, standby_s, log.kv_block_s)


def replay_lanes(
    experts: ExpertProfile,
    requests: LaneRequests,
    *,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
    min_rows: int = 1,
    together: int | None = None,
) -> LaneLog:
    """Replays every lane to its end.

    The number of slots starts at what most workloads need and doubles until no request lacks one.

    Args:
      experts: profile with one entry per lane, fields [L].
      requests: of each lane.
      block_size: tokens per KV block.
      dtype: of the engine's times.
      min_rows: requests for which a program is compiled at least, so that similar runs share it.
      together: lanes of one fleet, which follow each other; None where lanes do not wait for each other.

    Returns:
      The log of each lane.

    Raises:
      InputError: a size or the type is not legal.
    """
    if dtype not in (np.float64, np.float32):
        raise InputError(f"dtype is {dtype!r}, must be np.float64 or np.float32")
    length, lanes = requests.gap_s.shape
    rows = 1 << (max(length, min_rows, _MIN_ROWS) - 1).bit_length()  # powers of two, so that few shapes are compiled
    used = requests.output_tokens > 0 if requests.fails is None else (requests.output_tokens > 0) | requests.fails
    counts = used.sum(0).astype(np.int32)
    width = together or (min(lanes, _CPU_LANES) if jax.default_backend() == "cpu" else lanes)
    # Lanes of about one length end together.
    order = np.argsort(-counts, kind="stable") if together is None else np.arange(lanes)
    groups = [order[i : i + width] for i in range(0, lanes, width)]

    def run(group: np.ndarray) -> tuple[Any, ...]:
        lane, missing = np.resize(group, width), np.arange(width) >= len(group)
        part = jax.tree.map(lambda x: np.pad(x[:, lane], ((0, rows - length), (0, 0))), requests)
        fleet, max_live = jax.tree.map(lambda x: x[lane], experts), _MIN_LIVE
        while True:
            spec = EngineSpec(2 * max_live, block_size)
            with jax.enable_x64(np.dtype(dtype) == np.float64):
                *found, overflow = _replay(spec, fleet, part, np.where(missing, 0, counts[lane]))
            if not overflow:
                return jax.tree.map(lambda x: np.asarray(x)[..., : len(group)], tuple(found))
            max_live *= 2

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(run, groups))
    log, integrals = jax.tree.map(lambda *parts: np.concatenate(parts, -1)[..., np.argsort(order)], *found)
    log = {name: values[:length] for name, values in log.items()}
    for name in ("finish_s", "first_token_s"):  # the loop has no NaN, which JAX's debugging takes for a fault
        log[name] = np.where(np.isinf(log[name]), np.nan, log[name])
    return LaneLog(**log, **{name: values.astype(np.float64) for name, values in integrals.items()})


class _Progress(struct.PyTreeNode):
    """How far each of L lanes is."""

    state: ExpertState
    arrived: Array  # [L] int32 requests
    until_s: Array  # [L] s from now to the next one; ``_NEVER_S`` after the last, and before one that has an LLM loaded
    steady: Array  # [L] bool: the lane only decodes until a request finishes or arrives
    dropped: Array  # [J, L] bool

    @property
    def busy(self) -> Array:
        """[L] bool: an iteration starts before the next request arrives."""
        return engine.busy(self.state, self.until_s)


@partial(jax.jit, static_argnums=0)
def _replay(spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests, counts: Array) -> tuple[Any, Any, Array]:
    """Replays the first ``counts`` [L] requests of each lane.

    Lanes do not wait for each other: in each pass of the loop every lane runs an iteration and a stretch of decoding,
    or its next request arrives.

    Returns:
      The fields [J, L] of ``LaneLog``, with infinity for what never happened; those [L]; and [] bool: the slots did
      not suffice.
    """
    dtype = jnp.result_type(float)
    experts = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), experts)
    requests = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), requests)
    shape, lane = requests.gap_s.shape, jnp.arange(len(counts))[:, None]

    def done(at: _Progress) -> Array:
        return ~at.busy & (at.arrived >= counts)

    def step(at: _Progress) -> _Progress:
        return _arrive(spec, experts, requests, counts, _run(spec, experts, at))

    def collect(carry: tuple[_Progress, Any, Any, Array]) -> tuple[_Progress, Any, Any, Array]:
        at, log, integrals, _ = carry
        at = lax.while_loop(lambda at: ~jnp.all(done(at)) & ~jnp.any(engine.needs_compact(at.state)), step, at)
        state, slots = at.state, at.state.slots
        row = jnp.where(slots.finished, slots.payload, shape[0])  # others are beyond the end, where nothing is written
        log = {name: values.at[row, lane].set(getattr(slots, name), mode="drop") for name, values in log.items()}
        integrals = {name: values + getattr(state, name) for name, values in integrals.items()}
        state = engine.compact(spec, state.replace(**jax.tree.map(jnp.zeros_like, integrals)))
        return at.replace(state=state), log, integrals, jnp.any(engine.needs_compact(state))

    def unfinished(carry: tuple[_Progress, Any, Any, Array]) -> Array:
        return ~jnp.all(done(carry[0])) & ~carry[-1]

    never, none = jnp.full(shape, jnp.inf, dtype), jnp.zeros(len(counts), dtype)
    log = {"finish_s": never, "first_token_s": never, "preemptions": jnp.zeros(shape, jnp.int32)}
    integrals = {"busy_s": none, "standby_s": none, "kv_block_s": none}
    at = _Progress(
        state=engine.init_state(spec, (len(counts),), jnp.int32(0), dtype),
        arrived=jnp.zeros(len(counts), jnp.int32),
        until_s=_until_s(requests, counts, jnp.zeros_like(counts)),
        steady=none > 0,
        dropped=jnp.zeros(shape, bool),
    )
    at, log, integrals, overflow = lax.while_loop(unfinished, collect, (at, log, integrals, jnp.bool_(False)))
    integrals["standby_s"] += at.state.standby_left_s  # that after the last token
    return log | {"dropped": at.dropped}, integrals, overflow


def _run(spec: EngineSpec, experts: ExpertProfile, at: _Progress) -> _Progress:
    """Runs one iteration on each busy lane that is not steady, then the steady ones up to a completion."""
    before, fresh = at.state, at.busy & ~at.steady
    state, steady = lax.cond(
        jnp.any(fresh), lambda: engine.iterate(spec, experts, before, fresh), lambda: (before, jnp.zeros_like(fresh))
    )
    at = at.replace(state=state)
    decodes = (steady | at.steady) & at.busy
    state, decodes_on = engine.decode_stretch(spec, experts, state, decodes, at.until_s)
    left_s = jnp.where(state.clock_s > before.clock_s, experts.standby_s, before.standby_left_s)
    # Where requests wait, a completion may admit one.
    steady = decodes & decodes_on & ~jnp.any(state.slots.waiting, -1)
    return at.replace(state=state.replace(standby_left_s=left_s), steady=steady)


def _arrive(
    spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests, counts: Array, at: _Progress
) -> _Progress:
    """Lets the next request of each lane arrive that has run up to it."""
    arrives = ~at.busy & (at.arrived < counts)
    length, lane = len(requests.gap_s), jnp.arange(len(counts))
    request = jax.tree.map(lambda x: x[jnp.minimum(at.arrived, length - 1), lane], requests)
    if request.turns is not None:
        arrives &= request.turns.may_begin(at.arrived, at.state)
    is_request = arrives if request.fails is None else arrives & ~request.fails

    def arrived() -> tuple[ExpertState, Array]:
        state = at.state
        standby_s = jnp.where(arrives, jnp.clip(request.gap_s - state.clock_s, 0.0, state.standby_left_s), 0.0)
        state = engine.rebase(state, jnp.where(arrives, request.gap_s, 0.0)).replace(
            standby_left_s=state.standby_left_s - standby_s, standby_s=state.standby_s + standby_s
        )
        if requests.turns is not None and experts.cards is not None:
            before_s = jnp.where(at.arrived > 0, requests.turns.arrival_s[at.arrived - 1, lane], -_NEVER_S)
            start_s = request.turns.start_s(before_s + at.state.clock_s) + experts.cards.load_s
            state = state.replace(clock_s=jnp.where(arrives & request.turns.begins, start_s, state.clock_s))
        if request.fails is not None:
            state, _ = without_requests(state, arrives & request.fails)
        admissible = engine.admissible(spec, experts, state, request.prompt_tokens, request.output_tokens)
        shared_blocks = jnp.where(experts.prefix_cache, request.shared_tokens // spec.block_size, 0)
        tokens = request.prompt_tokens, request.output_tokens
        return engine.push(state, is_request & admissible, *tokens, at.arrived, shared_blocks), ~admissible

    state, refused = lax.cond(jnp.any(arrives), arrived, lambda: (at.state, jnp.zeros_like(arrives)))
    row = jnp.where(is_request & refused, at.arrived, length)  # others are beyond the end, where nothing is written
    after = at.arrived + arrives.astype(jnp.int32)
    return at.replace(
        state=state,
        arrived=after,
        until_s=jnp.where(arrives, _until_s(requests, counts, after), at.until_s),
        dropped=at.dropped.at[row, lane].set(True, mode="drop"),
    )


def _until_s(requests: LaneRequests, counts: Array, arrived: Array) -> Array:
    """Returns how long [L] s each lane runs, from the arrival of the last one of ``arrived`` requests."""
    row, lane = jnp.minimum(arrived, len(requests.gap_s) - 1), jnp.arange(len(counts))
    goes_on = arrived < counts
    if requests.turns is not None:  # an LLM that is to be loaded again ends its requests before
        goes_on &= ~requests.turns.begins[row, lane]
    return jnp.where(goes_on, requests.gap_s[row, lane], _NEVER_S)
