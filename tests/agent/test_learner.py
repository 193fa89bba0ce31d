"""The learner: its functions compile once, environments may differ, and every named agent trains."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from qos_jax.agent import AGENTS, Hyperparameters, Learner, make_learner
from qos_jax.agent.learner import TrainState
from qos_jax.encoder.han import HANConfig
from tests.helpers import decision_processes
from tests.helpers.decision_processes import ACTIONS, STATES, hyperparameters, process, quick_jit, stacked
from tests.helpers.encoder_worlds import one_of
from tests.helpers.small_env import small_env, small_params

NUM_EXPERTS, NUM_ENVS, WARM_UP, CHUNK, PROBES, CHUNKS = 2, 2, 4, 3, 2, 5
RATES = (4.0, 12.0)
ENV = small_env(NUM_EXPERTS, slots=7)


@functools.cache
def tiny(name: str) -> Learner:
    config = AGENTS[name]
    han = HANConfig(features=8, heads=2, layers=config.network.han.layers)
    network = dataclasses.replace(config.network, hidden=(8,), han=han, slots=config.network.slots and 4)
    sizes = {"num_envs": NUM_ENVS, "chunk": CHUNK, "probes": PROBES, "updates": 2, "batch_size": 8, "warm_up": WARM_UP}
    sizes["copies"] = min(config.copies, NUM_ENVS)
    return make_learner(ENV, dataclasses.replace(config, network=network, capacity=2 * NUM_ENVS * CHUNK, **sizes))


def arrays(hyper: Hyperparameters) -> Hyperparameters:
    return jax.tree.map(jnp.float32, hyper)


@functools.partial(quick_jit, static_argnums=0)
def run(learner: Learner, key: Array, params: Any, hyper: Hyperparameters) -> tuple[TrainState, Any, Any]:
    """Trains for some chunks; returns the states before and after them, and the metrics of each chunk."""
    before = learner.warm_up(learner.init(key, params, hyper), params, hyper)

    def chunk(state: TrainState, i: Array) -> tuple[TrainState, Any]:
        return learner.train_chunk(state, params, hyper, i, i / CHUNKS)

    after, metrics = lax.scan(chunk, before, jnp.arange(CHUNKS))
    return before, after, metrics


@functools.cache
def trained(name: str, **numbers: float) -> tuple[TrainState, TrainState, dict[str, Array]]:
    """Trains a small version of a named agent in two environments of different loads; see ``run``."""
    params = stacked([small_params(NUM_EXPERTS, rate_per_s=rate) for rate in RATES])
    hyper = arrays(AGENTS[name].hyper.replace(**({"reset_prob": 0.0} | numbers)))
    return run(tiny(name), jax.random.key(0), params, hyper)


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


QUICKEST = "mvr_no_graph"  # the graph is much of the program of the other agents with counterfactual targets
TRAINED_TOO = ("mvr", "baseline_rl", "mvr_no_impact", "sac", "sac_td0", "paper")


@pytest.mark.slow
@pytest.mark.parametrize("name", [QUICKEST, *TRAINED_TOO])
def test_agents_train(name: str) -> None:
    before, after, metrics = trained(name)
    chex.assert_tree_all_finite((after.learner, metrics))
    assert {"qos", "critic_loss", "actor_loss", "entropy", "alpha"} <= set(metrics)
    assert all(x.shape == (CHUNKS,) for x in metrics.values())
    assert np.all(metrics["qos"] >= 0) and np.all(metrics["qos"] <= 1)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), before.learner.params, after.learner.params)
    assert all(any(jax.tree.leaves(part)) for part in changed["params"].values())
    chex.assert_trees_all_equal(tiny(name).weights(after), after.learner.average)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(AGENTS) - {QUICKEST, *TRAINED_TOO}))
def test_variants_of_agents_have_a_training_step(name: str) -> None:
    """They differ from others in numbers only, so they are traced and not compiled."""
    params = stacked([small_params(NUM_EXPERTS, rate_per_s=rate) for rate in RATES])
    before, after, metrics = run.eval_shape(tiny(name), jax.random.key(0), params, arrays(AGENTS[name].hyper))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {"qos", "critic_loss"} <= set(metrics)


def test_targets_are_stored_when_their_probes_finish() -> None:
    """With two probes at a time, the first two chunks finish none; the buffer has room for one more chunk."""
    _, after, _ = trained(QUICKEST)
    valid = np.asarray(after.replay.valid).reshape(-1, NUM_ENVS)
    np.testing.assert_array_equal(valid[:, 0], [False, False, True, True, True, False])
    np.testing.assert_array_equal(valid[:, 0], valid[:, 1])
    targets = jax.tree.map(lambda x: np.asarray(x).reshape(-1, NUM_ENVS, *x.shape[1:])[2:5], after.replay)
    assert np.isfinite(targets.value).all()
    assert targets.inputs.legal[..., -1].all()  # the inputs are those of the decision
    np.testing.assert_array_equal(targets.value[..., -1], 0.0)
    assert np.all(np.any(targets.value != 0, -1))
    np.testing.assert_array_equal(after.envs[1].time, WARM_UP + CHUNKS * tiny(QUICKEST).requests_per_chunk)


def test_a_reset_environment_has_no_valid_targets() -> None:
    """A reset to the state after the warm-up interrupts its probes."""
    before, after, _ = trained(QUICKEST, reset_prob=1.0)
    assert not np.any(after.replay.valid)
    np.testing.assert_array_equal(after.envs[1].time, WARM_UP + tiny(QUICKEST).requests_per_chunk)
    chex.assert_trees_all_equal(before.learner.params, after.learner.params)


def test_targets_are_clipped_at_the_maximal_externality() -> None:
    free, bounded = (trained(QUICKEST, max_externality=bound)[1].replay for bound in (10.0, 0.02))
    assert np.min(free.value) < -0.02
    np.testing.assert_array_equal(bounded.value[: 3 * NUM_ENVS], np.maximum(free.value[: 3 * NUM_ENVS], -0.02))


@pytest.mark.parametrize("name", [QUICKEST, *slow("mvr", "baseline_rl")])
def test_the_router_takes_a_legal_action(name: str) -> None:
    learner, (_, after, _) = tiny(name), trained(name)
    router = learner.router(learner.weights(after), name)
    obs = one_of(after.envs[0])
    act = quick_jit(lambda obs: router.act(jax.random.key(1), obs, router.init()))
    for only in range(NUM_EXPERTS + 1):
        action, _ = act(obs.replace(action_mask=jnp.arange(NUM_EXPERTS + 1) == only))
        assert int(action) == only and action.dtype == jnp.int32
    assert router.kind == "learned" and router.name == name


def test_the_router_samples_only_where_metrics_are_stale() -> None:
    learner, (_, after, _) = tiny(QUICKEST), trained(QUICKEST)
    router = learner.router(learner.weights(after))
    obs = one_of(after.envs[0])
    alike = {
        name: jnp.full(NUM_EXPERTS, getattr(obs.arrived, name)[0]) for name in ("predicted_score", "predicted_tokens")
    }
    obs = obs.replace(arrived=obs.arrived.replace(**alike))
    keys = jax.random.split(jax.random.key(1), 1000)
    act = quick_jit(jax.vmap(lambda key, obs: router.act(key, obs, ())[0], in_axes=(0, None)))
    assert len(np.unique(act(keys, obs))) == 1
    assert len(np.unique(act(keys, obs.replace(staleness_s=jnp.float32(0.1))))) > 1


@pytest.mark.parametrize("name", [QUICKEST, "baseline_rl", *slow("mvr")])
def test_one_trace_serves_all_chunks_and_hyperparameters(name: str) -> None:
    """A chunk returns a state like its argument; chunk numbers, rates and costs are traced."""
    chex.clear_trace_counter()
    learner = tiny(name)
    counted = jax.jit(chex.assert_max_traces(learner.train_chunk, 1))
    params, hyper = small_params(NUM_EXPERTS), arrays(AGENTS[name].hyper)
    state = jax.eval_shape(learner.init, jax.random.key(0), params, hyper)
    state = jax.eval_shape(learner.warm_up, state, params, hyper)
    other = hyper.replace(alpha=jnp.float32(1.0), weights=hyper.weights.replace(energy=jnp.float32(1.0)))
    for chunk, numbers in enumerate((hyper, hyper, other)):
        after, _ = jax.eval_shape(counted, state, params, numbers, jnp.int32(chunk), jnp.float32(chunk / 3))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after


class TestOnTables:
    """Shared and separate parameters, and a buffer of two chunks, on processes that compile quickly."""

    envs, steps = 4, 3
    learner = decision_processes.learner(
        actor=False, num_envs=envs, chunk=steps, capacity=2 * envs * steps, batch_size=16
    )
    ring = process([1, 2, 3, 0], [[1], [0], [0], [0]], start=range(STATES))
    train = staticmethod(quick_jit(functools.partial(decision_processes.train, learner)))

    def state_after(self, chunks: int, params: Any) -> TrainState:
        return self.train(jax.random.key(0), params, hyperparameters(alpha=1.0), jnp.int32(chunks))

    def test_shared_parameters_equal_copies_of_them(self) -> None:
        shared, copied = self.state_after(2, self.ring), self.state_after(2, stacked([self.ring] * self.envs))
        chex.assert_trees_all_close(copied.learner, shared.learner, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(copied.replay.action, shared.replay.action)

    def test_each_environment_has_its_own_parameters(self) -> None:
        """In environment i every reward is i, and only actions up to i are legal."""
        worlds = [process([1, 2, 3, 0], i, legal=np.arange(ACTIONS) <= i) for i in range(self.envs)]
        replay = self.state_after(2, stacked(worlds)).replay
        rows = jax.tree.map(lambda x: np.asarray(x).reshape(-1, self.envs, *x.shape[1:]), replay)
        np.testing.assert_array_equal(rows.reward, np.tile(np.arange(4.0), (2 * self.steps, 1)))
        assert np.all(rows.action <= np.arange(4)) and np.all(rows.action.max(0)[1:] > 0)
        at = np.argmax(rows.inputs.columns, -1)
        np.testing.assert_array_equal(at[1:], (at[:-1] + 1) % STATES)  # an environment's next row is its next step

    def test_the_oldest_row_is_not_the_successor_of_the_newest(self) -> None:
        """If it were, a sixth of the transitions would be wrong."""
        q = decision_processes.solved(False, self.ring, self.state_after(500, stacked([self.ring] * self.envs))).q
        np.testing.assert_allclose(
            q, decision_processes.soft_optimum(self.ring, decision_processes.GAMMA, 1.0, 0.0)[0], atol=0.05
        )
