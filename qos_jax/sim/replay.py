"""Replay: what a fixed assignment of a known trace to experts leads to, request by request.

Experts do not see each other, so every expert replays its own requests and all run side by side as lanes of one program.
The requests of a lane come in chunks; behind each chunk the finished ones are handed out and the slots compacted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike

from qos_jax.sim import engine
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile, RequestLog, RequestTrace
from qos_jax.sim.validation import checked_assignment, checked_experts, checked_trace

_CHUNK = 64  # requests of one lane between two compactions


@struct.dataclass
class LaneRequests:
    """The requests of each lane in order of arrival, padded behind; time first, as a scan wants it."""

    gap_s: Array  # [J, L] s since the lane's previous request
    prompt_tokens: Array  # [J, L] int32
    output_tokens: Array  # [J, L] int32, 0 for padding


@struct.dataclass
class LaneLog:
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
    assignment: ArrayLike,
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> RequestLog:
    """Replays ``trace`` with request j on expert ``assignment[j]``; -1 drops the request before it reaches an expert.

    Args:
      experts: profile of the N experts, NumPy or JAX arrays [N].
      trace: J requests in order of arrival; only arrivals and tokens are read.
      assignment: [J] int, expert of each request.
      token_budget: tokens that one iteration may take.
      block_size: tokens per KV block.

    Returns:
      The log of the J requests. The engine runs in float32, or in float64 where jax_enable_x64 is set; absolute times are
      added on the host in float64.

    Raises:
      InputError: a field of the arguments is not usable.
    """
    experts = checked_experts(experts)
    num_experts = len(experts.step_base_s)
    trace = checked_trace(trace, num_experts)
    assignment = checked_assignment(assignment, len(trace.arrival_s), num_experts)

    lane, position = lane_positions(assignment, num_experts)
    requests = gather_lanes(trace, assignment, lane, position, num_experts)
    log = replay_lanes(experts, requests, token_budget=token_budget, block_size=block_size)
    return scatter_lanes(log, trace, lane, position)


def lane_positions(assignment: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each request [J] its lane, -1 if none, and how many requests that lane had before it."""
    position = np.zeros(len(assignment), np.int64)
    for expert in range(num_experts):
        mine = assignment == expert
        position[mine] = np.arange(mine.sum())
    return assignment, position


def gather_lanes(
    trace: RequestTrace, assignment: np.ndarray, lane: np.ndarray, position: np.ndarray, num_lanes: int
) -> LaneRequests:
    """Sorts the requests of a trace into lanes; gaps are taken in float64."""
    sent = lane >= 0
    length = int(position[sent].max(initial=-1)) + 1
    at = (position[sent], lane[sent])
    arrival_s = np.zeros((length, num_lanes))
    prompt_tokens, output_tokens = np.ones((2, length, num_lanes), np.int32)
    output_tokens[:] = 0
    arrival_s[at] = trace.arrival_s[sent]
    prompt_tokens[at] = trace.prompt_tokens[sent]
    output_tokens[at] = trace.output_tokens[sent, assignment[sent]]
    gap_s = np.diff(arrival_s, axis=0, prepend=arrival_s[:1])
    return LaneRequests(np.maximum(gap_s, 0.0), prompt_tokens, output_tokens)


def scatter_lanes(log: LaneLog, trace: RequestTrace, lane: np.ndarray, position: np.ndarray) -> RequestLog:
    """Puts the logs of the lanes back into the order of the trace."""
    sent = lane >= 0
    at = (position[sent], lane[sent])
    finish_s, first_token_s = np.full((2, len(lane)), np.nan)
    preemptions, dropped = np.zeros(len(lane), np.int32), np.ones(len(lane), bool)
    finish_s[sent] = trace.arrival_s[sent] + log.finish_s[at]
    first_token_s[sent] = trace.arrival_s[sent] + log.first_token_s[at]
    preemptions[sent], dropped[sent] = log.preemptions[at], log.dropped[at]
    return RequestLog(finish_s, first_token_s, preemptions, dropped)


def replay_lanes(
    experts: ExpertProfile,
    requests: LaneRequests,
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
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
    """Scans over chunks. Returns the finished requests by chunk, [chunks + 1, L, S], the dropped ones, and the integrals."""
    dtype = jnp.result_type(float)
    experts = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else jnp.int32), experts)
    requests = requests.replace(gap_s=requests.gap_s.astype(dtype))
    lanes = requests.gap_s.shape[2:]

    def arrive(carry: tuple[ExpertState, Array], request: LaneRequests) -> tuple[Any, Array]:
        state, index = carry
        state = engine.advance(spec, experts, state, request.gap_s)
        queued = jnp.sum(state.slots.waiting, -1)
        too_long = blocks_of(request.prompt_tokens + request.output_tokens, spec.block_size) > experts.kv_blocks
        real = request.output_tokens > 0
        dropped = real & (too_long | (queued >= experts.max_waiting))
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
    """Returns the finished requests of each slot (index -1 elsewhere), the integrals, and the state with these at zero."""
    slots = state.slots
    rows = {
        "index": jnp.where(slots.finished, slots.payload, -1),
        "finish_s": slots.finish_s - slots.arrival_s,
        "first_token_s": slots.first_token_s - slots.arrival_s,
        "preemptions": slots.preemptions,
    }
    zero = jnp.zeros_like(state.busy_s)
    return rows, (state.busy_s, state.kv_block_s), state.replace(busy_s=zero, kv_block_s=zero)
