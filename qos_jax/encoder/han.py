"""The encoder: a heterogeneous graph attention network (HAN, Wang et al. 2019) over arrived, expert and request nodes.

The graph is a tree. Each running or waiting request is linked to its expert, and each expert to the arrived request. In
every layer an expert reads its running requests, its waiting requests and the arrived request, a request reads its
expert, and the arrived request reads all experts. Within a relation, nodes read their neighbours by multi-head
attention as in GAT (a score from target and source, leaky ReLU, softmax). An expert weighs its relations by semantic
attention. All experts share the parameters, so one set of parameters serves any number of experts in any order.

``HAN`` reads dense arrays with masks. It needs no scatter operations, so it trains fast. ``encoder.han_ragged`` runs
the same network on ragged graphs. Differences to HAN:

* Semantic weights are computed for each node. HAN averages them over all nodes of the batch. Decisions in one
  environment would then depend on the other environments of the batch, and an idle expert would weigh its requests like
  a busy one. Relations in which a node has no neighbours are left out of the softmax.
* The score vectors of GAT are folded into the projections, and neighbours are averaged before projection, which is the
  same by linearity. This leaves little computation for each of the many requests.
* Attention over a single neighbour is 1 and is not computed: from the arrived request to an expert, and from an expert
  to its requests.
* Running and waiting requests have the same features and share the projection of these. They differ in the projection
  that they read from their expert. A second projection doubles the time of that gradient on a CPU.
* Each node adds a projection of its own features (a residual), and arrived and expert nodes are layer-normalised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from qos_jax.encoder.graph import GraphFeatures
from qos_jax.errors import InputError

REQUEST_RELATIONS = ("running", "waiting")
EXPERT_RELATIONS = (*REQUEST_RELATIONS, "arrived")  # that an expert reads, in the order of its semantic weights

_MASKED = -1e9  # minus infinity has no gradient where everything is masked

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class HANConfig:
    """Size of the encoder."""

    features: int = 32  # D, width of every embedding, a multiple of ``heads``
    heads: int = 4  # H, of every attention
    layers: int = 2

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is below 1, or ``features`` is not a multiple of ``heads``.
        """
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}, must be at least 1")
        if self.features % self.heads:
            raise InputError(f"features is {self.features}, must be a multiple of heads, {self.heads}")


class Embedding(struct.PyTreeNode):
    """The embeddings of an observation."""

    arrived: Array  # [D]
    experts: Array  # [N, D]


class Links(NamedTuple):
    """How nodes read their neighbours: the only difference between dense arrays and ragged graphs.

    An ``Attend`` takes the scores of T targets [T, R, H] and of K sources [K, R, H], and the values of the sources
    [K, F]. It returns the weighted means of the values [T, R, H, F] over the neighbours in each of R relations, 0
    without neighbours, and the weights. The weights are the softmax of the leaky ReLU of the sum of both scores.
    """

    to_experts: Attend  # from requests, R = 2: running, waiting
    to_arrived: Attend  # from experts, R = 1
    of_arrived: Callable[[Array], Array]  # arrived [F] -> what each expert reads from it [N, F]
    of_experts: Callable[[Array], Array]  # experts [N, F] -> what each request reads from its expert [N, S, F]
    has_requests: Array  # [N, 2] bool: the expert has running requests, waiting requests
    running: Array  # [N, S] bool: the request is running


class HAN(nn.Module):
    """The heterogeneous graph attention network.

    Attention weights are sown as ``intermediates`` under the name of each layer (``layer_0`` is the first):

    * ``request_attention`` [..., N, 2, H, S] of the experts to their running and waiting requests
    * ``expert_attention`` [..., 1, H, N] of the arrived request to the experts
    * ``semantic_attention`` [..., N, 3] of the experts to ``EXPERT_RELATIONS``
    """

    config: HANConfig = HANConfig()

    def __call__(self, nodes: GraphFeatures) -> Embedding:
        """Returns the embeddings, arrived [..., D] and experts [..., N, D], for any leading batch axes."""
        return self.encode(nodes.arrived, nodes.experts, nodes.requests, _dense_links(nodes))

    @nn.compact
    def encode(self, arrived: Array, experts: Array, requests: Array, links: Links) -> Embedding:
        """Returns the embeddings of nodes with these features and links."""
        for i in range(self.config.layers):
            is_last = i == self.config.layers - 1
            layer = _Layer(self.config, updates_requests=not is_last, name=f"layer_{i}")
            arrived, experts, requests = layer(arrived, experts, requests, links)
        return Embedding(arrived, experts)


