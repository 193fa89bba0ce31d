"""Discrete soft actor-critic: its losses and one update, as pure functions of a small state.

The critics are taught in one of two ways. ``temporal_difference`` is SAC as published, with the cures that discrete
action spaces need; ``marginal_values`` are what the simulator measured (``counterfactual``), which need no bootstrap.
Everything else is the same: two critics, a policy that is soft-optimal for them, its temperature, a running average of
the weights.

* Where the network has no actor, the policy is ``softmax(mean Q / alpha)``: with few actions the optimum that an actor
  would be trained towards has a closed form.
* The target entropy is a share of the entropy of the actions that are legal in each state.
* ``least_weight`` chooses between the minimum of both critics (1) and their mean (0), ``critic_entropy`` whether the
  critics' targets hold the entropy (1) or not (0): in discrete action spaces the minimum and the entropy bias them
  (arXiv 2209.10081, 2509.09838).
* Illegal actions get a large negative logit rather than minus infinity, whose entropy has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
_MOST_GRADIENT = 10.0  # norm

Weights = Any  # the parameters of the network

_ADAM = optax.chain(optax.clip_by_global_norm(_MOST_GRADIENT), optax.scale_by_adam())


class Hyperparameters(struct.PyTreeNode):
    """Numbers of the algorithm; all are traced, so that seeds and hyperparameters may be vmapped together."""

    learning_rate: Array | float = 1e-3
    final_learning_rate: Array | float = 1e-4  # reached linearly over the second half of training
    gamma: Array | float = 0.99
    polyak: Array | float = 0.995  # of the running average of the weights, per update
    alpha: Array | float = 0.02  # temperature at the start, in units of QoS
    alpha_rate: Array | float = 0.0  # per update and nat by which the entropy misses its target; 0 keeps alpha
    target_entropy: Array | float = 0.3  # as a share of the logarithm of the number of legal actions
    least_weight: Array | float = 0.0
    critic_entropy: Array | float = 0.0
    width_s: Array | float = 1e-3  # s/token, of the logistic by which measured answers are judged
    most_harm: Array | float = 10.0  # QoS, and other costs if they have weights; no placement is taught to cost more
    restart: Array | float = 0.005  # share of environments that go on from a prefilled state in each chunk
    weights: RewardWeights = RewardWeights()


class Learned(struct.PyTreeNode):
    """What an update changes."""

    params: Weights
    average: Weights  # running average of ``params``: the critics' target, and the router in the end
    optimizer: Any
    log_alpha: Array  # []


class Transition(struct.PyTreeNode):
    """One step for temporal differences; the inputs after it are those of the following row."""

    inputs: Inputs
    action: Array  # [] int32
    reward: Array  # []
    terminated: Array  # [] bool
    truncated: Array  # [] bool: the following row is not what came after, so this one teaches nothing


class Lesson(struct.PyTreeNode):
    """One decision with the measured values of all its actions."""

    inputs: Inputs
    whole: Array  # [] bool: else it teaches nothing
    value: Array  # [A]


class Step(NamedTuple):
    """Transitions of a batch and the inputs after each."""

    transition: Transition
    next_inputs: Inputs


def learned(params: Weights, hyper: Hyperparameters) -> Learned:
    """Returns the state before the first update."""
    # A copy, as both are donated together.
    average = jax.tree.map(jnp.copy, params)
    return Learned(params, average, _ADAM.init(params), jnp.log(jnp.asarray(hyper.alpha, jnp.float32)))


def policy_logits(heads: Heads, legal: Array, log_alpha: Array) -> Array:
    """Returns the log probabilities [..., A] of the policy; about -1e9 where an action is illegal."""
    logits = jnp.mean(heads.q, -2) / jnp.exp(log_alpha) if heads.logits is None else heads.logits
    return jax.nn.log_softmax(jnp.where(legal, logits, _ILLEGAL))


def update(
    network: nn.Module,
    hyper: Hyperparameters,
    state: Learned,
    batch: Step | Lesson,
    progress: Array,
    axes: tuple[str, ...] = (),
) -> tuple[Learned, dict[str, Array]]:
    """Takes one gradient step on a batch and returns the state after it, and the losses.

    Args:
      network: an ``nn.Module`` from inputs to ``Heads``.
      hyper: numbers of the algorithm.
      state: before the update.
      batch: steps, or lessons; leaves [B, ...].
      progress: [] share of the training that is done, for the learning rate.
      axes: by name, along which others have other batches; the gradient is the mean.
    """
    alpha = jnp.exp(state.log_alpha)
    inputs, critic_loss_of = _teaching(network, hyper, state, batch)

    def loss(params: Weights) -> tuple[Array, dict[str, Array]]:
        heads = heads_of(network, params, inputs)
        critic_loss = critic_loss_of(heads)
        log_policy = policy_logits(heads, inputs.legal, state.log_alpha)
        policy = jnp.exp(log_policy)
        entropy = -jnp.sum(policy * jnp.where(inputs.legal, log_policy, 0.0), -1)
        actor_loss = jnp.float32(0)
        if heads.logits is not None:
            worth = lax.stop_gradient(_combined(hyper, heads.q))
            actor_loss = -jnp.mean(jnp.sum(policy * jnp.where(inputs.legal, worth, 0.0), -1) + alpha * entropy)
        choices = jnp.maximum(jnp.sum(inputs.legal, -1), 1)
        surplus = jnp.mean(entropy - hyper.target_entropy * jnp.log(choices))
        aux = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": jnp.mean(entropy), "surplus": surplus}
        return critic_loss + actor_loss, aux

    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    if axes:
        gradient, aux = lax.pmean((gradient, aux), axes)
    direction, optimizer = _ADAM.update(gradient, state.optimizer)
    rate = _learning_rate(hyper, progress)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    average = optax.incremental_update(params, state.average, 1.0 - hyper.polyak)
    log_alpha = jnp.clip(state.log_alpha - hyper.alpha_rate * aux.pop("surplus"), *_LOG_ALPHA_RANGE)
    return Learned(params, average, optimizer, log_alpha), aux | {"alpha": jnp.exp(log_alpha)}


def _teaching(
    network: nn.Module, hyper: Hyperparameters, state: Learned, batch: Step | Lesson
) -> tuple[Inputs, Callable[[Heads], Array]]:
    """Returns the inputs of a batch and the critics' loss on what the network says of them."""
    if isinstance(batch, Lesson):
        return batch.inputs, lambda heads: _lesson_loss(heads, batch)
    target = temporal_difference(network, hyper, state, batch)
    return batch.transition.inputs, lambda heads: _step_loss(heads, batch.transition, target)


