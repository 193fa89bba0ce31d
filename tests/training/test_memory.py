"""A run says what it needs before it compiles, and what cannot fit is refused."""

from __future__ import annotations

import jax
import pytest

from qos_jax import InputError
from qos_jax.agent.learner import TrainState
from qos_jax.training.memory import available_bytes, check_fits, needed_bytes
from tests.helpers.instant_env import small_learner
from tests.helpers.small_env import small_params


def state_of(**sizes: int) -> TrainState:
    learner = small_learner(**sizes)
    return jax.eval_shape(learner.init, jax.random.key(0), small_params(), learner.config.hyper)


def test_what_is_needed_is_what_is_allocated() -> None:
    learner = small_learner()
    state = jax.jit(learner.init)(jax.random.key(0), small_params(), learner.config.hyper)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(state.replace(key=None)))
    assert sum(needed_bytes(state).values()) == allocated
    assert needed_bytes(state_of()) == needed_bytes(state)


def test_environments_and_replay_grow_with_their_number() -> None:
    small, many, long = (needed_bytes(state_of(**sizes)) for sizes in ({}, {"num_envs": 8}, {"capacity": 128}))
    assert many["environments"] == 2 * small["environments"]
    assert long["replay"] == 2 * small["replay"]
    assert many["replay"] == small["replay"]
    assert many["weights"] == long["weights"] == small["weights"]


def test_what_does_not_fit_is_refused_with_advice() -> None:
    needed = {"environments": 600_000_000, "replay": 300_000_000, "weights": 100_000_000}
    assert "at least 1,000 MB of 1,000 MB free" in check_fits(needed, 1, 1, 1_000_000_000)
    assert "at least 1,000 MB on each device" in check_fits(needed, 4, 4, None)
    with pytest.raises(InputError, match=r"needs at least 2,000 MB on each device .* take fewer environments"):
        check_fits(needed, 2, 1, 1_999_999_999)
    check_fits(needed, 2, 2, 1_999_999_999)


def test_this_machine_has_memory() -> None:
    here = available_bytes(jax.devices()[0])
    assert here is None or 1e8 < here < 1e14
