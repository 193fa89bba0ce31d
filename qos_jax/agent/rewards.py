"""The reward of the agent: the QoS of answers, less weighted costs.

All weights are traced and 0 by default, so one compiled program sweeps a frontier, for example of QoS against energy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.impact.estimate import impact, in_flight_qos
from qos_jax.sim.cost import excess_energy_j
from qos_jax.sim.engine import ExpertState
from qos_jax.sim.env import EnvParams
from qos_jax.sim.types import ExpertProfile, Observation
from qos_jax.sim.world import Completions, slot_margin_s


class RewardWeights(struct.PyTreeNode):
    """Weights in QoS: of answers, of four costs of the world, and of two terms that shape rewards of value learning."""

    score: Array | float = 1.0  # per score of an answer in time
    violation: Array | float = 0.0  # per answer beyond its latency limit
    drop: Array | float = 0.0  # per dropped request
    kv_memory: Array | float = 0.0  # per GB s of KV memory held
    energy: Array | float = 0.0  # per kJ of iterations and standby, in excess of idle power
    predicted_loss: Array | float = 0.0  # per QoS that a placement is predicted to cost other requests; 1 in the paper
    potential: Array | float = 0.0  # of potential-based shaping with the predicted QoS in flight, times ``score``


def expert_returns(
    profile: ExpertProfile, experts: ExpertState, weights: RewardWeights, width_s: Array | float
) -> Array:
    """Returns the soft QoS of the finished answers of each expert, less the weighted costs [N].

    Args:
      profile: of the experts.
      experts: their state, with the answers that finished since the last collection.
      weights: of the costs; ``drop``, ``predicted_loss`` and ``potential`` are not used.
      width_s: width of the logistic [s/token] that replaces the step at the limits.
    """
    slots = experts.slots
    in_time = jax.nn.sigmoid(slot_margin_s(profile, slots) / width_s)
    soft_qos = weights.score * slots.payload.score * in_time - weights.violation * (1.0 - in_time)
    cost = _resource_cost(profile, experts, weights)
    return jnp.sum(jnp.where(slots.finished, soft_qos, 0.0), -1) - cost


def shaped_reward(
    weights: RewardWeights,
    gamma: Array | float,
    params: EnvParams,
    obs: Observation,
    action: Array,
    reward: Array,
    info: dict[str, Any],
) -> Array:
    """Returns the reward [] of one step for value learning: the environment's reward, less costs, with shaping.

    Args:
      weights: of the costs and of shaping.
      gamma: discount factor, for the potential.
      params: of the world.
      obs: observation before the action.
      action: [] int32.
      reward: [] of the environment.
      info: of the environment's step.
    """
    completions = info["completions"]
    violations, dropped = (x.astype(reward.dtype) for x in (completions.violations, info["dropped"]))
    reward = weights.score * reward - weights.violation * violations - weights.drop * dropped
    reward -= jnp.sum(_resource_cost(params.experts, completions, weights))
    lost = jnp.append(impact(obs).qos_change, 0.0)[action]
    after = in_flight_qos(info["final_observation"])
    potential = weights.potential * weights.score
    return reward + weights.predicted_loss * lost + potential * (gamma * after - in_flight_qos(obs))


def _resource_cost(profile: ExpertProfile, used: ExpertState | Completions, weights: RewardWeights) -> Array:
    """Returns the weighted cost [N] of KV memory and energy."""
    memory_gb_s = used.kv_block_s * profile.kv_block_gb
    energy_kj = excess_energy_j(profile, used.busy_s, used.standby_s) / 1e3
    return weights.kv_memory * memory_gb_s + weights.energy * energy_kj