class _Layer(nn.Module):
    config: HANConfig
    updates_requests: bool  # False in the last layer, after which requests are not read

    @nn.compact
    def __call__(self, arrived: Array, experts: Array, requests: Array, links: Links) -> tuple[Array, Array, Array]:
        width = self.config.features

        def dense(name: str, x: Array) -> Array:
            return nn.Dense(width, name=name)(x)

        read, weights = _Attention(self.config, 2, name="request_to_expert")(experts, requests, links.to_experts)
        self.sow("intermediates", "request_attention", weights)
        from_arrived = links.of_arrived(nn.relu(dense("arrived_to_expert", arrived)))
        from_arrived = jnp.broadcast_to(from_arrived, (*experts.shape[:-1], width))
        read = jnp.concatenate([read, from_arrived[..., None, :]], -2)
        neighbours = jnp.concatenate([links.has_requests, jnp.ones_like(links.has_requests[..., :1])], -1)
        read, weights = _SemanticAttention(name="semantic")(read, neighbours)
        self.sow("intermediates", "semantic_attention", weights)
        new_experts = nn.LayerNorm(name="expert_norm")(nn.relu(dense("expert", experts) + read))

        read, weights = _Attention(self.config, 1, name="expert_to_arrived")(arrived, experts, links.to_arrived)
        self.sow("intermediates", "expert_attention", weights)
        new_arrived = nn.LayerNorm(name="arrived_norm")(nn.relu(dense("arrived", arrived) + read[..., 0, :]))

        if self.updates_requests:
            of_running, of_waiting = (
                links.of_experts(nn.relu(dense(f"expert_to_{name}", experts))) for name in REQUEST_RELATIONS
            )
            read = jnp.where(links.running[..., None], of_running, of_waiting)
            requests = nn.relu(dense("request", requests) + read)
        return new_arrived, new_experts, requests


class _Attention(nn.Module):
    """Multi-head attention of target nodes to their neighbours in each of R relations."""

    config: HANConfig
    relations: int

    @nn.compact
    def __call__(self, targets: Array, sources: Array, attend: Attend) -> tuple[Array, Any]:
        """Returns the messages to targets [..., T, F] in each relation [..., T, R, D], and the attention weights."""
        heads, width = self.config.heads, self.config.features
        stacked = (self.relations, heads)
        from_target = nn.DenseGeneral(stacked, name="target_score")(targets)
        from_source = nn.DenseGeneral(stacked, use_bias=False, name="source_score")(sources)
        means, weights = attend(from_target, from_source, sources)
        init = nn.initializers.lecun_normal(batch_axis=(0, 1))
        kernel = self.param("kernel", init, (*stacked, sources.shape[-1], width // heads), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.relations, width), jnp.float32)
        projected = jnp.einsum("...rhf,rhfd->...rhd", means, kernel)
        projected = projected.reshape(*projected.shape[:-2], width)
        return nn.relu(projected + jnp.broadcast_to(bias, projected.shape)), weights


class _SemanticAttention(nn.Module):
    """The weighted mean of the messages that a node reads in its relations."""

    @nn.compact
    def __call__(self, read: Array, present: Array) -> tuple[Array, Array]:
        """Returns the mean [..., D] of the messages [..., R, D] that are present [..., R], and the weights [..., R]."""
        key = jnp.tanh(nn.Dense(read.shape[-1], name="key")(read))
        score = nn.Dense(1, use_bias=False, name="query")(key)[..., 0]
        weights = jax.nn.softmax(jnp.where(present, score, _MASKED), -1)
        return jnp.sum(weights[..., None] * read, -2), weights


def _dense_links(nodes: GraphFeatures) -> Links:
    queues = jnp.stack([nodes.running, nodes.waiting], -2)  # [..., N, 2, S]
    all_experts = jnp.ones((1, nodes.experts.shape[-2]), bool)
    return Links(
        to_experts=lambda *scores_and_values: _attend(queues, *scores_and_values),
        to_arrived=lambda *scores_and_values: _attend(all_experts, *scores_and_values),
        of_arrived=lambda arrived: arrived[..., None, :],
        of_experts=lambda experts: experts[..., None, :],
        has_requests=jnp.any(queues, -1),
        running=nodes.running,
    )


def _attend(mask: Array, target_score: Array, source_score: Array, values: Array) -> tuple[Array, Array]:
    """Attends over K sources on a dense axis: mask [..., R, K], scores [..., R, H] and [..., K, R, H].

    Sources are the last axis of the scores, and all relations share one matrix product, as this is fastest on a CPU.
    """
    mask = mask[..., None, :]
    logits = nn.leaky_relu(target_score[..., None] + jnp.moveaxis(source_score, -3, -1), 0.2)
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, _MASKED), -1), 0.0)
    return jnp.einsum("...rhk,...kf->...rhf", weights, values), weights
