"""What the agent is paid: the QoS of answers, and whatever else is given a weight.

All weights are traced and 0 unless said otherwise, so that one compiled program sweeps a frontier, for instance of QoS
against energy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.impact.estimate import impact, in_flight_qos
from qos_jax.sim.engine import ExpertState
from qos_jax.sim.env import EnvParams
from qos_jax.sim.types import ExpertProfile, Observation
from qos_jax.sim.world import slot_latency_per_token_s


class RewardWeights(struct.PyTreeNode):
    """Costs, in QoS. The first four are costs of the world; the last two only help plain value learning."""

    violation: Array | float = 0.0  # per answer that comes too late
    drop: Array | float = 0.0  # per request dropped
    kv_memory: Array | float = 0.0  # per GB s of KV memory held
    energy: Array | float = 0.0  # per kJ that iterations use beyond idling
    predicted_loss: Array | float = 0.0  # per QoS that a placement is predicted to cost others; 1 in the paper
    potential: Array | float = 0.0  # of the predicted QoS in flight as a potential; 1 or 0


def expert_returns(
    profile: ExpertProfile, experts: ExpertState, weights: RewardWeights, width_s: Array | float
) -> Array:
    """Returns what each expert [N] has earned with the answers that it finished since they were last collected.

    Args:
      profile: the experts.
      experts: their state, answers not collected yet.
      weights: what costs how much; those of drops and of value learning do not count here.
      width_s: limits are judged by a logistic of this width [s/token], which tells by how much an answer was in time.
    """
    slots = experts.slots
    margin_s = slots.payload.latency_limit_s - slot_latency_per_token_s(profile, slots)
    in_time = jax.nn.sigmoid(margin_s / width_s)
    answer = slots.payload.score * in_time - weights.violation * (1.0 - in_time)
    return jnp.sum(jnp.where(slots.finished, answer, 0.0), -1) - _resources(
        profile, experts.kv_block_s, experts.busy_s, weights
    )


def shaped_reward(
    weights: RewardWeights,
    gamma: Array | float,
    params: EnvParams,
    obs: Observation,
    action: Array,
    reward: Array,
    info: dict[str, Any],
) -> Array:
    """Returns the reward [] of one step for value learning: the environment's, less the costs, with the potential.

    Args:
      weights: what costs how much.
      gamma: discount, for the potential.
      params: the world.
      obs: what the router saw.
      action: what it did.
      reward: the environment's.
      info: the environment's.
    """
    completions = info["completions"]
    reward = reward - weights.violation * completions.violations - weights.drop * info["dropped"]
    reward -= jnp.sum(_resources(params.experts, completions.kv_block_s, completions.busy_s, weights))
    lost = jnp.append(impact(obs).qos_change, 0.0)[action]
    after = in_flight_qos(info["final_observation"])
    return reward + weights.predicted_loss * lost + weights.potential * (gamma * after - in_flight_qos(obs))


def _resources(profile: ExpertProfile, kv_block_s: Array, busy_s: Array, weights: RewardWeights) -> Array:
    memory_gb_s = kv_block_s * profile.kv_block_gb
    energy_kj = busy_s * (jnp.asarray(profile.busy_w) - profile.idle_w) / 1e3
    return weights.kv_memory * memory_gb_s + weights.energy * energy_kj
