"""Counterfactual targets: the measured marginal value of every action, see ``qos_jax.agent.probes``.

A row of the replay buffer is one decision with the values of all its actions, so no bootstrap is needed. Each
environment starts one probe per chunk and finishes the oldest one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent import replay_buffer
from qos_jax.agent.networks import Heads, Inputs
from qos_jax.agent.preferences import with_preferences
from qos_jax.agent.probes import Probe, SoftQos, empty_probes, marginal_values, simulate, start_probe
from qos_jax.agent.sac import Hyperparameters, LearnerState
from qos_jax.agent.targets.base import Agent, CriticLoss
from qos_jax.errors import InputError
from qos_jax.sim.batching import map_environments
from qos_jax.sim.env import EnvParams, axis_of_environments
from qos_jax.sim.failures import reseeded


class CounterfactualTarget(struct.PyTreeNode):
    """One decision with the measured values of all its actions."""

    inputs: Inputs
    valid: Array  # [] bool; False: the probe was interrupted, so the row does not count
    value: Array  # [A] in reward units


class Counterfactual:
    """Regression on measured marginal values; see ``Targets``."""

    def check(self, config: Any) -> None:
        """Accepts all sizes."""

    def rows_per_chunk(self, config: Any) -> int:
        """Returns one decision per environment."""
        return config.num_envs

    def requests_per_chunk(self, config: Any, num_experts: int) -> int:
        """Returns ``chunk`` requests per expert: the time that requests stay is a number of arrivals per expert."""
        return config.chunk * num_experts

    def empty_row(self, inputs: Inputs) -> CounterfactualTarget:
        """Returns an invalid decision."""
        return CounterfactualTarget(inputs, jnp.bool_(False), jnp.zeros(inputs.legal.shape))

    def init(self, agent: Agent, states: Any, inputs: Inputs) -> Probe:
        """Returns the probes of every environment, none of them valid.

        Raises:
          InputError: LLMs share a card. What loading one keeps from the others shows on no copy of an expert.
        """
        if agent.env.spec.shared_cards:
            raise InputError("targets are counterfactual, must be returns where LLMs share a card: choose agent sac")
        return jax.vmap(lambda state: empty_probes(state, inputs, agent.config.probes))(states)

    def collect(
        self, agent: Agent, state: Any, params: EnvParams, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[Any, CounterfactualTarget, dict[str, Array]]:
        """Finishes the oldest probe of each environment, stores its target, starts a new probe, simulates one chunk."""
        config = agent.config
        requests = self.requests_per_chunk(config, agent.env.spec.num_experts)
        oldest = chunk % config.probes
        key_reset, key_envs = jax.random.split(key)
        reset = jax.random.bernoulli(key_reset, hyper.reset_prob, (config.num_envs,))
        envs = _where(reset, state.warm_state, state.envs[1])
        failures = reseeded(envs.world.failures, key_reset)
        envs = envs.replace(world=envs.world.replace(failures=failures))
        probes = state.beside.replace(valid=state.beside.valid & ~reset[:, None])

        def policy(key: Array, obs: Any) -> Array:
            return agent.sample(state.learner, key, agent.features(obs))

        def one(x: tuple[Array, Any, Probe, Probe, EnvParams | None]) -> tuple[Any, Probe, CounterfactualTarget, Any]:
            key, env, finished, probes, own_params = x
            world = params if own_params is None else own_params
            soft_qos = SoftQos(with_preferences(hyper, world).weights, hyper.width_s)
            key_act, key_simulate = jax.random.split(key)
            value = jnp.maximum(marginal_values(agent.env, world, soft_qos, env, finished), -hyper.max_externality)
            target = CounterfactualTarget(finished.decision, finished.valid, value)
            obs = agent.env.observe(env, world)
            decision = replay_buffer.to_half_precision(agent.features(obs))
            probes = start_probe(agent.env, world, soft_qos, env, probes, oldest, decision, policy(key_act, obs))
            env, probes, sums = simulate(
                agent.env, world, policy, soft_qos, requests, key_simulate, env, probes, oldest
            )
            return env, probes, target, sums

        # One slice; in the mapped function it would be a gather.
        finished = jax.tree.map(lambda each: lax.dynamic_index_in_dim(each, oldest, 1, keepdims=False), probes)
        keys = jax.random.split(key_envs, config.num_envs)
        own_params = params if axis_of_environments(params) == 0 else None
        envs, probes, targets, sums = map_environments(one, (keys, envs, finished, probes, own_params))
        metrics = {"qos": jnp.mean(sums.qos) / requests, "dropped": jnp.mean(sums.dropped) / requests}
        return state.replace(envs=(state.envs[0], envs), beside=probes), targets, metrics

    def batch(
        self, config: Any, ring: CounterfactualTarget, key: Array, oldest: Array, filled: Array
    ) -> CounterfactualTarget:
        """Samples from all rows."""
        rows = replay_buffer.rows_at(ring, jax.random.randint(key, (config.batch_size,), 0, filled))
        return rows.replace(inputs=replay_buffer.to_single_precision(rows.inputs))

    def critic_loss(
        self, network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: CounterfactualTarget
    ) -> tuple[Inputs, CriticLoss]:
        """Returns the mean squared error over the legal actions of valid rows."""

        def loss(heads: Heads) -> Array:
            counts = (batch.inputs.legal & batch.valid[:, None])[:, None, :]
            error = jnp.where(counts, heads.q - batch.value[:, None, :], 0.0)
            count = jnp.sum(counts.astype(error.dtype)) * error.shape[-2]
            return jnp.sum(jnp.square(error)) / jnp.maximum(count, 1.0)

        return batch.inputs, loss


def _where(mask: Array, yes: Any, no: Any) -> Any:
    """Returns ``yes`` in the environments where ``mask`` [num_envs] is set, and ``no`` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)
