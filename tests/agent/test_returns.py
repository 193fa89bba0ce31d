"""Lambda returns: the scan, the opportunity cost, the orthogonal regression, and that values converge in time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import Array

from qos_jax import InputError, train
from qos_jax.agent import AGENTS, make_learner, recipes
from qos_jax.agent.configs import AgentConfig, from_dict, to_dict
from qos_jax.agent.networks import Heads
from qos_jax.agent.recipes import Recipe
from qos_jax.agent.rewards import RewardWeights
from qos_jax.agent.targets.returns import Return, Returns, _of_other_copies, lambda_returns, opportunity_cost
from qos_jax.encoder.han import HANConfig
from qos_jax.worlds.randomization import LOADS
from tests.helpers.decision_processes import quick_jit
from tests.helpers.everything_once import tiny_agent, tiny_world
from tests.helpers.small_env import small_env, small_params

COLD = jnp.log(1e-3)


def by_definition(reward: Any, discount: Any, value: Any, decay: float) -> np.ndarray:
    """The mean of the returns of 1, 2, ... steps with weights (1 - decay) decay^(k - 1); the last has what is left."""
    steps = len(reward)

    def n_step(t: int, k: int) -> Any:
        weights = np.cumprod([1.0, *discount[t : t + k]])
        return sum(w * r for w, r in zip(weights, reward[t : t + k], strict=False)) + weights[k] * value[t + k]

    def one(t: int) -> Any:
        left = steps - t
        weights = [(1 - decay) * decay ** (k - 1) for k in range(1, left)] + [decay ** (left - 1)]
        return sum(w * n_step(t, k) for k, w in enumerate(weights, 1))

    return np.array([one(t) for t in range(steps)])


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_scan_equals_the_definition(seed: int, decay: float) -> None:
    rng = np.random.default_rng(seed)
    reward, value, discount = rng.normal(size=(9, 2)), rng.normal(size=(10, 2)), rng.uniform(0.5, 1.0, 9)
    found = lambda_returns(*(jnp.float32(x) for x in (reward, discount, value)), decay)
    np.testing.assert_allclose(found, by_definition(reward, discount, value, decay), rtol=1e-5, atol=1e-5)


class TestOpportunityCost:
    def test_it_is_what_the_best_other_use_is_worth(self) -> None:
        price = opportunity_cost(jnp.array([0.5, 0.3, -0.2, 0.0]), jnp.ones(4, bool), COLD)
        np.testing.assert_allclose(price, [0.3, 0.5, 0.5], atol=1e-5)

    def test_a_drop_is_the_other_use_where_all_others_do_harm(self) -> None:
        price = opportunity_cost(jnp.array([0.5, -0.3, -0.2, 0.0]), jnp.ones(4, bool), COLD)
        np.testing.assert_allclose(price, [0.0, 0.5, 0.5], atol=1e-5)

    def test_illegal_actions_are_no_use(self) -> None:
        legal = jnp.array([True, False, True, False])
        price = opportunity_cost(jnp.array([0.5, 9.0, -0.2, 9.0]), legal, COLD)
        np.testing.assert_allclose(price[jnp.array([0, 2])], [-0.2, 0.5], atol=1e-5)
        alone = opportunity_cost(jnp.array([0.5, 9.0]), jnp.array([True, False]), COLD)
        np.testing.assert_allclose(alone, [0.0], atol=1e-5)

    @pytest.mark.parametrize(("first", "second"), [(0.9, 0.8), (0.7, 0.8)])
    def test_a_stream_that_pays_gains_what_the_fleet_gains(self, first: float, second: float) -> None:
        """Expert 0 has one place, and expert 1 as many as needed, at a lower worth; the router reacts.

        If the first request takes the place, the second goes to expert 1. The advantage over a drop of the first is
        then ``first + other - second`` in the fleet; a stream that does not pay misses ``other``.
        """
        other, legal = 0.5, jnp.ones(3, bool)
        price = opportunity_cost(jnp.array([second, other, 0.0]), legal, COLD)[0]
        assert float(price) == pytest.approx(other, abs=1e-5)

        def stream(placed: bool, paid: Array | float) -> Array:
            reward = [first, 0.0] if placed else [0.0, second - paid]
            return lambda_returns(jnp.array(reward)[:, None], jnp.ones(2), jnp.zeros((3, 1)), 1.0)[0, 0]

        fleet = (first + other) - second
        assert float(stream(True, price) - stream(False, price)) == pytest.approx(fleet, abs=1e-5)
        assert float(stream(True, 0.0) - stream(False, 0.0)) == pytest.approx(fleet - other, abs=1e-5)


class _NoInputs(struct.PyTreeNode):
    legal: Array


def rows(rng: np.random.Generator, advantage: np.ndarray, policy: np.ndarray, value_error: float) -> Return:
    """Decisions of which the returns are known, with values that are wrong by ``value_error``."""
    count, num_experts = 20_000, len(advantage)
    action = rng.choice(num_experts + 1, count, p=policy)
    taken = np.arange(num_experts) == action[:, None]
    price = rng.uniform(0.0, 0.3, (count, num_experts))
    luck = rng.normal(size=(count, 1))
    gain = (taken - policy[:-1]) * (advantage - price)
    total = np.sum((taken - policy[:-1]) * advantage, -1, keepdims=True)
    target = np.concatenate([gain, total], -1) + luck + value_error
    return Return(
        inputs=_NoInputs(jnp.ones((count, num_experts + 1), bool)),
        action=jnp.int32(action),
        policy=jnp.broadcast_to(jnp.float32(policy), (count, num_experts + 1)),
        price=jnp.float32(price),
        target=jnp.float32(target),
        common=jnp.broadcast_to(jnp.float32(luck), target.shape),
    )


@pytest.mark.parametrize("joint", [0.0, 0.5, 1.0])
def test_errors_of_the_values_do_not_bias_the_advantages(joint: float) -> None:
    """Values are 3 below the mean return; the advantages with the least loss are the true ones all the same."""
    advantage, policy = np.array([0.3, -0.2]), np.array([0.6, 0.3, 0.1])
    batch = rows(np.random.default_rng(0), advantage, policy, 3.0)
    count = len(batch.action)
    hyper = AGENTS["sac"].hyper.replace(joint=joint)
    _, loss = Returns().critic_loss(None, hyper, None, batch)  # type: ignore[arg-type]

    def of(advantage: Array) -> Array:
        q = jnp.broadcast_to(jnp.append(advantage, 0.0), (count, 2, 3))
        return loss(Heads(None, q, jnp.zeros((count, 2, 3))))

    gradient, curvature = jax.grad(of)(jnp.zeros(2)), jax.hessian(of)(jnp.zeros(2))
    np.testing.assert_allclose(-jnp.linalg.solve(curvature, gradient), advantage, atol=0.12)


def test_the_luck_of_the_other_copies_is_subtracted_and_not_the_own() -> None:
    error = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_allclose(_of_other_copies(error, 3)[:3], [[3.0, 4.0], [2.0, 3.0], [1.0, 2.0]])
    np.testing.assert_array_equal(_of_other_copies(error, 1), 0.0)


def converged_share(config: AgentConfig, steps: int, rate_per_s: float) -> float:
    """Returns how much of the value r / (1 - gamma) of a constant reward an agent has after its own training.

    The weights are assumed to fit their targets at once, so this is an upper bound: what the running average and the
    bootstrap allow. Temporal differences close (1 - polyak)(1 - gamma) of the gap per update; lambda returns close, per
    chunk, what a stretch does not leave to the bootstrap.
    """
    hyper = config.hyper
    chunks = steps // (config.num_envs * config.chunk)
    if config.targets == "temporal_difference":
        gap = (1.0 - (1.0 - hyper.polyak) * (1.0 - hyper.gamma)) ** (chunks * config.updates)
        return float(1.0 - gap)
    discount = float(hyper.gamma * np.exp(-1.0 / (rate_per_s * hyper.discount_s)))
    reward, values = jnp.full((config.chunk, 2), 1.0 - discount), jnp.tile(jnp.arange(2.0), (config.chunk + 1, 1))
    returns = lambda_returns(reward, jnp.full(config.chunk, discount), values, hyper.trace_decay)
    of_zero, of_one = np.mean(returns, 0)  # mean return where values are 0, and where they are right
    follows, average = 1.0 - hyper.polyak**config.updates, 0.0
    ring: list[float] = []
    for _ in range(chunks):
        ring = [*ring, of_zero + average * (of_one - of_zero)][-(config.capacity // config.rows_per_chunk) :]
        average += follows * (np.mean(ring) - average)
    return average


CONVERGING = ("sac", "sac_joint", "sac_paper_reward", "paper", "baseline_rl")


@pytest.mark.parametrize("preset, saturation_per_s", [("paper-3", 22.9), ("edge-8", 67.8)])
@pytest.mark.parametrize("name", CONVERGING)
def test_the_value_of_a_constant_reward_is_reached_in_training(name: str, preset: str, saturation_per_s: float) -> None:
    """At the highest load of training, where the horizon has most requests."""
    recipe, rate_per_s = recipes.recipe(preset, name), LOADS[1] * saturation_per_s
    assert converged_share(recipe.agent, recipe.steps, rate_per_s) == pytest.approx(1.0, abs=0.1)


def test_one_step_bootstraps_from_a_slow_average_do_not_reach_it() -> None:
    """What was wrong with ``sac_td0``: after 150,000 requests its values are at a ninth of what they should be."""
    assert converged_share(AGENTS["sac_td0"], 150_000, 22.9) == pytest.approx(0.11, abs=0.01)


@pytest.mark.slow
def test_a_small_run_values_a_constant_reward() -> None:
    """Answers are worth nothing and a drop costs 1, so every placement earns 1 more than a drop."""
    gamma, envs, chunk, chunks = 0.9, 4, 16, 150
    network = dataclasses.replace(AGENTS["sac"].network, hidden=(16,), han=HANConfig(features=8, heads=2))
    sizes = {
        "num_envs": envs,
        "chunk": chunk,
        "copies": 2,
        "batch_size": 64,
        "capacity": 4 * envs * chunk,
        "warm_up": 4,
    }
    config = dataclasses.replace(AGENTS["sac"], network=network, **sizes)
    params = small_params(2, rate_per_s=0.5)
    params = params.replace(workload=dataclasses.replace(params.workload, quality=jnp.zeros(2)))
    hyper = config.hyper.replace(gamma=gamma, discount_s=1e9, weights=RewardWeights(drop=1.0, potential=1.0))
    hyper = jax.tree.map(jnp.float32, hyper)
    learner = make_learner(small_env(2, slots=7), config)

    @quick_jit
    def run(key: Array) -> tuple[Any, Any]:
        def one(state: Any, i: Array) -> Any:
            return learner.train_chunk(state, params, hyper, i, i / chunks)

        state = learner.warm_up(learner.init(key, params, hyper), params, hyper)
        return jax.lax.scan(one, state, jnp.arange(chunks))

    _, metrics = run(jax.random.key(0))
    assert float(metrics["dropped"][-1]) < 0.1
    assert float(metrics["value"][-1]) == pytest.approx(1.0 / (1.0 - gamma), rel=0.1)


@pytest.mark.parametrize(
    ("path", "value", "says"), [("copies", 3, "multiple of the 3 copies"), ("value", False, "network.value is False")]
)
def test_sizes_that_do_not_fit_are_refused(path: str, value: Any, says: str) -> None:
    values = to_dict(AGENTS["sac"])
    table = values if path in values else values["network"]
    table[path] = value
    with pytest.raises(InputError, match=says):
        from_dict(values)


@pytest.mark.slow
def test_proxies_of_environments_with_loads_of_their_own_start_anew() -> None:
    world = tiny_world(observe="proxy", scrape_s=0.5)  # the time between two scrapes is a parameter of each environment
    recipe = Recipe(tiny_agent("sac"), steps=40, randomise=("load",))
    assert train(world, recipe, evaluation_envs=2, evaluation_steps=4).finished
