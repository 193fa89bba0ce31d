"""The two views of an observation: values of the flat view, nodes and edges of the graph, and that they agree."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import ExpertProfile, Observation
from qos_jax.encoder.flat import FLAT_ARRIVED, FLAT_EXPERT, FLAT_LIMIT, flat_size, flat_view
from qos_jax.encoder.jraph_views import NODE_KINDS, graph_view
from qos_jax.sim.types import RATE_WINDOWS_S, ArrivedView, ExpertView, RequestView
from tests.helpers.small_env import small_experts

NUM_EXPERTS = 3
NUM_SLOTS = 6
RELATIONS = [(kind, "expert") for kind in ("arrived", "running", "waiting")]


def some_observation(
    seed: int, time_scale_s: float = 0.1, token_scale: int = 60, num_experts: int = NUM_EXPERTS
) -> Observation:
    """Requests in random slots, the running ones first; garbage in all other slots."""
    rng = np.random.default_rng(seed)
    shape = (num_experts, NUM_SLOTS)
    running = np.arange(NUM_SLOTS) < rng.integers(0, NUM_SLOTS, num_experts)[:, None]
    present = running | (rng.random(shape) < 0.4)
    generated = np.where(running, rng.integers(0, token_scale, shape), 0)
    requests = RequestView(
        running=running,
        waiting=present & ~running,
        prompt_tokens=rng.integers(1, token_scale + 1, shape).astype(np.int32),
        generated_tokens=generated.astype(np.int32),
        computed_tokens=np.where(running, generated + 1, 0).astype(np.int32),
        age_s=rng.exponential(time_scale_s, shape).astype(np.float32),
        latency_limit_s=rng.choice([0.02, 0.05], shape).astype(np.float32),
        predicted_score=rng.random(shape).astype(np.float32),
        predicted_tokens=(generated + 1 + rng.exponential(token_scale, shape)).astype(np.float32),
    )
    garbage = {
        field.name: np.where(present, getattr(requests, field.name), rng.choice([-1, 0, 1_000_000], shape))
        for field in dataclasses.fields(RequestView)
        if field.name not in ("running", "waiting", "limits", "first_token_s")
    }
    requests = requests.replace(**{name: x.astype(getattr(requests, name).dtype) for name, x in garbage.items()})
    waiting = np.sum(requests.waiting, -1, dtype=np.int32)
    return Observation(
        arrived=ArrivedView(
            np.int32(rng.integers(1, token_scale + 1)),
            np.float32(0.06),
            rng.random(num_experts).astype(np.float32),
            rng.exponential(token_scale, num_experts).astype(np.float32),
            rng.exponential(time_scale_s, len(RATE_WINDOWS_S)).astype(np.float32),
        ),
        experts=ExpertView(
            profile=jax.tree.map(np.asarray, small_experts(num_experts, max_running=8, max_waiting=4)),
            running=np.sum(running, -1, dtype=np.int32),
            waiting=waiting,
            kv_used_blocks=rng.integers(0, 41, num_experts).astype(np.int32),
        ),
        requests=requests,
        action_mask=np.append(waiting < 4, True),
    )


def by_expert(flat: Any, num_experts: int = NUM_EXPERTS) -> dict[str, np.ndarray]:
    """The columns [N] of the flat view by name."""
    rows = np.asarray(flat)[len(FLAT_ARRIVED) :].reshape(num_experts, len(FLAT_EXPERT))
    return dict(zip(FLAT_EXPERT, rows.T, strict=True))


def slots_in_place(obs: Observation, running: np.ndarray, waiting: np.ndarray, **fields: Any) -> Observation:
    requests = obs.requests.replace(running=running, waiting=waiting, **fields)
    experts = obs.experts.replace(
        running=np.sum(running, -1, dtype=np.int32), waiting=np.sum(waiting, -1, dtype=np.int32)
    )
    return obs.replace(requests=requests, experts=experts)


def test_the_flat_view_by_hand() -> None:
    obs = some_observation(0)
    shape = (NUM_EXPERTS, NUM_SLOTS)
    running, waiting = np.zeros((2, *shape), bool)
    running[1, :2] = waiting[1, 2] = True
    obs = slots_in_place(
        obs,
        running,
        waiting,
        predicted_tokens=np.full(shape, 50.0, np.float32),
        generated_tokens=np.full(shape, 20, np.int32),
        age_s=np.full(shape, 0.75, np.float32),
        latency_limit_s=np.full(shape, 0.03, np.float32),
        predicted_score=np.tile(np.float32([0.2, 0.8, 0.9, 0.0, 0.0, 0.0]), (NUM_EXPERTS, 1)),
    )
    obs = obs.replace(arrived=obs.arrived.replace(recent_rate_per_s=np.float32([0.0, 3.0, 6.0])))
    flat = np.asarray(flat_view(obs))
    arrived = [math.log1p(obs.arrived.prompt_tokens) / math.log(1025), 2.0, 0.0, math.log(2), math.log(3)]
    np.testing.assert_allclose(flat[: len(FLAT_ARRIVED)], arrived, rtol=1e-5)
    columns = by_expert(flat)
    expected = {
        "running": [0, 2 / 8, 0],
        "waiting": [0, 1 / 4, 0],
        "kv_used": obs.experts.kv_used_blocks / 40,
        "step_time": np.array([0.02, 0.026, 0.032]) / 0.06,
        "prefill_time": np.array([0.0356, 0.04628, 0.05696]) / 0.06,
        "running_tokens_left": [0, math.log1p(60) / math.log(1025), 0],
        "waiting_tokens_left": [0, math.log1p(30) / math.log(1025), 0],
        "running_latency": [0, 0.5, 0],
        "running_score": [0, 0.5, 0],
        "waiting_score": [0, 0.9, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-5, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    time_scale_s=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    token_scale=st.sampled_from([1, 60, 1_000_000]),
    latency_limit_s=st.sampled_from([0.0, 1e-9, 0.03, 1e9, np.inf]),
    limits=st.sampled_from([(1, 0, 1), (32, 32, 3000), (2**30, 2**30, 2**30)]),
)
def test_the_flat_view_is_always_finite_and_small(
    seed: int, time_scale_s: float, token_scale: int, latency_limit_s: float, limits: tuple[int, int, int]
) -> None:
    obs = some_observation(seed, time_scale_s, token_scale)
    limit_s = np.float32(latency_limit_s)
    max_running, max_waiting, kv_blocks = (np.full(NUM_EXPERTS, limit, np.int32) for limit in limits)
    profile = obs.experts.profile.replace(max_running=max_running, max_waiting=max_waiting, kv_blocks=kv_blocks)
    obs = obs.replace(
        arrived=obs.arrived.replace(latency_limit_s=limit_s),
        experts=obs.experts.replace(profile=profile),
        requests=obs.requests.replace(latency_limit_s=np.full((NUM_EXPERTS, NUM_SLOTS), limit_s)),
    )
    flat = np.asarray(flat_view(obs))
    assert flat.shape == (flat_size(NUM_EXPERTS),)
    assert flat.dtype == np.float32
    assert np.all(np.abs(flat) <= FLAT_LIMIT)


def test_the_flat_view_in_jit_and_vmap() -> None:
    observations = [some_observation(seed) for seed in range(4)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *observations)
    together = jax.jit(jax.vmap(flat_view))(batch)
    np.testing.assert_allclose(together, jnp.stack([flat_view(obs) for obs in observations]), rtol=1e-5)
    assert len(np.unique(together, axis=0)) == len(observations)


def test_the_flat_view_ignores_empty_slots_and_permutes_with_the_experts() -> None:
    obs = some_observation(3)
    present = obs.requests.running | obs.requests.waiting
    assert not present.all()
    junk = jax.tree.map(lambda x: np.where(present, x, x.dtype.type(7)) if x.dtype != bool else x, obs.requests)
    np.testing.assert_array_equal(flat_view(obs.replace(requests=junk)), flat_view(obs))
    order = np.array([2, 0, 1])
    arrived = obs.arrived.replace(
        predicted_score=obs.arrived.predicted_score[order], predicted_tokens=obs.arrived.predicted_tokens[order]
    )
    experts, requests = jax.tree.map(lambda x: x[order], (obs.experts, obs.requests))
    turned = by_expert(flat_view(obs.replace(arrived=arrived, experts=experts, requests=requests)))
    for name, column in by_expert(flat_view(obs)).items():
        np.testing.assert_array_equal(turned[name], column[order], err_msg=name)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), num_experts=st.integers(1, 5))
def test_the_graph_holds_every_request_once_with_its_fields(seed: int, num_experts: int) -> None:
    obs = some_observation(seed, num_experts=num_experts)
    graphs = graph_view(obs)
    assert list(graphs) == RELATIONS
    present = obs.requests.running | obs.requests.waiting
    nodes = graphs["arrived", "expert"].nodes
    kinds = [NODE_KINDS[kind] for kind in nodes["kind"]]
    assert kinds == ["arrived"] + ["expert"] * num_experts + ["request"] * int(present.sum())
    is_expert, is_request = np.equal(kinds, "expert"), np.equal(kinds, "request")
    assert nodes["prompt_tokens"][0] == obs.arrived.prompt_tokens
    assert nodes["latency_limit_s"][0] == obs.arrived.latency_limit_s
    for name in {field.name for field in dataclasses.fields(ExpertProfile)} - {"kernels", "cards"}:  # not observed
        np.testing.assert_array_equal(nodes[name][is_expert], getattr(obs.experts.profile, name))
        assert not nodes[name][~is_expert].any()
    for name in ("running", "waiting", "kv_used_blocks"):
        np.testing.assert_array_equal(nodes[name][is_expert], getattr(obs.experts, name))
    for name in ("prompt_tokens", "generated_tokens", "age_s", "predicted_score", "predicted_tokens"):
        np.testing.assert_array_equal(nodes[name][is_request], getattr(obs.requests, name)[present])
    linked = np.concatenate([graphs[relation].senders for relation in RELATIONS[1:]])
    np.testing.assert_array_equal(np.sort(linked), np.flatnonzero(is_request))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_both_views_agree(seed: int) -> None:
    """Sums over the edges of the graph give the columns of the flat view."""
    obs = some_observation(seed, time_scale_s=2.0)
    graphs, columns = graph_view(obs), by_expert(flat_view(obs))
    for name in ("running", "waiting"):
        graph = graphs[name, "expert"]
        of_sender = {column: values[graph.senders] for column, values in graph.nodes.items()}
        expert = graph.receivers - 1

        def over_edges(values: np.ndarray, expert: np.ndarray = expert) -> np.ndarray:
            return np.bincount(expert, values, NUM_EXPERTS)

        count = over_edges(np.ones(len(expert)))
        latency = of_sender["age_s"] / (of_sender["latency_limit_s"] * of_sender["predicted_tokens"])
        remaining_tokens = over_edges(of_sender["predicted_tokens"] - of_sender["generated_tokens"])
        limit = getattr(obs.experts.profile, f"max_{name}")
        expected = {
            name: count / limit,
            f"{name}_tokens_left": np.log1p(remaining_tokens) / np.log1p(1024),
            f"{name}_latency": over_edges(np.minimum(latency, FLAT_LIMIT)) / np.maximum(count, 1),
            f"{name}_score": over_edges(of_sender["predicted_score"]) / np.maximum(count, 1),
        }
        for column, values in expected.items():
            np.testing.assert_allclose(columns[column], values, rtol=1e-4, atol=1e-5, err_msg=column)
    arrived = graphs["arrived", "expert"]
    np.testing.assert_allclose(columns["predicted_score"][arrived.receivers - 1], arrived.edges["predicted_score"])


def test_the_graph_holds_the_legal_actions() -> None:
    obs = some_observation(1).replace(action_mask=np.array([True, False, True, False]))
    graph = graph_view(obs)["arrived", "expert"]
    np.testing.assert_array_equal(graph.edges["legal"], [1, 0, 1])
    np.testing.assert_array_equal(graph.receivers, [1, 2, 3])
    np.testing.assert_array_equal(graph.senders, [0, 0, 0])
    np.testing.assert_array_equal(graph.globals["drop_legal"], [0])


@pytest.mark.parametrize("relation", RELATIONS)
def test_graphs_of_different_sizes_make_a_batch(relation: tuple[str, str]) -> None:
    no_requests = np.zeros((NUM_EXPERTS, NUM_SLOTS), bool)
    empty = slots_in_place(some_observation(0), no_requests, no_requests)
    graphs = [graph_view(obs)[relation] for obs in (some_observation(1), empty, some_observation(2))]
    batch = jraph.batch_np(graphs)
    np.testing.assert_array_equal(batch.n_node, [len(graph.nodes["kind"]) for graph in graphs])
    assert batch.n_node[1] == 1 + NUM_EXPERTS
    assert np.all(batch.nodes["kind"][batch.receivers] == NODE_KINDS.index("expert"))
    for graph, again in zip(graphs, jraph.unbatch_np(batch), strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, graph)
