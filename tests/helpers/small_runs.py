"""A few small runs for tests of figures and reports: replays of fixed assignments."""

from __future__ import annotations

import functools

import jax
import numpy as np

from qos_jax import RequestTrace
from qos_jax.evaluation.evaluate import RouterRun, Scenario
from qos_jax.evaluation.metrics import metrics_of
from qos_jax.routers.base import Router
from qos_jax.sim.replay import replay_many
from tests.helpers.small_env import small_experts

EXPERTS = jax.tree.map(np.asarray, small_experts(3))
EXPERT_NAMES = ("alpha", "beta", "gamma")
LOADS, SEEDS = (0.5, 1.5), (0, 1)
REQUESTS, WARM_UP, LIMIT_S = 80, 8, 0.05
KINDS = {"round_robin": "heuristic", "only_gamma": "expert", "refuse_all": "heuristic", "oracle": "oracle"}


@functools.cache
def runs() -> tuple[RouterRun, ...]:
    """Every router at every load and seed; ``only_gamma`` overloads its expert, ``refuse_all`` drops all requests."""
    scenarios = [Scenario(load, 6.0 * load, seed) for load in LOADS for seed in SEEDS]
    traces = [_trace(scenario) for scenario in scenarios]
    names = [name for name in KINDS for _ in scenarios]
    assignments = [_assignment(name, trace) for name in KINDS for trace in traces]
    replays = replay_many(EXPERTS, traces * len(KINDS), assignments)
    return tuple(
        RouterRun(_router(name), scenario, trace, sent, replayed, metrics_of(EXPERTS, trace, sent, replayed, WARM_UP))
        for name, scenario, trace, sent, replayed in zip(
            names, scenarios * len(KINDS), traces * len(KINDS), assignments, replays, strict=True
        )
    )


def runs_at(load: float) -> list[RouterRun]:
    return [run for run in runs() if run.scenario.load == load]


def _trace(scenario: Scenario) -> RequestTrace:
    rng = np.random.default_rng(scenario.seed)
    return RequestTrace(
        arrival_s=np.cumsum(rng.exponential(1 / scenario.rate_per_s, REQUESTS)),
        prompt_tokens=rng.integers(1, 120, REQUESTS),
        output_tokens=rng.integers(1, 60, (REQUESTS, 3)),
        score=rng.uniform(0.3, 1.0, (REQUESTS, 3)),
        latency_limit_s=np.full(REQUESTS, LIMIT_S),
    )


def _assignment(name: str, trace: RequestTrace) -> np.ndarray:
    return {
        "round_robin": np.arange(REQUESTS) % 3,
        "only_gamma": np.full(REQUESTS, 2),
        "refuse_all": np.full(REQUESTS, -1),
        "oracle": np.argmax(trace.score, 1),
    }[name]


def _router(name: str) -> Router:
    """A router with a name and a kind only, as the assignments are fixed."""
    return Router(name=name, kind=KINDS[name], init=lambda: (), act=lambda key, obs, memory: (0, memory))
