"""Preferences: environments reward by their own, networks read them, and routers take any without a new trace."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from qos_jax import InputError, Observation, RequestTrace
from qos_jax.agent import AGENTS, Learner, RewardWeights, make_learner
from qos_jax.agent.networks import NetworkConfig, heads_of, network_of
from qos_jax.agent.preferences import checked_preferences, preferences_of, with_preferences
from qos_jax.encoder.graph import graph_features
from qos_jax.encoder.han import HANConfig
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import Preferences
from tests.helpers.decision_processes import quick_jit, stacked
from tests.helpers.instant_env import small_learner
from tests.helpers.observations import observation, running, waiting
from tests.helpers.small_env import small_env, small_params

POINTER = NetworkConfig("pooled", with_preferences=True, hidden=(8,), han=HANConfig(8, 2, 1))
FLAT = NetworkConfig("flat", "arrived", actor=True, with_impact=False, residual=False, hidden=(8,))
NETWORKS = {
    "han": dataclasses.replace(POINTER, encoder="han"),
    "pooled": POINTER,
    "flat": dataclasses.replace(FLAT, with_preferences=True),
}
OBS = jax.tree.map(jnp.asarray, observation([running(), waiting()], [running()], []))


def told(**weights: float) -> Observation:
    return OBS.replace(preferences=Preferences(**{name: jnp.float32(weight) for name, weight in weights.items()}))


@functools.cache
def in_general_position(config: NetworkConfig, seed: int = 0) -> Any:
    features, network = network_of(config)
    shapes = jax.eval_shape(lambda key: network.init(key, features(told())), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(0.3 * rng.standard_normal(x.shape)), shapes)


class TestNetworks:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_values_depend_on_every_preference(self, name: str) -> None:
        features, network = network_of(NETWORKS[name])
        weights = in_general_position(NETWORKS[name])

        @quick_jit
        @functools.partial(jax.jacobian, argnums=0)
        def slope(preferences: Preferences) -> Array:
            return heads_of(network, weights, features(OBS.replace(preferences=preferences))).q

        slopes = slope(preferences_of(RewardWeights(score=0.8, violation=0.3, drop=0.2, energy=2.0)))
        assert all(np.all(np.std(each, -1) > 1e-4) for each in vars(slopes).values())  # and differ between actions

    def test_without_them_nothing_has_changed(self) -> None:
        plain = graph_features(OBS)
        chex.assert_trees_all_equal(graph_features(told(energy=2.0)), plain)
        with_them = graph_features(told(energy=2.0, score=0.5), with_preferences=True)
        chex.assert_trees_all_equal(with_them.replace(arrived=with_them.arrived[:-4]), plain)
        np.testing.assert_allclose(with_them.arrived[-4:], [0.5, 0.0, 0.0, np.log(3.0)], rtol=1e-6)

    def test_the_prior_is_weighted_as_the_score(self) -> None:
        features, network = network_of(POINTER)
        weights = jax.tree.map(jnp.zeros_like, in_general_position(POINTER))
        whole, half = (heads_of(network, weights, features(told(score=score))).q[:, :-1] for score in (1.0, 0.5))
        assert np.all(whole != 0)
        np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-6)

    def test_a_network_that_reads_them_must_be_told(self) -> None:
        with pytest.raises(InputError, match="preferences is None, must be observed"):
            network_of(POINTER)[0](OBS)


def test_the_reward_is_that_of_the_world_where_it_says_so() -> None:
    hyper, params = AGENTS["sac"].hyper, small_params()
    assert with_preferences(hyper, params) is hyper
    own = with_preferences(hyper, params.replace(preferences=Preferences(energy=2.0))).weights
    assert own == hyper.weights.replace(score=1.0, violation=0.0, drop=0.0, energy=2.0)


class TestTargets:
    """Two environments in which no request meets another one, with an expert of 200 W and one of 800 W."""

    busy_w, idle_w = np.array([200.0, 800.0]), 50.0
    quiet = small_params(2, rate_per_s=1e-3, busy_w=busy_w, idle_w=idle_w)

    @functools.cached_property
    def learner(self) -> Learner:
        sizes = {"num_envs": 2, "chunk": 2, "probes": 1, "updates": 1, "batch_size": 8, "capacity": 8}
        return make_learner(small_env(2, slots=7), dataclasses.replace(AGENTS["mvr"], network=POINTER, **sizes))

    def measured(self, energy: tuple[float, float], scores: tuple[float, float] = (1.0, 1.0)) -> tuple[Any, np.ndarray]:
        """Returns the first request of both environments, and the value of each action for it [2, 3]."""
        both = zip(scores, energy, strict=True)
        params = stacked(
            [
                self.quiet.replace(preferences=preferences_of(RewardWeights(score=score, energy=weight)))
                for score, weight in both
            ]
        )
        start, collected = self.programs
        hyper = jax.tree.map(jnp.float32, AGENTS["mvr"].hyper.replace(reset_prob=0.0))
        state = start(params, hyper)
        requests = state.envs[1].request
        state, _ = collected(state, params, hyper, 0)
        _, rows = collected(state, params, hyper, 1)
        assert np.all(rows.valid)
        return requests, np.asarray(rows.value)

    @functools.cached_property
    def programs(self) -> tuple[Any, Any]:
        learner = self.learner

        @quick_jit
        def start(params: Any, hyper: Any) -> Any:
            return learner.init(jax.random.key(0), params, hyper)

        @quick_jit
        def collected(state: Any, params: Any, hyper: Any, chunk: Array) -> tuple[Any, Any]:
            key = jax.random.fold_in(jax.random.key(1), chunk)
            return learner.targets.collect(learner, state, params, hyper, key, chunk)[:2]

        return start, collected

    @pytest.mark.slow
    def test_energy_costs_its_weight_times_what_a_replay_spends(self) -> None:
        requests, free = self.measured((0.0, 0.0))
        _, charged = self.measured((2.0, 7.0))
        experts = jax.tree.map(np.asarray, self.quiet.experts)
        for env, weight in enumerate((2.0, 7.0)):
            fields = jax.tree.map(lambda x, env=env: np.asarray(x)[env : env + 1], vars(requests))
            trace = RequestTrace(arrival_s=np.zeros(1), **fields)
            alone = replay_many(experts, [trace, trace], [np.array([0]), np.array([1])])
            busy_s = np.array([run.busy_s[expert] for expert, run in enumerate(alone)])
            energy_kj = busy_s * (self.busy_w - self.idle_w) / 1e3
            assert energy_kj[1] > 3 * energy_kj[0] > 0
            np.testing.assert_allclose(free[env, :2] - charged[env, :2], weight * energy_kj, rtol=2e-3)
        np.testing.assert_array_equal(charged[:, 2], 0.0)

    @pytest.mark.slow
    def test_an_answer_is_worth_the_weight_of_its_score(self) -> None:
        _, whole = self.measured((0.0, 0.0))
        _, part = self.measured((0.0, 0.0), (0.25, 0.5))
        assert np.all(whole[:, :2] > 0.1)
        np.testing.assert_allclose(part, np.array([[0.25], [0.5]]) * whole, rtol=1e-5)


def collected_from(learner: Learner, **numbers: float) -> tuple[Any, Any]:
    """Returns the rows of one chunk in two worlds: in one nothing counts but drops, in the other nothing but QoS."""
    given = [RewardWeights(score=0.0, drop=0.7), RewardWeights()]
    params = stacked([small_params().replace(preferences=preferences_of(weights)) for weights in given])
    hyper = jax.tree.map(jnp.float32, learner.config.hyper.replace(**numbers))

    @quick_jit
    def rows_of(key: Array) -> Any:
        state = learner.init(key, params, hyper)
        return learner.targets.collect(learner, state, params, hyper, key, jnp.int32(0))[1]

    rows = jax.tree.map(lambda x: np.asarray(x).reshape(-1, 2, *x.shape[1:]), rows_of(jax.random.key(0)))
    return tuple(jax.tree.map(lambda x, env=env: x[:, env], rows) for env in range(2))  # type: ignore[return-value]


@pytest.mark.slow
def test_rewards_of_temporal_differences_are_those_of_the_environment() -> None:
    drops, plain = collected_from(small_learner(num_envs=2, network=NETWORKS["flat"]))
    np.testing.assert_allclose(drops.reward, np.where(drops.action == 3, -0.7, 0.0), atol=1e-6)
    assert 0 < np.sum(drops.action == 3) < len(drops.action)
    np.testing.assert_array_equal(plain.reward > 0, plain.action < 3)


@pytest.mark.slow
def test_returns_are_those_of_the_environment() -> None:
    """Without bootstrap and prices, a placement earns what a drop would cost, and its answer if that counts."""
    network = dataclasses.replace(POINTER, value=True)
    sizes = {"num_envs": 2, "copies": 1, "chunk": 16, "batch_size": 8, "capacity": 32}
    learner = make_learner(small_env(), dataclasses.replace(AGENTS["sac"], network=network, **sizes))
    drops, plain = collected_from(learner, gamma=0.0, opportunity_cost=0.0, reset_prob=0.0, empty_prob=0.0)
    placed = np.arange(3) == drops.action[:, None]
    np.testing.assert_allclose(drops.target[:, :3], 0.7 * placed, atol=1e-5)
    assert np.any(np.abs(plain.target) > 0.1)


class TestRouters:
    learner = small_learner(network=NETWORKS["flat"], hyper=AGENTS["baseline_rl"].hyper.replace(alpha=0.02))

    def test_they_start_with_those_of_the_agent(self) -> None:
        hyper = AGENTS["baseline_rl"].hyper
        learner = small_learner(network=NETWORKS["flat"], hyper=hyper.replace(weights=RewardWeights(energy=0.5)))
        weights = in_general_position(NETWORKS["flat"])
        assert learner.router(weights).init() == preferences_of(RewardWeights(energy=0.5))
        assert learner.router(weights, preferences=Preferences(drop=1.0)).init() == Preferences(drop=1.0)
        chex.assert_trees_all_equal(learner.features(OBS), learner.features(told(energy=0.5)))
        assert small_learner(network=FLAT).router(in_general_position(FLAT)).init() == ()

    def test_one_trace_serves_every_dial(self) -> None:
        """The router's memory is the dial, and it stays as it was set."""
        network = dataclasses.replace(POINTER, residual=False)
        learner = make_learner(small_env(), dataclasses.replace(AGENTS["mvr"], network=network))
        router = learner.router(in_general_position(network, seed=1))
        act = jax.jit(chex.assert_max_traces(router.act, n=1))
        obs, chosen = OBS.replace(action_mask=jnp.arange(4) < 3), set()
        for energy in (0.0, 0.5, 2.0, 10.0):
            dial = preferences_of(RewardWeights(energy=energy))
            action, memory = act(jax.random.key(0), obs, dial)
            chex.assert_trees_all_equal(memory, dial)
            chosen.add(int(action))
        assert len(chosen) > 1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"speed": 1}, r"here.speed is unknown; choose from score, violation, drop, energy"),
            ({"energy": -1}, r"here.energy is -1, must be a number from 0 to 10"),
            ({"energy": float("nan")}, r"here.energy is nan, must be a number from 0 to 10"),
            ({"energy": 11.0}, r"here.energy is 11.0, must be a number from 0 to 10"),
            ({"drop": "much"}, r"here.drop is 'much', must be a number from 0 to 1"),
            ({"score": 0}, r"here.score is 0, must be a number from 0.1 to 1"),
            (2.0, r"here is 2.0, must be a table of weights by name"),
        ],
    )
    def test_what_was_never_trained_is_refused(self, given: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            checked_preferences(self.learner.config, given, "here")

    def test_an_agent_without_preferences_takes_none(self) -> None:
        with pytest.raises(InputError, match=r"here is {'energy': 2}, must not be given for an agent without"):
            checked_preferences(AGENTS["mvr"], {"energy": 2}, "here")
        with pytest.raises(InputError, match=r"here is {}, must not be given"):
            checked_preferences(AGENTS["mvr"], {}, "here")

    def test_what_is_not_given_is_the_agents(self) -> None:
        hyper = self.learner.config.hyper.replace(weights=RewardWeights(drop=0.25))
        config = dataclasses.replace(self.learner.config, hyper=hyper)
        assert checked_preferences(config, {"energy": 2}, "here") == Preferences(1.0, 0.0, 0.25, 2.0)
