"""Evaluation: the same requests for every router, decisions as in the environment, ground truth for oracles only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import Array, lax

from qos_jax import (
    EnvParams,
    InputError,
    Observation,
    Request,
    Router,
    Scenario,
    evaluate,
    make,
    make_router,
    sample_requests,
    scenarios,
)
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.metrics import qos_of
from qos_jax.sim.env import Environment
from qos_jax.sim.world import advance, collect, dispatch, empty_world
from tests.helpers.small_env import small_env

NUM_EXPERTS = 3
REQUESTS = 64  # one chunk of a replay, even on one expert, so that all replays are one program
RATE_PER_S = 16.0  # an overload, so that queues fill and requests are dropped
SEEDS = (1000, 1001)
KIND_BY_INFORMATION = {"predictions": "heuristic", "true_scores": "oracle", "true_scores_and_tokens": "oracle"}


@struct.dataclass
class Playback:
    """Plays given requests in order, in a loop, from the first one or a random one; the rate cannot change."""

    gaps_s: Array  # [J]
    requests: Request  # leaves [J, ...]
    random_start: bool = False

    def init(self, key: Array) -> Array:
        return jnp.where(self.random_start, jax.random.randint(key, (), 0, self.gaps_s.shape[0]), 0)

    def next(self, key: Array, state: Array) -> tuple[Array, Request, Array]:
        gap_s, request = jax.tree.map(lambda x: x[state], (self.gaps_s, self.requests))
        return gap_s, request, (state + 1) % self.gaps_s.shape[0]

    def with_rate(self, rate_per_s: Array | float) -> Playback:
        return self


def reader(field: str, information: str) -> Router:
    """Sends each request to the expert with the highest value of an observed field, even if it is full."""

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        return jnp.argmax(getattr(obs.arrived, field)), memory

    return Router(f"{field} of {information}", KIND_BY_INFORMATION[information], tuple, act, information)


def heedless() -> Router:
    """Samples an expert or the drop, legal or not."""
    return Router("heedless", "heuristic", tuple, lambda key, obs, memory: (jax.random.randint(key, (), 0, 4), memory))


NAMED = ("round_robin", "shortest_queue", "random", "impact_greedy", "oracle_score")
READERS = {
    (field, information): reader(field, information)
    for field in ("predicted_score", "predicted_tokens")
    for information in KIND_BY_INFORMATION
}
ROUTERS = (*(make_router(name, small_env(NUM_EXPERTS)) for name in NAMED), heedless(), *READERS.values())


@functools.cache
def world(**fields: Any) -> tuple[Environment, EnvParams]:
    """A preset with small queues, and recorded requests; after the last request there is time to finish all of them."""
    env, params = make("paper-3", rate_per_s=RATE_PER_S, max_running=6, max_waiting=3, **fields)
    gaps_s, requests = sample_requests(params.workload, jax.random.key(5), REQUESTS)
    gaps_s = jnp.append(gaps_s, 1e4)
    requests = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), requests)
    return env, params.replace(workload=Playback(gaps_s, requests))


def run_all(routers: Sequence[Router] = ROUTERS, **playback: Any) -> dict[tuple[str, int], RouterRun]:
    """The runs by router and seed, in the world or with other fields of ``Playback``."""
    env, params = world()
    params = params.replace(workload=params.workload.replace(**playback))
    asked = [Scenario(0.5, RATE_PER_S, seed) for seed in SEEDS]
    runs = evaluate(env, params, routers, asked, REQUESTS)
    assert [(run.router, run.scenario) for run in runs] == [(router, each) for router in routers for each in asked]
    return {(run.router.name, run.scenario.seed): run for run in runs}


@functools.cache
def plain_runs() -> dict[tuple[str, int], RouterRun]:
    return run_all()


def same_decisions(one: RouterRun, other: RouterRun, up_to: int | None = None) -> bool:
    return np.array_equal(one.assignment[:up_to], other.assignment[:up_to])


@pytest.mark.slow
def test_every_router_gets_the_same_requests_with_any_other_routers() -> None:
    many = run_all(random_start=True)
    for (_, seed), run in many.items():
        jax.tree.map(np.testing.assert_array_equal, run.trace, many["random", seed].trace)
    one, other = (many["random", seed] for seed in SEEDS)
    assert not np.array_equal(one.trace.arrival_s, other.trace.arrival_s)

    few = run_all(ROUTERS[2::-2], random_start=True)  # random and round_robin, in another order
    for which, run in few.items():
        jax.tree.map(np.testing.assert_array_equal, run.trace, many[which].trace)
        np.testing.assert_array_equal(run.assignment, many[which].assignment)
        assert run.metrics == many[which].metrics


@pytest.mark.slow
def test_random_decisions_differ_between_seeds_and_deterministic_ones_do_not() -> None:
    runs = plain_runs()
    one, other = SEEDS
    assert not same_decisions(runs["random", one], runs["random", other])
    assert same_decisions(runs["impact_greedy", one], runs["impact_greedy", other])


def environment_steps(routers: tuple[Router, ...], env: Environment, params: EnvParams) -> Any:
    """Actions, drops, rewards and completions of each router in the environment, [R, J] each."""

    def play(which: Array, key: Array) -> Any:
        def step(carry: Any, key: Array) -> Any:
            (obs, state), memories = carry

            def act(i: int) -> Any:
                action, memory = routers[i].act(key, obs, memories[i])
                return jnp.asarray(action, jnp.int32), (*memories[:i], memory, *memories[i + 1 :])

            action, memories = lax.switch(which, [functools.partial(act, i) for i in range(len(routers))])
            obs, state, reward, _, _, info = env.step(key, state, action, params)
            row = {"action": action, "dropped": info["dropped"], "reward": reward, "completions": info["completions"]}
            return ((obs, state), memories), row

        start = env.reset(key, params), tuple(router.init() for router in routers)
        return lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), REQUESTS))[1]

    which = jnp.arange(len(routers))
    return jax.tree.map(
        np.asarray, jax.jit(lambda key: lax.map(lambda i: play(i, key), which))(jax.random.key(SEEDS[0]))
    )


def test_decisions_and_qos_are_those_of_the_environment() -> None:
    routers = tuple(router for router in ROUTERS if router.information == "predictions")
    are_those_of_the_environment([plain_runs()[router.name, SEEDS[0]] for router in routers], *world())


@pytest.mark.slow
def test_so_they_are_with_sessions_whose_prompts_depend_on_who_answered() -> None:
    env, params = world(engine="vllm", sessions="6:4:2000")
    # Answers come before the next turn, as a rule.
    params = params.replace(workload=params.workload.replace(gaps_s=20.0 * params.workload.gaps_s))
    routers = [make_router(name, env) for name in ("round_robin", "prefix_affinity", "impact_greedy")]
    runs = evaluate(env, params, routers, [Scenario(0.5, RATE_PER_S, SEEDS[0])], REQUESTS)
    are_those_of_the_environment(runs, env, params)
    one, other, _ = (run.trace for run in runs)
    assert (one.prompt_tokens != other.prompt_tokens).sum() > REQUESTS / 4
    cached = [run.trace.shared_tokens.sum() for run in runs]
    assert cached[1] > cached[0] > 0


def are_those_of_the_environment(runs: list[RouterRun], env: Environment, params: EnvParams) -> None:
    rows = environment_steps(tuple(run.router for run in runs), env, params)
    experts = jax.tree.map(np.asarray, params.experts)
    for i, run in enumerate(runs):
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        completions, dropped, metrics = row["completions"], row["dropped"], run.metrics
        np.testing.assert_array_equal(run.assignment, np.where(row["action"] == NUM_EXPERTS, -1, row["action"]))
        np.testing.assert_array_equal(run.replayed.log.dropped, dropped)
        assert completions.finished.sum() == (~dropped).sum()
        qos = qos_of(experts, run.trace, run.assignment, run.replayed)
        assert row["reward"].sum() == pytest.approx(qos.sum(), rel=1e-4)
        assert row["reward"].sum() / REQUESTS == pytest.approx(metrics["qos"], rel=1e-4)
        latency_per_token_s = completions.latency_per_token_s.sum() / completions.finished.sum()
        assert latency_per_token_s == pytest.approx(metrics["latency_per_token_s"], rel=1e-4)
        assert (completions.violations.sum() + dropped.sum()) / REQUESTS == pytest.approx(metrics["violation_rate"])
        np.testing.assert_allclose(completions.busy_s.sum(0), run.replayed.busy_s, rtol=1e-4)
        # Memory is integrated between events, and the environment has more events than the replay.
        np.testing.assert_allclose(completions.kv_block_s.sum(0), run.replayed.kv_block_s, rtol=2e-3)


def test_experts_and_routers_drop_requests_in_this_world() -> None:
    """Without drops the comparison with the environment would be weak."""
    heedless_run, greedy = plain_runs()["heedless", SEEDS[0]], plain_runs()["impact_greedy", SEEDS[0]]
    refused_by_an_expert = heedless_run.replayed.log.dropped & (heedless_run.assignment >= 0)
    assert refused_by_an_expert.sum() > 5
    assert 5 < (greedy.assignment == -1).sum() < REQUESTS - 5


def test_oracles_observe_the_ground_truth_of_their_kind_only() -> None:
    known_to = {
        "predicted_score": ("true_scores", "true_scores_and_tokens"),
        "predicted_tokens": ("true_scores_and_tokens",),
    }
    for (field, information), router in READERS.items():
        run = plain_runs()[router.name, SEEDS[0]]
        truth = run.trace.score if field == "predicted_score" else run.trace.output_tokens
        best_in_truth, best_predicted = np.argmax(truth, 1), np.argmax(getattr(run.trace, field), 1)
        assert (best_in_truth != best_predicted).mean() > 0.2
        np.testing.assert_array_equal(
            run.assignment, best_in_truth if information in known_to[field] else best_predicted
        )


def test_only_oracles_know_the_scores() -> None:
    score = world()[1].workload.requests.score[:, ::-1]
    others = run_all(requests=world()[1].workload.requests.replace(score=score))
    readers_of_tokens = {router.name for (field, _), router in READERS.items() if field == "predicted_tokens"}
    for which, run in others.items():
        knows_scores = run.router.kind == "oracle" and run.router.name not in readers_of_tokens
        assert same_decisions(run, plain_runs()[which]) != knows_scores


def test_only_oracles_know_the_lengths() -> None:
    """Lengths affect later observations. So requests from one on are changed: decisions up to it must stay the same."""
    changed = REQUESTS // 2
    requests = world()[1].workload.requests
    output_tokens = requests.output_tokens.at[changed].set(jnp.array([1, 2, 500])).at[changed + 1 :].set(1)
    others = run_all(requests=requests.replace(output_tokens=output_tokens))
    for which, run in others.items():
        if run.router.information != "true_scores_and_tokens":
            assert same_decisions(run, plain_runs()[which], changed + 1)
    assert any(
        not same_decisions(run, plain_runs()[which]) for which, run in others.items() if run.router.kind == "heuristic"
    )
    oracle = "predicted_tokens of true_scores_and_tokens"
    assert others[oracle, SEEDS[0]].assignment[changed] == 2


def test_the_warmup_is_not_counted_and_progress_is_reported() -> None:
    env, params = world()
    done: list[str] = []
    scenario = Scenario(0.5, RATE_PER_S, SEEDS[0])
    runs = evaluate(
        env, params, ROUTERS, [scenario] * 2, REQUESTS, warmup=30, progress=lambda router: done.append(router.name)
    )
    assert sorted(done) == sorted(router.name for router in ROUTERS)
    run, all_counted = runs[0], plain_runs()[runs[0].router.name, SEEDS[0]]
    assert (run.metrics["requests"], all_counted.metrics["requests"]) == (REQUESTS - 30, REQUESTS)
    np.testing.assert_array_equal(run.assignment, all_counted.assignment)
    experts = jax.tree.map(np.asarray, params.experts)
    qos = qos_of(experts, run.trace, run.assignment, run.replayed)
    assert run.metrics["qos"] == pytest.approx(qos[30:].mean())


class TestScenarios:
    def test_every_load_with_every_seed_at_its_exact_rate(self) -> None:
        _, params = make("paper-3")
        loads, saturation_per_s = (0.9, 0.90001, 1 / 3), float(params.saturation_per_s)
        assert scenarios(params, loads, range(1000, 1002)) == [
            Scenario(load, load * saturation_per_s, seed) for load in loads for seed in (1000, 1001)
        ]
        assert scenarios(params, np.array([0.5]), np.array([7])) == [Scenario(0.5, 0.5 * saturation_per_s, 7)]

    @pytest.mark.parametrize("load", [0, -0.5, float("nan"), float("inf"), True, "0.9", None])
    def test_a_bad_load_is_refused(self, load: Any) -> None:
        with pytest.raises(InputError, match=r"load is .*, must be a finite number above 0"):
            scenarios(make("paper-3")[1], [0.5, load], [1000])

    @pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "7"])
    def test_a_bad_seed_is_refused(self, seed: Any) -> None:
        with pytest.raises(InputError, match=r"seed is .*, must be a whole number from 0 to 4294967295"):
            scenarios(make("paper-3")[1], [0.5], [1000, seed])

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ((0.5, 6.0, 2**32), "seed is 4294967296"),
            ((0.5, 6.0, -1), "seed is -1"),
            ((0.5, 6.0, True), "seed is True"),
            ((0.5, 1e-50, 0), "rate_per_s is 1e-50, must be a number from 1e-06 to 1e"),
            ((0.5, float("inf"), 0), "rate_per_s is inf"),
            ((float("nan"), 6.0, 0), "load is nan"),
            (("0.5", 6.0, 0), "load is '0.5'"),
        ],
    )
    def test_a_scenario_of_ones_own_is_checked_too(self, numbers: tuple[Any, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Scenario(*numbers)

    def test_a_world_without_saturation_rate_is_refused(self) -> None:
        with pytest.raises(InputError, match="saturation_per_s is nan: measure it with"):
            scenarios(make("paper-3", rate_per_s=1.0)[1], [0.5], [1000])


@pytest.mark.slow
def test_simple_routers_have_the_qos_of_an_independent_event_loop() -> None:
    """Mean QoS on paper-3 by requests/s, from a plain event loop that shares no code with this project."""
    measured = {
        "round_robin": {6.0: 0.68, 10.0: 0.675, 13.0: 0.615, 16.0: 0.46},
        "shortest_queue": {6.0: 0.68, 10.0: 0.68, 13.0: 0.665, 16.0: 0.58},
    }
    env, params = make("paper-3")
    asked = [Scenario(0.0, rate_per_s, seed) for rate_per_s in measured["round_robin"] for seed in range(8)]
    runs = evaluate(env, params, [make_router(name, env, params) for name in measured], asked, 2000)
    for name, by_rate in measured.items():
        for rate_per_s, expected in by_rate.items():
            at_rate = [run for run in runs if (run.router.name, run.scenario.rate_per_s) == (name, rate_per_s)]
            qos = np.mean([run.metrics["qos"] for run in at_rate])
            assert qos == pytest.approx(expected, abs=0.07 if rate_per_s > 13 else 0.03)


@pytest.mark.slow
def test_equal_experts_share_the_load_of_a_burst_where_metrics_are_late() -> None:
    names = ("shortest_queue", "shortest_tokens", "least_kv", "vllm_dp", "vllm_dp_2026", "latency_headroom")
    fleet = (("alpaca-native", "A40"),) * 4
    env, params = make("paper-3", experts=fleet, arrivals="gamma:4", staleness_s=0.5, rate_per_s=20.0)
    runs = evaluate(env, params, [make_router(name, env) for name in names], [Scenario(0.0, 20.0, 1000)], 4000)
    for run in runs:
        shares = np.bincount(run.assignment[run.assignment >= 0], minlength=4) / len(run.assignment)
        assert shares == pytest.approx(np.full(4, 0.25), abs=0.03), (run.router.name, shares)


@pytest.mark.slow
def test_where_experts_fail_the_replay_loses_what_the_routed_world_lost() -> None:
    env, params = world(failures="2:0.5")
    spec, sent = env.spec, (*(make_router(name, env) for name in ("round_robin", "impact_greedy")), heedless())
    gaps_s, requests = sample_requests(params.workload, jax.random.key(SEEDS[0]), REQUESTS)
    key = jax.random.fold_in(jax.random.key(SEEDS[0]), 1)  # also of the failures, for every router

    @jax.jit
    def by_hand(assignment: Array) -> Any:
        def step(state: Any, x: tuple[Array, Request, Array]) -> Any:
            gap_s, request, action = x
            state, done = collect(params.experts, advance(spec, params.experts, state, gap_s))
            return dispatch(spec, params.experts, state, request, action)[0], done

        start = empty_world(spec, params.experts, 0.0, params.failure_law, key)
        end, rows = lax.scan(step, start, (gaps_s, requests, assignment % (NUM_EXPERTS + 1)))
        # No expert fails once more, so what is there still is finished.
        end = end.replace(failures=end.failures.replace(left_s=end.failures.left_s + 1e9))
        _, last = collect(params.experts, advance(spec, params.experts, end, jnp.float32(1e4)))
        return jax.tree.map(lambda x, y: jnp.sum(x, 0) + y, rows, last)

    for run in evaluate(env, params, sent, [Scenario(0.5, RATE_PER_S, SEEDS[0])], REQUESTS):
        done, log = by_hand(jnp.asarray(run.assignment)), run.replayed.log
        assert (int(done.lost), int(done.finished)) == (log.lost.sum(), (~log.dropped).sum())
        assert log.lost.sum() > 3
        assert float(done.qos) / REQUESTS == pytest.approx(run.metrics["qos"], rel=1e-4)
        assert run.metrics["lost_rate"] == pytest.approx(log.lost.mean())
