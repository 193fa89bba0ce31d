"""Metrics against hand-computed figures, of a made-up log and of a run that is known exactly."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from qos_jax import ExpertProfile, InputError, RequestLog, RequestTrace
from qos_jax.evaluation.metrics import latency_per_token_s, metrics_of, qos_of
from qos_jax.fleet.profiles import expert_profile
from qos_jax.sim.cost import excess_energy_j
from qos_jax.sim.replay import ReplayResult, replay_many, run_end_s
from tests.helpers.workloads import profile

NAN = math.nan
EXPERTS = profile(
    step_base_s=[0.01, 0.02],
    network_s=[0.5, 0.0],
    kv_blocks=[100, 200],
    idle_w=[100.0, 50.0],
    busy_w=[400.0, 300.0],
    standby_w=[150.0, 80.0],
    standby_s=[0.5, 2.0],
    kv_block_gb=[0.01, 0.02],
)
# Request 0 meets its limit exactly. Request 1 misses it because of the network delay. Request 2 meets it exactly, on an
# expert without network delay. The expert drops 3 and the router drops 4. The answer to 5 has one token.
ASSIGNMENT = np.array([0, 0, 1, 1, -1, 1])
TRACE = RequestTrace(
    arrival_s=np.array([0.0, 1.0, 2.0, 3.0, 4.0, 4.0]),
    prompt_tokens=np.full(6, 10),
    output_tokens=np.array([[16, 9], [8, 9], [9, 8], [5, 5], [5, 5], [9, 1]]),
    score=np.array([[0.8, 0.1], [0.6, 0.1], [0.1, 0.5], [1.0, 1.0], [1.0, 1.0], [0.1, 0.9]]),
    latency_limit_s=np.array([0.125, 0.3, 0.25, 9.0, 9.0, 1.0]),
)
REPLAYED = ReplayResult(
    RequestLog(
        finish_s=np.array([1.5, 3.0, 4.0, NAN, NAN, 4.5]),
        first_token_s=np.array([0.5, 2.0, 2.25, NAN, NAN, 4.5]),
        preemptions=np.array([2, 1, 0, 0, 0, 0]),
        dropped=np.array([False, False, False, True, True, False]),
    ),
    busy_s=np.array([3.0, 1.5]),
    standby_s=np.array([0.25, 0.5]),
    kv_block_s=np.array([90.0, 180.0]),
)
EXPECTED = {
    "requests": 6,
    "qos": (0.8 + 0.5 + 0.9) / 6,
    "score": (0.8 + 0.6 + 0.5 + 0.9) / 4,
    "latency_per_token_s": (0.125 + 0.3125 + 0.25 + 0.5) / 4,
    "latency_per_token_p50_s": 0.28125,
    "latency_per_token_p95_s": 0.471875,
    "latency_per_token_p99_s": 0.494375,
    "ttft_s": (1.0 + 1.5 + 0.25 + 0.5) / 4,  # with network delay
    "ttft_p50_s": 0.75,
    "ttft_p95_s": 1.425,
    "ttft_p99_s": 1.485,
    "tpot_s": (1 / 15 + 1 / 7 + 1.75 / 7) / 3,  # an answer of one token has no TPOT
    "tpot_p50_s": 1 / 7,
    "tpot_p95_s": 1 / 7 + 0.9 * (0.25 - 1 / 7),
    "tpot_p99_s": 1 / 7 + 0.98 * (0.25 - 1 / 7),
    "e2e_s": (2.0 + 2.5 + 2.0 + 0.5) / 4,
    "e2e_p50_s": 2.0,
    "e2e_p95_s": 2.425,
    "e2e_p99_s": 2.485,
    "violation_rate": 3 / 6,
    "drop_rate": 2 / 6,
    "preemptions": 3,
    "kv_utilisation": (90 / (4.5 * 100) + 180 / (4.5 * 200)) / 2,
    "qos_per_gb_s": 2.2 / (90 * 0.01 + 180 * 0.02),
    "energy_j_per_request": 1977.5 / 6,  # 400 x 3 + 150 x .25 + 100 x 1.25 and 300 x 1.5 + 80 x .5 + 50 x 2.5 J
    "energy_j_per_token": 1977.5 / 33,
    "qos_per_kj": 2.2 / 1.9775,
    "busy_fraction": (3.0 / 4.5 + 1.5 / 4.5) / 2,
}
OF_THE_WHOLE_RUN = ("kv_utilisation", "qos_per_gb_s", "energy_j_per_token", "qos_per_kj", "busy_fraction")


def test_a_log_computed_by_hand() -> None:
    np.testing.assert_allclose(
        latency_per_token_s(EXPERTS, TRACE, ASSIGNMENT, REPLAYED), [0.125, 0.3125, 0.25, NAN, NAN, 0.5]
    )
    np.testing.assert_array_equal(qos_of(EXPERTS, TRACE, ASSIGNMENT, REPLAYED), [0.8, 0.0, 0.5, 0.0, 0.0, 0.9])
    assert metrics_of(EXPERTS, TRACE, ASSIGNMENT, REPLAYED) == pytest.approx(EXPECTED)


def test_a_limit_missed_by_one_ulp_has_no_qos() -> None:
    limit_s = np.nextafter(TRACE.latency_limit_s, 0.0)
    qos = qos_of(EXPERTS, TRACE.replace(latency_limit_s=limit_s), ASSIGNMENT, REPLAYED)
    np.testing.assert_array_equal(qos, [0.0, 0.0, 0.0, 0.0, 0.0, 0.9])


def test_requests_of_the_warmup_count_for_the_experts_only() -> None:
    metrics = metrics_of(EXPERTS, TRACE, ASSIGNMENT, REPLAYED, warmup=2)
    counted = {
        "requests": 4,
        "qos": (0.5 + 0.9) / 4,
        "score": (0.5 + 0.9) / 2,
        "latency_per_token_s": (0.25 + 0.5) / 2,
        "ttft_s": (0.25 + 0.5) / 2,
        "tpot_s": 0.25,
        "violation_rate": 2 / 4,
        "drop_rate": 2 / 4,
        "preemptions": 0,
    }
    assert {name: metrics[name] for name in counted} == pytest.approx(counted)
    whole = {name: EXPECTED[name] for name in OF_THE_WHOLE_RUN}
    assert {name: metrics[name] for name in whole} == pytest.approx(whole)


@pytest.mark.parametrize("num_requests", [1, 6])
def test_where_all_requests_are_dropped_times_are_unknown(num_requests: int) -> None:
    trace = jax.tree.map(lambda x: x[:num_requests], TRACE)
    nothing = np.full(num_requests, NAN)
    log = RequestLog(nothing, nothing, np.zeros(num_requests, int), np.ones(num_requests, bool))
    result = ReplayResult(log, *[np.zeros(2)] * 3)
    metrics = metrics_of(EXPERTS, trace, np.full(num_requests, -1), result)
    unknown = {name for name, value in metrics.items() if math.isnan(value)}
    times = ("latency_per_token", "ttft", "tpot", "e2e")
    answers = {"score", "energy_j_per_token", "qos_per_gb_s"} | {f"{name}_s" for name in times}
    percentiles = {f"{name}_p{p}_s" for name in times for p in (50, 95, 99)}
    assert unknown == answers | percentiles
    assert (metrics["qos"], metrics["violation_rate"], metrics["drop_rate"]) == (0.0, 1.0, 1.0)
    assert (metrics["kv_utilisation"], metrics["busy_fraction"]) == (0.0, 0.0)
    run_s = trace.arrival_s[-1] - trace.arrival_s[0]
    assert metrics["energy_j_per_request"] == pytest.approx(150.0 * run_s / num_requests, abs=1e-6)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("latency_limit_s", np.array([0.125]), r"trace.latency_limit_s has shape \(1,\), must be \[J\] = \[6\]"),
        ("score", np.ones((6, 1)), r"trace.score has shape \(6, 1\), must be \[J, N\] = \[6, 2\]"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(field: str, values: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics_of(EXPERTS, TRACE.replace(**{field: values}), ASSIGNMENT, REPLAYED)
    with pytest.raises(InputError, match=r"assignment has shape \(1,\), must be \[J\] = \[6\]"):
        metrics_of(EXPERTS, TRACE, ASSIGNMENT[:1], REPLAYED)


def test_a_run_known_exactly() -> None:
    """Two requests, one after the other, on an expert whose iterations take 10 ms; the other expert is idle.

    A request of 20 prompt tokens and 30 output tokens takes 30 iterations. It holds 2 blocks in 13 of them, 3 in 16 and
    4 in the last one.
    """
    experts = ExpertProfile(
        step_base_s=np.array([0.01, 0.05]), prefill_base_s=0.0, prefill_per_token_s=0.0, per_sequence_s=0.0,
        per_kv_token_s=0.0, kv_blocks=np.array([10, 50]), max_running=4, max_waiting=4,
        idle_w=np.array([100.0, 10.0]), busy_w=np.array([400.0, 999.0]), standby_w=150.0, standby_s=0.5,
        kv_block_gb=0.01,
    )  # fmt: skip
    trace = RequestTrace(
        arrival_s=np.array([5.0, 7.0]),
        prompt_tokens=np.full(2, 20),
        output_tokens=np.full((2, 2), 30),
        score=np.array([[0.5, 1.0], [0.75, 1.0]]),
        latency_limit_s=np.full(2, 0.0101),
    )
    assignment = np.zeros(2, int)
    (result,) = replay_many(experts, [trace], [assignment])
    metrics = metrics_of(experts, trace, assignment, result)
    run_s, busy_s, blocks_s = 2.3, 0.6, 2 * 0.01 * (13 * 2 + 16 * 3 + 4)
    # It stands by after the first request only, as the run ends with the second one.
    energy_j = 400 * busy_s + 150 * 0.5 + 100 * (run_s - busy_s - 0.5) + 10 * run_s
    expected = {
        "qos": 0.625,
        "latency_per_token_s": 0.01,
        "ttft_s": 0.01,
        "tpot_s": 0.01,
        "violation_rate": 0.0,
        "kv_utilisation": blocks_s / (run_s * 10) / 2,
        "qos_per_gb_s": 1.25 / (0.01 * blocks_s),
        "energy_j_per_request": energy_j / 2,
        "energy_j_per_token": energy_j / 60,
        "qos_per_kj": 1.25 / (energy_j / 1e3),
        "busy_fraction": busy_s / run_s / 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_measured_energy_of_a_gpu_follows_from_three_power_states(data_dir: pathlib.Path) -> None:
    """Three bursts of 10 requests, 60 s apart, on vLLM 0.11 with Llama-3.1-8B and an A6000 whose power was sampled.

    Timing and power are those of the shipped profile. A second expert serves the same requests without standby.
    """
    folder = data_dir / "golden-power-a6000"
    time_s, power_w = np.loadtxt(folder / "gpu_power_tp1.csv", delimiter=",", skiprows=1).T
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    experts = expert_profile([("llama-3.1-8b", "A6000")] * 2)
    experts = experts.replace(standby_s=experts.standby_s * [1.0, 0.0])
    served = {name: np.repeat([row[name] for row in rows], 2) for name in rows[0]}
    # The router drops a request at both ends of the samples, so that the run is as long. The bursts start at 8.6 s.
    arrival_s = np.concatenate([time_s[:1], served["arrival_s"] + 7.6, time_s[-1:]])
    prompts, outputs = (np.pad(served[name], 1, constant_values=1) for name in ("input_toks", "output_toks"))
    trace = RequestTrace(arrival_s, prompts, np.tile(outputs[:, None], 2))
    (result,) = replay_many(experts, [trace], [np.array([-1, *[0, 1] * len(rows), -1])])

    run_s = run_end_s(trace, result.log) - arrival_s[0]
    energy_j = excess_energy_j(experts, result.busy_s, result.standby_s) + experts.idle_w * run_s
    measured_j = np.trapezoid(power_w, time_s)
    assert measured_j == pytest.approx(19_787, abs=1)
    assert energy_j[0] == pytest.approx(measured_j, rel=0.05)
    assert energy_j[1] < 0.85 * measured_j
