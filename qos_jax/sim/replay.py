"""Replay: the outcome of each request of a known trace under a fixed assignment to experts.

Experts do not interact, so each expert replays its own requests, and all experts run side by side as lanes of one
program. The requests of a lane are processed in chunks. After each chunk, the finished requests are collected and the
slots are compacted.
"""

from __future__ import annotations

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
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.failures import without_requests
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile, RequestLog, RequestTrace
from qos_jax.sim.validation import MAX_SIZE, checked_assignment, checked_experts, checked_trace, checked_whole

_CHUNK = 64  # requests of one lane between two compactions
_MIN_LIVE = 64  # requests on one expert, for which slots are allocated first


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
        compute whole blocks of ``shared_tokens``; they never leave the cache, and count as memory of each request.
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
    traces = [checked_trace(trace, num_experts) for trace in traces]
    assignments = [
        checked_assignment(assignment, len(trace.arrival_s), num_experts)
        for trace, assignment in zip(traces, assignments, strict=True)
    ]
    never = [[np.zeros(0)] * num_experts] * len(traces)
    failures = never if failures is None else failures
    positions = [_positions(*args) for args in zip(traces, assignments, failures, strict=True)]
    length = 1 + max(
        (int(of.max(initial=-1)) for position in positions for of in (position[0], *position[1])), default=0
    )
    lanes = [_sort_into_lanes(*args, length) for args in zip(traces, assignments, positions, failures, strict=True)]
    requests = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *lanes)
    if failures is never:
        requests = requests.replace(fails=None)
    fleets = jax.tree.map(lambda x: np.concatenate([x] * len(traces)), experts)
    log = replay_lanes(fleets, requests, block_size=block_size, dtype=dtype)
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
) -> LaneLog:
    """Replays every lane to its end.

    The number of slots starts at what most workloads need and doubles until no request lacks one.

    Args:
      experts: profile with one entry per lane, fields [L].
      requests: of each lane.
      block_size: tokens per KV block.
      dtype: of the engine's times.

    Returns:
      The log of each lane.

    Raises:
      InputError: a size or the type is not legal.
    """
    if dtype not in (np.float64, np.float32):
        raise InputError(f"dtype is {dtype!r}, must be np.float64 or np.float32")
    length, lanes = requests.gap_s.shape
    chunks = 1 << (-(-length // _CHUNK) - 1).bit_length()  # powers of two, so that few shapes are compiled
    requests = jax.tree.map(lambda x: _split_into_chunks(x, chunks), requests)
    max_live = _MIN_LIVE
    while True:
        spec = EngineSpec(max_live + _CHUNK, block_size)
        with jax.enable_x64(np.dtype(dtype) == np.float64):
            rows, dropped, integrals, overflow = _replay(spec, experts, requests)
        if not overflow:
            break
        max_live *= 2
    rows = jax.tree.map(np.asarray, rows)
    finished = rows["index"] >= 0
    index, lane = rows["index"][finished], np.broadcast_to(np.arange(lanes)[:, None], finished.shape)[finished]
    finish_s, first_token_s = np.full((2, length, lanes), np.nan)
    preemptions = np.zeros((length, lanes), np.int32)
    finish_s[index, lane] = rows["finish_s"][finished]
    first_token_s[index, lane] = rows["first_token_s"][finished]
    preemptions[index, lane] = rows["preemptions"][finished]
    dropped = np.asarray(dropped).reshape(-1, lanes)[:length]
    busy_s, standby_s, kv_block_s = (np.asarray(x, np.float64).sum(0) for x in integrals)
    return LaneLog(finish_s, first_token_s, preemptions, dropped, busy_s, standby_s, kv_block_s)


def _split_into_chunks(values: np.ndarray, chunks: int) -> np.ndarray:
    """Returns ``values`` [J, L] padded with 0 and reshaped to [chunks, _CHUNK, L]."""
    padding = chunks * _CHUNK - len(values)
    return np.pad(values, ((0, padding), (0, 0))).reshape(chunks, _CHUNK, -1)


@partial(jax.jit, static_argnums=0)
def _replay(spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests) -> Any:
    """Scans over the chunks of requests [chunks, _CHUNK, L].

    Returns:
      The finished requests after each chunk [chunks + 1, L, S], which requests were dropped [chunks, _CHUNK, L], the
      integrals of each chunk [chunks + 1, L], and [] bool: the slots did not suffice.
    """
    dtype = jnp.result_type(float)
    experts = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), experts)
    requests = requests.replace(gap_s=requests.gap_s.astype(dtype))
    lanes = requests.gap_s.shape[2:]

    def arrive(carry: tuple[ExpertState, Array], request: LaneRequests) -> tuple[Any, Array]:
        state, index = carry
        state = engine.advance(spec, experts, state, request.gap_s)
        if request.fails is not None:
            state, _ = without_requests(state, request.fails)
        not_padding = request.output_tokens > 0
        admissible = engine.admissible(spec, experts, state, request.prompt_tokens, request.output_tokens)
        dropped = not_padding & ~admissible
        shared_blocks = jnp.where(experts.prefix_cache, request.shared_tokens // spec.block_size, 0)
        tokens = request.prompt_tokens, request.output_tokens
        state = engine.push(state, not_padding & ~dropped, *tokens, index, shared_blocks)
        return (state, index + 1), dropped

    def chunk(carry: Any, requests: LaneRequests) -> tuple[Any, Any]:
        state, index, overflow = carry
        (state, index), dropped = lax.scan(arrive, (state, index), requests)
        rows, integrals, state = _collect(state)
        state = engine.compact(spec, state)
        overflow |= jnp.any(jnp.sum(state.slots.live, -1) > spec.slots - _CHUNK)
        return (state, index, overflow), (rows, dropped, integrals)

    start = (engine.init_state(spec, lanes, jnp.int32(0), dtype), jnp.zeros(lanes, jnp.int32), jnp.bool_(False))
    (state, _, overflow), (rows, dropped, integrals) = lax.scan(chunk, start, requests)
    last_rows, last_integrals, _ = _collect(engine.drain(spec, experts, state))
    rows, integrals = jax.tree.map(
        lambda x, last: jnp.concatenate([x, last[None]]), (rows, integrals), (last_rows, last_integrals)
    )
    return rows, dropped, integrals, overflow


def _collect(state: ExpertState) -> tuple[dict[str, Array], tuple[Array, Array, Array], ExpertState]:
    """Returns the finished requests by slot (index -1 in other slots), the integrals, and the state with these at 0."""
    slots = state.slots
    rows = {
        "index": jnp.where(slots.finished, slots.payload, -1),
        "finish_s": slots.finish_s,
        "first_token_s": slots.first_token_s,
        "preemptions": slots.preemptions,
    }
    zero = jnp.zeros_like(state.busy_s)
    integrals = state.busy_s, state.standby_s, state.kv_block_s
    return rows, integrals, state.replace(busy_s=zero, standby_s=zero, kv_block_s=zero)
