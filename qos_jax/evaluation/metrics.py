"""Metrics of one run: what the requests of a trace got, and what it cost."""

from __future__ import annotations

import dataclasses

import numpy as np

from qos_jax.sim.replay import ReplayResult
from qos_jax.sim.types import ExpertProfile, RequestTrace


def qos_of(experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, replayed: ReplayResult) -> np.ndarray:
    """Returns the QoS [J]: the score where the latency per token is within the limit, else 0 (dropped ones too)."""
    in_time = latency_per_token_s(experts, trace, assignment, replayed) <= trace.latency_limit_s
    return np.where(in_time, chosen(trace.score, assignment), 0.0)


def latency_per_token_s(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, replayed: ReplayResult
) -> np.ndarray:
    """Returns (finish - arrival + network) / output tokens [J] in s/token, NaN where dropped."""
    network_s = np.broadcast_to(experts.network_s, np.shape(experts.step_base_s))[assignment]
    latency_s = replayed.log.finish_s - trace.arrival_s + network_s
    return latency_s / chosen(trace.output_tokens, assignment)


def chosen(values: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns ``values`` [J, N] at each request's expert [J]; anything where it has none."""
    return np.take_along_axis(np.asarray(values), np.maximum(assignment, 0)[:, None], 1)[:, 0]


def metrics_of(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, replayed: ReplayResult, warmup: int = 0
) -> dict[str, float]:
    """Returns the metrics of a run by name.

    Means are over the requests from number ``warmup`` on: QoS, violation and drop rate over all of them (a drop has QoS
    0 and is a violation), scores and times over those that were answered. What concerns the experts (KV memory, energy)
    is over the whole run, from the first arrival to the last token.
    """
    counted = slice(warmup, None)
    log = replayed.log
    qos = qos_of(experts, trace, assignment, replayed)[counted]
    per_token_s = latency_per_token_s(experts, trace, assignment, replayed)[counted]
    answered = ~log.dropped[counted]
    tokens = chosen(trace.output_tokens, assignment)[counted]
    first_s, finish_s = log.first_token_s[counted], log.finish_s[counted]
    with np.errstate(invalid="ignore"):
        tpot_s = ((finish_s - first_s) / np.maximum(tokens - 1, 1))[answered & (tokens > 1)]
        violation = ~(per_token_s <= trace.latency_limit_s[counted])
    return {
        "requests": len(qos),
        "qos": float(qos.mean()),
        "score": _mean(chosen(trace.score, assignment)[counted][answered]),
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
        **_fleet_metrics(experts, trace, assignment, replayed),
    }


def _fleet_metrics(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, replayed: ReplayResult
) -> dict[str, float]:
    log = replayed.log
    last_s = np.nanmax(log.finish_s) if (~log.dropped).any() else trace.arrival_s[-1]
    run_s = max(float(last_s - trace.arrival_s[0]), 1e-9)
    qos = float(qos_of(experts, trace, assignment, replayed).sum())
    tokens = float(chosen(trace.output_tokens, assignment)[~log.dropped].sum())
    gb_s = float(np.sum(replayed.kv_block_s * experts.kv_block_gb))
    idle_s = np.maximum(run_s - replayed.busy_s, 0.0)
    energy_j = float(np.sum(experts.busy_w * replayed.busy_s + experts.idle_w * idle_s))
    return {
        "kv_utilisation": float(np.mean(replayed.kv_block_s / (run_s * experts.kv_blocks))),
        "qos_per_gb_s": _ratio(qos, gb_s),
        "energy_j_per_request": energy_j / len(log.dropped),
        "energy_j_per_token": _ratio(energy_j, tokens),
        "qos_per_kj": _ratio(qos, energy_j / 1e3),
        "busy_fraction": float(np.mean(replayed.busy_s) / run_s),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    meaning: str
    decimals: int
    better: int = 0  # 1: more is better, -1: less is, 0: neither by itself
    scale: float = 1.0  # from the unit in results.json to the one in the title


METRICS = {
    "qos": Metric("QoS", "mean score of all requests, a late answer and a dropped request counting 0", 3, 1),
    "score": Metric("score", "mean quality of the answers given, late ones included, between 0 and 1", 3, 1),
    "violation_rate": Metric("late or dropped, %", "requests whose latency per token exceeded their limit", 1, -1, 100),
    "drop_rate": Metric("dropped, %", "requests refused by the router or by a full expert", 1, -1, 100),
    "latency_per_token_s": Metric("ms per token", "mean of (finish - arrival + network) / output tokens", 1, -1, 1e3),
    "latency_per_token_p50_s": Metric("p50, ms", "half of the answers take at most this long per token", 1, -1, 1e3),
    "latency_per_token_p95_s": Metric("p95, ms", "95 % of the answers take at most this long per token", 1, -1, 1e3),
    "latency_per_token_p99_s": Metric("p99, ms", "99 % of the answers take at most this long per token", 1, -1, 1e3),
    "ttft_s": Metric("TTFT, ms", "mean time from arrival to first token", 0, -1, 1e3),
    "tpot_s": Metric("TPOT, ms", "mean time per output token after the first", 1, -1, 1e3),
    "preemptions": Metric("preemptions", "how often a running request lost its KV memory and had to start over", 0, -1),
    "kv_utilisation": Metric("KV use, %", "KV memory in use, mean over time and experts", 1, 0, 100),
    "qos_per_gb_s": Metric("QoS per GB s", "QoS earned per GB of KV memory and second that it was held", 3, 1),
    "energy_j_per_request": Metric("J per request", "energy of the whole fleet per request that arrived", 1, -1),
    "energy_j_per_token": Metric("J per token", "energy of the whole fleet per token that was answered", 2, -1),
    "qos_per_kj": Metric("QoS per kJ", "QoS earned per kJ", 3, 1),
    "busy_fraction": Metric("busy, %", "time in which an expert runs an iteration, mean over experts", 1, 0, 100),
    "requests": Metric("requests", "requests counted, those behind the warm-up", 0),
}
