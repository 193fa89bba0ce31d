"""Replay: what a fixed assignment of a known trace to experts leads to, request by request.

Experts do not see each other, so every expert replays its own requests and all run side by side as lanes of one
program. The requests of a lane come in chunks; behind each chunk the finished ones are handed out and the slots
compacted.
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
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, AnyArray, ExpertProfile, RequestLog, RequestTrace
from qos_jax.sim.validation import checked_assignment, checked_experts, checked_trace

_CHUNK = 64  # requests of one lane between two compactions


class ReplayResult(struct.PyTreeNode):
    """The log of a trace, and what the experts used for it."""

    log: RequestLog
    busy_s: np.ndarray  # [N] s of iterations
    kv_block_s: np.ndarray  # [N] blocks x s held


class LaneRequests(struct.PyTreeNode):
    """The requests of each lane in order of arrival, padded behind; time first, as a scan wants it."""

    gap_s: AnyArray  # [J, L] s since the lane's previous request
    prompt_tokens: AnyArray  # [J, L] int32
    output_tokens: AnyArray  # [J, L] int32, 0 for padding


class LaneLog(struct.PyTreeNode):
    """What happened on each lane; times count from the request's arrival."""

    finish_s: np.ndarray  # [J, L] s, NaN where dropped or padding
    first_token_s: np.ndarray  # [J, L] s, NaN where dropped or padding
    preemptions: np.ndarray  # [J, L] int32
    dropped: np.ndarray  # [J, L] bool
    busy_s: np.ndarray  # [L] s of iterations
    kv_block_s: np.ndarray  # [L] blocks x s held


def replay(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: AnyArray,
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
) -> RequestLog:
    """Replays ``trace`` with request j on expert ``assignment[j]``; -1 drops the request before it reaches an expert.

    Args:
      experts: profile of the N experts, NumPy or JAX arrays [N].
      trace: J requests in order of arrival; only arrivals and tokens are read.
      assignment: [J] int, expert of each request.
      token_budget: tokens that one iteration may take.
      block_size: tokens per KV block.
      dtype: of the engine's times, float64 or float32, whatever jax_enable_x64 says. In float32, as environments run, a
        request may be seen by an expert one iteration early or late where rounding decides.

    Returns:
      The log of the J requests; absolute times are added on the host in float64.

    Raises:
      InputError: a field of the arguments is not usable.
    """
    (replayed,) = replay_many(
        experts, [trace], [assignment], token_budget=token_budget, block_size=block_size, dtype=dtype
    )
    return replayed.log


def replay_many(
    experts: ExpertProfile,
    traces: Sequence[RequestTrace],
    assignments: Sequence[AnyArray],
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
) -> list[ReplayResult]:
    """Replays several traces, each with its assignment, on copies of the same experts side by side; see ``replay``."""
    for name, value in (("token_budget", token_budget), ("block_size", block_size)):
        if value < 1:
            raise InputError(f"{name} is {value}, must be at least 1")
    experts = checked_experts(experts)
    num_experts = len(experts.step_base_s)
    traces = [checked_trace(trace, num_experts) for trace in traces]
    assignments = [
        checked_assignment(assignment, len(trace.arrival_s), num_experts)
        for trace, assignment in zip(traces, assignments, strict=True)
    ]
    positions = [_positions(assignment, num_experts) for assignment in assignments]
    length = 1 + max((int(position.max(initial=-1)) for position in positions), default=0)
    columns = [_lanes(*each, num_experts, length) for each in zip(traces, assignments, positions, strict=True)]
    requests = jax.tree.map(lambda *lanes: np.concatenate(lanes, axis=1), *columns)
    fleets = jax.tree.map(lambda x: np.tile(x, len(traces)), experts)
    log = replay_lanes(fleets, requests, token_budget=token_budget, block_size=block_size, dtype=dtype)
    fleet_logs = [
        jax.tree.map(lambda x, i=i: x[..., i * num_experts : (i + 1) * num_experts], log) for i in range(len(traces))
    ]
    return [_replayed(*each) for each in zip(fleet_logs, traces, assignments, positions, strict=True)]


