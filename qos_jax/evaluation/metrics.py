"""Metrics of one run: service of the requests of a trace, and resources that the experts used."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from qos_jax.sim.cost import excess_energy_j
from qos_jax.sim.replay import ReplayResult, run_end_s
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.sim.validation import check_shapes


def qos_of(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult) -> np.ndarray:
    """Returns the QoS [J]: the score if the answer meets all limits, else 0, also for dropped requests.

    Args:
      experts: profile of the N experts.
      trace: J requests, with scores and latency limits.
      assignment: [J] int, expert of each request; -1 for a request that the router dropped.
      result: of the replay of this assignment.
    """
    in_time = in_time_of(experts, trace, assignment, result)
    return np.where(in_time, select_assigned(trace.score, assignment), 0.0)


def in_time_of(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult) -> np.ndarray:
    """Returns [J] bool: the answer meets all limits; no for dropped requests. See ``qos_of``."""
    times = times_of(experts, trace, assignment, result)
    with np.errstate(invalid="ignore"):
        in_time = times.latency_per_token_s <= trace.latency_limit_s
        if trace.limits is not None:
            in_time &= (times.ttft_s <= trace.limits.ttft_s) & (times.e2e_s <= trace.limits.e2e_s)
            in_time &= (times.tpot_s <= trace.limits.tpot_s) | (times.tokens == 1)
    return in_time


class Times(NamedTuple):
    """The times that users see, with the network delay; NaN for dropped requests."""

    tokens: np.ndarray  # [J] tokens of the answer
    ttft_s: np.ndarray  # [J] s from the arrival to the first token
    tpot_s: np.ndarray  # [J] s per token after the first; 0 for answers of one token
    e2e_s: np.ndarray  # [J] s from the arrival to the last token
    latency_per_token_s: np.ndarray  # [J] s/token


def times_of(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult) -> Times:
    """Returns the times of the answers; see ``qos_of``."""
    network_s = np.broadcast_to(experts.network_s, np.shape(experts.step_base_s))[assignment]
    tokens = select_assigned(trace.output_tokens, assignment)
    e2e_s = result.log.finish_s - trace.arrival_s + network_s
    ttft_s = result.log.first_token_s - trace.arrival_s + network_s
    tpot_s = (result.log.finish_s - result.log.first_token_s) / np.maximum(tokens - 1, 1)
    return Times(tokens, ttft_s, tpot_s, e2e_s, e2e_s / tokens)


def latency_per_token_s(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult
) -> np.ndarray:
    """Returns (finish - arrival + network) / output tokens [J] in s/token, NaN for dropped requests; see ``qos_of``."""
    return times_of(experts, trace, assignment, result).latency_per_token_s


def select_assigned(values: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns ``values`` [J, N] at each request's expert [J]; arbitrary for requests that the router dropped."""
    return np.take_along_axis(np.asarray(values), np.maximum(assignment, 0)[:, None], 1)[:, 0]


def metrics_of(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult, warmup: int = 0
) -> dict[str, float]:
    """Returns the metrics of a run by name; ``METRICS`` describes them.

    Means are over the requests after the first ``warmup`` ones: QoS, violation rate and drop rate over all of them (a
    dropped request has QoS 0 and is a violation), scores and times over the answered ones. Metrics of the experts (KV
    memory, energy) are over the whole run, from the first arrival to the last token, or to the last arrival if that is
    later.

    Args:
      experts: profile of the N experts.
      trace: J requests, with scores and latency limits.
      assignment: [J] int, expert of each request; -1 for a request that the router dropped.
      result: of the replay of this assignment.
      warmup: requests to leave out.

    Raises:
      InputError: the arrays do not belong together.
    """
    _check(trace, assignment, result)
    counted = slice(warmup, None)
    log = result.log
    qos = qos_of(experts, trace, assignment, result)[counted]
    answered = ~log.dropped[counted]
    in_time = in_time_of(experts, trace, assignment, result)[counted]
    times = Times(*(values[counted] for values in times_of(experts, trace, assignment, result)))
    per_token_s = times.latency_per_token_s
    tpot_s = times.tpot_s[answered & (times.tokens > 1)]
    return {
        "requests": len(qos),
        "qos": float(qos.mean()),
        "score": _mean(select_assigned(trace.score, assignment)[counted][answered]),
        "latency_per_token_s": _mean(per_token_s[answered]),
        **_percentiles("latency_per_token", per_token_s[answered]),
        "ttft_s": _mean(times.ttft_s[answered]),
        **_percentiles("ttft", times.ttft_s[answered]),
        "tpot_s": _mean(tpot_s),
        **_percentiles("tpot", tpot_s),
        "e2e_s": _mean(times.e2e_s[answered]),
        **_percentiles("e2e", times.e2e_s[answered]),
        "violation_rate": float(1.0 - in_time.mean()),
        "drop_rate": float(1.0 - answered.mean()),
        "preemptions": float(log.preemptions[counted].sum()),
        **_cached_share(trace, counted, answered),
        **({} if log.lost is None else {"lost_rate": float(log.lost[counted].mean())}),
        **_fleet_metrics(experts, trace, assignment, result),
    }


