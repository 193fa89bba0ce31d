"""Discrete soft actor-critic: its losses and one update, as pure functions of a small state.

``qos_jax.agent.targets`` defines the targets of the critics. This module has everything else: two critics, a policy
that is soft-optimal for them, its temperature, and a running average of the weights.

* Without an actor network, the policy is ``softmax(mean Q / alpha)``, the closed form of the policy to which an actor
  would converge.
* The target entropy is a share of the maximum entropy over the legal actions of each state.
* ``min_q_weight`` selects the minimum of both critics (1) or their mean (0). ``critic_entropy`` includes the entropy in
  the critics' targets (1) or not (0). In discrete action spaces, the minimum and the entropy bias the targets (arXiv
  2209.10081, 2509.09838).
* Illegal actions have a large negative logit instead of minus infinity, for which the entropy has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent.networks import Heads, Inputs, heads_of
from qos_jax.agent.rewards import RewardWeights

_ILLEGAL = -1e9
_LOG_ALPHA_RANGE = (-7.0, 2.0)  # a temperature of 0.0009 to 7.4, in reward units
_MAX_GRAD_NORM = 10.0

Weights = Any  # a pytree, the parameters of the network

_ADAM = optax.chain(optax.clip_by_global_norm(_MAX_GRAD_NORM), optax.scale_by_adam())


class Hyperparameters(struct.PyTreeNode):
    """Hyperparameters of the algorithm; all are traced, so seeds and hyperparameters can be vmapped together."""

    learning_rate: Array | float = 1e-3
    final_learning_rate: Array | float = 1e-4  # reached linearly over the second half of training
    gamma: Array | float = 0.99  # discount factor per request
    polyak: Array | float = 0.995  # decay of the running average of the weights, per update
    alpha: Array | float = 0.02  # initial temperature, in QoS
    alpha_rate: Array | float = 0.0  # change of log alpha per update and nat of missing entropy; 0 keeps alpha
    target_entropy: Array | float = 0.3  # as a share of the logarithm of the number of legal actions
    min_q_weight: Array | float = 0.0  # weight of the minimum of both critics against their mean
    critic_entropy: Array | float = 0.0  # weight of the entropy in the critics' targets
    width_s: Array | float = 1e-3  # s/token, width of the logistic in the soft QoS of measured answers
    max_externality: Array | float = 10.0  # lower clip of counterfactual targets, in reward units
    reset_prob: Array | float = 0.005  # share of environments reset to their state after the warm-up, per chunk
    empty_prob: Array | float = 0.0  # share of environments whose experts are emptied, per chunk
    discount_s: Array | float = 1e9  # s, time constant of the discount of returns, beside ``gamma``
    trace_decay: Array | float = 1.0  # lambda of returns
    opportunity_cost: Array | float = 1.0  # share that experts pay of what the best other use of a request is worth
    joint: Array | float = 0.0  # weight of the fleet's stream of returns against those of the experts
    weights: RewardWeights = RewardWeights()


class LearnerState(struct.PyTreeNode):
    """The state that an update changes."""

    params: Weights
    average: Weights  # running average of ``params``: the critics' target network, and the trained router
    optimizer: Any
    log_alpha: Array  # []


def init(params: Weights, hyper: Hyperparameters) -> LearnerState:
    """Returns the state before the first update."""
    # The average is a copy, as params and average are donated together.
    average = jax.tree.map(jnp.copy, params)
    return LearnerState(params, average, _ADAM.init(params), jnp.log(jnp.asarray(hyper.alpha, jnp.float32)))


def policy_logits(heads: Heads, legal: Array, log_alpha: Array) -> Array:
    """Returns the log probabilities [..., A] of the policy, about -1e9 for an illegal action.

    Args:
      heads: outputs of the network, leaves [..., A] and [..., 2, A].
      legal: [..., A] bool, legal actions.
      log_alpha: [] logarithm of the temperature.
    """
    logits = jnp.mean(heads.q, -2) / jnp.exp(log_alpha) if heads.logits is None else heads.logits
    return jax.nn.log_softmax(jnp.where(legal, logits, _ILLEGAL))


def update(
    network: nn.Module,
    hyper: Hyperparameters,
    state: LearnerState,
    inputs: Inputs,
    critic_loss: Callable[[Heads], Array],
    progress: Array,
    axes: tuple[str, ...] = (),
) -> tuple[LearnerState, dict[str, Array]]:
    """Takes one gradient step on a batch.

    Args:
      network: an ``nn.Module`` from inputs to ``Heads``.
      hyper: hyperparameters.
      state: before the update.
      inputs: of a batch, leaves [B, ...].
      critic_loss: returns the loss [] of the network's outputs for these inputs; see ``qos_jax.agent.targets``.
      progress: [] completed share of the training, for the learning rate.
      axes: names of mapped axes with different batches, over which gradients are averaged.

    Returns:
      The state after the step; and the losses, the entropy and the temperature, each [].
    """
    alpha = jnp.exp(state.log_alpha)

    def loss(params: Weights) -> tuple[Array, dict[str, Array]]:
        heads = heads_of(network, params, inputs)
        critics_loss = critic_loss(heads)
        log_policy = policy_logits(heads, inputs.legal, state.log_alpha)
        policy = jnp.exp(log_policy)
        entropy = -jnp.sum(policy * jnp.where(inputs.legal, log_policy, 0.0), -1)
        actor_loss = jnp.float32(0)
        if heads.logits is not None:
            values = lax.stop_gradient(combined_q(hyper, heads.q))
            actor_loss = -jnp.mean(jnp.sum(policy * jnp.where(inputs.legal, values, 0.0), -1) + alpha * entropy)
        num_legal = jnp.maximum(jnp.sum(inputs.legal, -1), 1).astype(entropy.dtype)
        surplus = jnp.mean(entropy - hyper.target_entropy * jnp.log(num_legal))
        losses = {"critic_loss": critics_loss, "actor_loss": actor_loss}
        return critics_loss + actor_loss, losses | {"entropy": jnp.mean(entropy), "surplus": surplus}

    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    if axes:
        gradient, aux = lax.pmean((gradient, aux), axes)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with its count of updates
        direction, optimizer = _ADAM.update(gradient, state.optimizer)
    rate = _learning_rate(hyper, progress)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    average = optax.incremental_update(params, state.average, 1.0 - hyper.polyak)
    log_alpha = jnp.clip(state.log_alpha - hyper.alpha_rate * aux.pop("surplus"), *_LOG_ALPHA_RANGE)
    return LearnerState(params, average, optimizer, log_alpha), aux | {"alpha": jnp.exp(log_alpha)}


def combined_q(hyper: Hyperparameters, q: Array) -> Array:
    """Returns the values [..., A] of both critics [..., 2, A], combined by ``min_q_weight``."""
    mean, minimum = jnp.mean(q, -2), jnp.min(q, -2)
    return mean + hyper.min_q_weight * (minimum - mean)


def _learning_rate(hyper: Hyperparameters, progress: Array) -> Array:
    decay = jnp.clip(2.0 * progress - 1.0, 0.0, 1.0)
    return hyper.learning_rate + decay * (hyper.final_learning_rate - hyper.learning_rate)
