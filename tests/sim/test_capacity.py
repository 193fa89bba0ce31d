"""The saturation rate against closed forms, with answers and iterations of equal lengths."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import Array

from qos_jax import Environment, EnvParams, Request
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.world import WorldSpec
from tests.helpers.workloads import profile

REQUESTS = 1000
MAX_RUNNING = 8
TOKENS = np.array([10, 14])  # length of each expert's answers
STEP_S = np.array([0.02, 0.01])


@struct.dataclass
class EqualRequests:
    """Prompts of one token and answers of one length per expert; arrival times are not used."""

    output_tokens: Array  # [N] int32

    def init(self, key: Array) -> tuple[()]:
        return ()

    def next(self, key: Array, state: tuple[()]) -> tuple[Array, Request, tuple[()]]:
        zeros = jnp.zeros(self.output_tokens.shape)
        return jnp.nan, Request(jnp.int32(1), self.output_tokens, zeros, jnp.float32(1.0), zeros, zeros), state


def rate(**fields: Any) -> float:
    """The saturation rate of the two experts."""
    limits = {"max_running": MAX_RUNNING, "max_waiting": 2 * MAX_RUNNING}
    env = Environment(WorldSpec(2, EngineSpec(3 * MAX_RUNNING)))
    params = EnvParams(profile(**{"step_base_s": STEP_S} | limits | fields), EqualRequests(jnp.asarray(TOKENS)))
    return saturation_rate(env, params, requests_per_expert=REQUESTS)


def test_full_batches_of_two_experts() -> None:
    assert rate() == pytest.approx(sum(MAX_RUNNING / (TOKENS * STEP_S)), rel=0.01)


@pytest.mark.parametrize("expert", [0, 1])
def test_one_expert_with_a_very_slow_one(expert: int) -> None:
    step_s = np.where(np.arange(2) == expert, STEP_S, 1e4)
    assert rate(step_base_s=step_s) == pytest.approx(MAX_RUNNING / (TOKENS[expert] * STEP_S[expert]), rel=0.01)


def test_the_time_per_sequence_counts_for_the_whole_batch() -> None:
    iteration_s = STEP_S + 0.003 * MAX_RUNNING
    assert rate(per_sequence_s=0.003) == pytest.approx(sum(MAX_RUNNING / (TOKENS * iteration_s)), rel=0.01)


def test_memory_limits_the_batch() -> None:
    """A request needs one block of 16 tokens, so the batch has at most as many requests as there are blocks."""
    blocks = np.array([3, 5])
    assert rate(kv_blocks=blocks) == pytest.approx(sum(blocks / (TOKENS * STEP_S)), rel=0.01)
