"""In a large fleet only the busy lanes are run, with the same outcome as if all were."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.validation import checked_experts
from tests.helpers.workloads import profile

SPEC = EngineSpec(slots=16)
ENVIRONMENTS, EXPERTS, STEPS = 3, 40, 60


def fleet() -> Any:
    """Experts of both kinds of scheduling, some with little memory."""
    rng = np.random.default_rng(0)
    experts = profile(
        step_base_s=rng.uniform(0.01, 0.05, EXPERTS),
        prefill_per_token_s=1e-4,
        per_sequence_s=1e-3,
        kv_blocks=40,
        max_running=4,
        async_scheduling=rng.random(EXPERTS) < 0.5,
        prefix_cache=rng.random(EXPERTS) < 0.5,
    )
    experts = checked_experts(experts, np.float32)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (ENVIRONMENTS, EXPERTS)), experts)


@functools.partial(jax.jit, static_argnums=0)
def played(run: Any, experts: Any, key: jax.Array, gap_s: jax.Array) -> tuple[ExpertState, jax.Array]:
    """The state after some steps, in each of which requests arrive at a few experts; and how many were busy at each."""

    def step(state: ExpertState, key: jax.Array) -> tuple[ExpertState, jax.Array]:
        chosen, prompt, output, wait = jax.random.split(key, 4)
        state = engine.compact(SPEC, state)
        state = engine.push(
            state,
            (jax.random.uniform(chosen, shape) < 0.05) & ~engine.needs_compact(state),
            jax.random.randint(prompt, shape, 1, 200),
            jax.random.randint(output, shape, 1, 100),
            (),
        )
        until_s = jnp.full(shape, gap_s * jax.random.exponential(wait))
        busy = jnp.sum((state.clock_s < until_s) & jnp.any(state.slots.live, -1))
        return engine.rebase(run(SPEC, experts, state, until_s), until_s), busy

    shape = (ENVIRONMENTS, EXPERTS)
    return jax.lax.scan(step, engine.init_state(SPEC, shape), jax.random.split(key, STEPS))


@pytest.mark.parametrize("gap_s", [0.01, pytest.param(0.2, marks=pytest.mark.slow)])
def test_the_outcome_is_that_of_all_lanes(gap_s: float) -> None:
    experts = fleet()
    few, busy = played(engine._run_busy_lanes, experts, jax.random.key(1), jnp.float32(gap_s))
    all_, _ = played(engine._run_lanes, experts, jax.random.key(1), jnp.float32(gap_s))
    assert busy.min() <= engine._BLOCK < busy.max(), "one block and several must be needed"
    few, all_ = (state.replace(passes=0) for state in (few, all_))  # the passes are not those of lanes left alone
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), few, all_)
