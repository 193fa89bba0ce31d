"""Networks of the agents: features of an observation, an encoder, and heads for a policy and two critics.

The readout ``pointer`` scores each expert from its own node, so that one set of parameters serves any number of experts
in any order. The readout ``arrived`` reads only the node of the arrived request, as in the paper, and has one output
per action.

``register_network`` adds a network of another kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.graph import (
    IMPACT_FEATURES,
    PREFERENCE_FEATURES,
    GraphFeatures,
    graph_features,
    preference_features,
)
from qos_jax.encoder.han import HAN, Embedding, HANConfig
from qos_jax.errors import InputError
from qos_jax.routers.base import drawn_best
from qos_jax.sim.types import Observation

Readout = Literal["pointer", "arrived"]

NUM_CRITICS = 2

_MAX_LAYERS = 100

_NET = IMPACT_FEATURES.index("net") - len(IMPACT_FEATURES)  # from the end of an expert's
_SCORE_WEIGHT = PREFERENCE_FEATURES.index("score") - len(PREFERENCE_FEATURES)  # from the end of the arrived request's
_VALUE_SCALE = 10.0  # reward units; values are sums over some hundred requests, and weights start small
_LOWEST_PRIOR = -2.0  # QoS; lower clip of the prior, the cost of two answers


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Kind and shape of a network. A change of any field needs new parameters."""

    encoder: str = "han"
    """``han`` for graph attention, ``pooled`` for expert nodes without their requests, ``flat`` for the flat view, or a
    name registered with ``register_network``."""
    readout: Readout = "pointer"
    actor: bool = False  # a separate policy head; without it the policy is soft-optimal for the critics
    value: bool = False  # critics of the state, and of each placement's advantage over a drop, for targets ``returns``
    with_impact: bool = True  # the impact estimate is among the features
    later_prompts: bool = False  # that estimate counts prompts that take freed places, see ``impact``
    with_rates: bool = True  # the recent arrival rates are among the features; always in the flat view
    with_preferences: bool = False  # the weights of the reward are among the features, and differ in training
    with_sessions: bool = False  # the cached share of the prompt is among the features; never in the flat view
    residual: bool = True  # the critics learn the difference to the impact estimate
    slots: int | None = None  # requests of each expert among the features; None for all
    rate_clip_per_s: float | None = None
    """Upper clip of the observed arrival rates [requests/s per expert]; None for no clip.

    Outside the range of training a network extrapolates badly. With the clip a burst faster than any in training looks
    like the fastest one there. Recipes set it to ``worlds.randomization.rate_clip_per_s``."""
    hidden: tuple[int, ...] = (64,)  # widths of the hidden layers of the heads
    han: HANConfig = HANConfig()

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is out of range, or two fields contradict each other.
        """
        if not isinstance(self.encoder, str) or self.encoder not in _NETWORKS:
            raise InputError(
                f"encoder {self.encoder!r} is not known: register it first (qos_jax.register_network), "
                f"or choose from {', '.join(_NETWORKS)}"
            )
        if self.readout not in get_args(Readout):
            raise InputError(f"readout is {self.readout!r}, must be one of {', '.join(get_args(Readout))}")
        if self.slots is not None and not (isinstance(self.slots, int) and self.slots >= 1):
            raise InputError(f"slots is {self.slots}, must be a whole number of at least 1, or None for all")
        if self.rate_clip_per_s is not None and not 0 < self.rate_clip_per_s < math.inf:
            raise InputError(f"rate_clip_per_s is {self.rate_clip_per_s}, must be above 0 and finite, or None for all")
        for name, layers in (("hidden", len(self.hidden)), ("han", self.han.layers)):
            if layers > _MAX_LAYERS:
                raise InputError(f"{name} has {layers} layers, must have at most {_MAX_LAYERS}")
        if not all(isinstance(width, int) and width >= 1 for width in self.hidden):
            raise InputError(f"hidden is {self.hidden}, must be whole numbers of at least 1")
        if self.encoder == "flat" and self.readout == "pointer":
            raise InputError("readout is 'pointer', must be 'arrived' for encoder 'flat', which has no expert nodes")
        if self.value and (self.actor or self.readout != "pointer"):
            raise InputError("value is True, which needs actor False and readout 'pointer'")
        if self.residual and not (self.with_impact and self.readout == "pointer"):
            raise InputError("residual is True, which needs with_impact True and readout 'pointer'")


class FlatInputs(struct.PyTreeNode):
    """The flat view and the legal actions."""

    columns: Array  # [F] float32
    legal: Array  # [N + 1] bool


Inputs = Any  # a pytree with a field ``legal`` [A] bool: GraphFeatures, FlatInputs


class Heads(struct.PyTreeNode):
    """Outputs of a network for each of the A actions; leading batch axes are those of the inputs."""

    logits: Array | None  # [A] of the policy; None without a policy head
    q: Array  # [NUM_CRITICS, A]; with values, the advantage over a drop
    value: Array | None = None  # [NUM_CRITICS, N + 1] of the state, for each expert and the fleet; None without values


Features = Callable[[Observation], Inputs]  # from the observation of one environment to the inputs of the network
NetworkFactory = Callable[[NetworkConfig], tuple[Features, nn.Module]]


class ActorCritic(nn.Module):
    """Policy and critics on top of one encoder; the inputs may have any leading batch axes."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, inputs: Inputs) -> Heads:
        """Returns the heads."""
        config = self.config
        if config.encoder == "flat":
            return self._heads(lambda name: self._mlp(name, inputs.legal.shape[-1])(inputs.columns))
        embed = HAN(config.han, name="han") if config.encoder == "han" else _Pooled(config.han, name="pooled")
        embedding = embed(inputs)
        if config.readout == "arrived":
            return self._heads(lambda name: self._mlp(name, inputs.legal.shape[-1])(embedding.arrived))
        experts, fleet = _in_context(embedding)
        prior = _prior(inputs) if config.residual else 0.0
        if config.residual and config.with_preferences:
            prior *= inputs.arrived[..., _SCORE_WEIGHT, None]

        def place(name: str) -> Array:
            return self._mlp(name, 1)(experts)[..., 0] + (prior if name != "actor" else 0.0)

        def point(name: str) -> Array:
            return jnp.concatenate([place(name), self._mlp(f"{name}_drop", 1)(fleet)], -1)

        if not config.value:
            return self._heads(point)

        def placements(name: str) -> Array:
            return jnp.pad(place(name), [(0, 0)] * (experts.ndim - 2) + [(0, 1)])

        return self._heads(placements).replace(value=self._values(inputs))

    def _values(self, inputs: Inputs) -> Array:
        """Returns the values by an encoder of their own: their errors are many times the advantages."""
        experts, fleet = _in_context(_Pooled(self.config.han, name="value_pooled")(inputs))

        def value(name: str) -> Array:
            by_expert = _MLP((*self.config.hidden, 1), name=name)(experts)[..., 0]
            return jnp.concatenate([by_expert, _MLP((*self.config.hidden, 1), name=f"{name}_fleet")(fleet)], -1)

        return _VALUE_SCALE * jnp.stack([value(f"value_{i}") for i in range(NUM_CRITICS)], -2)

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
        # Small weights: the initial policy is that of the prior, or nearly uniform without a prior.
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal"))(x)


