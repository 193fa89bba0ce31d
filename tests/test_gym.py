"""The gymnasium adapter: gymnasium's own checks, the steps of the environment, episode ends, an agent that learns."""

from __future__ import annotations

import os
import pathlib
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


@pytest.mark.slow
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
    env = small_env()
    reset, step, view = jax.jit(env.reset), jax.jit(env.step), jax.jit(flat_view)
    obs, info = vector_env.reset(seed=7)
    keys, states = [], []
    for i in range(NUM_ENVS):
        key, reset_key = jax.random.split(jax.random.fold_in(jax.random.key(7), i))
        first_obs, state = reset(reset_key, PARAMS)
        np.testing.assert_allclose(obs[i], view(first_obs), rtol=1e-5)
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
            np.testing.assert_allclose(obs[i], view(next_obs), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose((reward[i], terminated[i], truncated[i]), expected[:3], rtol=1e-5)
            np.testing.assert_array_equal(info["action_mask"][i], next_obs.action_mask)
            of_step = info["final_info"] if truncated[i] else info
            assert of_step["_dropped"][i]
            assert of_step["dropped"][i] == expected[3]["dropped"]
            assert of_step["finished"][i] == expected[3]["completions"].finished
            if truncated[i]:
                final_obs = expected[3]["final_observation"]
                np.testing.assert_allclose(info["final_obs"][i], view(final_obs), rtol=1e-4, atol=1e-5)
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


def test_next_step_plays_the_same_episodes_and_shows_their_ends_first() -> None:
    same_step = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS)
    next_step = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS, autoreset_mode=AutoresetMode.NEXT_STEP)
    reference = SyncVectorEnv([partial(RouterEnv, small_env(), PARAMS)] * NUM_ENVS, autoreset_mode="NextStep")
    assert next_step.metadata["autoreset_mode"] is reference.metadata["autoreset_mode"]
    np.testing.assert_allclose(same_step.reset(seed=3)[0], next_step.reset(seed=3)[0], rtol=1e-5)
    reference.reset(seed=3)
    same_step.action_space.seed(0)
    for count in range(1, 2 * STEPS_IN_EPISODE + 1):
        actions = same_step.action_space.sample()
        obs, reward, _, truncated, info = same_step.step(actions)
        next_obs, next_reward, terminated, next_truncated, next_info = next_step.step(actions)
        assert_same_form(next_info, reference.step(actions)[-1])
        np.testing.assert_allclose(next_reward, reward, rtol=1e-5)
        np.testing.assert_array_equal(next_truncated, truncated)
        assert not terminated.any()
        if count % STEPS_IN_EPISODE:
            np.testing.assert_allclose(next_obs, obs, rtol=1e-5)
            continue
        np.testing.assert_allclose(next_obs, np.stack(info["final_obs"]), rtol=1e-5)
        np.testing.assert_array_equal(next_info["action_mask"], info["final_info"]["action_mask"])
        next_obs, next_reward, _, next_truncated, next_info = next_step.step(actions)
        reference_info = reference.step(actions)[-1]
        np.testing.assert_allclose(next_obs, obs, rtol=1e-5)
        np.testing.assert_array_equal(next_info["action_mask"], info["action_mask"])
        assert not next_reward.any()
        assert not next_truncated.any()
        assert next_info.keys() == reference_info.keys() == {"action_mask", "_action_mask"}


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_a_reset_mask_resets_these_environments_alone(mode: str) -> None:
    env = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS, autoreset_mode=mode)
    alike = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS, autoreset_mode=mode)
    actions, mask = np.zeros(NUM_ENVS, int), np.array([False, True, False])
    for each in (env, alike):
        each.reset(seed=5)
        before, *_ = each.step(actions)
    options = {"reset_mask": mask}
    obs, info = env.reset(options=options)
    assert options == {"reset_mask": mask}
    np.testing.assert_array_equal(obs[~mask], before[~mask])
    assert np.all(np.any(obs != before, 1) == mask)
    assert info.keys() == {"action_mask", "_action_mask"}
    np.testing.assert_array_equal(info["_action_mask"], mask)
    for step in range(2, STEPS_IN_EPISODE + 1):
        (obs, *_, truncated, info), (expected, *_) = env.step(actions), alike.step(actions)
        np.testing.assert_array_equal(obs[~mask], expected[~mask])
        assert np.any(obs[mask] != expected[mask])
        np.testing.assert_array_equal(truncated, ~mask if step == STEPS_IN_EPISODE else np.zeros(NUM_ENVS, bool))
    again, _ = env.reset(seed=5, options=options)
    np.testing.assert_array_equal(again[mask], alike.reset(seed=5)[0][mask])
    np.testing.assert_array_equal(again[~mask], obs[~mask])


def test_without_automatic_resets_an_ended_episode_must_be_reset() -> None:
    env = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS, autoreset_mode="Disabled")
    actions, mask = np.zeros(NUM_ENVS, int), np.array([True, False, False])
    env.reset(seed=0)
    env.reset(options={"reset_mask": mask})
    env.step(actions)
    env.reset(options={"reset_mask": mask})
    for _ in range(STEPS_IN_EPISODE - 1):
        *_, truncated, _ = env.step(actions)
    np.testing.assert_array_equal(truncated, ~mask)
    with pytest.raises(gymnasium.error.ResetNeeded, match="an episode has ended"):
        env.step(actions)
    env.reset(options={"reset_mask": truncated})
    *_, truncated, _ = env.step(actions)
    np.testing.assert_array_equal(truncated, mask)


@pytest.mark.parametrize(
    "mask", [[True, False, False], np.array([True, False]), np.array([1, 0, 0]), np.zeros(NUM_ENVS, bool)]
)
def test_what_is_no_reset_mask_is_refused(vector_env: RouterVectorEnv, mask: Any) -> None:
    with pytest.raises(InputError, match=r"reset_mask is .* must be an array of 3 booleans, one of them true"):
        vector_env.reset(options={"reset_mask": mask})