def _cached_share(trace: RequestTrace, counted: slice, answered: np.ndarray) -> dict[str, float]:
    """Returns the share of the answered prompts that was cached, in worlds with sessions; nothing elsewhere."""
    if trace.shared_tokens is None:
        return {}
    cached, prompt = (np.asarray(tokens)[counted][answered] for tokens in (trace.shared_tokens, trace.prompt_tokens))
    return {"cached_share": _ratio(float(cached.sum()), float(prompt.sum()))}


def _check(trace: RequestTrace, assignment: np.ndarray, result: ReplayResult) -> None:
    """Checks shapes that would otherwise broadcast, for example one latency limit for all requests."""
    requests = {"score": "JN", "output_tokens": "JN", "latency_limit_s": "J"}
    arrays = {f"trace.{name}": (getattr(trace, name), axes) for name, axes in requests.items()}
    arrays |= {"assignment": (assignment, "J"), "result.log.finish_s": (result.log.finish_s, "J")}
    check_shapes(arrays, J=len(trace.arrival_s), N=len(result.busy_s))


def _fleet_metrics(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult
) -> dict[str, float]:
    """Returns the metrics of the experts over the whole run."""
    log = result.log
    run_s = max(float(run_end_s(trace, log) - trace.arrival_s[0]), 1e-9)
    qos = float(qos_of(experts, trace, assignment, result).sum())
    tokens = float(select_assigned(trace.output_tokens, assignment)[~log.dropped].sum())
    gb_s = float(np.sum(result.kv_block_s * experts.kv_block_gb))
    energy_j = float(np.sum(excess_energy_j(experts, result.busy_s, result.standby_s) + experts.idle_w * run_s))
    return {
        "kv_utilisation": float(np.mean(result.kv_block_s / (run_s * experts.kv_blocks))),
        "qos_per_gb_s": _ratio(qos, gb_s),
        "energy_j_per_request": energy_j / len(log.dropped),
        "energy_j_per_token": _ratio(energy_j, tokens),
        "qos_per_kj": _ratio(qos, energy_j / 1e3),
        "busy_fraction": float(np.mean(result.busy_s) / run_s),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _percentiles(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}_p{p}_s": float(np.percentile(values, p)) if values.size else float("nan") for p in (50, 95, 99)}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class Metric:
    """Presentation of a metric."""

    title: str
    meaning: str
    decimals: int
    better: int = 0  # 1: higher is better, -1: lower is better, 0: neither
    scale: float = 1.0  # factor from the unit in results.json to the one in the title


def _shares(name: str, title: str, what: str, decimals: int) -> dict[str, Metric]:
    return {
        f"{name}_p{p}_s": Metric(f"{title} p{p}, ms", f"{p} % of the {what} at most this time", decimals, -1, 1e3)
        for p in (50, 95, 99)
    }


METRICS = {
    "qos": Metric("QoS", "mean score of all requests; late answers and dropped requests count 0", 3, 1),
    "score": Metric("score", "mean quality of the answers, including late ones, between 0 and 1", 3, 1),
    "violation_rate": Metric("late or dropped, %", "requests that were dropped or missed their limit", 1, -1, 100),
    "drop_rate": Metric("dropped, %", "requests dropped by the router or by a full expert, or lost", 1, -1, 100),
    "lost_rate": Metric("lost, %", "requests lost, as their expert failed; dropped ones, too", 1, -1, 100),
    "latency_per_token_s": Metric("ms per token", "mean of (finish - arrival + network) / output tokens", 1, -1, 1e3),
    "latency_per_token_p50_s": Metric("p50, ms", "50 % of the answers take at most this time per token", 1, -1, 1e3),
    "latency_per_token_p95_s": Metric("p95, ms", "95 % of the answers take at most this time per token", 1, -1, 1e3),
    "latency_per_token_p99_s": Metric("p99, ms", "99 % of the answers take at most this time per token", 1, -1, 1e3),
    "ttft_s": Metric("TTFT, ms", "mean time from arrival to first token, with the network delay", 0, -1, 1e3),
    **_shares("ttft", "TTFT", "answers have their first token after", 0),
    "tpot_s": Metric("TPOT, ms", "mean time per output token after the first", 1, -1, 1e3),
    **_shares("tpot", "TPOT", "answers take per token after the first", 1),
    "e2e_s": Metric("E2E, ms", "mean time from arrival to last token, with the network delay", 0, -1, 1e3),
    **_shares("e2e", "E2E", "answers take from arrival to last token", 0),
    "preemptions": Metric("preemptions", "how often a running request lost its KV memory and had to start over", 0, -1),
    "cached_share": Metric("cached, %", "prompt tokens that the prefix cache had; with sessions only", 1, 0, 100),
    "kv_utilisation": Metric("KV use, %", "KV memory in use, mean over time and experts", 1, 0, 100),
    "qos_per_gb_s": Metric("QoS per GB s", "QoS per GB of KV memory and second of holding it", 3, 1),
    "energy_j_per_request": Metric("J per request", "energy of the whole fleet per request that arrived", 1, -1),
    "energy_j_per_token": Metric("J per token", "energy of the whole fleet per output token", 2, -1),
    "qos_per_kj": Metric("QoS per kJ", "QoS per kJ of energy of the whole fleet", 3, 1),
    "busy_fraction": Metric("busy, %", "share of time with an iteration, mean over experts", 1, 0, 100),
    "requests": Metric("requests", "requests counted, without the warm-up", 0),
}
