"""Replay: the outcome of each request of a known trace under a fixed assignment to experts.

Requests are sorted into a lane for each expert, all lanes are replayed (``sim.lanes``), and what happened is put back
into the order of the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from qos_jax.errors import InputError
from qos_jax.sim.cost import fits_in_memory
from qos_jax.sim.lanes import LaneLog, LaneRequests, replay_lanes
from qos_jax.sim.shared_cards import card_turns
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile, RequestLog, RequestTrace, SharedCards
from qos_jax.sim.validation import MAX_SIZE, checked_assignment, checked_experts, checked_trace, checked_whole

_SHARED_ROWS = 4096  # no more rows are compiled than needed for the sake of sharing a program


class ReplayResult(struct.PyTreeNode):
    """The log of a trace, and the resources that the experts used."""

    log: RequestLog
    busy_s: np.ndarray  # [N] s of iterations
    standby_s: np.ndarray  # [N] s of standby up to ``run_end_s``
    kv_block_s: np.ndarray  # [N] blocks x s held


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
    lanes = [
        _sort_into_lanes(experts.cards, *args, length)
        for args in zip(traces, assignments, positions, failures, strict=True)
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
    of_each = experts.replace(kv_blocks=experts.kv_blocks[assignment])
    output_tokens = trace.output_tokens[np.arange(len(assignment)), assignment]
    fits = fits_in_memory(of_each, trace.prompt_tokens, output_tokens, block_size)
    return np.where(fits, assignment, -1)


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
    cards: SharedCards | None,
    trace: RequestTrace,
    assignment: np.ndarray,
    rows: Rows,
    failures: Sequence[np.ndarray],
    length: int,
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
    begin_s = trace.arrival_s[0] if len(trace.arrival_s) else 0.0
    turns = None if cards is None else card_turns(cards, arrival_s - begin_s, assignment, position)
    return LaneRequests(np.maximum(gap_s, 0.0), prompt_tokens, output_tokens, shared_tokens, fails, turns)


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
