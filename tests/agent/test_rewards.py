"""Rewards: each cost computed by hand, and the potential, which telescopes over an episode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from qos_jax.agent.rewards import RewardWeights, expert_returns, shaped_reward
from qos_jax.impact.estimate import impact, in_flight_qos
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.world import Completions, SlotPayload
from tests.helpers.decision_processes import quick_jit
from tests.helpers.observations import observation, running
from tests.helpers.small_env import small_env, small_experts, small_params

WATTS = {
    "idle_w": np.array([50.0, 100.0]), "busy_w": np.array([250.0, 500.0]), "standby_w": np.array([80.0, 100.0])
}  # fmt: skip
BUSY_S, STANDBY_S, KV_BLOCK_S, BLOCK_GB = np.array([2.0, 1.0]), np.array([10.0, 5.0]), np.array([30.0, 10.0]), 0.5


def two_experts(**fields: Any) -> Any:
    return small_experts(2, kv_block_gb=BLOCK_GB, **(WATTS | fields))


class TestExpertReturns:
    """Expert 0 finished two requests, one late, and runs a third; expert 1 finished one."""

    profile = two_experts(network_s=np.array([0.0, 0.1]))
    margin_s = np.array([0.01, -0.005, 0.002])  # s/token
    score = np.array([0.8, 0.6, 0.9])

    def state(self) -> ExpertState:
        zero = jnp.zeros(())
        state = engine.init_state(EngineSpec(3), (2,), SlotPayload(zero, zero, zero, zero))
        tokens, limit_s = jnp.array([[10, 20, 30], [5, 0, 0]]), 0.05
        per_token_s = limit_s - jnp.array([[0.01, -0.005, 0.0], [0.002, 0.0, 0.0]])
        payload = state.slots.payload.replace(
            score=jnp.array([[0.8, 0.6, 0.7], [0.9, 0.3, 0.3]]), latency_limit_s=jnp.full((2, 3), limit_s)
        )
        slots = state.slots.replace(
            output_tokens=tokens,
            generated=jnp.array([[10, 20, 7], [5, 0, 0]]),
            finish_s=per_token_s * tokens - self.profile.network_s[:, None],
            payload=payload,
        )
        used = {"busy_s": jnp.array(BUSY_S), "standby_s": jnp.array(STANDBY_S), "kv_block_s": jnp.array(KV_BLOCK_S)}
        return state.replace(slots=slots, **used)

    @pytest.mark.parametrize("width_s", [1e-3, 5e-3])
    def test_answers_get_the_soft_qos(self, width_s: float) -> None:
        in_time = 1.0 / (1.0 + np.exp(-self.margin_s / width_s))
        answers = self.score * in_time - 0.5 * (1.0 - in_time)
        found = expert_returns(self.profile, self.state(), RewardWeights(violation=0.5), width_s)
        np.testing.assert_allclose(found, [answers[:2].sum(), answers[2]], rtol=1e-3)

    def test_a_logistic_of_no_width_is_the_step_at_the_limit(self) -> None:
        found = expert_returns(self.profile, self.state(), RewardWeights(violation=0.5), 1e-9)
        np.testing.assert_allclose(found, [0.8 - 0.5, 0.9], rtol=1e-5)

    @pytest.mark.parametrize(
        "weights, cost",
        [
            (RewardWeights(kv_memory=0.02), 0.02 * KV_BLOCK_S * BLOCK_GB),
            (RewardWeights(energy=0.3), 0.3 * (BUSY_S * [0.2, 0.4] + STANDBY_S * [0.03, 0.0])),
            (RewardWeights(drop=9.0, predicted_loss=9.0, potential=9.0), [0.0, 0.0]),
        ],
    )
    def test_resources_cost(self, weights: RewardWeights, cost: Any) -> None:
        plain = expert_returns(self.profile, self.state(), RewardWeights(), 1e-3)
        np.testing.assert_allclose(
            plain - expert_returns(self.profile, self.state(), weights, 1e-3), cost, rtol=1e-4, atol=1e-6
        )


GAMMA, QOS, EXPERT = 0.9, 2.5, 1
BEFORE = observation([running()], [running(predicted_score=0.7, age_s=1.1, latency_limit_s=0.045)] * 2)
AFTER = observation([running(predicted_score=0.9, age_s=0.1)], [])
COMPLETIONS = Completions(
    finished=jnp.int32(4),
    qos=jnp.float32(QOS),
    score=jnp.float32(3.5),
    latency_per_token_s=jnp.float32(0.2),
    violations=jnp.int32(3),
    busy_s=jnp.array(BUSY_S),
    standby_s=jnp.array(STANDBY_S),
    kv_block_s=jnp.array(KV_BLOCK_S),
    passes=jnp.int32(7),
)

compiled_reward, in_flight = quick_jit(shaped_reward), quick_jit(in_flight_qos)


def reward_of(weights: RewardWeights, action: int = EXPERT, dropped: bool = False) -> float:
    params = small_params(2, kv_block_gb=BLOCK_GB, **WATTS)
    info = {"completions": COMPLETIONS, "dropped": jnp.bool_(dropped), "final_observation": AFTER}
    weights = jax.tree.map(jnp.float32, weights)
    return float(compiled_reward(weights, jnp.float32(GAMMA), params, BEFORE, jnp.int32(action), COMPLETIONS.qos, info))


@pytest.mark.parametrize(
    "weights, dropped, expected",
    [
        (RewardWeights(), True, QOS),
        (RewardWeights(violation=0.25), False, QOS - 0.75),
        (RewardWeights(drop=0.4), False, QOS),
        (RewardWeights(drop=0.4), True, QOS - 0.4),
        (RewardWeights(kv_memory=0.02), False, QOS - 0.02 * 40.0 * BLOCK_GB),
        (RewardWeights(energy=0.3), False, QOS - 0.3 * (2.0 * 0.2 + 1.0 * 0.4 + 10.0 * 0.03)),
    ],
)
def test_the_costs_of_a_step_are_those_computed_by_hand(weights: RewardWeights, dropped: bool, expected: float) -> None:
    assert reward_of(weights, dropped=dropped) == pytest.approx(expected, rel=1e-5)


def test_the_predicted_loss_of_other_requests_is_a_cost() -> None:
    """The paper's penalty; a drop has none."""
    loss = np.asarray(quick_jit(impact)(BEFORE).qos_change)
    assert loss[EXPERT] < -1e-3 and loss[0] != pytest.approx(loss[EXPERT])
    for action, expected in ((0, loss[0]), (EXPERT, loss[EXPERT]), (2, 0.0)):
        assert reward_of(RewardWeights(predicted_loss=2.0), action) == pytest.approx(QOS + 2.0 * expected, rel=1e-4)


