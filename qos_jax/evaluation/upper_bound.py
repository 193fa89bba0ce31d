"""An upper bound on the QoS of any assignment of a known trace: a linear program, certified by its dual.

A request that is answered in time must get its tokens between its arrival and its limit, and every token costs its
expert some time that is not shared. For an expert and a window of time, ``_least_work_s`` says how much time in that
window each request must take at least if it is answered in time; the sum cannot exceed the window. docs/limits.md
proves it for every schedule that the rules of the simulator allow. KV memory and the lengths of queues are ignored.

The linear program may split a request. Its dual prices give a bound by themselves, whatever the solver's accuracy: QoS
is at most the price of all windows, and for each request the best score less the price of its work, or 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from qos_jax.evaluation.hindsight import known_trace
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.sim.validation import checked_experts

_SHORTEST = 0.25  # length of the shortest windows, in times that a request may take on average
_ROUNDING = 1e-9  # of times, in favour of the bound


def upper_bound(experts: ExpertProfile, trace: RequestTrace) -> float:
    """Returns a mean QoS that no assignment of the trace can exceed.

    Args:
      experts: profile of the N experts.
      trace: J requests in order of arrival, with scores and latency limits.

    Raises:
      InputError: a field of the arguments is not usable.
    """
    experts = checked_experts(experts)
    trace = known_trace(trace, len(experts.step_base_s))
    works = [_work_of(experts, trace, n) for n in range(len(experts.step_base_s))]
    score = np.where(np.stack([work.feasible for work in works], 1), trace.score, 0.0)
    length_s, work_s = _constraints(works, trace)
    price = _dual_prices(score, length_s, work_s)
    left = score - (price @ work_s).reshape(score.shape)
    return float(price @ length_s + np.maximum(left.max(1), 0.0).sum()) / len(score)


class _Work(NamedTuple):
    """What every token of every request costs one expert at least; D is the largest number of tokens."""

    base_s: float  # of each iteration, shared by its requests
    max_running: int
    arrival_s: np.ndarray  # [J]
    allowed_s: np.ndarray  # [J] from arrival to the limit
    tokens: np.ndarray  # [J]
    cost_s: np.ndarray  # [J, D + 1] of the first tokens, not shared
    root_cost: np.ndarray  # [J, D + 1] sum of the square roots of these costs
    span_s: np.ndarray  # [J, D + 1] that the first tokens take
    feasible: np.ndarray  # [J] bool: in time if nobody else is there


def _work_of(experts: ExpertProfile, trace: RequestTrace, n: int) -> _Work:
    base_s, prefill_base_s, per_prompt_token_s, per_sequence_s, per_kv_token_s, network_s = (
        float(getattr(experts, name)[n])
        for name in (
            "step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s", "network_s"
        )
    )  # fmt: skip
    # A preempted request computes its cache anew instead of reading it; the mix makes that cost no less.
    mix = min(1.0, per_kv_token_s / per_prompt_token_s) if per_prompt_token_s > 0 else 0.0
    per_kv_token_s = min(per_kv_token_s, mix * per_prompt_token_s)
    shared_s = (1 - mix) * base_s + mix * min(base_s, prefill_base_s)

    tokens = trace.output_tokens[:, n].astype(np.int64)
    prompt = trace.prompt_tokens[:, None].astype(np.float64)
    cost_s = per_sequence_s + per_kv_token_s * (prompt + np.arange(tokens.max()) - 1.0)
    cost_s[:, 0] = per_sequence_s + mix * per_prompt_token_s * prompt[:, 0]
    span_s = shared_s + cost_s
    span_s[:, 0] = np.maximum(base_s, prefill_base_s + per_prompt_token_s * prompt[:, 0]) + per_sequence_s
    span_s = _sums(span_s)
    allowed_s = trace.latency_limit_s * tokens * (1 + _ROUNDING) + _ROUNDING - network_s
    return _Work(
        shared_s, int(experts.max_running[n]), trace.arrival_s, allowed_s, tokens,
        _sums(cost_s), _sums(np.sqrt(cost_s)), span_s, _at(span_s, tokens) <= allowed_s,
    )  # fmt: skip


def _constraints(works: list[_Work], trace: RequestTrace) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Returns the length [C] s of windows and the least work [C, J N] s in them."""
    lengths: list[float] = []
    requests, columns, values = [], [], []
    for n, work in enumerate(works):
        for start_s, end_s in _windows(work):
            touched = np.flatnonzero(
                work.feasible & (work.arrival_s < end_s) & (work.arrival_s + work.allowed_s > start_s)
            )
            for least_s in _least_work_s(work, touched, start_s, end_s):
                columns.append(touched * len(works) + n)
                values.append(least_s)
                requests.append(np.full(len(touched), len(lengths)))
                lengths.append(end_s - start_s)
    entries = (np.concatenate(values), (np.concatenate(requests), np.concatenate(columns)))
    return np.array(lengths), scipy.sparse.csr_array(entries, shape=(len(lengths), len(trace.arrival_s) * len(works)))


