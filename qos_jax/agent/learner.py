"""The learner: training as three pure functions, init, warm_up and train_chunk, which jit and vmap over seeds.

In a chunk every environment routes some requests, the rows that the targets collected go to the replay buffer, and some
gradient steps are taken. The caller counts the chunks: a counter in a vmapped state would turn branches on it into
selects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent import replay_buffer, sac
from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.networks import Inputs, greedy, heads_of, network_of
from qos_jax.agent.preferences import preferences_of
from qos_jax.agent.rewards import shaped_reward
from qos_jax.agent.sac import Hyperparameters, LearnerState, Weights
from qos_jax.agent.targets import Targets, targets_named
from qos_jax.routers.base import Router, gumbel_if_stale, key_for_ties
from qos_jax.sim.env import EnvParams, axis_of_environments
from qos_jax.sim.types import Preferences

_TEMPERATURE = 0.03  # QoS, of the sampled action where metrics are stale; see docs/decisions
_PREFERENCE_SD = 2.0  # of the log odds of each action in the warm-up; overloads some experts


class TrainState(struct.PyTreeNode):
    """Everything that training changes."""

    learner: LearnerState
    envs: tuple[Any, Any]  # observations and states, leaves [num_envs, ...]
    warm_state: Any  # states after the warm-up, to which environments are reset
    beside: Any  # state of the targets beside the environments, leaves [num_envs, ...]; None without any
    replay: Any  # replay buffer: rows of the targets, leaves [capacity, ...]
    key: Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """Trains an agent in an environment; build one with ``make_learner``."""

    env: Any  # with reset, step and observe like ``qos_jax.Environment``
    config: AgentConfig
    features: Callable[[Any], Inputs]
    network: nn.Module
    reward: Callable[..., Array] = shaped_reward
    axes: tuple[str, ...] = ()  # names of the axes of shards that train together; see ``qos_jax.training.parallel``

    @property
    def targets(self) -> Targets:
        """The implementation of ``config.targets``."""
        return targets_named(self.config.targets)

    @property
    def steps_per_chunk(self) -> int:
        """Requests of one chunk, over all environments."""
        return self.config.num_envs * self.requests_per_chunk

    @property
    def requests_per_chunk(self) -> int:
        """Requests of each environment in one chunk."""
        return self.targets.requests_per_chunk(self.config, self.env.spec.num_experts)

    def init(self, key: Array, params: EnvParams, hyper: Hyperparameters) -> TrainState:
        """Returns the state before training.

        Args:
          key: random key.
          params: of the environments, shared or with an axis [num_envs] on every leaf.
          hyper: numbers of the algorithm.
        """
        key, key_reset, key_net = jax.random.split(key, 3)
        if self.axes:  # shards share the weights and have different environments
            key, key_reset = (jax.random.fold_in(one, lax.axis_index(self.axes)) for one in (key, key_reset))
        keys = jax.random.split(key_reset, self.config.num_envs)
        obs, states = jax.vmap(self.env.reset, in_axes=(0, axis_of_environments(params)))(keys, params)
        inputs = jax.tree.map(jnp.zeros_like, self.features(jax.tree.map(lambda x: x[0], obs)))
        compact = replay_buffer.to_half_precision(inputs)
        return TrainState(
            learner=sac.init(self.network.init(key_net, inputs), hyper),
            envs=(obs, states),
            warm_state=jax.tree.map(jnp.copy, states),
            beside=self.targets.init(self, states, compact),
            replay=replay_buffer.empty(self.targets.empty_row(compact), self.config.capacity),
            key=key,
        )

    def warm_up(self, state: TrainState, params: EnvParams, hyper: Hyperparameters) -> TrainState:
        """Routes ``config.warm_up`` requests at random in every environment, so that training starts with busy experts.

        Each environment has random preferences of its own.
        """
        del hyper
        key, key_preference, key_steps = jax.random.split(state.key, 3)
        legal = self._legal(state.envs[0])
        preference = _PREFERENCE_SD * jax.random.normal(key_preference, legal.shape)

        def step(envs: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            obs, states = envs
            key_act, key_step = jax.random.split(key)
            action = jax.random.categorical(key_act, jnp.where(self._legal(obs), preference, -jnp.inf))
            obs, states, *_ = self.step(key_step, states, action, params)
            return (obs, states), None

        envs, _ = lax.scan(step, state.envs, jax.random.split(key_steps, self.config.warm_up))
        return state.replace(envs=envs, warm_state=jax.tree.map(jnp.copy, envs[1]), key=key)

    def train_chunk(
        self, state: TrainState, params: EnvParams, hyper: Hyperparameters, chunk: Array, progress: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Trains for one chunk.

        Args:
          state: after ``warm_up`` or the previous chunk.
          params: of the environments, as for ``init``.
          hyper: numbers of the algorithm.
          chunk: [] int32, number of previous chunks.
          progress: [] share of the training that is done.

        Returns:
          The state after the chunk, and its metrics [].
        """
        key, key_act, key_learn = jax.random.split(state.key, 3)
        state, rows, metrics = self.targets.collect(self, state, params, hyper, key_act, chunk)
        count = self.targets.rows_per_chunk(self.config)
        chunks_kept = self.config.capacity // count
        ring = replay_buffer.insert(state.replay, rows, chunk % chunks_kept * count)
        oldest = jnp.where(chunk < chunks_kept, 0, (chunk + 1) % chunks_kept * count)
        filled = jnp.minimum(chunk + 1, chunks_kept) * count

        def update(learner: LearnerState, key: Array) -> tuple[LearnerState, dict[str, Array]]:
            batch = self.targets.batch(self.config, ring, key, oldest, filled)
            inputs, critic_loss = self.targets.critic_loss(self.network, hyper, learner, batch)
            return sac.update(self.network, hyper, learner, inputs, critic_loss, progress, self.axes)

        learner, losses = lax.scan(update, state.learner, jax.random.split(key_learn, self.config.updates))
        metrics |= jax.tree.map(jnp.mean, losses)
        if self.axes:
            metrics = lax.pmean(metrics, self.axes)
        return state.replace(learner=learner, replay=ring, key=key), metrics

    def weights(self, state: TrainState) -> Weights:
        """Returns the weights of the router: the running average of the network's parameters."""
        return state.learner.average

    def act(self, weights: Weights, key: Array, obs: Any, margin: float = 0.0) -> Array:
        """Returns the router's action [] int32 in one environment: the best one by the learned values or policy.

        The action is sampled where the best policy depends on something that the router does not observe. This is the
        case where metrics are stale, and always for a network that reads the arrived node alone, as it cannot observe
        which expert is busy (``paper`` ends at a QoS of 0.30 with sampling and at 0.04 with its likeliest action).

        Args:
          weights: see ``weights``.
          key: random key.
          obs: the observation.
          margin: see ``router``.
        """
        inputs = self.features(obs)
        heads = heads_of(self.network, weights, inputs)
        if heads.logits is not None and self.config.network.readout == "arrived":
            return jax.random.categorical(key, jnp.where(inputs.legal, heads.logits, -jnp.inf)).astype(jnp.int32)
        temperature = _TEMPERATURE if heads.logits is None else 1.0
        return greedy(key_for_ties(key), heads, inputs.legal, gumbel_if_stale(key, obs, temperature), margin)

    def router(
        self, weights: Weights, name: str = "learned", preferences: Preferences | None = None, margin: float = 0.0
    ) -> Router:
        """Returns the router that acts by ``weights``.

        If the network reads preferences, they are the router's memory, so that others need no other program.

        Args:
          weights: see ``weights``.
          name: of the router.
          preferences: those that it starts with; by default the agent's.
          margin: QoS by which the value of a placement must exceed that of a drop; for networks without a policy head.
        """
        reads_preferences = self.config.network.with_preferences
        start = preferences_of(self.config.hyper.weights) if preferences is None else preferences

        def act(key: Array, obs: Any, memory: Any) -> tuple[Array, Any]:
            seen = obs.replace(preferences=memory) if reads_preferences else obs
            return self.act(weights, key, seen, margin), memory

        init = (lambda: start) if reads_preferences else tuple
        return Router(name=name, kind="learned", init=init, act=act, params=weights)

    def sample(self, learner: LearnerState, key: Array, inputs: Inputs) -> Array:
        """Samples an action [] int32 from the policy for one environment."""
        heads = heads_of(self.network, learner.params, inputs)
        logits = sac.policy_logits(heads, inputs.legal, learner.log_alpha)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def step(self, key: Array, states: Any, action: Array, params: EnvParams) -> Any:
        """Steps all environments; the state and action have an axis [num_envs]."""
        keys = jax.random.split(key, self.config.num_envs)
        return jax.vmap(self.env.step, in_axes=(0, 0, 0, axis_of_environments(params)))(keys, states, action, params)

    def _legal(self, obs: Any) -> Array:
        return jax.vmap(self.features)(obs).legal


def make_learner(env: Any, config: AgentConfig) -> Learner:
    """Builds the learner of an agent.

    Where no preferences are observed, a network that reads them gets those of the agent.

    Args:
      env: the environment, see ``qos_jax.Environment``.
      config: the agent, one of ``AGENTS`` or another.
    """
    features, network = network_of(config.network)
    if not config.network.with_preferences:
        return Learner(env, config, features, network)
    default = preferences_of(config.hyper.weights)

    def with_default(obs: Any) -> Inputs:
        return features(obs if obs.preferences is not None else obs.replace(preferences=default))

    return Learner(env, config, with_default, network)
