"""The VecEnv of Stable-Baselines3: the steps of the gymnasium environments, its wrappers and its agents."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.gym import RouterVectorEnv
from tests.helpers.small_env import small_env, small_params

NUM_ENVS = 3
STEPS_IN_EPISODE = 5
PARAMS = small_params(rate_per_s=15.0, max_steps_in_episode=STEPS_IN_EPISODE)


def test_stable_baselines3_is_optional() -> None:
    program = """
import sys
sys.modules["stable_baselines3"] = None  # what an import then finds is that there is no such package
from qos_jax.gym import RouterEnv
try:
    from qos_jax.gym import RouterVecEnv
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "qos_jax.gym.RouterVecEnv needs Stable-Baselines3: pip install 'qos_jax[sb3]'"


@pytest.fixture(scope="module")
def vec_env() -> Any:
    pytest.importorskip("stable_baselines3")
    from qos_jax.gym import RouterVecEnv

    return RouterVecEnv(small_env(), PARAMS, NUM_ENVS)


@pytest.mark.slow
def test_steps_are_those_of_the_gymnasium_environments(vec_env: Any) -> None:
    reference = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS)
    vec_env.seed(4)
    obs, (expected, info) = vec_env.reset(), reference.reset(seed=4)
    np.testing.assert_array_equal(obs, expected)
    np.testing.assert_array_equal(vec_env.env_method("action_masks"), info["action_mask"])
    rng = np.random.default_rng(0)
    for count in range(1, 2 * STEPS_IN_EPISODE + 1):
        actions = rng.integers(0, 4, NUM_ENVS)
        obs, rewards, dones, infos = vec_env.step(actions)
        expected, expected_rewards, _, truncated, info = reference.step(actions)
        np.testing.assert_array_equal(obs, expected)
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(dones, truncated)
        np.testing.assert_array_equal(vec_env.env_method("action_masks"), info["action_mask"])
        of_step = info["final_info"] if dones.any() else info
        for i in range(NUM_ENVS):
            assert infos[i]["dropped"] == of_step["dropped"][i]
            assert infos[i]["gap_s"] == of_step["gap_s"][i]
            assert infos[i].get("TimeLimit.truncated", False) == (count % STEPS_IN_EPISODE == 0)
            if dones[i]:
                np.testing.assert_array_equal(infos[i]["terminal_observation"], info["final_obs"][i])


@pytest.mark.slow
def test_what_cannot_be_set_is_refused(vec_env: Any) -> None:
    with pytest.raises(InputError, match="attribute 'load' cannot be set"):
        vec_env.set_attr("load", 0.5)
    vec_env.set_options({"load": 0.5})
    with pytest.raises(InputError, match=r"reset options are .* there are none"):
        vec_env.reset()
    vec_env.set_options()
    vec_env.reset()
    assert not vec_env.has_attr("load")
    assert vec_env.has_attr("action_masks")
    assert vec_env.env_is_wrapped(object, indices=[0]) == [False]


@pytest.mark.slow
def test_its_wrappers_and_agents_take_the_environments(vec_env: Any) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

    env = VecNormalize(VecMonitor(vec_env), norm_reward=False)
    model = PPO("MlpPolicy", env, n_steps=10, batch_size=15, n_epochs=1, seed=0, device="cpu").learn(60)
    assert {episode["l"] for episode in model.ep_info_buffer} == {STEPS_IN_EPISODE}
    action, _ = model.predict(env.reset(), deterministic=True)
    assert action.shape == (NUM_ENVS,)
