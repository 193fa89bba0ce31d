"""What the agent computes from an observation: features, then an encoder, then a policy and two critics.

``pointer`` networks score each expert from its own node, so that one set of parameters serves any number of experts in
any order. ``arrived`` reads only the arrived request's node, as the paper does, and has one output per action.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.graph import EXPERT_FEATURES, IMPACT_FEATURES, GraphFeatures, graph_features
from qos_jax.encoder.han import HAN, Embedding, HANConfig
from qos_jax.errors import InputError
from qos_jax.sim.types import Observation

Encoder = Literal["han", "pooled", "flat"]
Readout = Literal["pointer", "arrived"]

NUM_CRITICS = 2

_NET = (*EXPERT_FEATURES, *IMPACT_FEATURES).index("net")
_LOWEST_PRIOR = -2.0  # QoS; a placement predicted to cost more than two answers is as bad as any


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; every field needs new parameters."""

    encoder: Encoder = "han"
    """Graph attention; expert nodes without their requests; the flat view."""
    readout: Readout = "pointer"
    actor: bool = False  # a policy of its own; else the soft-optimal one for its critics
    with_impact: bool = True  # the impact estimate is among the features
    with_rates: bool = True  # the recent rates of arrivals are, too; always in the flat view
    residual: bool = True  # the critics learn what the impact estimate misses
    slots: int | None = None  # requests that are seen of each expert; all without it
    rate_clip_per_s: float | None = None
    """Requests/s for each expert up to which recent rates are told apart; None for all. A burst faster than any in
    training then looks like one of those; of what it has never seen, a network may say anything. ``qos-jax train``
    sets it to ``domain.rate_clip_per_s`` unless it is given."""
    hidden: tuple[int, ...] = (64,)  # widths of the heads
    han: HANConfig = HANConfig()

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together.

        Raises:
          InputError: a field is out of range, or they do not.
        """
        for name, known in (("encoder", get_args(Encoder)), ("readout", get_args(Readout))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(known)}")
        if self.slots is not None and not (isinstance(self.slots, int) and self.slots >= 1):
            raise InputError(f"slots is {self.slots}, must be a whole number of at least 1, or None for all")
        if self.rate_clip_per_s is not None and not 0 < self.rate_clip_per_s < math.inf:
            raise InputError(f"rate_clip_per_s is {self.rate_clip_per_s}, must be above 0 and finite, or None for all")
        if not all(isinstance(width, int) and width >= 1 for width in self.hidden):
            raise InputError(f"hidden is {self.hidden}, must be whole numbers of at least 1")
        if self.encoder == "flat" and self.readout == "pointer":
            raise InputError("readout is 'pointer', must be 'arrived' for encoder 'flat', which has no expert nodes")
        if self.residual and not (self.with_impact and self.readout == "pointer"):
            raise InputError("residual is True, which needs with_impact True and readout 'pointer'")


class FlatInputs(struct.PyTreeNode):
    """The flat view, and what is legal."""

    columns: Array  # [F] float32
    legal: Array  # [N + 1] bool


Inputs = Any  # a pytree with a field ``legal`` [A] bool: GraphFeatures, FlatInputs


class Heads(struct.PyTreeNode):
    """What the network says of each action."""

    logits: Array | None  # [A] of the policy; None where the critics are the policy
    q: Array  # [NUM_CRITICS, A]


def inputs_of(config: NetworkConfig, obs: Observation) -> Inputs:
    """Returns the features of the observation of one environment."""
    if config.rate_clip_per_s is not None:
        most_per_s = config.rate_clip_per_s * obs.experts.running.shape[-1]
        rate_per_s = jnp.minimum(obs.arrived.recent_rate_per_s, most_per_s)
        obs = obs.replace(arrived=obs.arrived.replace(recent_rate_per_s=rate_per_s))
    if config.encoder == "flat":
        return FlatInputs(flat_view(obs), obs.action_mask)
    return graph_features(obs, with_impact=config.with_impact, with_rates=config.with_rates, slots=config.slots)


class ActorCritic(nn.Module):
    """Policy and critics over one encoder; takes inputs with any leading batch axes."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, inputs: Inputs) -> Heads:
        """Returns the heads for each action."""
        config = self.config
        if config.encoder == "flat":
            return self._heads(lambda name: self._mlp(name, inputs.legal.shape[-1])(inputs.columns))
        embed = HAN(config.han, name="han") if config.encoder == "han" else _Pooled(config.han, name="pooled")
        embedding = embed(inputs)
        if config.readout == "arrived":
            return self._heads(lambda name: self._mlp(name, inputs.legal.shape[-1])(embedding.arrived))
        experts, fleet = _in_context(embedding)
        prior = _prior(inputs) if config.residual else 0.0

        def point(name: str) -> Array:
            place = self._mlp(name, 1)(experts)[..., 0]
            drop = self._mlp(f"{name}_drop", 1)(fleet)
            return jnp.concatenate([place + (prior if name != "actor" else 0.0), drop], -1)

        return self._heads(point)

    def _heads(self, head: Callable[[str], Array]) -> Heads:
        logits = head("actor") if self.config.actor else None
        return Heads(logits, jnp.stack([head(f"critic_{i}") for i in range(NUM_CRITICS)], -2))

    def _mlp(self, name: str, outputs: int) -> nn.Module:
        return _MLP((*self.config.hidden, outputs), name=name)


