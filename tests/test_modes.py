"""The modes of JAX in which users debug their programs: everything works in each of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from qos_jax.agent import make_learner
from qos_jax.routers import make_router, router_names
from tests.helpers.everything_once import tiny_agent, tiny_world
from tests.helpers.programs import ROOT


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Neither types nor ranks are promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


QUICK = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.parametrize("mode", [partial(jax.enable_x64, True), strict], ids=["x64", "strict"])
def test_every_router_and_kind_of_agent_is_traced_in_it(mode: Callable[[], AbstractContextManager]) -> None:
    with mode():
        env, params = tiny_world()
        key = jax.eval_shape(jax.random.key, 0)
        obs, state = jax.eval_shape(env.reset, key, params)
        next_obs, next_state, *_ = jax.eval_shape(env.step, key, state, jnp.int32(0), params)
        assert jax.tree.map(lambda x: x.dtype, (next_obs, next_state)) == jax.tree.map(lambda x: x.dtype, (obs, state))
        for name in (*router_names(env), "rollout"):
            router = make_router(name, env, params)
            action, _ = jax.eval_shape(router.act, key, obs, router.init())
            assert (action.shape, jnp.issubdtype(action.dtype, jnp.integer)) == ((), True), name
        for name in ("mvr", "baseline_rl"):
            learner = make_learner(env, tiny_agent(name))
            hyper = jax.tree.map(jnp.float32, learner.config.hyper)
            training = jax.eval_shape(learner.init, key, params, hyper)
            after, _ = jax.eval_shape(learner.train_chunk, training, params, hyper, jnp.int32(0), jnp.float32(0.0))
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, training), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable",
    [
        "JAX_ENABLE_X64=1",
        "JAX_NUMPY_DTYPE_PROMOTION=strict",
        "JAX_NUMPY_RANK_PROMOTION=raise",
        "JAX_DEBUG_NANS=1",
        "JAX_DEFAULT_PRNG_IMPL=rbg",
    ],
)
def test_everything_runs_in_it(variable: str) -> None:
    name, value = variable.split("=")
    command = [sys.executable, "-m", "tests.helpers.everything_once"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | QUICK | {name: value}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "learned" in ran.stdout
