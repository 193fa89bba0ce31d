"""Networks: symmetry, size of the fleet, initial values, and observations in which only the drop is legal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qos_jax import Observation
from qos_jax.agent import sac
from qos_jax.agent.networks import Heads, Inputs, NetworkConfig, greedy, network_of
from qos_jax.agent.targets import targets_named
from qos_jax.agent.targets.counterfactual import CounterfactualTarget
from qos_jax.encoder.han import HANConfig
from qos_jax.impact.estimate import impact
from tests.helpers.decision_processes import hyperparameters, quick_jit
from tests.helpers.observations import observation, reordered, running, waiting
from tests.helpers.small_env import small_experts

SMALL: dict[str, Any] = {"hidden": (16,), "han": HANConfig(features=8, heads=2)}
POINTERS = {
    "han": NetworkConfig(**SMALL),
    "han with an actor, few slots": NetworkConfig(actor=True, slots=2, **SMALL),
    "han without impact": NetworkConfig(with_impact=False, residual=False, **SMALL),
    "pooled": NetworkConfig("pooled", **SMALL),
    "pooled with values": NetworkConfig("pooled", value=True, **SMALL),
}
ARRIVED = NetworkConfig(readout="arrived", actor=True, with_impact=False, residual=False, **SMALL)
FLAT = dataclasses.replace(ARRIVED, encoder="flat")


def fleet(num_experts: int, seed: int = 0, **arrived: Any) -> Observation:
    """Unequal experts with up to three running and two waiting requests; some are full."""
    rng = np.random.default_rng(seed)

    def some(kind: Any, most: int) -> list[Any]:
        return [
            kind(age_s=rng.uniform(0.0, 2.0), predicted_score=rng.uniform(), predicted_tokens=rng.uniform(20, 60))
            for _ in range(rng.integers(0, most + 1))
        ]

    return observation(
        *[some(running, 3) + some(waiting, 2) for _ in range(num_experts)],
        profile=small_experts(num_experts, step_base_s=rng.uniform(0.01, 0.03, num_experts)),
        legal=[*(rng.uniform(size=num_experts) < 0.8), True],
        predicted_score=rng.uniform(size=num_experts),
        **arrived,
    )


def heads_of(config: NetworkConfig, params: Any, obs: Observation) -> Heads:
    return _apply(network_of(config)[1], params, features(config, obs))


def features(config: NetworkConfig, obs: Observation) -> Inputs:
    """The features; networks that read the same features share one compiled program."""
    irrelevant = {"hidden": (), "han": HANConfig(), "actor": False, "residual": False}
    encoder = "flat" if config.encoder == "flat" else "han"
    return _features(dataclasses.replace(config, encoder=encoder, **irrelevant), obs)


@quick_jit
def estimate(obs: Observation) -> jax.Array:
    return impact(obs).net


@functools.partial(quick_jit, static_argnums=0)
def _features(config: NetworkConfig, obs: Observation) -> Inputs:
    return network_of(config)[0](obs)


@functools.partial(quick_jit, static_argnums=0)
def _apply(network: nn.Module, params: Any, inputs: Inputs) -> Heads:
    return network.apply(params, inputs)


@functools.cache
def trained(config: NetworkConfig, num_experts: int = 3) -> Any:
    """Parameters in general position, as after some training."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), _shapes(config, num_experts))


@functools.cache
def fresh(config: NetworkConfig) -> Any:
    """Parameters before training."""
    return quick_jit(network_of(config)[1].init)(jax.random.key(0), features(config, fleet(3)))


def _shapes(config: NetworkConfig, num_experts: int) -> Any:
    inputs, network = network_of(config)
    return jax.eval_shape(network.init, jax.random.key(0), jax.eval_shape(inputs, fleet(num_experts)))


@pytest.mark.parametrize("name", POINTERS)
def test_the_order_of_the_experts_does_not_matter(name: str) -> None:
    config, obs, order = POINTERS[name], fleet(3), [2, 0, 1]
    plain, turned = (heads_of(config, trained(config), each) for each in (obs, reordered(obs, order)))
    chex.assert_trees_all_close(turned, jax.tree.map(lambda x: x[..., [*order, 3]], plain), rtol=1e-4, atol=1e-4)
    assert np.all(np.std(plain.q[:, :-1], -1) > 1e-3)  # experts differ


@pytest.mark.parametrize("name", POINTERS)
def test_parameters_do_not_depend_on_the_size_of_the_fleet(name: str) -> None:
    chex.assert_trees_all_equal_shapes(_shapes(POINTERS[name], 64), _shapes(POINTERS[name], 3))


@pytest.mark.parametrize("num_experts", [8, 64])
def test_one_set_of_parameters_serves_any_fleet(num_experts: int) -> None:
    config = POINTERS["han"]
    heads = heads_of(config, trained(config), fleet(num_experts))
    chex.assert_tree_all_finite(heads)
    assert heads.q.shape == (2, num_experts + 1) and heads.logits is None


@pytest.mark.parametrize("config", [ARRIVED, FLAT], ids=["arrived", "flat"])
def test_other_networks_have_one_output_for_each_action_of_their_fleet(config: NetworkConfig) -> None:
    heads = heads_of(config, trained(config), fleet(3))
    chex.assert_tree_all_finite(heads)
    assert heads.q.shape == (2, 4) and heads.logits is not None and heads.logits.shape == (4,)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        heads_of(config, trained(config), fleet(4))


