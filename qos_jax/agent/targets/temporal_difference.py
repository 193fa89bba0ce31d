"""Temporal-difference targets: discrete SAC as published, with the corrections that discrete actions need.

A row of the replay buffer is one step of one environment. Rows are ordered by request, then by environment, so the row
``num_envs`` further on holds the inputs after the step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent import replay_buffer
from qos_jax.agent.networks import Heads, Inputs, heads_of
from qos_jax.agent.preferences import with_preferences
from qos_jax.agent.sac import Hyperparameters, LearnerState, combined_q, policy_logits
from qos_jax.agent.targets.base import Agent, CriticLoss
from qos_jax.errors import InputError
from qos_jax.sim.env import EnvParams, axis_of_environments


class Transition(struct.PyTreeNode):
    """One step; the inputs after it are those of the following row."""

    inputs: Inputs
    action: Array  # [] int32
    reward: Array  # []
    terminated: Array  # [] bool
    truncated: Array  # [] bool; True: the following row belongs to another episode, so this row does not count


class Step(NamedTuple):
    """A batch of transitions, leaves [B, ...]."""

    transition: Transition
    next_inputs: Inputs


class TemporalDifference:
    """One-step bootstrap from the running average of the critics; see ``Targets``."""

    def check(self, config: Any) -> None:
        """Raises ``InputError`` for chunks of one step, in which no step has a successor."""
        if config.chunk < 2:
            raise InputError(f"chunk is {config.chunk}, must be at least 2 for a step to have another after it")

    def rows_per_chunk(self, config: Any) -> int:
        """Returns one row per step and environment."""
        return config.num_envs * config.chunk

    def requests_per_chunk(self, config: Any, num_experts: int) -> int:
        """Returns ``chunk``."""
        return config.chunk

    def empty_row(self, inputs: Inputs) -> Transition:
        """Returns a step of zeros."""
        return Transition(inputs, jnp.int32(0), jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    def init(self, agent: Agent, states: Any, inputs: Inputs) -> None:
        """Returns None: nothing is kept beside the environments."""

    def collect(
        self, agent: Agent, state: Any, params: EnvParams, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[Any, Transition, dict[str, Array]]:
        """Steps every environment ``chunk`` times."""

        def reward_of(params: EnvParams, *step: Any) -> Array:
            return agent.reward(with_preferences(hyper, params).weights, hyper.gamma, params, *step)

        rewards_of = jax.vmap(reward_of, in_axes=(axis_of_environments(params), 0, 0, 0, 0))

        def step(envs: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], tuple[Transition, Array]]:
            obs, states = envs
            key_act, key_step = jax.random.split(key)
            keys = jax.random.split(key_act, agent.config.num_envs)
            action = jax.vmap(lambda key, obs: agent.sample(state.learner, key, agent.features(obs)))(keys, obs)
            next_obs, states, qos, terminated, truncated, info = agent.step(key_step, states, action, params)
            reward = rewards_of(params, obs, action, qos, info)
            inputs = replay_buffer.to_half_precision(jax.vmap(agent.features)(obs))
            return (next_obs, states), (Transition(inputs, action, reward, terminated, truncated), qos)

        envs, (rows, qos) = lax.scan(step, state.envs, jax.random.split(key, agent.config.chunk))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        return state.replace(envs=envs), rows, {"qos": jnp.mean(qos)}

    def batch(self, config: Any, ring: Transition, key: Array, oldest: Array, filled: Array) -> Step:
        """Samples from all steps except the newest of each environment, which has no successor yet."""
        ahead = jax.random.randint(key, (config.batch_size,), 0, filled - config.num_envs)
        index = (oldest + ahead) % config.capacity
        rows = replay_buffer.rows_at(ring, index)
        following = replay_buffer.rows_at(ring.inputs, (index + config.num_envs) % config.capacity)
        rows = rows.replace(inputs=replay_buffer.to_single_precision(rows.inputs))
        return Step(rows, replay_buffer.to_single_precision(following))

    def critic_loss(
        self, network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Step
    ) -> tuple[Inputs, CriticLoss]:
        """Returns the mean squared error of the action taken, over steps that are not truncated."""
        target = bootstrapped_value(network, hyper, state, batch)
        step = batch.transition

        def loss(heads: Heads) -> Array:
            # A mask, as the gradient of indexing is a scatter, which adds in any order on GPUs.
            taken = jnp.arange(heads.q.shape[-1])[None] == step.action[:, None]
            q = jnp.sum(jnp.where(taken[:, None], heads.q, 0.0), -1)
            counts = (~step.truncated).astype(q.dtype)[:, None]
            return jnp.sum(counts * jnp.square(q - target[:, None])) / jnp.maximum(jnp.sum(counts) * q.shape[-1], 1.0)

        return step.inputs, loss


def bootstrapped_value(network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Step) -> Array:
    """Returns the critics' target [B] of each transition: the reward plus the discounted soft value after it."""
    legal = batch.next_inputs.legal
    log_policy = policy_logits(heads_of(network, state.params, batch.next_inputs), legal, state.log_alpha)
    q = combined_q(hyper, heads_of(network, state.average, batch.next_inputs).q)
    q -= hyper.critic_entropy * jnp.exp(state.log_alpha) * log_policy
    value = jnp.sum(jnp.exp(log_policy) * jnp.where(legal, q, 0.0), -1)
    return batch.transition.reward + hyper.gamma * jnp.where(batch.transition.terminated, 0.0, value)
