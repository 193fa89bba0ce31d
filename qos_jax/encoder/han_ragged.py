"""The encoder on ragged graphs: the parameters of ``HAN``, run with jraph's segment operations.

Nodes are the existing requests only, so the graphs fit real systems of any size, and fleets of different sizes make one
batch. Shapes differ between graphs, so jit would compile for each graph. Training uses the dense form.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn
from jax import Array

from qos_jax.encoder.han import EXPERT_RELATIONS, HAN, REQUEST_RELATIONS, Attend, Embedding, HANConfig, Links
from qos_jax.encoder.jraph_views import NODE_KINDS, Graphs


def segment_encode(variables: Any, config: HANConfig, graphs: Graphs) -> Embedding:
    """Returns the embeddings of ``HAN(config)`` for one graph or a batch of graphs.

    Args:
      variables: parameters of ``HAN(config)``.
      config: size of the encoder.
      graphs: as returned by ``to_graphs``, or several of them joined by relation.

    Returns:
      The embeddings: arrived [G, D] of the G graphs, and experts [E, D] of all their experts, in order.
    """
    table = graphs["arrived", "expert"].nodes
    arrived, experts, requests = (jnp.asarray(table[name][table["kind"] == i]) for i, name in enumerate(NODE_KINDS))
    return HAN(config).bind(variables).encode(arrived, experts, requests, _segment_links(graphs))


def _segment_links(graphs: Graphs) -> Links:
    kind = graphs["arrived", "expert"].nodes["kind"]
    count = np.bincount(kind, minlength=len(NODE_KINDS))
    row = np.zeros(len(kind), np.int32)  # of each node among those of its kind
    for i, number in enumerate(count):
        row[kind == i] = np.arange(number)
    sent_by = {name: row[graphs[name, "expert"].senders] for name in EXPERT_RELATIONS}
    expert_of = {name: row[graphs[name, "expert"].receivers] for name in EXPERT_RELATIONS}

    graph_of_expert, expert_of_request = np.zeros(count[1], np.int32), np.zeros(count[2], np.int32)
    graph_of_expert[expert_of["arrived"]] = sent_by["arrived"]
    running, has_requests = np.zeros(count[2], bool), np.zeros((count[1], 2), bool)
    running[sent_by["running"]] = True
    for i, name in enumerate(REQUEST_RELATIONS):
        expert_of_request[sent_by[name]] = expert_of[name]
        has_requests[expert_of[name], i] = True
    return Links(
        to_experts=_attend([(sent_by[name], expert_of[name]) for name in REQUEST_RELATIONS], count[1]),
        to_arrived=_attend([(expert_of["arrived"], sent_by["arrived"])], count[0]),
        of_arrived=lambda arrived: arrived[graph_of_expert],
        of_experts=lambda experts: experts[expert_of_request],
        has_requests=jnp.asarray(has_requests),
        running=jnp.asarray(running),
    )


def _attend(edges: list[tuple[np.ndarray, np.ndarray]], num_targets: int) -> Attend:
    """Builds the attention along the edges (senders, receivers) of each relation; the weights are [E, H] for each."""

    def attend(target_score: Array, source_score: Array, values: Array) -> tuple[Array, list[Array]]:
        means, weights = [], []
        for relation, (senders, receivers) in enumerate(edges):
            logits = nn.leaky_relu(target_score[receivers, relation] + source_score[senders, relation], 0.2)
            share = jraph.segment_softmax(logits, receivers, num_targets)
            weighted = share[:, :, None] * values[senders][:, None, :]
            means.append(jraph.segment_sum(weighted, receivers, num_targets))
            weights.append(share)
        return jnp.stack(means, 1), weights

    return attend
