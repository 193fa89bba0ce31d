"""The environment step and a training chunk compile to programs without scatters.

A scatter is slow on GPUs, and one that adds gives wrong results in jaxlib 0.10.2.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qos_jax import make
from qos_jax.agent import AGENTS, make_learner

ENVS = 4


def lowered_step(**world: Any) -> str:
    env, params = make("paper-3", load=0.9, **world)
    keys = jax.vmap(jax.random.key)(jnp.arange(ENVS))
    _, states = jax.eval_shape(jax.vmap(env.reset, in_axes=(0, None)), keys, params)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    return jax.jit(step).lower(keys, states, jax.ShapeDtypeStruct((ENVS,), jnp.int32), params).as_text()


def test_the_step_has_no_scatter() -> None:
    """Of any law of arrivals, as all are one program (``test_all_kinds_and_rates_run_in_one_traced_program``)."""
    program = lowered_step()
    assert "while" in program
    assert "scatter" not in program


def test_stale_metrics_are_scattered_into_a_ring_without_addition() -> None:
    scatters = re.findall(r'"stablehlo.scatter".*?stablehlo.return', lowered_step(staleness_s=0.5), re.DOTALL)
    assert scatters
    assert not any("stablehlo.add" in each for each in scatters)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["mvr", "sac", "sac_td0", "paper"])
def test_training_has_no_scatter(agent: str) -> None:
    env, params = make("paper-3", load=0.9)
    learner = make_learner(env, AGENTS[agent])
    hyper = jax.tree.map(jnp.float32, learner.config.hyper)
    state = jax.eval_shape(learner.init, jax.random.key(0), params, hyper)
    program = jax.jit(learner.train_chunk).lower(state, params, hyper, jnp.int32(0), jnp.float32(0)).as_text()
    assert "scatter" not in program
