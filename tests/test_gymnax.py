"""The contract of gymnax: spaces, default parameters, flat observations, and gymnax's own wrappers."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.flat_env import FlatEnvironment, masked_flat_view
from qos_jax.sim.spaces import Box, Discrete
from tests.helpers.instant_env import instant_env
from tests.helpers.small_env import small_params

STEPS_IN_EPISODE = 5
PARAMS = small_params(rate_per_s=15.0, max_steps_in_episode=STEPS_IN_EPISODE)
ENV = instant_env().with_default_params(PARAMS)  # compiles fast
FLAT = FlatEnvironment(ENV)
reset, step = jax.jit(ENV.reset), jax.jit(ENV.step)
flat_reset, flat_step = jax.jit(FLAT.reset), jax.jit(FLAT.step)
KEY = jax.random.key(0)


def test_spaces_hold_what_they_describe() -> None:
    actions = ENV.action_space(PARAMS)
    assert (actions.n, actions.shape) == (ENV.num_actions, ())
    samples = jax.vmap(actions.sample)(jax.random.split(KEY, 100))
    assert set(samples.tolist()) == set(range(ENV.num_actions))
    assert actions.contains(3)
    assert not actions.contains(4)
    assert not actions.contains(-1)

    obs, _ = reset(KEY)
    space = ENV.observation_space(PARAMS)
    assert space.contains(obs)
    assert jax.tree.structure(space.sample(KEY)).num_leaves == len(jax.tree.leaves(obs))
    mask = space.spaces["action_mask"]
    assert (mask.low, mask.high, mask.shape, mask.dtype) == (0, 1, (ENV.num_actions,), bool)

    flat_obs, _ = flat_reset(KEY)
    flat = FLAT.observation_space(PARAMS)
    assert flat.shape == flat_obs.shape == flat.sample(KEY).shape
    assert flat.contains(flat_obs)
    assert flat.contains(flat.sample(KEY))
    assert not flat.contains(flat_obs + 2 * flat.high)


def test_spaces_do_without_gymnax() -> None:
    program = """
import sys
import jax.numpy as jnp
from qos_jax.sim import spaces
assert spaces.space_class(spaces.Box) is spaces.Box
spaces.space_of(jnp.zeros(3))
assert "gymnax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_parameters_may_be_left_out() -> None:
    _, state = reset(KEY)
    for values in zip(jax.tree.leaves(step(KEY, state, 1)), jax.tree.leaves(step(KEY, state, 1, PARAMS)), strict=True):
        np.testing.assert_array_equal(*values)
    with pytest.raises(InputError, match="no default parameters"):
        instant_env().reset(KEY)


def test_a_compiled_program_never_takes_the_default_parameters_of_another_environment() -> None:
    fast = ENV.with_default_params(small_params(rate_per_s=1000.0))
    gap_s = jax.jit(lambda env: env.step(KEY, env.reset(KEY)[1], 0)[-1]["gap_s"], static_argnums=0)
    assert gap_s(fast) < gap_s(ENV)
    assert fast != ENV
    assert copy.copy(ENV) == ENV
    assert FlatEnvironment(copy.copy(ENV)) == FLAT
    assert len({ENV, copy.copy(ENV), fast}) == 2


def test_flat_observations_are_the_flat_view_and_the_mask() -> None:
    obs, state = reset(KEY)
    flat_obs, flat_state = flat_reset(KEY)
    for count in range(1, STEPS_IN_EPISODE + 1):
        np.testing.assert_allclose(flat_obs[: -FLAT.num_actions], flat_view(obs), rtol=1e-5)
        np.testing.assert_array_equal(FLAT.action_mask(flat_obs), obs.action_mask)
        np.testing.assert_allclose(flat_obs, masked_flat_view(obs), rtol=1e-5)
        key = jax.random.fold_in(KEY, count)
        obs, state, reward, *_, info = step(key, state, 0)
        flat_obs, flat_state, flat_reward, _, truncated, flat_info = flat_step(key, flat_state, 0)
        np.testing.assert_allclose(flat_reward, reward, rtol=1e-5)
        np.testing.assert_allclose(
            flat_info["final_observation"], masked_flat_view(info["final_observation"]), rtol=1e-5
        )
    assert truncated
    assert np.any(flat_info["final_observation"] != flat_obs)


@pytest.fixture(scope="module")
def wrappers() -> Any:
    if importlib.util.find_spec("gymnax") is None:
        pytest.skip("gymnax is not installed")
    return importlib.import_module("gymnax.wrappers")  # an incomplete installation is an error


@pytest.mark.slow
def test_spaces_are_those_of_gymnax_once_it_is_imported(wrappers: Any) -> None:
    spaces = importlib.import_module("gymnax.environments.spaces")
    assert isinstance(ENV.action_space(PARAMS), spaces.Discrete)
    assert isinstance(ENV.observation_space(PARAMS), spaces.Dict)
    assert isinstance(FLAT.observation_space(PARAMS), spaces.Box)
    assert not isinstance(FLAT.observation_space(PARAMS), Box)
    assert not isinstance(ENV.action_space(PARAMS), Discrete)
    obs, _ = reset(KEY)
    assert ENV.observation_space(PARAMS).contains(obs)


@pytest.mark.slow
@pytest.mark.parametrize("params", [None, PARAMS], ids=["default", "given"])
def test_gymnax_wrappers_take_the_environment(wrappers: Any, params: Any) -> None:
    env = wrappers.LogWrapper(wrappers.FlattenObservationWrapper(FLAT))
    assert env.observation_space(PARAMS).shape == FLAT.observation_space(PARAMS).shape
    assert (env.name, env.num_actions, env.default_params) == (FLAT.name, FLAT.num_actions, PARAMS)
    obs, state = env.reset(KEY, params)
    rewards = []
    for count in range(1, STEPS_IN_EPISODE + 1):
        action = env.action_space(PARAMS).sample(jax.random.fold_in(KEY, count))
        obs, state, reward, _, truncated, info = env.step(jax.random.fold_in(KEY, 100 + count), state, action, params)
        rewards.append(float(reward))
        assert env.observation_space(PARAMS).contains(obs)
        assert bool(info["returned_episode"]) == bool(truncated) == (count == STEPS_IN_EPISODE)
    assert info["returned_episode_lengths"] == STEPS_IN_EPISODE
    assert info["returned_episode_returns"] == pytest.approx(sum(rewards), rel=1e-5)


@pytest.mark.slow
def test_gymnax_log_wrapper_vectorises_over_graphs(wrappers: Any) -> None:
    """Observations may be structs, as long as no wrapper flattens them."""
    env = wrappers.LogWrapper(ENV)
    keys = jax.random.split(KEY, 4)
    obs, state = jax.vmap(env.reset, (0, None))(keys, PARAMS)
    obs, state, *_, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, jnp.zeros(4, jnp.int32), PARAMS)
    assert obs.action_mask.shape == (4, ENV.num_actions)
    np.testing.assert_array_equal(info["returned_episode"], False)


@pytest.mark.slow
def test_gymnax_turns_the_environment_into_one_of_gymnasium(wrappers: Any) -> None:
    env = wrappers.GymnaxToGymWrapper(FLAT, seed=0)
    obs, _ = env.reset(seed=1)
    assert np.asarray(obs) in env.observation_space
    obs, *_ = env.step(env.action_space.sample())
    assert np.asarray(obs) in env.observation_space
    sticky = wrappers.StickyActionWrapper(FLAT, 0.5)
    _, state = sticky.reset(KEY)
    assert sticky.step(KEY, state, 1)[0].shape == obs.shape
