"""Metrics of one run: service of the requests of a trace, and resources that the experts used."""

from __future__ import annotations

import dataclasses

import numpy as np

from qos_jax.sim.cost import excess_energy_j
from qos_jax.sim.replay import ReplayResult, run_end_s
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.sim.validation import check_shapes


def qos_of(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult) -> np.ndarray:
    """Returns the QoS [J]: the score if the latency per token is within the limit, else 0, also for dropped requests.

    Args:
      experts: profile of the N experts.
      trace: J requests, with scores and latency limits.
      assignment: [J] int, expert of each request; -1 for a request that the router dropped.
      result: of the replay of this assignment.
    """
    in_time = latency_per_token_s(experts, trace, assignment, result) <= trace.latency_limit_s
    return np.where(in_time, select_assigned(trace.score, assignment), 0.0)


def latency_per_token_s(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, result: ReplayResult
) -> np.ndarray:
    """Returns (finish - arrival + network) / output tokens [J] in s/token, NaN for dropped requests; see ``qos_of``."""
    network_s = np.broadcast_to(experts.network_s, np.shape(experts.step_base_s))[assignment]
    latency_s = result.log.finish_s - trace.arrival_s + network_s
    return latency_s / select_assigned(trace.output_tokens, assignment)


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
    per_token_s = latency_per_token_s(experts, trace, assignment, result)[counted]
    answered = ~log.dropped[counted]
    tokens = select_assigned(trace.output_tokens, assignment)[counted]
    first_s, finish_s = log.first_token_s[counted], log.finish_s[counted]
    with np.errstate(invalid="ignore"):
        tpot_s = ((finish_s - first_s) / np.maximum(tokens - 1, 1))[answered & (tokens > 1)]
        violation = ~(per_token_s <= trace.latency_limit_s[counted])
    return {
        "requests": len(qos),
        "qos": float(qos.mean()),
        "score": _mean(select_assigned(trace.score, assignment)[counted][answered]),
        "latency_per_token_s": _mean(per_token_s[answered]),
        **{
            f"latency_per_token_p{p}_s": float(np.percentile(per_token_s[answered], p))
            if answered.any()
            else float("nan")
            for p in (50, 95, 99)
        },
        "ttft_s": _mean((first_s - trace.arrival_s[counted])[answered]),
        "tpot_s": _mean(tpot_s),
        "violation_rate": float(violation.mean()),
        "drop_rate": float(1.0 - answered.mean()),
        "preemptions": float(log.preemptions[counted].sum()),
        **_fleet_metrics(experts, trace, assignment, result),
    }


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


METRICS = {
    "qos": Metric("QoS", "mean score of all requests; late answers and dropped requests count 0", 3, 1),
    "score": Metric("score", "mean quality of the answers, including late ones, between 0 and 1", 3, 1),
    "violation_rate": Metric("late or dropped, %", "requests that were dropped or missed their limit", 1, -1, 100),
    "drop_rate": Metric("dropped, %", "requests dropped by the router or by a full expert", 1, -1, 100),
    "latency_per_token_s": Metric("ms per token", "mean of (finish - arrival + network) / output tokens", 1, -1, 1e3),
    "latency_per_token_p50_s": Metric("p50, ms", "50 % of the answers take at most this time per token", 1, -1, 1e3),
    "latency_per_token_p95_s": Metric("p95, ms", "95 % of the answers take at most this time per token", 1, -1, 1e3),
    "latency_per_token_p99_s": Metric("p99, ms", "99 % of the answers take at most this time per token", 1, -1, 1e3),
    "ttft_s": Metric("TTFT, ms", "mean time from arrival to first token", 0, -1, 1e3),
    "tpot_s": Metric("TPOT, ms", "mean time per output token after the first", 1, -1, 1e3),
    "preemptions": Metric("preemptions", "how often a running request lost its KV memory and had to start over", 0, -1),
    "kv_utilisation": Metric("KV use, %", "KV memory in use, mean over time and experts", 1, 0, 100),
    "qos_per_gb_s": Metric("QoS per GB s", "QoS per GB of KV memory and second of holding it", 3, 1),
    "energy_j_per_request": Metric("J per request", "energy of the whole fleet per request that arrived", 1, -1),
    "energy_j_per_token": Metric("J per token", "energy of the whole fleet per output token", 2, -1),
    "qos_per_kj": Metric("QoS per kJ", "QoS per kJ of energy of the whole fleet", 3, 1),
    "busy_fraction": Metric("busy, %", "share of time with an iteration, mean over experts", 1, 0, 100),
    "requests": Metric("requests", "requests counted, without the warm-up", 0),
}
