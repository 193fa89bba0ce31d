"""Observations as NumPy graphs of jraph, one per relation: for plots, analysis and real systems of any size."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jraph
import numpy as np

from qos_jax.encoder.graph import GraphFeatures
from qos_jax.errors import InputError
from qos_jax.sim.types import ExpertProfile, ExpertView, Observation, RequestView, ServiceLimits

NODE_KINDS = ("arrived", "expert", "request")


Relation = tuple[str, str]


def graph_view(obs: Observation) -> dict[Relation, jraph.GraphsTuple]:
    """Returns the observation of one environment as one NumPy graph per relation, all over the same table of nodes.

    Nodes are the arrived request, then the N experts, then the R requests on them by expert and arrival. ``nodes`` is a
    dict of columns [1 + N + R]: ``kind``, an index into ``NODE_KINDS``, and in float32 the fields of ``ArrivedView``,
    ``ExpertView``, ``ExpertProfile`` and ``RequestView`` under their own names and in their own units, 0 for nodes
    without that field.

    Edges lead to experts. ``("arrived", "expert")`` has one to each expert, with the columns [N] ``predicted_score``,
    ``predicted_tokens`` and ``legal``. ``("running", "expert")`` and ``("waiting", "expert")`` have one from each
    request to its expert, without features. ``globals`` holds ``drop_legal`` [1] and ``recent_rate_per_s`` [1, K].
    """
    obs = jax.tree.map(np.asarray, obs)
    num_experts = obs.experts.running.shape[0]
    expert_of, slot = np.nonzero(obs.requests.running | obs.requests.waiting)
    runs = obs.requests.running[expert_of, slot]
    nodes = _node_table(obs, expert_of, slot)
    request_nodes = np.arange(1 + num_experts, len(nodes["kind"]))
    arrived_edges = {
        "predicted_score": obs.arrived.predicted_score.astype(np.float32),
        "predicted_tokens": obs.arrived.predicted_tokens.astype(np.float32),
        "legal": obs.action_mask[:-1].astype(np.float32),
    }

    shared = {
        "drop_legal": obs.action_mask[-1:].astype(np.float32),
        "recent_rate_per_s": obs.arrived.recent_rate_per_s[None].astype(np.float32),
    }

    def relation(senders: np.ndarray, experts: np.ndarray, edges: dict[str, Any]) -> jraph.GraphsTuple:
        return jraph.GraphsTuple(
            nodes=nodes,
            edges=edges,
            senders=senders.astype(np.int32),
            receivers=(1 + experts).astype(np.int32),
            globals=shared,
            n_node=np.array([len(nodes["kind"])]),
            n_edge=np.array([len(senders)]),
        )

    return {
        ("arrived", "expert"): relation(np.zeros(num_experts), np.arange(num_experts), arrived_edges),
        ("running", "expert"): relation(request_nodes[runs], expert_of[runs], {}),
        ("waiting", "expert"): relation(request_nodes[~runs], expert_of[~runs], {}),
    }


def _node_table(obs: Observation, expert_of: np.ndarray, slot: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the columns [1 + N + R] of ``graph_view``; request r is in slot ``slot[r]`` on ``expert_of[r]``."""
    num_experts, num_requests = obs.experts.running.shape[0], len(slot)
    kind = np.repeat(np.arange(3, dtype=np.int32), (1, num_experts, num_requests))
    columns: dict[str, np.ndarray] = {}

    def put(rows: np.ndarray, view: object, names: list[str], at: tuple[np.ndarray, ...] | tuple[()] = ()) -> None:
        for name in names:
            column = columns.setdefault(name, np.zeros(len(kind), np.float32))
            column[rows] = getattr(view, name)[at]

    put(kind == 0, obs.arrived, ["prompt_tokens", "latency_limit_s"])
    put(kind == 1, obs.experts, [name for name in _names(ExpertView) if name not in ("profile", "load_left_s")])
    put(kind == 1, obs.experts.profile, [name for name in _names(ExpertProfile) if name not in ("kernels", "cards")])
    if obs.experts.load_left_s is not None:
        put(kind == 1, obs.experts, ["load_left_s"])
    others = ("running", "waiting", "limits", "first_token_s")
    put(kind == 2, obs.requests, [name for name in _names(RequestView) if name not in others], (expert_of, slot))
    if obs.requests.limits is not None:
        limits = _names(ServiceLimits)
        put(kind == 2, obs.requests, ["first_token_s"], (expert_of, slot))
        put(kind == 2, obs.requests.limits, limits, (expert_of, slot))
        put(kind == 0, obs.arrived.limits, limits)
    return {"kind": kind, **columns}


def _names(struct_type: type) -> list[str]:
    return [field.name for field in dataclasses.fields(struct_type)]


Graphs = dict[Relation, jraph.GraphsTuple]


def to_graphs(nodes: GraphFeatures) -> Graphs:
    """Returns the features of one environment as one NumPy graph per relation, all over the same table of nodes.

    Nodes are the arrived request, then the N experts, then the R requests on them by expert and slot. ``nodes`` is a
    dict of arrays [1 + N + R, ...]: ``kind``, an index into ``NODE_KINDS``, and under the name of each kind its
    features, 0 for nodes of another kind. Edges lead to experts, as in ``graph_view``. The network reads them in both
    directions. ``jraph.batch_np`` joins graphs of the same relation.

    Raises:
      InputError: the features have batch axes.
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
        requests_in = np.flatnonzero(mask[expert_of, slot])
        graphs[name, "expert"] = relation(1 + len(experts) + requests_in, expert_of[requests_in])
    return graphs
