"""PPO in one file, in the style of PureJaxRL: environments, network and updates are one jitted program.

``python examples/ppo.py [STEPS]`` trains on paper-3 and compares the agent with two other routers on held-out requests.
It takes less than two minutes on two CPU cores. From Python::

    env, params = qos_jax.make("paper-3", load=0.8, requests=1000)
    weights, qos = jax.jit(make_train(env, params, Config()))(jax.random.key(0))
    router = ppo_router(env, weights)  # for qos_jax.evaluate
"""

import sys
from collections import namedtuple
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import qos_jax
from qos_jax.encoder.flat_env import FlatEnvironment, masked_flat_view
from qos_jax.evaluation.statistics import summarise


class Config(NamedTuple):
    """Hyperparameters."""

    steps: int = 800_000  # requests, over all environments
    num_envs: int = 64
    rollout: int = 256  # requests of each environment between two updates
    epochs: int = 4
    minibatches: int = 16
    learning_rate: float = 5e-4  # falls to 0
    discount: float = 0.997  # a request finishes, and is rewarded, about 100 requests later
    gae_decay: float = 0.98
    clip: float = 0.2
    entropy_weight: float = 0.01


# One decision, leaves [E, ...]; next_value is that of the last observation of the episode where it ends.
Transition = namedtuple("Transition", "obs action log_prob value reward next_value done")
chosen = jnp.vectorize(lambda log_probs, action: log_probs[action], signature="(a),()->()")


class ActorCritic(nn.Module):
    """Returns log probabilities [..., A] of the actions and values [...]; observations [..., F] end with the mask."""

    num_actions: int

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """Applies the two networks."""
        logits, value, init = obs, obs, nn.initializers.orthogonal
        for _ in range(2):
            logits, value = (nn.tanh(nn.Dense(64, kernel_init=init(2**0.5))(x)) for x in (logits, value))
        logits = nn.Dense(self.num_actions, kernel_init=init(0.01))(logits)
        logits = jnp.where(obs[..., -self.num_actions :] > 0, logits, -1e9)
        return nn.log_softmax(logits), nn.Dense(1, kernel_init=init(1.0))(value)[..., 0]


def make_train(world: qos_jax.Environment, params: qos_jax.EnvParams, config: Config) -> Any:
    """Returns ``train(key) -> (weights, qos)``, to be jitted; ``qos`` [updates] is the mean reward of each rollout."""
    env, network = FlatEnvironment(world), ActorCritic(world.num_actions)
    reset, step = jax.vmap(env.reset, (0, None)), jax.vmap(env.step, (0, 0, 0, None))
    num_updates = config.steps // (config.num_envs * config.rollout)
    schedule = optax.linear_schedule(config.learning_rate, 0.0, num_updates * config.epochs * config.minibatches)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, eps=1e-5))

    def decide(carry: Any, key: Array) -> tuple[Any, Transition]:
        weights, obs, states = carry
        key_act, key_step = jax.random.split(key)
        log_probs, value = network.apply(weights, obs)
        action, keys = jax.random.categorical(key_act, log_probs), jax.random.split(key_step, config.num_envs)
        next_obs, states, reward, _, truncated, info = step(keys, states, action, params)
        next_value = network.apply(weights, info["final_observation"])[1]
        row = Transition(obs, action, chosen(log_probs, action), value, reward, next_value, truncated)
        return (weights, next_obs, states), row

    def advantages(rows: Transition) -> Array:  # of rewards times 1 - discount: values are then as large as a reward
        def back(advantage: Array, row: Transition) -> tuple[Array, Array]:
            delta = (1 - config.discount) * row.reward + config.discount * row.next_value - row.value
            return (delta + config.discount * config.gae_decay * (1 - row.done) * advantage,) * 2

        return jax.lax.scan(back, jnp.zeros(config.num_envs), rows, reverse=True)[1]

    def loss(weights: Any, rows: Transition, advantage: Array) -> Array:
        log_probs, value = network.apply(weights, rows.obs)
        critic = jnp.mean((value - rows.value - advantage) ** 2)
        ratio = jnp.exp(chosen(log_probs, rows.action) - rows.log_prob)
        scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        actor = -jnp.mean(jnp.minimum(ratio * scaled, jnp.clip(ratio, 1 - config.clip, 1 + config.clip) * scaled))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, -1))
        return actor + 0.5 * critic - config.entropy_weight * entropy

    def update(carry: Any, key: Array) -> tuple[Any, Array]:
        learner, obs, states = carry
        keys = jax.random.split(key, 1 + config.rollout)
        (_, obs, states), rows = jax.lax.scan(decide, (learner[0], obs, states), keys[1:])
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, advantages(rows)))
        in_order = jnp.tile(jnp.arange(len(batch[1])), (config.epochs, 1))
        order = jax.random.permutation(keys[0], in_order, axis=1, independent=True)

        def descend(learner: Any, index: Array) -> tuple[Any, None]:
            weights, optimizer_state = learner
            gradients = jax.grad(loss)(weights, *jax.tree.map(lambda x: x[index], batch))
            changes, optimizer_state = optimizer.update(gradients, optimizer_state)
            return (optax.apply_updates(weights, changes), optimizer_state), None

        learner, _ = jax.lax.scan(descend, learner, order.reshape(config.epochs * config.minibatches, -1))
        return (learner, obs, states), jnp.mean(rows.reward)

    def train(key: Array) -> tuple[Any, Array]:
        key_weights, key_reset, key_updates = jax.random.split(key, 3)
        obs, states = reset(jax.random.split(key_reset, config.num_envs), params)
        weights = network.init(key_weights, obs)
        start = ((weights, optimizer.init(weights)), obs, states)
        (learner, *_), qos = jax.lax.scan(update, start, jax.random.split(key_updates, num_updates))
        return learner[0], qos

    return train


def ppo_router(env: qos_jax.Environment, weights: Any) -> qos_jax.Router:
    """Returns the trained router. It samples as in training, as its most probable expert hardly ever changes."""
    network = ActorCritic(env.num_actions)

    def act(key: Array, obs: qos_jax.Observation, memory: Any) -> tuple[Array, Any]:
        return jax.random.categorical(key, network.apply(weights, masked_flat_view(obs))[0]), memory

    return qos_jax.Router("ppo", "learned", tuple, act)


def main(steps: int = Config().steps) -> None:
    """Trains PPO and compares it."""
    env, params = qos_jax.make("paper-3", load=0.8, requests=1000)
    weights, qos = jax.jit(make_train(env, params, Config(steps)))(jax.random.key(0))
    print("QoS in training:", np.asarray(qos).round(3))
    routers = [ppo_router(env, weights), *(qos_jax.make_router(name, env) for name in ("random", "impact_greedy"))]
    runs = qos_jax.evaluate(env, params, routers, qos_jax.scenarios(params, [0.8], range(1000, 1016)), 1000, warmup=200)
    scores = np.array([run.metrics["qos"] for run in runs]).reshape(len(routers), -1)
    for router, score in zip(routers, scores, strict=True):
        gain = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**summarise(scores[0] - score))
        print(f"{router.name:13} QoS {score.mean():.3f}; gain of ppo: {gain}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
