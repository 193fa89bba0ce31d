"""The gymnasium adapter: gymnasium's own checks, the steps of the environment, episode ends, an agent that learns."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from qos_jax import InputError
from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.graph import graph_features
from qos_jax.gym import RouterEnv, RouterVectorEnv
from tests.helpers.small_env import small_env, small_params

NUM_ENVS = 3
STEPS_IN_EPISODE = 5
PARAMS = small_params(rate_per_s=15.0, max_steps_in_episode=STEPS_IN_EPISODE)


@pytest.fixture(scope="module")
def vector_env() -> RouterVectorEnv:
    return RouterVectorEnv(small_env(), PARAMS, NUM_ENVS)


def test_gymnasium_finds_nothing_wrong() -> None:
    gymnasium.register("EdgeServing-v0", partial(RouterEnv, small_env(), PARAMS), disable_env_checker=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gymnasium.make("EdgeServing-v0", disable_env_checker=True).unwrapped)
    finally:
        del gymnasium.registry["EdgeServing-v0"]


def test_observations_may_be_the_nodes_of_the_graph() -> None:
    env = small_env()
    vector_env = RouterVectorEnv(env, PARAMS, NUM_ENVS, graph=True)
    obs, _ = vector_env.reset(seed=7)
    assert obs in vector_env.observation_space
    for _ in range(STEPS_IN_EPISODE):
        obs, *_, info = vector_env.step(vector_env.action_space.sample())
        assert obs in vector_env.observation_space
    assert info["final_obs"][0] in vector_env.single_observation_space  # all episodes are as long
    reset_key = jax.random.split(jax.random.fold_in(jax.random.key(7), 1))[1]
    expected = graph_features(env.reset(reset_key, PARAMS)[0])
    first, _ = vector_env.reset(seed=7)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(first[name][1], value, rtol=1e-5, err_msg=name)


def test_steps_are_those_of_the_environment(vector_env: RouterVectorEnv) -> None:
    env, step = small_env(), jax.jit(small_env().step)
    obs, info = vector_env.reset(seed=7)
    keys, states = [], []
    for i in range(NUM_ENVS):
        key, reset_key = jax.random.split(jax.random.fold_in(jax.random.key(7), i))
        first_obs, state = env.reset(reset_key, PARAMS)
        np.testing.assert_allclose(obs[i], flat_view(first_obs), rtol=1e-5)
        np.testing.assert_array_equal(info["action_mask"][i], first_obs.action_mask)
        keys.append(key)
        states.append(state)
    rng = np.random.default_rng(0)
    for _ in range(2 * STEPS_IN_EPISODE + 1):
        actions = rng.integers(0, 4, NUM_ENVS)
        obs, reward, terminated, truncated, info = vector_env.step(actions)
        assert obs in vector_env.observation_space
        for i in range(NUM_ENVS):
            keys[i], step_key = jax.random.split(keys[i])
            next_obs, states[i], *expected = step(step_key, states[i], jnp.int32(actions[i]), PARAMS)
            np.testing.assert_allclose(obs[i], flat_view(next_obs), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose((reward[i], terminated[i], truncated[i]), expected[:3], rtol=1e-5)
            np.testing.assert_array_equal(info["action_mask"][i], next_obs.action_mask)
            of_step = info["final_info"] if truncated[i] else info
            assert of_step["_dropped"][i]
            assert of_step["dropped"][i] == expected[3]["dropped"]
            assert of_step["finished"][i] == expected[3]["completions"].finished
            if truncated[i]:
                final_obs = expected[3]["final_observation"]
                np.testing.assert_allclose(info["final_obs"][i], flat_view(final_obs), rtol=1e-4, atol=1e-5)
                np.testing.assert_array_equal(info["final_info"]["action_mask"][i], final_obs.action_mask)
                assert np.any(info["final_obs"][i] != obs[i])


def assert_same_form(ours: Any, gymnasiums: Any) -> None:
    """The infos have the same names, shapes, kinds of numbers and masks."""
    if isinstance(gymnasiums, dict):
        assert ours.keys() == gymnasiums.keys()
        for name in gymnasiums:
            assert_same_form(ours[name], gymnasiums[name])
            if name.startswith("_"):
                np.testing.assert_array_equal(ours[name], gymnasiums[name])
    else:
        assert (ours.shape, ours.dtype.kind) == (gymnasiums.shape, gymnasiums.dtype.kind)


def test_episodes_end_as_in_gymnasiums_own_vector_environments(vector_env: RouterVectorEnv) -> None:
    same_step = AutoresetMode.SAME_STEP
    reference = SyncVectorEnv([partial(RouterEnv, small_env(), PARAMS)] * NUM_ENVS, autoreset_mode=same_step)
    assert vector_env.metadata["autoreset_mode"] is same_step
    assert vector_env.observation_space == reference.observation_space
    assert vector_env.action_space == reference.action_space
    (obs, info), (reference_obs, reference_info) = vector_env.reset(seed=1), reference.reset(seed=[1, 2, 3])
    np.testing.assert_allclose(obs[0], reference_obs[0], rtol=1e-5)
    assert_same_form(info, reference_info)
    vector_env.action_space.seed(0)
    for count in range(1, 2 * STEPS_IN_EPISODE + 1):
        actions = vector_env.action_space.sample()
        *ours, info = vector_env.step(actions)
        *expected, reference_info = reference.step(actions)
        assert_same_form(info, reference_info)
        assert ("final_obs" in info) == (count % STEPS_IN_EPISODE == 0)
        for values, reference_values in zip(ours, expected, strict=True):
            assert values.shape == reference_values.shape
            if count < STEPS_IN_EPISODE:  # then the two begin different episodes
                np.testing.assert_allclose(values[0], reference_values[0], rtol=1e-5)
        if count == STEPS_IN_EPISODE:
            np.testing.assert_allclose(info["final_obs"][0], reference_info["final_obs"][0], rtol=1e-5)


def test_seeds_decide_whatever_the_number_of_environments(vector_env: RouterVectorEnv) -> None:
    first, _ = vector_env.reset(seed=3)
    second, _ = vector_env.reset()
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 2 * NUM_ENVS
    again = [vector_env.reset(seed=3)[0], vector_env.reset()[0]]
    np.testing.assert_array_equal(again, [first, second])
    alone, _ = RouterEnv(small_env(), PARAMS).reset(seed=3)
    np.testing.assert_allclose(alone, first[0], rtol=1e-6)
    assert np.any(RouterEnv(small_env(), PARAMS).reset()[0] != RouterEnv(small_env(), PARAMS).reset()[0])


@pytest.mark.parametrize("actions", [[0, 1, 4], [0, -1, 0], [0, 1], 1, [0.0, 1.0, 2.0]])
def test_what_is_no_action_is_refused(vector_env: RouterVectorEnv, actions: Any) -> None:
    vector_env.reset(seed=0)
    with pytest.raises(InputError, match="must be 3 integers from 0 to 3"):
        vector_env.step(actions)


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        RouterEnv(small_env(), PARAMS).step(0)


def test_no_environments_are_refused() -> None:
    with pytest.raises(InputError, match="num_envs is 0"):
        RouterVectorEnv(small_env(), PARAMS, 0)


def test_gymnasium_is_optional() -> None:
    program = """
