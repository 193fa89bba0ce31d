"""The planner and the bound: the best of all assignments lies between them, and nobody beats either."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from qos_jax import ExpertProfile, RequestTrace, evaluate, make, make_router, replay, scenarios
from qos_jax.errors import InputError
from qos_jax.evaluation.hindsight import plan
from qos_jax.evaluation.metrics import latency_per_token_s, qos_of
from qos_jax.evaluation.upper_bound import _constraints, _work_of, upper_bound
from qos_jax.sim.replay import replay_many
from qos_jax.sim.validation import checked_experts
from tests.helpers import workloads
from tests.helpers.quick_compilation import quick_compilation

TINY_REQUESTS = 6
EVERY_ASSIGNMENT = np.array(list(itertools.product((-1, 0, 1), repeat=TINY_REQUESTS)))
ROUTERS = ("impact_greedy", "oracle_impact")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def tiny_experts() -> ExpertProfile:
    """Two experts that slow down so much with every request that hardly three of them keep their limit."""
    return workloads.profile(
        step_base_s=[0.02, 0.025],
        prefill_base_s=[0.01, 0.01],
        prefill_per_token_s=[3e-4, 2e-4],
        per_sequence_s=[2e-3, 1e-3],
        per_kv_token_s=[1e-5, 2e-5],
        kv_blocks=[12, 200],
        max_running=[3, 4],
        max_waiting=[2, 2],
        network_s=[0.0, 0.01],
    )


def tiny_trace(seed: int) -> RequestTrace:
    rng = np.random.default_rng(seed)
    return RequestTrace(
        arrival_s=np.cumsum(rng.exponential(0.03, TINY_REQUESTS)),
        prompt_tokens=rng.integers(5, 60, TINY_REQUESTS),
        output_tokens=rng.integers(5, 40, (TINY_REQUESTS, 2)),
        score=rng.uniform(0.3, 1.0, (TINY_REQUESTS, 2)),
        latency_limit_s=rng.choice([0.026, 0.028, 0.031], TINY_REQUESTS),
    )


@functools.cache
def qos_of_all(seed: int) -> np.ndarray:
    """What each assignment of a tiny trace earns, by brute force."""
    trace, count = tiny_trace(seed), len(EVERY_ASSIGNMENT)
    replays = replay_many(tiny_experts(), [trace] * count, EVERY_ASSIGNMENT)
    qos = [qos_of(tiny_experts(), trace, *each) for each in zip(EVERY_ASSIGNMENT, replays, strict=True)]
    return np.mean(qos, 1)


SEEDS = range(8)


@pytest.mark.slow
def test_the_tiny_worlds_are_no_walkover() -> None:
    """Nobody may have all, and to send each request to its best score earns clearly less than the optimum."""
    greedy, optimum, all_of_it = [], [], []
    for seed in SEEDS:
        best_scores = np.argmax(tiny_trace(seed).score, 1)
        greedy.append(qos_of_all(seed)[(best_scores == EVERY_ASSIGNMENT).all(1)])
        optimum.append(qos_of_all(seed).max())
        all_of_it.append(tiny_trace(seed).score.max(1).mean())
    assert np.mean(greedy) < 0.7 * np.mean(optimum)
    assert np.mean(optimum) < 0.8 * np.mean(all_of_it)


@pytest.mark.slow
def test_the_optimum_lies_between_plan_and_bound() -> None:
    optimal, bites = 0, 0
    for seed in SEEDS:
        best, all_of_it = qos_of_all(seed).max(), tiny_trace(seed).score.max(1).mean()
        found, bound = plan(tiny_experts(), tiny_trace(seed)).qos, upper_bound(tiny_experts(), tiny_trace(seed))
        assert found <= best + 1e-12
        assert best <= bound <= all_of_it + 1e-12
        optimal += found == pytest.approx(best)
        bites += bound < 0.99 * all_of_it
    assert optimal >= len(SEEDS) - 1
    assert bites >= 2


@pytest.mark.slow
def test_no_plan_is_worse_than_where_it_started() -> None:
    rng = np.random.default_rng(0)
    for seed in SEEDS[:3]:
        starts = rng.integers(-1, 2, (3, TINY_REQUESTS))
        earned = [qos_of_all(seed)[(start == EVERY_ASSIGNMENT).all(1)].item() for start in starts]
        untouched = plan(tiny_experts(), tiny_trace(seed), starts, prices=())
        assert untouched.qos >= max(earned)
        assert untouched.qos == qos_of_all(seed)[(untouched.assignment == EVERY_ASSIGNMENT).all(1)]
        assert plan(tiny_experts(), tiny_trace(seed), starts).qos >= untouched.qos


@pytest.mark.slow
def test_restarts_go_on_from_the_plan_and_repeat_with_their_seed() -> None:
    once, twice, again = (plan(tiny_experts(), tiny_trace(2), restarts=n, seed=3) for n in (0, 8, 8))
    assert once.qos <= twice.qos == again.qos
    np.testing.assert_array_equal(twice.assignment, again.assignment)


@pytest.mark.slow
def test_the_plan_beats_every_router_and_stays_below_the_bound() -> None:
    env, params = make("paper-3", load=1.5)
    routers = [make_router(router, env, params) for router in ROUTERS]
    runs = evaluate(env, params, routers, scenarios(params, [1.5], [1]), 80)
    experts, trace = jax.tree.map(np.asarray, params.experts), runs[0].trace
    seen: list[float] = []
    best = plan(
        experts,
        trace,
        [run.assignment for run in runs],
        prices=(0.2, 0.05),
        progress=lambda plan: seen.append(plan.qos),
    )
    assert best.qos > max(run.metrics["qos"] for run in runs) + 0.01
    assert seen == sorted(seen)
    assert best.qos == seen[-1]
    assert best.qos < upper_bound(experts, trace) <= trace.score.max(1).mean() + 1e-9

    log, expert = replay(experts, trace, best.assignment), np.maximum(best.assignment, 0)[:, None]
    tokens, score = (np.take_along_axis(each, expert, 1)[:, 0] for each in (trace.output_tokens, trace.score))
    in_time = (log.finish_s - trace.arrival_s) / tokens <= trace.latency_limit_s
    assert best.qos == pytest.approx(score[in_time].sum() / len(score))


@pytest.mark.parametrize("kind", sorted(set(workloads.KINDS) - {"crowd", "measured"}))
def test_whatever_is_answered_in_time_fits_every_window(kind: str) -> None:
    """Every limit is what the request took, so that all are in time without a moment to spare."""
    world = workloads.KINDS[kind](np.random.default_rng(7))
    experts, assignment = checked_experts(world.experts), world.assignment.astype(np.int32)
    (replayed,) = replay_many(experts, [world.trace], [assignment])
    took_s = latency_per_token_s(experts, world.trace, assignment, replayed)
    served = np.flatnonzero(~replayed.log.dropped)
    trace = world.trace.replace(latency_limit_s=np.nan_to_num(took_s))
    works = [_work_of(experts, trace, n) for n in range(len(experts.step_base_s))]
    assert all(works[assignment[j]].feasible[j] for j in served)
    length_s, work_s = _constraints(works, trace)
    chosen = np.zeros(trace.output_tokens.shape)
    chosen[served, assignment[served]] = 1.0
    assert (work_s @ chosen.ravel() <= length_s * (1 + 1e-6)).all()


def crowd(requests: int, latency_limit_s: float, max_running: int = 16) -> tuple[ExpertProfile, RequestTrace]:
    """Equal requests at once; iterations take 20 ms and 1 ms for each on one expert, and far too long on the other."""
    trace = RequestTrace(
        arrival_s=np.zeros(requests),
        prompt_tokens=np.ones(requests, int),
        output_tokens=np.full((requests, 2), 100),
        score=np.ones((requests, 2)),
        latency_limit_s=np.full(requests, latency_limit_s),
    )
    return workloads.profile(step_base_s=[0.02, 1.0], per_sequence_s=0.001, max_running=max_running), trace


@pytest.mark.slow
def test_the_bound_is_the_optimum_where_iterations_get_too_long() -> None:
    world = crowd(10, latency_limit_s=0.02801)
    assert plan(*world).qos == pytest.approx(0.8)
    assert upper_bound(*world) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.slow
def test_the_bound_is_the_optimum_where_the_batch_is_full() -> None:
    world = crowd(10, latency_limit_s=0.04801, max_running=4)
    assert plan(*world).qos == pytest.approx(0.8)
    assert upper_bound(*world) == pytest.approx(0.8, abs=2e-3)


def test_an_expert_that_is_always_late_gets_nobody() -> None:
    world = crowd(3, latency_limit_s=0.0205)
    assert plan(*world).qos == 0.0
    assert upper_bound(*world) == 0.0


BAD = {
    "no request": (crowd(0, 0.03)[1], "trace has no request"),
    "no score": (crowd(3, 0.03)[1].replace(score=None), r"trace\.score is None"),
    "limits": (crowd(3, 0.03)[1].replace(latency_limit_s=np.full(3, np.nan)), r"trace\.latency_limit_s must be \[3\]"),
    "scores": (crowd(3, 0.03)[1].replace(score=np.ones(3)), r"trace\.score must be \[3, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_named(name: str) -> None:
    trace, message = BAD[name]
    for function in (plan, upper_bound):
        with pytest.raises(InputError, match=message):
            function(crowd(3, 0.03)[0], trace)


def test_a_start_must_fit_the_trace() -> None:
    with pytest.raises(InputError, match=r"assignment has shape \(2,\)"):
        plan(*crowd(3, 0.03), [np.zeros(2, int)])
