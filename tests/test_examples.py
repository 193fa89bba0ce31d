"""The example agent: short enough to read, and it learns."""

from __future__ import annotations

import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qos_jax
from qos_jax.evaluation.statistics import crossed_interval
from qos_jax.routers import Router
from tests.helpers.decision_processes import quick_jit
from tests.helpers.instant_env import instant_env
from tests.helpers.small_env import small_params

PPO = pathlib.Path(__file__).parents[1] / "examples" / "ppo.py"


@pytest.fixture(scope="module")
def ppo() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("ppo", PPO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ppo_is_short() -> None:
    assert len(PPO.read_text().splitlines()) < 150


@pytest.mark.slow
def test_ppo_takes_the_best_expert_where_experts_answer_at_once(ppo: types.ModuleType) -> None:
    """The reward is the score at once, and the last expert has the highest one."""
    params = small_params(max_steps_in_episode=50)
    config = ppo.Config(steps=20_000, num_envs=16, rollout=32, learning_rate=3e-3, discount=0.5)
    weights, qos = quick_jit(ppo.make_train(instant_env(), params, config))(jax.random.key(0))
    assert np.mean(qos[-5:]) > np.mean(qos[:5]) + 0.1
    router = ppo.ppo_router(instant_env(), weights)
    obs, _ = jax.vmap(instant_env().reset, (0, None))(jax.random.split(jax.random.key(1), 64), params)
    actions, _ = jax.vmap(router.act, (0, 0, None))(jax.random.split(jax.random.key(2), 64), obs, router.init())
    assert np.mean(actions == 2) > 0.8


def test_ppo_takes_legal_actions_only(ppo: types.ModuleType) -> None:
    network = ppo.ActorCritic(4)
    obs = jnp.concatenate([jnp.ones(53), jnp.array([0.0, 1.0, 0.0, 1.0])])
    log_probs, _ = network.apply(network.init(jax.random.key(0), obs), obs)
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.exp(log_probs) > 0, [False, True, False, True])


@pytest.mark.slow
def test_ppo_is_better_than_random_on_requests_it_has_not_trained_on(ppo: types.ModuleType) -> None:
    """The interval is over training seeds and evaluation seeds, each pair of routers on the same requests."""
    env, params = qos_jax.make("paper-3", load=0.8, requests=1000)
    train = jax.jit(ppo.make_train(env, params, ppo.Config(steps=200_000)))
    trained: list[Router] = [ppo.ppo_router(env, train(jax.random.key(seed))[0]) for seed in range(4)]
    held_out = qos_jax.scenarios(params, [0.8], range(1000, 1016))
    runs = qos_jax.evaluate(env, params, [*trained, qos_jax.make_router("random", env)], held_out, 1000, warmup=200)
    qos = np.array([run.metrics["qos"] for run in runs]).reshape(len(trained) + 1, -1)
    gain = crossed_interval(qos[:-1] - qos[-1])
    assert gain["low"] > 0.02, gain
