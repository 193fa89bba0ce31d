"""Discrete soft actor-critic: its losses and one update, as pure functions of a small state.

What the critics learn from is up to ``qos_jax.agent.targets``. Everything else is common: two critics, a policy that is
soft-optimal for them, its temperature, and a running average of the weights.

* Where the network has no actor, the policy is ``softmax(mean Q / alpha)``: with few actions the optimum that an actor
  would be trained towards has a closed form.
* The target entropy is a share of the entropy of the actions that are legal in each state.
* ``min_q_weight`` chooses between the minimum of both critics (1) and their mean (0), ``critic_entropy`` whether the
  critics' targets hold the entropy (1) or not (0): in discrete action spaces the minimum and the entropy bias them
  (arXiv 2209.10081, 2509.09838).
* Illegal actions get a large negative logit rather than minus infinity, whose entropy has no gradient.
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
_LOG_ALPHA_RANGE = (-7.0, 2.0)  # of the temperature, .0009 to 7.4 in units of the reward
_MAX_GRAD_NORM = 10.0  # norm

Weights = Any  # the parameters of the network

_ADAM = optax.chain(optax.clip_by_global_norm(_MAX_GRAD_NORM), optax.scale_by_adam())


class Hyperparameters(struct.PyTreeNode):
    """Numbers of the algorithm; all are traced, so that seeds and hyperparameters may be vmapped together."""

    learning_rate: Array | float = 1e-3
    final_learning_rate: Array | float = 1e-4  # reached linearly over the second half of training
    gamma: Array | float = 0.99
    polyak: Array | float = 0.995  # of the running average of the weights, per update
    alpha: Array | float = 0.02  # temperature at the start, in units of QoS
    alpha_rate: Array | float = 0.0  # per update and nat by which the entropy misses its target; 0 keeps alpha
    target_entropy: Array | float = 0.3  # as a share of the logarithm of the number of legal actions
    min_q_weight: Array | float = 0.0
    critic_entropy: Array | float = 0.0
    width_s: Array | float = 1e-3  # s/token, of the logistic by which measured answers are judged
    max_externality: Array | float = 10.0  # lower clip of counterfactual targets, in reward units
    reset_prob: Array | float = 0.005  # share of environments reset to their state after the warm-up, per chunk
    weights: RewardWeights = RewardWeights()


class LearnerState(struct.PyTreeNode):
    """What an update changes."""

    params: Weights
    average: Weights  # running average of ``params``: the critics' target, and the router in the end
    optimizer: Any
    log_alpha: Array  # []


def init(params: Weights, hyper: Hyperparameters) -> LearnerState:
    """Returns the state before the first update."""
    # A copy, as both are donated together.
    average = jax.tree.map(jnp.copy, params)
    return LearnerState(params, average, _ADAM.init(params), jnp.log(jnp.asarray(hyper.alpha, jnp.float32)))


def policy_logits(heads: Heads, legal: Array, log_alpha: Array) -> Array:
    """Returns the log probabilities [..., A] of the policy; about -1e9 where an action is illegal."""
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
    """Takes one gradient step on a batch and returns the state after it and the losses [].

    Args:
      network: an ``nn.Module`` from inputs to ``Heads``.
      hyper: numbers of the algorithm.
      state: before the update.
      inputs: of a batch, leaves [B, ...].
      critic_loss: of what the network says of these inputs, see ``qos_jax.agent.targets``.
      progress: [] share of the training that is done, for the learning rate.
      axes: by name, along which others have other batches; the gradient is the mean.
    """
    alpha = jnp.exp(state.log_alpha)

    def loss(params: Weights) -> tuple[Array, dict[str, Array]]:
        heads = heads_of(network, params, inputs)
        loss_of_critics = critic_loss(heads)
        log_policy = policy_logits(heads, inputs.legal, state.log_alpha)
        policy = jnp.exp(log_policy)
        entropy = -jnp.sum(policy * jnp.where(inputs.legal, log_policy, 0.0), -1)
        actor_loss = jnp.float32(0)
        if heads.logits is not None:
            values = lax.stop_gradient(combined_q(hyper, heads.q))
            actor_loss = -jnp.mean(jnp.sum(policy * jnp.where(inputs.legal, values, 0.0), -1) + alpha * entropy)
        choices = jnp.maximum(jnp.sum(inputs.legal, -1), 1)
        surplus = jnp.mean(entropy - hyper.target_entropy * jnp.log(choices))
        losses = {"critic_loss": loss_of_critics, "actor_loss": actor_loss}
        return loss_of_critics + actor_loss, losses | {"entropy": jnp.mean(entropy), "surplus": surplus}

    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    if axes:
        gradient, aux = lax.pmean((gradient, aux), axes)
    direction, optimizer = _ADAM.update(gradient, state.optimizer)
    rate = _learning_rate(hyper, progress)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    average = optax.incremental_update(params, state.average, 1.0 - hyper.polyak)
    log_alpha = jnp.clip(state.log_alpha - hyper.alpha_rate * aux.pop("surplus"), *_LOG_ALPHA_RANGE)
    return LearnerState(params, average, optimizer, log_alpha), aux | {"alpha": jnp.exp(log_alpha)}


def combined_q(hyper: Hyperparameters, q: Array) -> Array:
    """Returns one value [..., A] out of two critics' [..., 2, A]."""
    mean, minimum = jnp.mean(q, -2), jnp.min(q, -2)
    return mean + hyper.min_q_weight * (minimum - mean)


def _learning_rate(hyper: Hyperparameters, progress: Array) -> Array:
    decay = jnp.clip(2.0 * progress - 1.0, 0.0, 1.0)
    return hyper.learning_rate + decay * (hyper.final_learning_rate - hyper.learning_rate)