def test_a_network_that_reads_the_arrived_node_alone_does_not_observe_which_expert_is_busy() -> None:
    obs = fleet(3)
    plain, turned = (heads_of(ARRIVED, trained(ARRIVED), each) for each in (obs, reordered(obs, [2, 0, 1])))
    chex.assert_trees_all_close(turned, plain, rtol=1e-4, atol=1e-4)
    assert not np.allclose(heads_of(ARRIVED, trained(ARRIVED), fleet(3, seed=1)).q, plain.q, atol=1e-4)


@pytest.mark.parametrize("name", ["han", "han with an actor, few slots"])
def test_critics_start_from_the_impact_estimate(name: str) -> None:
    config = POINTERS[name]
    for seed in range(4):
        obs = fleet(3, seed)
        net = np.asarray(estimate(obs))
        heads = heads_of(config, fresh(config), obs)
        for q in heads.q:
            np.testing.assert_allclose(q[:-1], net, atol=0.05)
            assert float(q[-1]) == pytest.approx(0.0, abs=0.05)
        best = int(np.argmax(np.where(obs.action_mask[:-1], net, -np.inf)))
        assert net[best] > 0.1
        if heads.logits is None:
            assert int(greedy(jax.random.key(seed), heads, obs.action_mask)) == best
        else:
            np.testing.assert_allclose(heads.logits, 0.0, atol=0.05)


@pytest.mark.parametrize("config", [POINTERS["han"], FLAT], ids=["pointer", "flat"])
def test_rates_above_the_clip_look_like_the_clip(config: NetworkConfig) -> None:
    clipped = dataclasses.replace(config, rate_clip_per_s=4.5)
    slow, at_clip, burst = (fleet(3, recent_rate_per_s=rate) for rate in (13.0, 13.5, 200.0))  # three experts
    chex.assert_trees_all_equal(features(clipped, slow), features(config, slow))
    chex.assert_trees_all_equal(features(clipped, burst), features(config, at_clip))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(features(config, burst), features(config, at_clip))


def test_the_initial_value_of_a_placement_is_bounded_below() -> None:
    """A long prompt would delay eight requests beyond their limit: the prior clips the estimated cost."""
    in_time = running(age_s=0.4, generated_tokens=20, predicted_tokens=40, predicted_score=1.0, latency_limit_s=0.06)
    experts = small_experts(3, max_running=40, kv_blocks=4000, per_sequence_s=1e-4)
    obs = observation([in_time] * 8, [], [], profile=experts, prompt_tokens=60_000)
    assert float(estimate(obs)[0]) < -5.0
    q = heads_of(POINTERS["han"], fresh(POINTERS["han"]), obs).q
    np.testing.assert_allclose(q[:, 0], -2.0, atol=0.1)


@pytest.mark.parametrize("config", [POINTERS["han"], ARRIVED, FLAT], ids=["pointer", "arrived", "flat"])
def test_outputs_and_gradients_are_finite_where_only_the_drop_is_legal(config: NetworkConfig) -> None:
    full = dataclasses.replace(fleet(3), action_mask=jnp.array([False, False, False, True]))
    idle = observation([], [], [], legal=[False, False, False, True])
    _, network = network_of(config)
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *(features(config, obs) for obs in (full, idle)))
    hyper = hyperparameters(alpha_rate=1e-2)
    state = sac.init(trained(config), hyper)
    batch = CounterfactualTarget(inputs, jnp.ones(2, bool), jnp.full((2, 4), -100.0))

    @quick_jit
    def update(state: sac.LearnerState, batch: CounterfactualTarget) -> Any:
        inputs, critic_loss = targets_named("counterfactual").critic_loss(network, hyper, state, batch)
        after, losses = sac.update(network, hyper, state, inputs, critic_loss, jnp.float32(0.0))
        heads = network.apply(after.params, inputs)
        return after, losses, heads, jax.vmap(greedy)(jax.random.split(jax.random.key(0)), heads, inputs.legal)

    *numbers, actions = update(state, batch)
    chex.assert_tree_all_finite(numbers)
    np.testing.assert_array_equal(actions, [3, 3])


def test_greedy_takes_the_best_legal_action() -> None:
    legal = jnp.array([True, False, True, True])
    q = jnp.array([[0.0, 9.0, 5.0, 1.0], [2.0, 9.0, -5.0, 2.0]])
    key = jax.random.key(0)
    assert int(greedy(key, Heads(None, q), legal)) == 3  # the mean of the critics
    assert int(greedy(key, Heads(jnp.array([0.0, 9.0, 1.0, 0.5]), q), legal)) == 2  # the policy, if there is one


def test_greedy_draws_among_equals() -> None:
    heads, legal = Heads(None, jnp.array([[2.0, 1.0, 2.0, 2.0], [2.0, 1.0, 2.0, 2.0]])), jnp.array([True] * 3 + [False])
    keys = jax.random.split(jax.random.key(0), 400)
    taken = np.bincount(jax.vmap(lambda key: greedy(key, heads, legal))(keys), minlength=4)
    assert taken[[1, 3]].sum() == 0
    assert taken[[0, 2]] == pytest.approx(200, abs=50)  # 5 standard deviations
