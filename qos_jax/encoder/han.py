"""The encoder: a heterogeneous graph attention network (HAN, Wang et al. 2019) over arrived, expert and request nodes.

The graph is a tree: each running or waiting request hangs on its expert, and each expert on the arrived request. In
every layer an expert reads its running requests, its waiting requests and the arrived request, a request reads its
expert, and the arrived request reads all experts. A relation is read by multi-head attention over the neighbours as in
GAT (a score from target and source, leaky ReLU, softmax), and an expert weighs what its relations say by semantic
attention. No weight belongs to one expert, so one set of parameters serves any number of experts in any order.

``HAN`` reads dense arrays with masks, without scatter, which is fast in training; ``segment.py`` runs the same network
on ragged graphs. Where it departs from HAN:

* Semantic weights are computed for each node. HAN averages them over all nodes of the batch: then what is decided in
  one environment would depend on the others beside it, and an idle expert would weigh its requests as a busy one does.
  Relations in which a node has no neighbour are left out of the softmax.
* The score vectors of GAT are folded into the projections, and neighbours are averaged before they are projected, which
  is the same by linearity: then next to nothing is computed for each of the many requests.
* Attention over one neighbour is 1 and is not computed: the arrived request to an expert, an expert to its requests.
* Running and waiting requests, which have the same features, share the projection of their own features; what differs
  by type is what they read from their expert. Two projections made the gradient of that step twice as slow on a CPU.
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
EXPERT_RELATIONS = (*REQUEST_RELATIONS, "arrived")  # what an expert reads, in the order of its semantic weights

_MASKED = -1e9  # not minus infinity, which has no gradient where everything is masked

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class HANConfig:
    """Size of the encoder."""

    features: int = 32  # D, of every embedding
    heads: int = 4  # H, of every attention; D is a multiple of it
    layers: int = 2

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is below 1, or ``features`` is no multiple of ``heads``.
        """
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}, must be at least 1")
        if self.features % self.heads:
            raise InputError(f"features is {self.features}, must be a multiple of heads, {self.heads}")


class Embedding(struct.PyTreeNode):
    """What the encoder makes of an observation."""

    arrived: Array  # [D]
    experts: Array  # [N, D]


class Links(NamedTuple):
    """How nodes find their neighbours: all that differs between dense arrays and ragged graphs.

    An ``Attend`` takes the scores of T targets [T, R, H] and of K sources [K, R, H] and the sources' values [K, F]. It
    returns their means [T, R, H, F] over the neighbours in each of R relations, 0 where there are none, weighted by the
    softmax of the leaky ReLU of the sum of both scores, and those weights.
    """

    to_experts: Attend  # from requests, R = 2: running, waiting
    to_arrived: Attend  # from experts, R = 1
    of_arrived: Callable[[Array], Array]  # arrived [F] -> what each expert reads from it [N, F]
    of_experts: Callable[[Array], Array]  # experts [N, F] -> what each request reads from its expert [N, S, F]
    has_requests: Array  # [N, 2] bool: there are running, waiting requests
    running: Array  # [N, S] bool, of the requests


class HAN(nn.Module):
    """The heterogeneous graph attention network.

    Attention weights are sown as ``intermediates``, under the name of each layer (``layer_0`` is the first):
    ``request_attention`` [..., N, 2, H, S] of running and waiting requests, ``expert_attention`` [..., 1, H, N] that
    the arrived request pays, and ``semantic_attention`` [..., N, 3] over ``EXPERT_RELATIONS``.
    """

    config: HANConfig = HANConfig()

    def __call__(self, nodes: GraphFeatures) -> Embedding:
        """Returns the embeddings, arrived [..., D] and experts [..., N, D], for any leading batch axes."""
        return self.encode(nodes.arrived, nodes.experts, nodes.requests, _dense_links(nodes))

    @nn.compact
    def encode(self, arrived: Array, experts: Array, requests: Array, links: Links) -> Embedding:
        """Returns the embeddings of nodes that find each other by ``links``."""
        for i in range(self.config.layers):
            is_last = i == self.config.layers - 1
            layer = _Layer(self.config, updates_requests=not is_last, name=f"layer_{i}")
            arrived, experts, requests = layer(arrived, experts, requests, links)
        return Embedding(arrived, experts)


class _Layer(nn.Module):
    config: HANConfig
    updates_requests: bool  # nobody reads requests after the last layer

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
        """Returns what targets [..., T, F] read in each relation [..., T, R, D], and the attention weights."""
        heads, width = self.config.heads, self.config.features
        stacked = (self.relations, heads)
        from_target = nn.DenseGeneral(stacked, name="target_score")(targets)
        from_source = nn.DenseGeneral(stacked, use_bias=False, name="source_score")(sources)
        means, weights = attend(from_target, from_source, sources)
        init = nn.initializers.lecun_normal(batch_axis=(0, 1))
        kernel = self.param("kernel", init, (*stacked, sources.shape[-1], width // heads))
        bias = self.param("bias", nn.initializers.zeros, (self.relations, width))
        projected = jnp.einsum("...rhf,rhfd->...rhd", means, kernel)
        return nn.relu(projected.reshape(*projected.shape[:-2], width) + bias), weights


class _SemanticAttention(nn.Module):
    """Weighs what a node reads in its relations."""

    @nn.compact
    def __call__(self, read: Array, present: Array) -> tuple[Array, Array]:
        """Returns the mean [..., D] over what is read [..., R, D] where present [..., R], and its weights [..., R]."""
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
    """Attends over K sources on an axis of their own: mask [..., R, K], scores [..., R, H] and [..., K, R, H].

    Sources come last in the scores, and all relations share one matrix product, which is fastest on a CPU.
    """
    mask = mask[..., None, :]
    logits = nn.leaky_relu(target_score[..., None] + jnp.moveaxis(source_score, -3, -1), 0.2)
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, _MASKED), -1), 0.0)
    return jnp.einsum("...rhk,...kf->...rhf", weights, values), weights
