"""Soft actor-critic: small processes that each isolate one fault of value learning, a known optimum, and parts.

One compiled program learns the processes side by side, once with an actor and once without.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import Array

from qos_jax.agent import sac
from qos_jax.agent.networks import Heads
from qos_jax.agent.sac import Hyperparameters, LearnerState
from qos_jax.agent.targets import targets_named
from qos_jax.agent.targets.counterfactual import CounterfactualTarget
from qos_jax.agent.targets.temporal_difference import Step, Transition, bootstrapped_value
from tests.helpers import decision_processes
from tests.helpers.decision_processes import (
    ACTIONS,
    GAMMA,
    STATES,
    Process,
    Solved,
    TinyNetwork,
    View,
    hyperparameters,
    process,
)

CHUNKS = 200
ONCE = np.ones((STATES, 1), bool)  # an episode is one step
LAST = np.arange(STATES)[:, None] == STATES - 1
RING = np.array([1, 2, 3, 0])
TEMPTING = 100.0  # reward of an action that is never legal
SOFT = {"gamma": 0.7, "alpha": 0.5, "critic_entropy": 1.0}
TARGET_ENTROPY = 0.5


def by_state(*values: float) -> np.ndarray:
    return np.pad(np.array(values), (0, STATES - len(values)))[:, None]


def any_process() -> Process:
    """Random transitions and rewards; in state 1 the last action is illegal."""
    rng = np.random.default_rng(0)
    reward, legal = rng.uniform(-1.0, 1.0, (STATES, ACTIONS)), np.ones((STATES, ACTIONS), bool)
    reward[1, 2], legal[1, 2] = TEMPTING, False
    transition = rng.dirichlet(np.full(STATES, 0.5), (STATES, ACTIONS))
    return process(transition, reward, legal=legal, start=range(STATES), max_steps_in_episode=20)


def problems() -> dict[str, tuple[Process, Hyperparameters]]:
    hyper, adaptive = hyperparameters(), hyperparameters(alpha_rate=1e-2, target_entropy=TARGET_ENTROPY)
    curious = hyperparameters(alpha=1.0)
    stay = np.zeros(STATES, int)
    return {
        "constant": (process(stay, 1.0, terminates=ONCE), hyper),
        "observed": (process(stay, by_state(1, -1), terminates=ONCE, start=[0, 1]), hyper),
        "delayed": (process([1, 0, 0, 0], by_state(0, 1), terminates=by_state(0, 1)), hyper),
        "chosen": (process(stay, [0, 1, 0], terminates=ONCE), hyper),
        "chosen and observed": (process(stay, np.eye(STATES)[:, :ACTIONS], terminates=ONCE, start=[0, 1]), hyper),
        "truncated": (process(RING, 1.0, start=range(STATES), max_steps_in_episode=3), hyper),
        "truncated far": (process(RING, by_state(1), start=range(STATES), max_steps_in_episode=3), curious),
        "terminated": (process(RING, 1.0, terminates=LAST), hyper),
        "three legal": (process(stay, [1, 0.5, 0], terminates=ONCE), adaptive),
        "two legal": (process(stay, [1, 0.5, TEMPTING], terminates=ONCE, legal=[True, True, False]), adaptive),
        "any": (any_process(), hyperparameters(**SOFT)),
    }


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="critics alone"), pytest.param(True, id="with an actor", marks=pytest.mark.slow)],
)
def solved(request: pytest.FixtureRequest) -> dict[str, Solved]:
    return decision_processes.solve(request.param, problems(), CHUNKS)


@pytest.mark.slow
class TestSmallProcesses:
    def test_a_constant_reward_is_valued(self, solved: dict[str, Solved]) -> None:
        np.testing.assert_allclose(solved["constant"].q[0], 1.0, atol=0.02)

    def test_a_reward_that_depends_on_the_observation(self, solved: dict[str, Solved]) -> None:
        np.testing.assert_allclose(solved["observed"].q[:2], [[1.0] * ACTIONS, [-1.0] * ACTIONS], atol=0.02)

    def test_a_delayed_reward_is_discounted_once(self, solved: dict[str, Solved]) -> None:
        np.testing.assert_allclose(solved["delayed"].q[:2], [[GAMMA] * ACTIONS, [1.0] * ACTIONS], atol=0.02)

    def test_the_rewarded_action_is_preferred(self, solved: dict[str, Solved]) -> None:
        np.testing.assert_allclose(solved["chosen"].q[0], [0.0, 1.0, 0.0], atol=0.05)
        assert solved["chosen"].policy[0, 1] > 0.95

    def test_the_rewarded_action_of_each_observation_is_preferred(self, solved: dict[str, Solved]) -> None:
        found = solved["chosen and observed"]
        np.testing.assert_allclose(found.q[:2], np.eye(2, ACTIONS), atol=0.05)
        assert found.policy[0, 0] > 0.95 and found.policy[1, 1] > 0.95

    def test_a_truncated_episode_has_a_future_and_a_terminated_one_has_none(self, solved: dict[str, Solved]) -> None:
        np.testing.assert_allclose(solved["truncated"].q, 1.0 / (1.0 - GAMMA), atol=0.1)
        ringed, _ = decision_processes.soft_optimum(problems()["truncated far"][0], GAMMA, 1.0, 0.0)
        # The future of a truncated episode is not the next episode either.
        np.testing.assert_allclose(solved["truncated far"].q, ringed, atol=0.05)
        steps_left = STATES - np.arange(STATES)
        expected = (1.0 - GAMMA**steps_left) / (1.0 - GAMMA)
        np.testing.assert_allclose(solved["terminated"].q, np.tile(expected[:, None], ACTIONS), atol=0.05)


@pytest.mark.slow
def test_the_soft_optimum_is_found(solved: dict[str, Solved]) -> None:
    found, params = solved["any"], any_process()
    q, policy = decision_processes.soft_optimum(params, *SOFT.values())
    hard_q, _ = decision_processes.soft_optimum(params, SOFT["gamma"], 1e-3, 0.0)
    legal = np.asarray(params.legal)
    tolerance = 0.12
    assert np.all((q - hard_q)[legal] > 3 * tolerance)  # the tolerance is below the contribution of the entropy
    np.testing.assert_allclose(found.q[legal], q[legal], atol=tolerance)
    np.testing.assert_allclose(found.policy, policy, atol=0.04)


def test_illegal_actions_are_never_taken(solved: dict[str, Solved]) -> None:
    for name, (params, _) in problems().items():
        taken = jax.tree.map(
            lambda x: x[: CHUNKS * decision_processes.CONFIG.rows_per_chunk], solved[name].state.replay
        )
        legal = np.take_along_axis(np.asarray(taken.inputs.legal), np.asarray(taken.action)[:, None], 1)
        assert legal.all(), name
        assert not np.any(solved[name].policy[~np.asarray(params.legal)]), name
    assert np.all(solved["any"].q < TEMPTING / 10)


def test_the_entropy_meets_its_share_of_the_legal_maximum(solved: dict[str, Solved]) -> None:
    for name, legal in (("three legal", 3), ("two legal", 2)):
        policy = solved[name].policy[0, :legal]
        assert -np.sum(policy * np.log(policy)) == pytest.approx(TARGET_ENTROPY * np.log(legal), abs=0.03), name


def test_one_seed_repeats_and_another_differs() -> None:
    def learn(seed: int) -> Any:
        return {name: one.state.learner for name, one in decision_processes.solve(False, problems(), 5, seed).items()}

    first, other = learn(0), learn(1)
    chex.assert_trees_all_equal(learn(0), first)
    for name in problems():
        differs = jax.tree.map(lambda x, y: np.any(x != y), first[name].params, other[name].params)
        assert any(jax.tree.leaves(differs)), name


def test_seeds_side_by_side_learn_what_each_learns_alone() -> None:
    """Tests the last problem after few updates: later, rounding changes a sampled action and so everything after it."""
    chunks, (params, hyper) = 6, list(problems().values())[-1]
    key = jax.random.split(jax.random.key(0), len(problems()))[-1]
    *_, together = decision_processes.solve(False, problems(), chunks).values()
    learner = decision_processes.learner(actor=False)
    alone = decision_processes.quick_jit(decision_processes.train, static_argnums=0)(
        learner, key, params, hyper, jnp.int32(chunks)
    )
    chex.assert_trees_all_equal(alone.replay.action, together.state.replay.action)
    chex.assert_trees_all_close(alone.learner, together.state.learner, rtol=1e-3, atol=1e-4)


class Table(nn.Module):
    """A network whose values and logits are parameters, the same for all inputs."""

    actor: bool = False

    @nn.compact
    def __call__(self, inputs: View) -> Heads:
        def table(name: str, *shape: int) -> Array:
            values = self.param(name, nn.initializers.zeros, shape)
            return jnp.broadcast_to(values, (*inputs.legal.shape[:-1], *shape))

        return Heads(table("logits", ACTIONS) if self.actor else None, table("q", 2, ACTIONS))


def updated(
    network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Any, progress: Any
) -> tuple[LearnerState, dict[str, Array]]:
    """Takes one gradient step on a batch of either kind of target."""
    targets = targets_named("counterfactual" if isinstance(batch, CounterfactualTarget) else "temporal_difference")
    return sac.update(network, hyper, state, *targets.critic_loss(network, hyper, state, batch), progress)


update = decision_processes.quick_jit(updated, static_argnums=0)


def table_of(q: Any, logits: Any = None) -> dict[str, Any]:
    values = {"q": jnp.array(q, jnp.float32)}
    return {"params": values if logits is None else values | {"logits": jnp.array(logits, jnp.float32)}}


def views(*legal: list[bool]) -> View:
    return View(jnp.zeros((len(legal), STATES)), jnp.array(legal))


ALL, TWO, ONE, NONE = [True] * 3, [True, True, False], [False, False, True], [False] * 3
HUGE = 1e6


@pytest.mark.parametrize("logits", [None, [0.0, 1.0, HUGE]])
def test_an_illegal_action_has_no_probability_whatever_its_value(logits: Any) -> None:
    heads = Heads(None if logits is None else jnp.array(logits), jnp.array([[0.0, 1.0, HUGE]] * 2))
    log_policy = sac.policy_logits(heads, jnp.array(TWO), jnp.float32(0.0))
    np.testing.assert_allclose(jnp.exp(log_policy), [1 / (1 + np.e), np.e / (1 + np.e), 0.0], rtol=1e-5)
    sampled = jax.random.categorical(jax.random.key(0), log_policy, shape=(20_000,))
    assert np.mean(np.asarray(sampled) == 1) == pytest.approx(np.e / (1 + np.e), abs=0.02)
    assert not np.any(sampled == 2)


@pytest.mark.parametrize("critic_entropy", [0.0, 1.0])
@pytest.mark.parametrize("min_q_weight", [0.0, 1.0, 0.25])
def test_the_target_is_that_computed_by_hand(min_q_weight: float, critic_entropy: float) -> None:
    """The policy uses the weights, and the values use their running average."""
    hyper = hyperparameters(min_q_weight=min_q_weight, critic_entropy=critic_entropy, alpha=0.5)
    average = np.array([[1.0, 5.0, HUGE], [2.0, 3.0, -HUGE]])
    state = sac.init(table_of([[0.0, 1.0, HUGE], [0.0, 2.0, HUGE]]), hyper).replace(average=table_of(average))
    step = Step(
        Transition(
            views(ALL, ALL), jnp.array([0, 1]), jnp.array([3.0, 3.0]), jnp.array([False, True]), jnp.zeros(2, bool)
        ),
        next_inputs=views(TWO, TWO),
    )
    policy = np.exp([0.0, 1.5 / 0.5]) / np.sum(np.exp([0.0, 1.5 / 0.5]))
    worth = (1 - min_q_weight) * average.mean(0)[:2] + min_q_weight * average.min(0)[:2]
    value = np.sum(policy * (worth - critic_entropy * 0.5 * np.log(policy)))
    target = bootstrapped_value(Table(), hyper, state, step)
    np.testing.assert_allclose(target, [3.0 + GAMMA * value, 3.0], rtol=1e-5)


def targets_for(*legal: list[bool], value: Any) -> CounterfactualTarget:
    value = jnp.broadcast_to(jnp.array(value, jnp.float32), (len(legal), ACTIONS))
    return CounterfactualTarget(views(*legal), jnp.ones(len(legal), bool), value)


@pytest.mark.parametrize("actor", [False, True])
def test_a_target_teaches_all_legal_actions_at_once(actor: bool) -> None:
    """Values of illegal actions and of invalid rows are ignored, even if they are NaN."""
    hyper, network = hyperparameters(alpha=0.3), TinyNetwork(actor)
    inputs = View(jnp.eye(STATES)[jnp.array([0, 1, 0])], jnp.array([ALL, TWO, ALL]))
    value = np.array([[0.5, -0.2, 0.1], [-1.0, -0.8, np.nan], [np.nan, 9.0, 9.0]], np.float32)
    batch = CounterfactualTarget(inputs, jnp.array([True, True, False]), jnp.array(value))

    @decision_processes.quick_jit
    def learn(key: Array) -> LearnerState:
        state = sac.init(network.init(key, jax.tree.map(lambda x: x[0], batch.inputs)), hyper)
        return jax.lax.fori_loop(0, 800, lambda i, state: updated(network, hyper, state, batch, i / 800)[0], state)

    state, legal, value = learn(jax.random.key(0)), np.array([ALL, TWO]), value[:2]
    heads = network.apply(state.params, jax.tree.map(lambda x: x[:2], inputs))
    for critic in (0, 1):
        np.testing.assert_allclose(heads.q[:, critic][legal], value[legal], atol=0.01)
    policy = np.exp(sac.policy_logits(heads, jnp.array(legal), state.log_alpha))
    odds = np.where(legal, np.exp(value / 0.3), 0.0)
    np.testing.assert_allclose(policy, odds / odds.sum(-1, keepdims=True), atol=0.02)


@pytest.mark.parametrize("legal", [ONE, NONE], ids=["one", "none"])
@pytest.mark.parametrize("actor", [False, True])
def test_updates_are_finite_without_a_choice(actor: bool, legal: list[bool]) -> None:
    """Without a choice the entropy and its target are 0, so alpha stays."""
    hyper = hyperparameters(alpha_rate=0.1, critic_entropy=1.0)
    state = sac.init(table_of([[0.3, HUGE, 1.0]] * 2, [0.0, HUGE, 1.0] if actor else None), hyper)
    transition = Transition(views(legal), jnp.array([2]), jnp.ones(1), jnp.zeros(1, bool), jnp.zeros(1, bool))
    for batch in (targets_for(legal, value=[0.0, 1.0, 2.0]), Step(transition, views(legal))):
        after, losses = update(Table(actor), hyper, state, batch, jnp.float32(0.0))
        chex.assert_tree_all_finite((after, losses))
        assert float(after.log_alpha) == pytest.approx(float(state.log_alpha), abs=1e-6)


def test_alpha_follows_the_entropy_within_its_range() -> None:
    """Two actions of equal odds have the maximal entropy; a target of 0.3 of it lowers alpha."""
    batch = targets_for(TWO, value=0.0)
    for share, moves in ((0.3, -1), (1.0, 0), (2.0, 1)):
        hyper = hyperparameters(alpha_rate=0.1, target_entropy=share)
        state = sac.init(table_of(np.zeros((2, ACTIONS))), hyper)
        after, _ = update(Table(), hyper, state, batch, jnp.float32(0.0))
        assert float(after.log_alpha - state.log_alpha) == pytest.approx(0.1 * np.log(2) * (share - 1.0), abs=1e-6)
        assert np.sign(round(float(after.log_alpha - state.log_alpha), 5)) == moves
    for rate, bound in ((1e3, 1e-3), (-1e3, 7.0)):
        hyper = hyperparameters(alpha_rate=rate, target_entropy=0.0)
        after, losses = update(Table(), hyper, state, batch, jnp.float32(0.0))
        assert float(losses["alpha"]) == pytest.approx(bound, rel=0.1)


def test_the_learning_rate_falls_over_the_second_half() -> None:
    hyper = hyperparameters(learning_rate=1e-2, final_learning_rate=1e-3, polyak=0.9)
    state = sac.init(table_of(np.zeros((2, ACTIONS))), hyper)

    def moved(progress: float) -> float:
        after, _ = update(Table(), hyper, state, targets_for(ALL, value=1.0), jnp.float32(progress))
        change = after.params["params"]["q"]
        np.testing.assert_allclose(after.average["params"]["q"], 0.1 * change, rtol=1e-4)
        return float(change[0, 0])

    steps = [moved(progress) for progress in (0.0, 0.5, 0.75, 1.0)]
    # The first step of Adam is the learning rate.
    np.testing.assert_allclose(steps, [1e-2, 1e-2, 5.5e-3, 1e-3], rtol=1e-3)


def test_a_truncated_row_teaches_nothing() -> None:
    hyper = hyperparameters()
    state = sac.init(table_of(np.zeros((2, ACTIONS))), hyper)
    rows = Transition(views(ALL, ALL), jnp.array([0, 1]), jnp.ones(2), jnp.ones(2, bool), jnp.array([False, True]))
    after, losses = update(Table(), hyper, state, Step(rows, views(ALL, ALL)), jnp.float32(0.0))
    assert float(losses["critic_loss"]) == pytest.approx(1.0)
    change = np.asarray(after.params["params"]["q"])
    assert np.all(change[:, 0] > 0)
    np.testing.assert_array_equal(change[:, 1:], 0.0)