import sys
sys.modules["gymnasium"] = None  # what an import then finds is that there is no such package
import qos_jax
try:
    import qos_jax.gym
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "qos_jax.gym needs gymnasium 1.1 or later: pip install 'qos_jax[gym]'"


def mean_qos(policy: Any, env: RouterEnv, seeds: range) -> float:
    """Plays an episode per seed; returns the mean reward of its steps."""
    rewards = []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        truncated = False
        while not truncated:
            obs, reward, _, truncated, _ = env.step(policy(obs))
            rewards.append(reward)
    return float(np.mean(rewards))


@pytest.mark.slow
def test_a_dqn_learns_to_route() -> None:
    """At a low rate the best of three unlike experts is nearly always right; a random router earns half as much."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = RouterEnv(small_env(), small_params(rate_per_s=0.5, latency_limit_s=0.1, max_steps_in_episode=100))
    model = stable_baselines3.DQN(
        "MlpPolicy", env, seed=0, gamma=0.5, learning_rate=1e-3, learning_starts=200, target_update_interval=200,
        exploration_fraction=0.5, device="cpu",
    ).learn(3000)  # fmt: skip
    env.action_space.seed(0)
    held_out = range(1000, 1010)
    learned = mean_qos(lambda obs: int(model.predict(obs, deterministic=True)[0]), env, held_out)
    random = mean_qos(lambda obs: int(env.action_space.sample()), env, held_out)
    assert learned > 1.5 * random