def _positions(assignment: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns for each request [J] how many requests its expert had before it."""
    position = np.full(len(assignment), -1, np.int64)
    for expert in range(num_experts):
        mine = assignment == expert
        position[mine] = np.arange(mine.sum())
    return position


def _lanes(
    trace: RequestTrace, assignment: np.ndarray, position: np.ndarray, num_experts: int, length: int
) -> LaneRequests:
    """Sorts the requests of a trace into one lane per expert; gaps are taken in float64."""
    sent = assignment >= 0
    at = (position[sent], assignment[sent])
    arrival_s = np.zeros((length, num_experts))
    prompt_tokens, output_tokens = np.zeros((2, length, num_experts), np.int32)
    arrival_s[at] = trace.arrival_s[sent]
    prompt_tokens[at] = trace.prompt_tokens[sent]
    output_tokens[at] = trace.output_tokens[sent, assignment[sent]]
    gap_s = np.diff(arrival_s, axis=0, prepend=arrival_s[:1])
    return LaneRequests(np.maximum(gap_s, 0.0), prompt_tokens, output_tokens)


def _replayed(log: LaneLog, trace: RequestTrace, assignment: np.ndarray, position: np.ndarray) -> ReplayResult:
    """Puts the logs of the lanes back into the order of the trace."""
    sent = assignment >= 0
    at = (position[sent], assignment[sent])
    finish_s, first_token_s = np.full((2, len(sent)), np.nan)
    preemptions, dropped = np.zeros(len(sent), np.int32), np.ones(len(sent), bool)
    finish_s[sent] = trace.arrival_s[sent] + log.finish_s[at]
    first_token_s[sent] = trace.arrival_s[sent] + log.first_token_s[at]
    preemptions[sent], dropped[sent] = log.preemptions[at], log.dropped[at]
    return ReplayResult(RequestLog(finish_s, first_token_s, preemptions, dropped), log.busy_s, log.kv_block_s)


def replay_lanes(
    experts: ExpertProfile,
    requests: LaneRequests,
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
) -> LaneLog:
    """Replays every lane to its end; ``experts`` has one entry per lane [L].

    The number of slots starts at what most workloads need and doubles until every request has found one.
    """
    length, lanes = requests.gap_s.shape
    chunks = 1 << (-(-length // _CHUNK) - 1).bit_length()  # powers of two, so that few shapes are compiled
    requests = jax.tree.map(lambda x: _in_chunks(x, chunks), requests)
    held = 64
    while True:
        spec = EngineSpec(held + _CHUNK, token_budget, block_size)
        with jax.enable_x64(np.dtype(dtype) == np.float64):
            rows, dropped, integrals, overflow = _replay(spec, experts, requests)
        if not overflow:
            break
        held *= 2
    rows = jax.tree.map(np.asarray, rows)
    done = rows["index"] >= 0
    index, lane = rows["index"][done], np.broadcast_to(np.arange(lanes)[:, None], done.shape)[done]
    finish_s, first_token_s = np.full((2, length, lanes), np.nan)
    preemptions = np.zeros((length, lanes), np.int32)
    finish_s[index, lane] = rows["finish_s"][done]
    first_token_s[index, lane] = rows["first_token_s"][done]
    preemptions[index, lane] = rows["preemptions"][done]
    dropped = np.asarray(dropped).reshape(-1, lanes)[:length]
    busy_s, kv_block_s = (np.asarray(x, np.float64).sum(0) for x in integrals)
    return LaneLog(finish_s, first_token_s, preemptions, dropped, busy_s, kv_block_s)


def _in_chunks(values: np.ndarray, chunks: int) -> np.ndarray:
    padding = chunks * _CHUNK - len(values)
    return np.pad(values, ((0, padding), (0, 0))).reshape(chunks, _CHUNK, -1)


@partial(jax.jit, static_argnums=0)
def _replay(spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests) -> Any:
    """Scans over chunks; returns the finished requests by chunk [chunks + 1, L, S], the dropped ones, the integrals."""
    dtype = jnp.result_type(float)
    experts = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else jnp.int32), experts)
    requests = requests.replace(gap_s=requests.gap_s.astype(dtype))
    lanes = requests.gap_s.shape[2:]

    def arrive(carry: tuple[ExpertState, Array], request: LaneRequests) -> tuple[Any, Array]:
        state, index = carry
        state = engine.advance(spec, experts, state, request.gap_s)
        real = request.output_tokens > 0
        dropped = real & ~engine.admissible(spec, experts, state, request.prompt_tokens, request.output_tokens)
        state = engine.push(state, real & ~dropped, request.prompt_tokens, request.output_tokens, index)
        return (state, index + 1), dropped

    def chunk(carry: Any, requests: LaneRequests) -> tuple[Any, Any]:
        state, index, overflow = carry
        (state, index), dropped = lax.scan(arrive, (state, index), requests)
        rows, integrals, state = _hand_out(state)
        state = engine.compact(spec, state)
        overflow |= jnp.any(jnp.sum(state.slots.live, -1) > spec.slots - _CHUNK)
        return (state, index, overflow), (rows, dropped, integrals)

    start = (engine.init_state(spec, lanes, jnp.int32(0), dtype), jnp.zeros(lanes, jnp.int32), jnp.bool_(False))
    (state, _, overflow), (rows, dropped, integrals) = lax.scan(chunk, start, requests)
    last_rows, last_integrals, _ = _hand_out(engine.drain(spec, experts, state))
    rows, integrals = jax.tree.map(
        lambda x, last: jnp.concatenate([x, last[None]]), (rows, integrals), (last_rows, last_integrals)
    )
    return rows, dropped, integrals, overflow


def _hand_out(state: ExpertState) -> tuple[dict[str, Array], tuple[Array, Array], ExpertState]:
    """Returns the finished request of each slot (index -1 elsewhere), the integrals, and the state with these at 0."""
    slots = state.slots
    rows = {
        "index": jnp.where(slots.finished, slots.payload, -1),
        "finish_s": slots.finish_s,
        "first_token_s": slots.first_token_s,
        "preemptions": slots.preemptions,
    }
    zero = jnp.zeros_like(state.busy_s)
    return rows, (state.busy_s, state.kv_block_s), state.replace(busy_s=zero, kv_block_s=zero)