class _Pooled(nn.Module):
    """The ablation of the graph: the embedding of an expert depends on its own features alone."""

    config: HANConfig

    @nn.compact
    def __call__(self, inputs: GraphFeatures) -> Embedding:
        arrived, experts = inputs.arrived, inputs.experts
        for i in range(self.config.layers):
            arrived = nn.relu(nn.Dense(self.config.features, name=f"arrived_{i}")(arrived))
            experts = nn.relu(nn.Dense(self.config.features, name=f"expert_{i}")(experts))
        return Embedding(arrived, experts)


def _in_context(embedding: Embedding) -> tuple[Array, Array]:
    """Returns each expert together with the fleet [..., N, 4 D], and the fleet alone [..., 3 D]."""
    experts = embedding.experts
    fleet = jnp.concatenate([embedding.arrived, jnp.mean(experts, -2), _max_over_experts(experts)], -1)
    context = jnp.broadcast_to(fleet[..., None, :], (*experts.shape[:-1], fleet.shape[-1]))
    return jnp.concatenate([experts, context], -1), fleet


def _max_over_experts(experts: Array) -> Array:
    """Returns the maximum [..., D] over the experts [..., N, D].

    The gradient of ``jnp.max`` divides by the number of inputs that equal the maximum. This number is 0, and the
    gradient NaN, where XLA recomputes the inputs with other rounding.
    """
    index = lax.broadcasted_iota(jnp.int32, experts.shape, experts.ndim - 2)
    is_first = jnp.argmax(experts, -2, keepdims=True).astype(jnp.int32) == index
    return jnp.sum(jnp.where(is_first, experts, 0.0), -2)


