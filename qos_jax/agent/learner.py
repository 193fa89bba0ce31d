"""The learner: training as three pure phases, init, prefill and train_chunk, to be jitted and vmapped over seeds.

A chunk lets every environment go on for some requests, adds what was learned of them to the replay, and takes some
gradient steps. Counters stay outside (a counter in a vmapped state would turn branches on it into selects), so the
caller says which chunk it is.
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

from qos_jax.agent import replay, sac
from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.counterfactual import Judge, Twins, begun, follow, measured, no_twins
from qos_jax.agent.networks import Inputs, greedy, heads_of, network_of
from qos_jax.agent.rewards import shaped_reward
from qos_jax.agent.sac import Hyperparameters, Learned, Lesson, Step, Transition, Weights
from qos_jax.routers.base import Router, noise_if_late
from qos_jax.sim.blocks import map_environments
from qos_jax.sim.env import EnvParams

_TEMPERATURE = 0.03  # QoS, of values where metrics are late; see BUILD_NOTES.md
_FAVOURITISM = 2.0  # of the routing by lot: SD of the log odds of each action, so that some experts are overrun


class TrainState(struct.PyTreeNode):
    """Everything that training changes."""

    learned: Learned
    envs: tuple[Any, Any]  # observations and states, leaves [num_envs, ...]
    prefilled: Any  # the states that prefilling ended in, to restart from
    twins: Twins | None  # leaves [num_envs, ...]; None for temporal differences
    replay: Any  # Lesson or Transition, leaves [capacity, ...]
    key: Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """Trains an agent in an environment; build one with ``make_learner``."""

    env: Any  # reset, step and observe as ``qos_jax.Environment`` has them
    config: AgentConfig
    inputs: Callable[[Any], Inputs]
    network: nn.Module
    reward: Callable[..., Array] = shaped_reward
    axes: tuple[str, ...] = ()  # by name, along which shards train together; see ``qos_jax.parallel``

    @property
    def steps_per_chunk(self) -> int:
        """Requests of one chunk, over all environments."""
        return self.config.num_envs * self.requests_per_chunk

    @property
    def requests_per_chunk(self) -> int:
        """Requests of each environment in one chunk."""
        by_expert = self.config.teacher == "counterfactual"
        return self.config.chunk * (self.env.spec.num_experts if by_expert else 1)

    def init(self, key: Array, params: EnvParams, hyper: Hyperparameters) -> TrainState:
        """Returns the state before training; ``params`` may have an axis [num_envs] on every leaf."""
        key, key_reset, key_net = jax.random.split(key, 3)
        if self.axes:  # the weights are common to all shards, the environments are not
            key, key_reset = (jax.random.fold_in(one, lax.axis_index(self.axes)) for one in (key, key_reset))
        keys = jax.random.split(key_reset, self.config.num_envs)
        obs, states = jax.vmap(self.env.reset, in_axes=(0, axis_of_environments(params)))(keys, params)
        inputs = jax.tree.map(jnp.zeros_like, self.inputs(jax.tree.map(lambda x: x[0], obs)))
        learned = sac.learned(self.network.init(key_net, inputs), hyper)
        rows = replay.empty(self._row(inputs), self.config.capacity)
        twins = None
        if self.config.teacher == "counterfactual":
            twins = jax.vmap(lambda state: no_twins(state, replay.halved(inputs), self.config.twins))(states)
        return TrainState(learned, (obs, states), jax.tree.map(jnp.copy, states), twins, rows, key)

    def prefill(self, state: TrainState, params: EnvParams, hyper: Hyperparameters) -> TrainState:
        """Routes by lot for a while, each environment with favourites of its own; returns a state to train from."""
        del hyper
        key, key_taste, key_steps = jax.random.split(state.key, 3)
        legal = self._legal(state.envs[0])
        taste = _FAVOURITISM * jax.random.normal(key_taste, legal.shape)

        def step(envs: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            obs, states = envs
            key_act, key_step = jax.random.split(key)
            action = jax.random.categorical(key_act, jnp.where(self._legal(obs), taste, -jnp.inf))
            obs, states, *_ = self._step(key_step, states, action, params)
            return (obs, states), None

        envs, _ = lax.scan(step, state.envs, jax.random.split(key_steps, self.config.prefill))
        return state.replace(envs=envs, prefilled=jax.tree.map(jnp.copy, envs[1]), key=key)

    def train_chunk(
        self, state: TrainState, params: EnvParams, hyper: Hyperparameters, chunk: Array, progress: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Goes on for one chunk.

        Args:
          state: after ``prefill`` or the chunk before.
          params: of the environments, as they were given to ``init``.
          hyper: numbers of the algorithm.
          chunk: [] int32, chunks done before.
          progress: [] share of the training that is done.

        Returns:
          The state, and metrics [] of the chunk.
        """
        key, key_act, key_learn = jax.random.split(state.key, 3)
        rows: Lesson | Transition
        if state.twins is None:
            state, rows, metrics = self._walk(state, params, hyper, key_act)
        else:
            state, rows, metrics = self._measure(state, state.twins, params, hyper, key_act, chunk)
        count = self.config.rows_per_chunk
        chunks_kept = self.config.capacity // count
        ring = replay.insert(state.replay, rows, chunk % chunks_kept * count)
        oldest = jnp.where(chunk < chunks_kept, 0, (chunk + 1) % chunks_kept * count)
        filled = jnp.minimum(chunk + 1, chunks_kept) * count

        def learn(learned: Learned, key: Array) -> tuple[Learned, dict[str, Array]]:
            batch = self._batch(ring, key, oldest, filled)
            return sac.update(self.network, hyper, learned, batch, progress, self.axes)

        learned, losses = lax.scan(learn, state.learned, jax.random.split(key_learn, self.config.updates))
        metrics |= jax.tree.map(jnp.mean, losses)
        if self.axes:
            metrics = lax.pmean(metrics, self.axes)
        return state.replace(learned=learned, replay=ring, key=key), metrics

    def weights(self, state: TrainState) -> Weights:
        """Returns what a router needs of a state."""
        return state.learned.average

    def act(self, weights: Weights, key: Array, obs: Any) -> Array:
        """Returns the action [] int32 that is best by the learned values or policy, for one environment.

        Where that depends on what a router cannot see, the best policy draws lots. So does one whose metrics are late
        here, and always a network that reads the arrived node alone, as it cannot tell which expert is busy (at its end
        ``paper`` had a QoS of .30 so, and of .04 where it took the likeliest action).
        """
        inputs = self.inputs(obs)
        heads = heads_of(self.network, weights, inputs)
        if heads.logits is not None and self.config.network.readout == "arrived":
            return jax.random.categorical(key, jnp.where(inputs.legal, heads.logits, -jnp.inf)).astype(jnp.int32)
        temperature = _TEMPERATURE if heads.logits is None else 1.0
        return greedy(heads, inputs.legal, noise_if_late(key, obs, temperature))

    def router(self, weights: Weights, name: str = "ours") -> Router:
        """Returns the router that acts by ``weights``."""
        return Router(
            name=name,
            kind="learned",
            init=tuple,
            act=lambda key, obs, memory: (self.act(weights, key, obs), memory),
            params=weights,
        )

    def _measure(
        self, state: TrainState, twins: Twins, params: EnvParams, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[TrainState, Lesson, dict[str, Array]]:
        """Ends the oldest twins of each environment with a lesson, begins new ones, and goes on with all of them."""
        config, judge, requests = self.config, Judge(hyper.weights, hyper.width_s), self.requests_per_chunk
        which = chunk % config.twins
        key_restart, key_envs = jax.random.split(key)
        again = jax.random.bernoulli(key_restart, hyper.restart, (config.num_envs,))
        envs = _where(again, state.prefilled, state.envs[1])
        twins = twins.replace(whole=twins.whole & ~again[:, None])

        def policy(key: Array, obs: Any) -> Array:
            return self._sample(state.learned, key, self.inputs(obs))

        def one(x: tuple[Array, Any, Twins, Twins, EnvParams | None]) -> tuple[Any, Twins, Lesson, Any]:
            key, env, ended, twins, own = x
            world = params if own is None else own
            key_act, key_follow = jax.random.split(key)
            value = jnp.maximum(measured(self.env, world, judge, env, ended), -hyper.most_harm)
            lesson = Lesson(ended.decision, ended.whole, value)
            obs = self.env.observe(env, world)
            seen = replay.halved(self.inputs(obs))
            twins = begun(self.env, world, judge, env, twins, which, seen, policy(key_act, obs))
            env, twins, happened = follow(self.env, world, policy, judge, requests, key_follow, env, twins, which)
            return env, twins, lesson, happened

        # Taken out here, where it is one slice; in the mapped function it would be a gather.
        ended = jax.tree.map(lambda sets: lax.dynamic_index_in_dim(sets, which, 1, keepdims=False), twins)
        keys = jax.random.split(key_envs, config.num_envs)
        own_params = params if axis_of_environments(params) == 0 else None
        envs, twins, lessons, happened = map_environments(one, (keys, envs, ended, twins, own_params))
        metrics = {"qos": jnp.mean(happened.qos) / requests, "dropped": jnp.mean(happened.dropped) / requests}
        return state.replace(envs=(state.envs[0], envs), twins=twins), lessons, metrics

    def _walk(
        self, state: TrainState, params: EnvParams, hyper: Hyperparameters, key: Array
    ) -> tuple[TrainState, Transition, dict[str, Array]]:
        """Steps through ``chunk`` requests in each environment; rows are ordered by request, then environment."""
        shaped = jax.vmap(self.reward, in_axes=(None, None, axis_of_environments(params), 0, 0, 0, 0))

        def step(envs: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], tuple[Transition, Array]]:
            obs, states = envs
            key_act, key_step = jax.random.split(key)
            keys = jax.random.split(key_act, self.config.num_envs)
            action = jax.vmap(lambda key, obs: self._sample(state.learned, key, self.inputs(obs)))(keys, obs)
            next_obs, states, reward, terminated, truncated, info = self._step(key_step, states, action, params)
            paid = shaped(hyper.weights, hyper.gamma, params, obs, action, reward, info)
            inputs = replay.halved(jax.vmap(self.inputs)(obs))
            return (next_obs, states), (Transition(inputs, action, paid, terminated, truncated), reward)

        envs, (rows, reward) = lax.scan(step, state.envs, jax.random.split(key, self.requests_per_chunk))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        return state.replace(envs=envs), rows, {"qos": jnp.mean(reward)}

    def _batch(self, ring: Any, key: Array, oldest: Array, filled: Array) -> Step | Lesson:
        """Draws a batch with replacement: to draw without took four times as long to train."""
        shape = (self.config.batch_size,)
        if self.config.teacher == "counterfactual":
            lesson = replay.rows_at(ring, jax.random.randint(key, shape, 0, filled))
            return lesson.replace(inputs=replay.restored(lesson.inputs))
        # The newest row of each environment has no successor yet.
        ahead = jax.random.randint(key, shape, 0, filled - self.config.num_envs)
        index = (oldest + ahead) % self.config.capacity
        rows = replay.rows_at(ring, index)
        following = replay.rows_at(ring.inputs, (index + self.config.num_envs) % self.config.capacity)
        return Step(rows.replace(inputs=replay.restored(rows.inputs)), replay.restored(following))

    def _row(self, inputs: Inputs) -> Lesson | Transition:
        inputs = replay.halved(inputs)
        if self.config.teacher == "counterfactual":
            return Lesson(inputs, jnp.bool_(False), jnp.zeros(inputs.legal.shape))
        return Transition(inputs, jnp.int32(0), jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    def _sample(self, learned: Learned, key: Array, inputs: Inputs) -> Array:
        """Draws an action [] from the policy for one environment."""
        heads = heads_of(self.network, learned.params, inputs)
        return jax.random.categorical(key, sac.policy_logits(heads, inputs.legal, learned.log_alpha))

    def _step(self, key: Array, states: Any, action: Array, params: EnvParams) -> Any:
        keys = jax.random.split(key, self.config.num_envs)
        return jax.vmap(self.env.step, in_axes=(0, 0, 0, axis_of_environments(params)))(keys, states, action, params)

    def _legal(self, obs: Any) -> Array:
        return jax.vmap(self.inputs)(obs).legal


def make_learner(env: Any, config: AgentConfig) -> Learner:
    """Builds the learner of a named or own configuration."""
    inputs, network = network_of(config.network)
    return Learner(env, config, inputs, network)


def axis_of_environments(params: Any) -> int | None:
    """Returns the axis of the environments in their parameters; None if they share one set of them."""
    return 0 if jnp.ndim(params.max_steps_in_episode) else None


def _where(mask: Array, yes: Any, no: Any) -> Any:
    """Returns ``yes`` in the environments where ``mask`` [num_envs] is set, and ``no`` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)
