"""Calibration: scores computed by hand, predictions at decisions, and the violations that a request causes."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import EnvParams, InputError, RequestTrace, Router, Scenario
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.impact_calibration import (
    Outcome,
    agreement,
    calibration_of,
    outcome_of,
    predict,
    probability_scores,
    reliability_bins,
)
from qos_jax.evaluation.metrics import metrics_of
from qos_jax.impact.estimate import Impact
from qos_jax.report.reliability_plots import reliability_curves
from qos_jax.sim.env import Environment
from qos_jax.sim.replay import replay_many
from tests.helpers.small_env import small_env, small_params

ROOT = pathlib.Path(__file__).parents[2]
NO_ROUTER = Router("fixed", "heuristic", tuple, lambda key, obs, memory: (jnp.int32(0), memory))


class TestScores:
    def test_agreement_by_hand(self) -> None:
        found = agreement(np.array([1.0, 2.0, 6.0]), np.array([2.0, 2.0, 2.0]))
        assert np.isnan(found.pop("correlation"))
        assert found == pytest.approx({"number": 3, "predicted": 3.0, "realised": 2.0, "bias": 1.0, "mae": 5 / 3})
        assert agreement(np.array([1.0, 2.0]), np.array([5.0, 3.0]))["correlation"] == pytest.approx(-1.0)

    def test_probability_scores_by_hand(self) -> None:
        """Two predictions in the bin 0.2 to 0.3 and two in 0.9 to 1, with errors of 0.25 and 0.05."""
        predicted, happened = np.array([0.2, 0.3 - 1e-9, 0.9, 1.0]), np.array([True, False, True, True])
        found = probability_scores(predicted, happened)
        brier = (0.64 + 0.09 + 0.01 + 0.0) / 4
        expected = {"number": 4, "predicted": 0.6, "realised": 0.75, "brier": brier, "base_brier": 0.1875, "ece": 0.15}
        assert found == pytest.approx(expected)
        bins = reliability_bins(predicted, happened)
        assert bins[0] == pytest.approx({"number": 2, "predicted": 0.25, "realised": 0.5})
        assert bins[1] == pytest.approx({"number": 2, "predicted": 0.95, "realised": 1.0})
        assert len(bins) == 2

    def test_runs_are_pooled_and_only_counted_requests_are_scored(self) -> None:
        """Two runs of three requests; a full expert dropped one of the second run."""
        outcomes = [
            Outcome(bools(0, 1, 1), np.array([9.0, 1.0, 3.0]), bools(1, 1, 0), np.array([2]), np.array([1])),
            Outcome(bools(1, 1, 0), np.array([2.0, np.nan, 9.0]), bools(1, 0, 1), np.array([0]), np.array([0])),
        ]
        latency_s = np.array([[70.0, 2.0, 2.0], [2.0, 80.0, 90.0]])
        in_time = np.array([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])
        violations = np.array([[9.0, 9.0, 2.0], [1.0, 9.0, 9.0]])
        columns = [np.stack([values, 2 * values], -1) for values in (latency_s, in_time, in_time, in_time, violations)]
        first, second = calibration_of(outcomes, Impact(*columns))
        assert first["latency_per_token_s"]["number"] == 3
        assert first["latency_per_token_s"]["bias"] == pytest.approx(0.0)
        assert first["latency_per_token_s"]["mae"] == pytest.approx(2 / 3)
        assert first["in_time"]["brier"] == first["in_time"]["base_brier"] == pytest.approx(0.25)
        assert second["in_time"]["brier"] == pytest.approx(0.5)
        assert (first["violations"]["predicted"], first["violations"]["realised"]) == (1.5, 0.5)
        assert first["reliability"] == [{"number": 4, "predicted": 0.5, "realised": 0.5}]


def bools(*values: int) -> np.ndarray:
    return np.array(values, bool)


@functools.cache
def small_run(**fields: Any) -> tuple[Environment, EnvParams, RouterRun]:
    """A hundred requests with known lengths in round-robin order; the router drops every tenth."""
    env, params = small_env(3, slots=16), small_params(3, max_running=6, max_waiting=6, kv_blocks=80)
    rng = np.random.default_rng(4)
    output_tokens = rng.integers(5, 60, (100, 3))
    trace = RequestTrace(
        arrival_s=np.cumsum(rng.exponential(1 / 7, 100)),
        prompt_tokens=rng.integers(1, 200, 100).astype(np.int32),
        output_tokens=output_tokens.astype(np.int32),
        score=rng.uniform(0.3, 1.0, (100, 3)).astype(np.float32),
        latency_limit_s=np.full(100, 0.036, np.float32),
        predicted_score=rng.uniform(0.3, 1.0, (100, 3)).astype(np.float32),
        predicted_tokens=output_tokens.astype(np.float32),
    )
    assignment = np.where(np.arange(100) % 10 == 7, -1, np.arange(100) % 3)
    experts = jax.tree.map(np.asarray, params.experts)
    (replayed,) = replay_many(experts, [trace], [assignment])
    metrics = metrics_of(experts, trace, assignment, replayed)
    return env, params, RouterRun(NO_ROUTER, Scenario(1.0, 7.0, 0), trace, assignment, replayed, metrics)


def test_outcomes_are_those_of_the_log() -> None:
    env, params, run = small_run()
    outcome = outcome_of(env, params, run, warmup=20, removals=5)
    assert np.array_equal(outcome.counted, (np.arange(100) >= 20) & (run.assignment >= 0))
    assert outcome.in_time.mean() == pytest.approx(1 - run.metrics["violation_rate"])
    assert 0.2 < outcome.in_time.mean() < 0.8  # so that the run has both kinds of outcomes
    assert np.nanmean(outcome.latency_per_token_s) == pytest.approx(run.metrics["latency_per_token_s"])
    assert len(outcome.removed) == 5
    assert outcome.counted[outcome.removed].all()


def test_a_router_that_drops_all_requests_is_refused() -> None:
    env, params, run = small_run()
    with pytest.raises(InputError, match="router 'fixed' has sent no request after the warm-up of 100"):
        outcome_of(env, params, run, warmup=100)


def test_caused_violations_are_those_of_requests_present_at_arrival() -> None:
    """A meets its limit without B only; C goes to another expert, D is dropped, E arrives when all are finished."""
    env, params, _ = small_run()
    experts = jax.tree.map(np.asarray, params.experts)
    trace = RequestTrace(
        arrival_s=np.array([0.0, 0.3, 0.3, 0.3, 60.0]),
        prompt_tokens=np.array([20, 150, 20, 20, 20]),
        output_tokens=np.full((5, 3), 40),
        score=np.ones((5, 3)),
        latency_limit_s=np.full(5, np.nan),
    )
    assignment = np.array([0, 0, 1, -1, 0])
    together, alone = replay_many(experts, [trace] * 2, [assignment, np.array([0, -1, 1, -1, 0])])
    limit_s = (together.log.finish_s[0] + alone.log.finish_s[0]) / 2 / 40 + experts.network_s[0] / 40
    assert limit_s > alone.log.finish_s[0] / 40 + 1e-4
    trace = trace.replace(latency_limit_s=np.full(5, limit_s))
    metrics = metrics_of(experts, trace, assignment, together)
    run = RouterRun(NO_ROUTER, Scenario(1.0, 7.0, 0), trace, assignment, together, metrics)
    outcome = outcome_of(env, params, run)
    assert outcome.removed.tolist() == [0, 1, 2, 4]
    assert outcome.violations.tolist() == [0, 1, 0, 0]
    assert outcome.in_time[[0, 3, 4]].tolist() == [False, False, True]


def test_predictions_with_known_lengths_are_right_without_later_arrivals() -> None:
    """For the last request on each expert, by the rollout form, up to the iteration in progress at its arrival."""
    env, params, run = small_run()
    widths_s = [1e-4, 2e-3]
    predicted = predict(env, params, [run, run], "rollout", widths_s, 0.0)
    assert predicted.in_time.shape == (2, 100, 2)
    outcome = outcome_of(env, params, run, removals=1)
    for expert in range(3):
        last = np.flatnonzero(run.assignment == expert)[-1]
        iteration_s = 0.1 / run.trace.output_tokens[last, expert]
        error_s = outcome.latency_per_token_s[last] - predicted.latency_per_token_s[0, last]
        assert np.all((error_s > -1e-5) & (error_s < iteration_s))
    sent = outcome.counted
    expected, realised = predicted.latency_per_token_s[0, sent, 0], outcome.latency_per_token_s[sent]
    assert np.corrcoef(expected, realised)[0, 1] > 0.7
    assert np.all(expected < realised + 1e-4)  # later arrivals can only slow a request down


def test_the_picture_shows_the_bins_of_the_two_widths() -> None:
    few, many = {"number": 5, "predicted": 0.1, "realised": 0.9}, {"number": 50, "predicted": 0.4, "realised": 0.6}
    rows = [
        {"prediction": prediction, "form": form, "routing_width": w == 1, "best_width": w == 0, "reliability": bins}
        for prediction in ("perfect", "none")
        for form in ("analytic", "rollout")
        for w, bins in enumerate(([few, many, many], [many], [many]))
    ]
    figure = reliability_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["predictions: perfect", "predictions: none"]
    for axes in figure.axes:
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()[1:]}
        assert curves == {
            "analytic, best width": [[0.4, 0.6]] * 2,
            "analytic, routing width": [[0.4, 0.6]],
            "rollout, best width": [[0.4, 0.6]] * 2,
            "rollout, routing width": [[0.4, 0.6]],
        }


@pytest.mark.slow
def test_the_program_writes_its_results(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "experiments.calibrate", "--requests=80", "--seeds=1", "--removals=2"]
    done = subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "realistic rollout all" in done.stdout
    assert {"results.json", "reliability.png", "reliability.pdf"} <= {path.name for path in tmp_path.iterdir()}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 3 * 7  # predictions, forms, two routers and both together, widths
    for row in rows:
        assert 0 <= row["in_time"]["brier"] <= 1
        assert row["violations"]["number"] == (4 if row["router"] == "all" else 2)
    assert sum(row["best_width"] for row in rows) == 3 * 2 * 3