def _prior(inputs: GraphFeatures) -> Array:
    """Returns the estimated QoS gain [..., N] of each placement, decoded from its compressed feature."""
    net = inputs.experts[..., _NET]
    return jnp.maximum(jnp.sign(net) * jnp.expm1(jnp.abs(net)), _LOWEST_PRIOR)


def _graph_network(config: NetworkConfig) -> tuple[Features, nn.Module]:
    def features(obs: Observation) -> GraphFeatures:
        return graph_features(
            obs,
            with_impact=config.with_impact,
            later_prompts=config.later_prompts,
            with_rates=config.with_rates,
            with_preferences=config.with_preferences,
            with_sessions=config.with_sessions,
            slots=config.slots,
        )

    return features, ActorCritic(config)


def _flat_network(config: NetworkConfig) -> tuple[Features, nn.Module]:
    def features(obs: Observation) -> FlatInputs:
        columns = flat_view(obs)
        return FlatInputs(
            jnp.append(columns, preference_features(obs)) if config.with_preferences else columns, obs.action_mask
        )

    return features, ActorCritic(config)


_NETWORKS: dict[str, NetworkFactory] = {"han": _graph_network, "pooled": _graph_network, "flat": _flat_network}
_BUILT_IN = tuple(_NETWORKS)


def register_network(name: str, factory: NetworkFactory) -> None:
    """Registers a kind of network under a name for ``NetworkConfig.encoder``.

    A later registration under the same name replaces the earlier one. Run folders hold the name only: register the
    network before ``load_router`` reads a run that was trained with it.

    Args:
      name: of the kind.
      factory: called as ``factory(config)``; returns the features and the network of a ``NetworkConfig``. The features
        of one observation are a pytree with a field ``legal`` [A] bool, and the network takes them with any leading
        batch axes and returns ``Heads``.

    Raises:
      InputError: the name is a built-in network's.
    """
    if name in _BUILT_IN:
        raise InputError(f"network {name!r} is built in: choose another name")
    _NETWORKS[name] = factory


def network_of(config: NetworkConfig) -> tuple[Features, nn.Module]:
    """Returns the features that a network reads, and the network."""
    features, network = _NETWORKS[config.encoder](config)
    return lambda obs: features(_with_clipped_rates(config, obs)), network


def _with_clipped_rates(config: NetworkConfig, obs: Observation) -> Observation:
    if config.rate_clip_per_s is None:
        return obs
    max_rate_per_s = float(config.rate_clip_per_s) * obs.experts.running.shape[-1]
    rate_per_s = jnp.minimum(obs.arrived.recent_rate_per_s, max_rate_per_s)
    return obs.replace(arrived=obs.arrived.replace(recent_rate_per_s=rate_per_s))


def heads_of(network: nn.Module, weights: Any, inputs: Inputs) -> Heads:
    """Returns the heads of a network with these parameters, for inputs with any leading batch axes."""
    return cast(Heads, network.apply(weights, inputs))


def greedy(key: Array, heads: Heads, legal: Array, noise: Array | float = 0.0, margin: float = 0.0) -> Array:
    """Returns the best legal action [] int32 by the policy, or by the mean of the critics where there is no policy.

    Args:
      key: random key for ties.
      heads: of one observation.
      legal: [A] bool.
      noise: [A], added to the logits or values.
      margin: added to the logit or value of a drop.
    """
    score = jnp.mean(heads.q, -2) if heads.logits is None else heads.logits
    return drawn_best(key, (score + noise).at[-1].add(margin), legal)
