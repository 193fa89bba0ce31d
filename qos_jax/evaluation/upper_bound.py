"""An upper bound on the QoS of any assignment of a known trace: a linear program, certified by its dual.

A request that is answered in time gets its tokens between its arrival and its limit, and every token costs its expert
some time that is not shared. For an expert and a window of time, ``_least_work_s`` returns a lower bound of the time
that each request takes in that window if it is answered in time. The sum cannot exceed the length of the window.
docs/evidence/limits.md proves this for every schedule that the rules of the simulator allow. KV memory and the lengths
of queues are ignored.

The linear program may split requests. Its dual prices certify the bound regardless of the solver's accuracy: the total
QoS is at most the price of all windows plus, for each request, the maximum of 0 and the best score minus the price of
the request's work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from qos_jax.errors import InputError
from qos_jax.evaluation.hindsight import known_trace
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.sim.validation import checked_experts

_SHORTEST = 0.25  # length of the shortest windows, in units of the mean allowed time of a request
_ROUNDING = 1e-9  # tolerance of times, which can only raise the bound


def upper_bound(experts: ExpertProfile, trace: RequestTrace) -> float:
    """Returns an upper bound on the mean QoS of any assignment of the trace.

    Args:
      experts: profile of the N experts.
      trace: J requests in order of arrival, with scores and latency limits.

    Raises:
      InputError: a field of the arguments is not usable, or the experts have tables of their kernels: the bound rests
        on the five coefficients.
    """
    if experts.kernels is not None:
        raise InputError("experts.kernels is given, must be None: the upper bound is of the five coefficients")
    experts = checked_experts(experts)
    trace = known_trace(trace, len(experts.step_base_s))
    works = [_work_of(experts, trace, n) for n in range(len(experts.step_base_s))]
    score = np.where(np.stack([work.feasible for work in works], 1), trace.score, 0.0)
    length_s, work_s = _constraints(works, trace)
    price = _dual_prices(score, length_s, work_s)
    net_score = score - (price @ work_s).reshape(score.shape)
    return float(price @ length_s + np.maximum(net_score.max(1), 0.0).sum()) / len(score)


class _Work(NamedTuple):
    """Lower bounds of the time that every token of every request takes on one expert; D is the most tokens."""

    base_s: float  # of each iteration, shared by its requests
    max_running: int
    arrival_s: np.ndarray  # [J]
    allowed_s: np.ndarray  # [J] from the arrival to the limit
    tokens: np.ndarray  # [J]
    cost_s: np.ndarray  # [J, D + 1] of the first 0 .. D tokens, without the shared part
    root_cost: np.ndarray  # [J, D + 1] sum of the square roots of the cost of each of these tokens
    span_s: np.ndarray  # [J, D + 1] duration of the first tokens
    feasible: np.ndarray  # [J] bool: in time without other requests


def _work_of(experts: ExpertProfile, trace: RequestTrace, n: int) -> _Work:
    base_s, prefill_base_s, per_prompt_token_s, per_sequence_s, per_kv_token_s, network_s = (
        float(getattr(experts, name)[n])
        for name in (
            "step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s", "network_s"
        )
    )  # fmt: skip
    # A preempted request recomputes its cache instead of reading it. With this mix that is at least as expensive.
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
    allowed_s = trace.latency_limit_s * tokens
    if trace.limits is not None:
        later_s = np.where(tokens > 1, trace.limits.tpot_s * np.maximum(tokens - 1, 1), 0.0)
        allowed_s = np.minimum(allowed_s, np.minimum(trace.limits.e2e_s, trace.limits.ttft_s + later_s))
    allowed_s = allowed_s * (1 + _ROUNDING) + _ROUNDING - network_s
    return _Work(
        shared_s, int(experts.max_running[n]), trace.arrival_s, allowed_s, tokens,
        _sums(cost_s), _sums(np.sqrt(cost_s)), span_s, _at(span_s, tokens) <= allowed_s,
    )  # fmt: skip


def _constraints(works: list[_Work], trace: RequestTrace) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Returns the length [C] s of windows, and the least work [C, J N] s in them."""
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
    """Yields windows of doubling length until one holds all requests; each starts half a length or more after the last.

    All windows start at arrivals.
    """
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
    """Returns two lower bounds of the time [s] that each of ``requests`` takes on the expert in a window.

    The first follows from the latency limit, as iterations take longer in a fuller batch. The second follows from the
    maximum size of the batch.
    """
    arrival_s, limit_s = work.arrival_s[requests], work.arrival_s[requests] + work.allowed_s[requests]
    tokens, span_s = work.tokens[requests], work.span_s[requests]
    # As many of the first tokens as possible come before the window, and as many of the last tokens after it.
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
    """Returns a price of time [C] in each window, at least 0, for which the bound is low."""
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
    """Returns the sums [J, D + 1] of the first 0 .. D values [J, D]."""
    return np.pad(np.cumsum(values, 1), ((0, 0), (1, 0)))


def _at(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the sums [J] of the first ``count`` [J] values."""
    return np.take_along_axis(sums, count[:, None], 1)[:, 0]