def _windows(work: _Work) -> Iterator[tuple[float, float]]:
    """Yields windows of doubling length until one holds all; each starts at an arrival, half a length on or later."""
    last_s = float(np.max(work.arrival_s + work.allowed_s))
    length_s = _SHORTEST * max(float(np.mean(work.allowed_s)), 1e-3)
    while True:
        at = 0
        while at < len(work.arrival_s):
            start_s = float(work.arrival_s[at])
            yield start_s - 2 * _ROUNDING, start_s + length_s + 2 * _ROUNDING
            at = int(np.searchsorted(work.arrival_s, start_s + length_s / 2))
        if work.arrival_s[0] + length_s >= last_s:
            return
        length_s *= 2


def _least_work_s(work: _Work, requests: np.ndarray, start_s: float, end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least time [s] that each of ``requests`` takes of the expert in a window, in two ways.

    First by its limit: the fuller the batch, the longer its iterations. Then by the size of the batch.
    """
    arrival_s, limit_s = work.arrival_s[requests], work.arrival_s[requests] + work.allowed_s[requests]
    tokens, span_s = work.tokens[requests], work.span_s[requests]
    # The first tokens may come before the window and the last ones after it, as many as time allows.
    first = np.minimum(np.sum(span_s < (start_s - arrival_s + _ROUNDING)[:, None], 1), tokens)
    latest_s = _at(span_s, tokens) - (limit_s - end_s) - _ROUNDING
    last = np.clip(np.sum(span_s <= latest_s[:, None], 1) - 1, first, tokens)
    inside = last - first
    cost_s, root_cost = (
        _at(sums[requests], last) - _at(sums[requests], first) for sums in (work.cost_s, work.root_cost)
    )
    present_s = np.minimum(limit_s, end_s) - np.maximum(arrival_s, start_s)
    spare_s = np.where(inside > 0, present_s - inside * work.base_s, np.inf)
    by_limit_s = cost_s + work.base_s * root_cost**2 / np.maximum(spare_s, _ROUNDING)
    return by_limit_s, cost_s + work.base_s * inside / work.max_running


def _dual_prices(score: np.ndarray, length_s: np.ndarray, work_s: scipy.sparse.csr_array) -> np.ndarray:
    """Returns a price of time in each window [C], at least 0, under which the bound is low."""
    num_requests, num_experts = score.shape
    once = scipy.sparse.kron(scipy.sparse.eye_array(num_requests), np.ones((1, num_experts)), format="csr")
    solution = scipy.optimize.linprog(
        -score.ravel(),
        A_ub=scipy.sparse.vstack([work_s, once]),
        b_ub=np.concatenate([length_s, np.ones(num_requests)]),
        method="highs",
    )
    if solution.x is None:
        return np.zeros(len(length_s))
    return np.maximum(-solution.ineqlin.marginals[: len(length_s)], 0.0)


def _sums(values: np.ndarray) -> np.ndarray:
    """Returns the sums [J, D + 1] of the first 0 .. D values."""
    return np.pad(np.cumsum(values, 1), ((0, 0), (1, 0)))


def _at(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.take_along_axis(sums, count[:, None], 1)[:, 0]
