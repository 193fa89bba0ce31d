"""The encoder on ragged graphs: the parameters of ``HAN``, run with jraph's segment operations.

Only requests that exist are nodes, so it fits a real system of any size, and fleets of different sizes make one batch.
The shapes differ from graph to graph, which is why it is not meant for jit; training takes the dense form.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn
from jax import Array

from qos_jax.encoder.han import EXPERT_RELATIONS, HAN, REQUEST_RELATIONS, Attend, Embedding, HANConfig, Links
from qos_jax.encoder.nodes import Nodes
from qos_jax.errors import InputError
from qos_jax.sim.views import NODE_KINDS, Relation

Graphs = dict[Relation, jraph.GraphsTuple]


def to_graphs(nodes: Nodes) -> Graphs:
    """Returns the nodes of one environment as one NumPy graph per relation, all over the same table of nodes.

    Nodes are the arrived request, then the N experts, then the R requests on them by expert and slot. ``nodes`` is a
    dict of arrays [1 + N + R, ...]: ``kind``, an index into ``NODE_KINDS``, and under the name of each kind its
    features, 0 for nodes of another kind. Edges lead to experts, as in ``graph_view``: ``("arrived", "expert")`` to
    each, ``("running", "expert")`` and ``("waiting", "expert")`` from each request to where it is. The network reads
    them both ways. ``jraph.batch_np`` joins graphs of the same relation.

    Raises:
      InputError: there are batch axes.
    """
    arrived, experts, requests = (np.asarray(x) for x in (nodes.arrived, nodes.experts, nodes.requests))
    if arrived.ndim != 1:
        raise InputError(f"arrived has shape {arrived.shape}, must have no batch axes")
    masks = {"running": np.asarray(nodes.running), "waiting": np.asarray(nodes.waiting)}
    expert_of, slot = np.nonzero(masks["running"] | masks["waiting"])
    rows = (arrived[None], experts, requests[expert_of, slot])
    kind = np.repeat(np.arange(3, dtype=np.int32), [len(x) for x in rows])
    table: dict[str, np.ndarray] = {"kind": kind}
    for i, name in enumerate(NODE_KINDS):
        table[name] = np.zeros((len(kind), rows[i].shape[-1]), np.float32)
        table[name][kind == i] = rows[i]

    def relation(senders: np.ndarray, experts: np.ndarray) -> jraph.GraphsTuple:
        return jraph.GraphsTuple(
            nodes=table,
            edges={},
            senders=senders.astype(np.int32),
            receivers=(1 + experts).astype(np.int32),
            globals={},
            n_node=np.array([len(kind)]),
            n_edge=np.array([len(senders)]),
        )

    graphs = {("arrived", "expert"): relation(np.zeros(len(experts)), np.arange(len(experts)))}
    for name, mask in masks.items():
        here = np.flatnonzero(mask[expert_of, slot])
        graphs[name, "expert"] = relation(1 + len(experts) + here, expert_of[here])
    return graphs


def segment_encode(variables: Any, config: HANConfig, graphs: Graphs) -> Embedding:
    """Returns what ``HAN(config)`` makes of one graph or of a batch of graphs.

    Args:
      variables: of ``HAN(config)``.
      config: size of the encoder.
      graphs: as from ``to_graphs``, or such graphs joined by relation.

    Returns:
      The embeddings: arrived [G, D] of the G graphs, experts [E, D] of all their experts, in order.
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
    """Builds the attention along the edges (senders, receivers) of each relation; its weights are [E, H] for each."""

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