def test_unknown_options_are_refused(vector_env: RouterVectorEnv) -> None:
    for env in (vector_env, RouterEnv(small_env(), PARAMS)):
        with pytest.raises(InputError, match="reset option 'load' is unknown"):
            env.reset(options={"load": 0.5})
    with pytest.raises(InputError, match="autoreset_mode is 'Never', must be one of NextStep, SameStep, Disabled"):
        RouterVectorEnv(small_env(), PARAMS, NUM_ENVS, autoreset_mode="Never")


def test_the_first_reset_is_of_all_environments() -> None:
    env = RouterVectorEnv(small_env(), PARAMS, NUM_ENVS)
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False, True])})
    env.reset(options={"reset_mask": np.ones(NUM_ENVS, bool)})


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 1, 2**70, 1.5, "1", [1, 2, 3]])
def test_seeds_that_jax_would_cut_are_refused(vector_env: RouterVectorEnv, seed: Any) -> None:
    for env in (vector_env, RouterEnv(small_env(), PARAMS)):
        with pytest.raises(InputError, match=r"seed is .* must be a whole number from 0 to 4294967295"):
            env.reset(seed=seed)


def test_all_bits_of_a_seed_count(vector_env: RouterVectorEnv) -> None:
    first = [vector_env.reset(seed=seed)[0][0] for seed in (1, 2**31 + 1, 2**32 - 1, np.int64(2**31 - 1))]
    assert len(np.unique(first, axis=0)) == 4


def test_gymnasiums_vector_wrappers_take_the_environments() -> None:
    unhurried = small_params(
        rate_per_s=1.0, max_steps_in_episode=STEPS_IN_EPISODE
    )  # answers end before the next arrival
    for mode in AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP:
        env: Any = RouterVectorEnv(small_env(), unhurried, NUM_ENVS, autoreset_mode=mode)
        env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
        if mode is AutoresetMode.NEXT_STEP:
            env = gymnasium.wrappers.vector.NormalizeObservation(env)
        env = gymnasium.wrappers.vector.NormalizeReward(env)
        env.reset(seed=0)
        ends, returns = 0, np.zeros(NUM_ENVS)
        first_expert = np.zeros(NUM_ENVS, np.int64)
        for _ in range(2 * STEPS_IN_EPISODE + 2):
            obs, reward, _, truncated, info = env.step(first_expert)
            assert obs in env.observation_space
            assert np.isfinite(reward).all()
            if truncated.any():
                ends += 1
                episode = info["episode"] if "episode" in info else info["final_info"]["episode"]
                np.testing.assert_array_equal(episode["l"], STEPS_IN_EPISODE)
                returns += episode["r"]
        assert ends == 2
        assert (returns > 0).all()


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)


ASYNC = """
from functools import partial
from gymnasium.vector import AsyncVectorEnv
from qos_jax import InputError
from qos_jax.gym import RouterEnv
from tests.helpers.small_env import small_env, small_params

if __name__ == "__main__":
    make_env = {make_env}
    envs = AsyncVectorEnv([make_env] * 2, context={context!r})
    try:
        obs, _ = envs.reset(seed=[3, 3])
        print((obs[0] == obs[1]).all(), envs.step(envs.action_space.sample())[0].shape == obs.shape)
    except InputError as error:
        print("refused:", error)
    envs.close(terminate=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_is_refused_and_does_not_hang() -> None:
    run = run_python(ASYNC.format(make_env="partial(RouterEnv, small_env(), small_params())", context="fork"))
    assert run.stdout.startswith("refused: JAX does not work in a forked process"), run.stderr
    assert 'context="spawn"' in run.stdout
    # An environment that is made in the forked process ends it, and gymnasium notices.
    run = run_python(ASYNC.format(make_env="lambda: RouterEnv(small_env(), small_params())", context="fork"))
    assert run.returncode == 1
    assert "InputError: JAX does not work in a forked process" in run.stderr


def test_a_process_may_fork_before_it_uses_jax() -> None:
    program = """
import os
import qos_jax.gym
if os.fork() == 0:
    from tests.helpers.small_env import small_env, small_params
    qos_jax.gym.RouterEnv(small_env(), small_params())
    os._exit(0)
print(os.wait()[1])
"""
    assert run_python(program).stdout.strip() == "0"


@pytest.mark.slow
def test_spawned_processes_work(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"  # spawned processes import the main module, which must be a file
    script.write_text(ASYNC.format(make_env="partial(RouterEnv, small_env(), small_params())", context="spawn"))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert run.stdout.strip() == "True True", run.stderr


@pytest.mark.parametrize("actions", [[0, 1, 4], [0, -1, 0], [0, 1], 1, [0.0, 1.0, 2.0]])
def test_what_is_no_action_is_refused(vector_env: RouterVectorEnv, actions: Any) -> None:
    vector_env.reset(seed=0)
    with pytest.raises(InputError, match="must be 3 integers from 0 to 3"):
        vector_env.step(actions)


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        RouterEnv(small_env(), PARAMS).step(0)


@pytest.mark.parametrize("number", [0, 2.5, "3", True, None, 10**12])
def test_a_number_of_environments_that_is_none_is_refused(number: Any) -> None:
    with pytest.raises(InputError, match=f"num_envs is {number!r}, must be a whole number from 1"):
        RouterVectorEnv(small_env(), PARAMS, number)


def test_options_that_are_no_table_are_refused(vector_env: RouterVectorEnv) -> None:
    with pytest.raises(InputError, match=r"options is \[1\], must be a table"):
        vector_env.reset(options=[1])


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