class _MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        # Small, so that the first policy is that of the prior, and without one near uniform.
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal"))(x)


class _Pooled(nn.Module):
    """The ablation of the graph: an expert is known by its own features alone."""

    config: HANConfig

    @nn.compact
    def __call__(self, inputs: GraphFeatures) -> Embedding:
        arrived, experts = inputs.arrived, inputs.experts
        for i in range(self.config.layers):
            arrived = nn.relu(nn.Dense(self.config.features, name=f"arrived_{i}")(arrived))
            experts = nn.relu(nn.Dense(self.config.features, name=f"expert_{i}")(experts))
        return Embedding(arrived, experts)


def _in_context(embedding: Embedding) -> tuple[Array, Array]:
    """Returns each expert beside all others [..., N, 4 D], and the fleet as a whole [..., 3 D]."""
    experts = embedding.experts
    fleet = jnp.concatenate([embedding.arrived, jnp.mean(experts, -2), _most(experts)], -1)
    around = jnp.broadcast_to(fleet[..., None, :], (*experts.shape[:-1], fleet.shape[-1]))
    return jnp.concatenate([experts, around], -1), fleet


def _most(experts: Array) -> Array:
    """Returns the maximum [..., D] over the experts [..., N, D].

    The gradient of ``jnp.max`` divides by how many inputs equal the maximum. Where XLA computes the inputs anew for
    that and rounds otherwise, these are none, and it is NaN.
    """
    is_first = jnp.argmax(experts, -2, keepdims=True) == jnp.arange(experts.shape[-2])[:, None]
    return jnp.sum(jnp.where(is_first, experts, 0.0), -2)


def _prior(inputs: GraphFeatures) -> Array:
    """Returns the QoS [..., N] that each placement is estimated to add, out of its compressed feature."""
    net = inputs.experts[..., _NET]
    return jnp.maximum(jnp.sign(net) * jnp.expm1(jnp.abs(net)), _LOWEST_PRIOR)


def network_of(config: NetworkConfig) -> tuple[Callable[[Observation], Inputs], nn.Module]:
    """Returns the features that a network reads, and the network."""
    return lambda obs: inputs_of(config, obs), ActorCritic(config)


def heads_of(network: nn.Module, weights: Any, inputs: Inputs) -> Heads:
    """Returns what a network with these parameters says of inputs with any leading batch axes."""
    return cast(Heads, network.apply(weights, inputs))


def greedy(heads: Heads, legal: Array, noise: Array | float = 0.0) -> Array:
    """Returns the best legal action [] int32, with ``noise`` [N + 1] added to what each is worth."""
    score = jnp.mean(heads.q, -2) if heads.logits is None else heads.logits
    return jnp.argmax(jnp.where(legal, score + noise, -jnp.inf), -1).astype(jnp.int32)
