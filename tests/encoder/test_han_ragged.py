"""The encoder on ragged graphs equals the dense encoder, for any graph and any batch of graphs."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jraph
import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.encoder.graph import GraphFeatures
from qos_jax.encoder.han import HAN, Embedding, HANConfig
from qos_jax.encoder.han_ragged import segment_encode
from qos_jax.encoder.jraph_views import NODE_KINDS, Graphs, to_graphs
from tests.helpers.encoder_worlds import busy_nodes, one_of, quick_jit, some_nodes, variables_of

CONFIG = HANConfig(features=16, heads=4, layers=2)
WORLDS = {
    "busy": ("paper-3", 30.0),
    "full slots": ("paper-3", 500.0),
    "idle experts": ("paper-3", 8.0, 1),
    "no requests": ("paper-3", 1e-3),
}


dense = quick_jit(HAN(CONFIG).apply)


def segment(graphs: Graphs) -> Embedding:
    """All operations in one program, which compiles faster than each of them alone."""
    return quick_jit(lambda variables: segment_encode(variables, CONFIG, graphs))(variables_of(CONFIG))


def joined(fleets: Iterable[GraphFeatures]) -> Graphs:
    graphs = [to_graphs(nodes) for nodes in fleets]
    return {relation: jraph.batch_np([each[relation] for each in graphs]) for relation in graphs[0]}


@functools.cache
def ragged_of_worlds() -> dict[str, Embedding]:
    """The ragged form of all worlds in one batch, so that one program is compiled."""
    found = segment(joined(one_of(some_nodes(*world), i) for world in WORLDS.values() for i in range(4)))
    parts = [np.split(np.asarray(values), len(WORLDS)) for values in (found.arrived, found.experts)]
    return {world: Embedding(*part) for world, part in zip(WORLDS, zip(*parts, strict=True), strict=True)}


@pytest.mark.parametrize("world", [*WORLDS, "eight unequal experts"])
@pytest.mark.slow
def test_the_ragged_form_equals_the_dense_form(world: str) -> None:
    batch = some_nodes(*WORLDS.get(world, ("edge-8", 60.0)))
    present = np.asarray(batch.running | batch.waiting)
    assert present.all() == (world == "full slots")
    assert present.any() == (world != "no requests")
    assert np.any(~present.any(-1)) == (world in ("idle experts", "no requests"))
    expected = dense(variables_of(CONFIG), batch)
    found = ragged_of_worlds()[world] if world in WORLDS else segment(joined(one_of(batch, i) for i in range(4)))
    np.testing.assert_allclose(found.arrived, expected.arrived, atol=1e-5)
    np.testing.assert_allclose(found.experts, np.concatenate(expected.experts), atol=1e-5)


@pytest.mark.slow
def test_fleets_of_different_sizes_make_one_batch() -> None:
    busy, idle = (some_nodes(*WORLDS[world]) for world in ("busy", "idle experts"))
    large = one_of(busy).replace(
        **{name: np.concatenate(getattr(busy, name)) for name in ("experts", "requests", "running", "waiting")}
    )
    fleets = [one_of(busy), large, one_of(idle)]
    assert [len(nodes.experts) for nodes in fleets] == [3, 12, 3]
    found, expected = segment(joined(fleets)), [dense(variables_of(CONFIG), nodes) for nodes in fleets]
    np.testing.assert_allclose(found.arrived, np.stack([each.arrived for each in expected]), atol=1e-5)
    np.testing.assert_allclose(found.experts, np.concatenate([each.experts for each in expected]), atol=1e-5)


def test_the_graphs_hold_every_request_once_on_its_expert() -> None:
    nodes = one_of(busy_nodes())
    graphs = to_graphs(nodes)
    table = graphs["arrived", "expert"].nodes
    present = np.asarray(nodes.running | nodes.waiting)
    kinds = [NODE_KINDS[kind] for kind in table["kind"]]
    assert kinds == ["arrived"] + ["expert"] * 3 + ["request"] * present.sum()
    np.testing.assert_array_equal(table["request"][4:], np.asarray(nodes.requests)[present])
    np.testing.assert_array_equal(table["expert"][1:4], nodes.experts)
    assert not table["expert"][4:].any() and not table["request"][:4].any()
    for name in ("running", "waiting"):
        graph, mask = graphs[name, "expert"], np.asarray(getattr(nodes, name))
        np.testing.assert_array_equal(graph.receivers, 1 + np.nonzero(mask)[0])
        np.testing.assert_array_equal(table["request"][graph.senders], np.asarray(nodes.requests)[mask])


def test_batch_axes_are_refused() -> None:
    with pytest.raises(InputError, match="no batch axes"):
        to_graphs(busy_nodes())