def temporal_difference(network: nn.Module, hyper: Hyperparameters, state: Learned, batch: Step) -> Array:
    """Returns the critics' target [B] of each transition."""
    legal = batch.next_inputs.legal
    log_policy = policy_logits(heads_of(network, state.params, batch.next_inputs), legal, state.log_alpha)
    worth = _combined(hyper, heads_of(network, state.average, batch.next_inputs).q)
    worth -= hyper.critic_entropy * jnp.exp(state.log_alpha) * log_policy
    value = jnp.sum(jnp.exp(log_policy) * jnp.where(legal, worth, 0.0), -1)
    return batch.transition.reward + hyper.gamma * jnp.where(batch.transition.terminated, 0.0, value)


def _step_loss(heads: Heads, step: Transition, target: Array) -> Array:
    # A mask, as the gradient of an index is a scatter, which on GPUs adds in any order.
    taken = jnp.arange(heads.q.shape[-1]) == step.action[:, None]
    q = jnp.sum(jnp.where(taken[:, None], heads.q, 0.0), -1)
    taught = (~step.truncated).astype(q.dtype)[:, None]
    return jnp.sum(taught * jnp.square(q - target[:, None])) / jnp.maximum(jnp.sum(taught) * q.shape[-1], 1.0)


def _lesson_loss(heads: Heads, lesson: Lesson) -> Array:
    taught = (lesson.inputs.legal & lesson.whole[:, None])[:, None, :]
    error = jnp.where(taught, heads.q - lesson.value[:, None, :], 0.0)
    return jnp.sum(jnp.square(error)) / jnp.maximum(jnp.sum(taught) * error.shape[-2], 1.0)


def _combined(hyper: Hyperparameters, q: Array) -> Array:
    """Returns one value [..., A] out of two critics' [..., 2, A]."""
    mean, least = jnp.mean(q, -2), jnp.min(q, -2)
    return mean + hyper.least_weight * (least - mean)


def _learning_rate(hyper: Hyperparameters, progress: Array) -> Array:
    decay = jnp.clip(2.0 * progress - 1.0, 0.0, 1.0)
    return hyper.learning_rate + decay * (hyper.final_learning_rate - hyper.learning_rate)