def test_the_potential_is_the_qos_in_flight() -> None:
    change = GAMMA * float(in_flight(AFTER)) - float(in_flight(BEFORE))
    assert abs(change) > 1e-2
    assert reward_of(RewardWeights(potential=1.0)) == pytest.approx(QOS + change, rel=1e-4)


def test_the_potential_telescopes_over_each_episode() -> None:
    """Undiscounted, an episode earns its plain rewards plus the QoS in flight at its end, as none is at its start."""
    env, episode, episodes = small_env(), 12, 2
    params = small_params(rate_per_s=8.0, latency_limit_s=0.08, max_steps_in_episode=episode)
    weights = RewardWeights(potential=1.0)

    @quick_jit
    def play(key: Array) -> tuple[Array, Array, Array]:
        def step(carry: tuple[Any, Any], key: Array) -> tuple[Any, tuple[Array, Array, Array]]:
            obs, state = carry
            action = jax.random.randint(key, (), 0, env.num_actions)
            next_obs, state, reward, _, _, info = env.step(key, state, action, params)
            shaped = shaped_reward(weights, 1.0, params, obs, action, reward, info)
            return (next_obs, state), (reward, shaped, in_flight_qos(info["final_observation"]))

        return lax.scan(step, env.reset(key, params), jax.random.split(key, episodes * episode))[1]

    plain, shaped, left = (np.reshape(x, (episodes, episode)) for x in play(jax.random.key(3)))
    assert np.all(left[:, -1] > 0.1) and np.all(plain.sum(1) > 0.1)
    np.testing.assert_allclose(shaped.sum(1), plain.sum(1) + left[:, -1], rtol=1e-4, atol=1e-4)
