"""The modes of JAX in which users debug their programs: everything works in each of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax.agent import make_learner
from qos_jax.routers import make_router, router_names
from qos_jax.sim.validation import of_one_type
from tests.helpers.everything_once import tiny_agent, tiny_world
from tests.helpers.programs import ROOT
from tests.helpers.small_env import small_env, small_experts, small_params


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Neither types nor ranks are promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


QUICK = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [pytest.param(partial(jax.enable_x64, True), id="x64"), pytest.param(strict, id="strict")],
)
@pytest.mark.parametrize(
    "fields",
    [{}, {"engine": "vllm", "sessions": "4:3:900", "failures": "60:10"}],
    ids=["plain", "sessions and failures"],
)
def test_every_router_and_kind_of_agent_is_traced_in_it(
    mode: Callable[[], AbstractContextManager], fields: dict[str, Any]
) -> None:
    with mode():
        env, params = tiny_world(**fields)
        key = jax.eval_shape(jax.random.key, 0)
        obs, state = jax.eval_shape(env.reset, key, params)
        next_obs, next_state, *_ = jax.eval_shape(env.step, key, state, jnp.int32(0), params)
        assert jax.tree.map(lambda x: x.dtype, (next_obs, next_state)) == jax.tree.map(lambda x: x.dtype, (obs, state))
        for name in (*router_names(env), "rollout"):
            router = make_router(name, env, params)
            action, _ = jax.eval_shape(router.act, key, obs, router.init())
            assert (action.shape, jnp.issubdtype(action.dtype, jnp.integer)) == ((), True), name
        for name in ("mvr", "sac", "baseline_rl"):
            learner = make_learner(env, tiny_agent(name))
            hyper = jax.tree.map(jnp.float32, learner.config.hyper)
            training = jax.eval_shape(learner.init, key, params, hyper)
            after, _ = jax.eval_shape(learner.train_chunk, training, params, hyper, jnp.int32(0), jnp.float32(0.0))
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, training), name


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, np.float64),
        ({"network_s": np.zeros(3, np.float64), "max_waiting": np.full(3, 10**12)}, np.float32),
        ({"kv_blocks": np.full(3, 40, np.int16), "idle_w": np.arange(3)}, np.float64),
    ],
)
def test_a_profile_of_ones_own_may_have_any_types(change: dict[str, Any], dtype: Any, x64: bool) -> None:
    with jax.enable_x64(x64):
        own = jax.tree.map(lambda x: np.asarray(x, dtype if x.dtype.kind == "f" else np.int64), small_experts())
        own = own.replace(async_scheduling=np.zeros(3, bool), prefix_cache=np.zeros(3, bool), **change)
        env, params = small_env(), small_params().replace(experts=own)
        key = jax.eval_shape(jax.random.key, 0)
        before = jax.eval_shape(env.reset, key, params)
        after = jax.eval_shape(env.step, key, before[1], jnp.int32(0), params)[:2]
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
        assert before[1].world.experts.slots.computed.dtype == jnp.int32


def test_counts_beyond_int32_are_cut_off_rather_than_wrapped() -> None:
    own = small_experts().replace(max_waiting=np.full(3, 10**12), max_running=10**12)
    found = of_one_type(own)
    assert (np.asarray(found.max_waiting).tolist(), found.max_running) == ([2**30 - 1] * 3, 2**30 - 1)


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
