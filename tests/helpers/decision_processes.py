"""Decision processes so small that their values are known, for tests of the learner.

A process is a table of traced numbers, so one compiled program learns all of them side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.learner import Learner, TrainState
from qos_jax.agent.networks import Heads
from qos_jax.agent.sac import Hyperparameters, policy_logits

STATES, ACTIONS = 4, 3
GAMMA = 0.8
FOREVER = 1_000_000
CONFIG = AgentConfig(
    targets="temporal_difference", num_envs=8, chunk=8, updates=8, batch_size=64, capacity=8 * 8 * 512, warm_up=8
)

# Test programs run for milliseconds, so they are compiled without optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Process(struct.PyTreeNode):
    """The table of one decision process; entries of states that are never reached are arbitrary."""

    transition: Array  # [S, A, S] probability
    reward: Array  # [S, A]
    terminates: Array  # [S, A] bool
    legal: Array  # [S, A] bool
    start: Array  # [S] probability
    max_steps_in_episode: Array  # []
    preferences: None = None  # as in ``EnvParams``


class View(struct.PyTreeNode):
    """The observation, which is also the input of the network."""

    columns: Array  # [S] one at the state
    legal: Array  # [A] bool


class Position(struct.PyTreeNode):
    time: Array  # []
    state: Array  # []


class TableEnvironment:
    """A process with the interface of ``qos_jax.sim.env.Environment``."""

    def reset(self, key: Array, params: Process) -> tuple[View, Position]:
        position = Position(jnp.int32(0), _draw(key, params.start))
        return self.observe(position, params), position

    def step(
        self, key: Array, state: Position, action: Array, params: Process
    ) -> tuple[View, Position, Array, Array, Array, dict[str, Any]]:
        key_step, key_reset = jax.random.split(key)
        at = state.state, action
        after = Position(state.time + 1, _draw(key_step, params.transition[at]))
        seen = self.observe(after, params)
        terminated, truncated = params.terminates[at], after.time >= params.max_steps_in_episode
        obs, state = jax.tree.map(
            lambda fresh, old: jnp.where(terminated | truncated, fresh, old),
            self.reset(key_reset, params),
            (seen, after),
        )
        return obs, state, params.reward[at], terminated, truncated, {"final_observation": seen}

    def observe(self, state: Position, params: Process) -> View:
        return View(jax.nn.one_hot(state.state, STATES), params.legal[state.state])


class TinyNetwork(nn.Module):
    """One small perceptron for each head."""

    actor: bool

    @nn.compact
    def __call__(self, inputs: View) -> Heads:
        def head(name: str) -> Array:
            hidden = nn.relu(nn.Dense(32, name=f"{name}_hidden")(inputs.columns))
            return nn.Dense(ACTIONS, name=name)(hidden)

        logits = head("actor") if self.actor else None
        return Heads(logits, jnp.stack([head("critic_0"), head("critic_1")], -2))


@dataclasses.dataclass(frozen=True)
class Solved:
    """What the learner has learned of one process."""

    q: np.ndarray  # [S, A], mean of both critics
    policy: np.ndarray  # [S, A]
    state: TrainState


def learner(*, actor: bool, **config: Any) -> Learner:
    """A learner of processes with their unshaped reward."""
    config = dataclasses.replace(CONFIG, **config)
    return Learner(TableEnvironment(), config, lambda view: view, TinyNetwork(actor), _plain_reward)


def hyperparameters(**fields: Any) -> Hyperparameters:
    """Hyperparameters for fast learning, as float32 arrays."""
    quick = {"learning_rate": 3e-3, "final_learning_rate": 1e-4, "gamma": GAMMA, "polyak": 0.95, "alpha": 0.2}
    return jax.tree.map(jnp.float32, Hyperparameters(**(quick | fields)))


def train(learner: Learner, key: Array, params: Process, hyper: Hyperparameters, chunks: Array) -> TrainState:
    """Trains for a number of chunks."""

    def chunk(i: Array, state: TrainState) -> TrainState:
        return learner.train_chunk(state, params, hyper, i, i / chunks)[0]

    state = learner.warm_up(learner.init(key, params, hyper), params, hyper)
    return lax.fori_loop(0, chunks, chunk, state)


@functools.cache
def trainer(actor: bool) -> Any:
    """Compiled ``train`` of many processes: keys [P], params [P, ...], hyper [P] each, chunks."""
    return quick_jit(jax.vmap(functools.partial(train, learner(actor=actor)), in_axes=(0, 0, 0, None)))


def solve(
    actor: bool, problems: dict[str, tuple[Process, Hyperparameters]], chunks: int, seed: int = 0
) -> dict[str, Solved]:
    """Trains one learner on each problem."""
    params, hypers = (stacked(each) for each in zip(*problems.values(), strict=True))
    keys = jax.random.split(jax.random.key(seed), len(problems))
    states = trainer(actor)(keys, params, hypers, jnp.int32(chunks))
    each = ((process, jax.tree.map(lambda x, i=i: x[i], states)) for i, (process, _) in enumerate(problems.values()))
    return {name: solved(actor, *one) for name, one in zip(problems, each, strict=True)}


def solved(actor: bool, process: Process, state: TrainState) -> Solved:
    """Returns the values and the policy learned in each state."""
    heads = TinyNetwork(actor).apply(state.learner.params, View(jnp.eye(STATES), process.legal))
    policy = jnp.exp(policy_logits(heads, process.legal, state.learner.log_alpha))
    return Solved(np.asarray(heads.q.mean(-2)), np.asarray(policy), state)


def stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *trees)


def process(
    next_state: Any,
    reward: Any,
    *,
    terminates: Any = False,
    legal: Any = True,
    start: Any = 0,
    max_steps_in_episode: int = FOREVER,
) -> Process:
    """Makes a process.

    Args:
      next_state: [S] or [S, A], state after each action; or [S, A, S], their probabilities.
      reward: [], [S, 1] or [S, A].
      terminates: the same of bool.
      legal: the same of bool.
      start: one state, or several with equal probability.
      max_steps_in_episode: the time limit.
    """
    next_state = np.asarray(next_state)
    if next_state.ndim < 3:
        next_state = np.eye(STATES)[np.broadcast_to(next_state.reshape(STATES, -1), (STATES, ACTIONS))]

    def table(values: Any, dtype: Any) -> Array:
        return jnp.array(np.broadcast_to(values, (STATES, ACTIONS)), dtype)

    return Process(
        transition=jnp.array(next_state, jnp.float32),
        reward=table(reward, jnp.float32),
        terminates=table(terminates, jnp.bool_),
        legal=table(legal, jnp.bool_),
        start=jnp.array(np.eye(STATES)[np.atleast_1d(start)].mean(0), jnp.float32),
        max_steps_in_episode=jnp.int32(max_steps_in_episode),
    )


def soft_optimum(params: Process, gamma: float, alpha: float, critic_entropy: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values [S, A] and policy [S, A] to which discrete SAC converges, by value iteration in float64."""
    transition, reward = (np.asarray(x, np.float64) for x in (params.transition, params.reward))
    legal, goes_on = np.asarray(params.legal), ~np.asarray(params.terminates)
    q = np.zeros((STATES, ACTIONS))
    for _ in range(500):
        policy = scipy.special.softmax(np.where(legal, q, -np.inf) / alpha, 1)
        entropy = scipy.special.entr(policy).sum(1)
        value = np.sum(policy * q, 1) + critic_entropy * alpha * entropy
        q = reward + gamma * goes_on * (transition @ value)
    return q, policy


def _plain_reward(weights: Any, gamma: Any, params: Any, obs: Any, action: Any, reward: Array, info: Any) -> Array:
    return reward


def _draw(key: Array, probability: Array) -> Array:
    return jax.random.categorical(key, jnp.log(probability)).astype(jnp.int32)
