"""The encoder: the textbook formula, symmetries, which inputs it distinguishes, and gradients of empty graphs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qos_jax import InputError
from qos_jax.encoder.graph import GraphFeatures
from qos_jax.encoder.han import HAN, Embedding, HANConfig
from tests.helpers.encoder_worlds import busy_nodes, one_of, quick_jit, some_nodes, variables_of

CONFIG = HANConfig(features=16, heads=4, layers=2)
NUM_EXPERTS = 3

encode = quick_jit(HAN(CONFIG).apply)
encode_once = quick_jit(HAN(HANConfig(features=16, heads=4, layers=1)).apply)


def of_experts(change: Any, nodes: GraphFeatures) -> GraphFeatures:
    """Applies ``change`` along the axis of the experts of one environment."""
    names = ("experts", "requests", "running", "waiting")
    return nodes.replace(**{name: change(getattr(nodes, name)) for name in names})


def of_requests(change: Any, nodes: GraphFeatures) -> GraphFeatures:
    return nodes.replace(**{name: change(getattr(nodes, name)) for name in ("requests", "running", "waiting")})


def assert_same(found: Embedding, expected: Embedding) -> None:
    np.testing.assert_allclose(found.arrived, expected.arrived, atol=1e-5)
    np.testing.assert_allclose(found.experts, expected.experts, atol=1e-5)


class TestTextbook:
    """One layer node by node and edge by edge, each neighbour projected before it is averaged."""

    config = HANConfig(features=16, heads=4, layers=1)

    def dense(self, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return x @ params["kernel"] + params.get("bias", 0.0)

    def attend(self, params: dict[str, Any], relation: int, target: np.ndarray, sources: np.ndarray) -> np.ndarray:
        heads = []
        for head in range(self.config.heads):
            to, of = (params[name]["kernel"][:, relation, head] for name in ("target_score", "source_score"))
            score = target @ to + params["target_score"]["bias"][relation, head] + sources @ of
            weight = np.exp(np.where(score > 0, score, 0.2 * score))
            heads.append(weight / weight.sum() @ (sources @ params["kernel"][relation, head]))
        return np.maximum(np.concatenate(heads) + params["bias"][relation], 0)

    def norm(self, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["scale"] + params["bias"]

    def expert(self, params: dict[str, Any], nodes: GraphFeatures, n: int) -> np.ndarray:
        read = [np.maximum(self.dense(params["arrived_to_expert"], nodes.arrived), 0)]
        for relation, mask in enumerate((nodes.running[n], nodes.waiting[n])):
            if mask.any():
                read.append(
                    self.attend(params["request_to_expert"], relation, nodes.experts[n], nodes.requests[n][mask])
                )
        stack = np.stack(read)
        semantic = params["semantic"]
        score = np.exp(np.tanh(self.dense(semantic["key"], stack)) @ semantic["query"]["kernel"][:, 0])
        own = self.dense(params["expert"], nodes.experts[n])
        return self.norm(params["expert_norm"], np.maximum(own + score / score.sum() @ stack, 0))

    @pytest.mark.parametrize(("rate_per_s", "only"), [(30.0, -1), (8.0, 1)])
    def test_a_layer_by_hand(self, rate_per_s: float, only: int) -> None:
        variables = variables_of(self.config)
        batch = some_nodes("paper-3", rate_per_s, only)
        found = encode_once(variables, batch)
        params = jax.tree.map(np.asarray, variables["params"]["layer_0"])
        nodes = jax.tree.map(np.asarray, one_of(batch))
        for n in range(NUM_EXPERTS):
            np.testing.assert_allclose(found.experts[0, n], self.expert(params, nodes, n), atol=1e-5)
        read = self.attend(params["expert_to_arrived"], 0, nodes.arrived, nodes.experts)
        own = self.dense(params["arrived"], nodes.arrived)
        arrived = self.norm(params["arrived_norm"], np.maximum(own + read, 0))
        np.testing.assert_allclose(found.arrived[0], arrived, atol=1e-5)


class TestSymmetries:
    variables = property(lambda self: variables_of(CONFIG))
    nodes = property(lambda self: one_of(busy_nodes()))

    def test_experts_in_another_order(self) -> None:
        order = np.array([2, 0, 1])
        found = encode(self.variables, of_experts(lambda x: x[order], self.nodes))
        expected = encode(self.variables, self.nodes)
        assert_same(found, Embedding(expected.arrived, expected.experts[order]))

    def test_requests_in_another_order(self) -> None:
        slots = np.random.default_rng(0).permutation(self.nodes.running.shape[-1])
        found = encode(self.variables, of_requests(lambda x: x[:, slots], self.nodes))
        assert_same(found, encode(self.variables, self.nodes))

    def test_more_empty_slots_change_nothing(self) -> None:
        def padded(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, 7)] + [(0, 0)] * (x.ndim - 2))

        assert_same(encode(self.variables, of_requests(padded, self.nodes)), encode(self.variables, self.nodes))

    def test_values_in_empty_slots_change_nothing(self) -> None:
        present = (self.nodes.running | self.nodes.waiting)[..., None]
        junk = self.nodes.replace(requests=jnp.where(present, self.nodes.requests, 4.0))
        assert_same(encode(self.variables, junk), encode(self.variables, self.nodes))

    def test_an_environment_does_not_depend_on_others_in_the_batch(self) -> None:
        together = encode(self.variables, busy_nodes())
        for i in range(4):
            alone = encode(self.variables, one_of(busy_nodes(), i))
            assert_same(alone, jax.tree.map(lambda x, i=i: x[i], together))

    def test_any_leading_axes(self) -> None:
        batch = busy_nodes()
        folded = encode(self.variables, jax.tree.map(lambda x: x.reshape(2, 1, 2, *x.shape[1:]), batch))
        assert folded.arrived.shape == (2, 1, 2, 16)
        assert folded.experts.shape == (2, 1, 2, NUM_EXPERTS, 16)
        assert_same(jax.tree.map(lambda x: x.reshape(4, *x.shape[3:]), folded), encode(self.variables, batch))

    @pytest.mark.parametrize("copies", [3, 21])
    def test_one_set_of_parameters_for_any_number_of_experts(self, copies: int) -> None:
        """A fleet of copies: attention over experts is a mean, so the embeddings are those of the small fleet."""
        fleet = of_experts(lambda x: jnp.concatenate([x] * copies), self.nodes)
        found, small = encode(self.variables, fleet), encode(self.variables, self.nodes)
        assert_same(found, Embedding(small.arrived, jnp.concatenate([small.experts] * copies)))


class TestWhatItTellsApart:
    variables = property(lambda self: variables_of(CONFIG))
    nodes = property(lambda self: one_of(busy_nodes()))

    def test_which_expert_is_busy(self) -> None:
        """Two equal experts, of which one holds requests: to swap them must show in the embedding of each."""
        idle = jnp.zeros_like(self.nodes.running[0])
        requests, running = self.nodes.requests.at[1].set(0.0), self.nodes.running.at[1].set(idle)
        experts = self.nodes.experts.at[1].set(self.nodes.experts[0])
        nodes = GraphFeatures(
            self.nodes.arrived, experts, requests, running, self.nodes.waiting.at[1].set(idle), self.nodes.legal
        )
        before = encode(self.variables, nodes).experts
        after = encode(self.variables, of_experts(lambda x: x[np.array([1, 0, 2])], nodes)).experts
        assert float(jnp.max(jnp.abs(after[0] - before[0]))) > 1e-2
        assert float(jnp.max(jnp.abs(after[1] - before[1]))) > 1e-2
        np.testing.assert_allclose(after[2], before[2], atol=1e-5)

    @pytest.mark.parametrize("queue", ["running", "waiting"])
    def test_a_request_is_read_by_its_own_expert_and_through_it_by_the_arrived_one(self, queue: str) -> None:
        expert, slot = np.argwhere(np.asarray(getattr(self.nodes, queue)))[0]
        touched = self.nodes.replace(requests=self.nodes.requests.at[expert, slot].add(1.0))
        before, after = encode(self.variables, self.nodes), encode(self.variables, touched)
        moved = np.max(np.abs(after.experts - before.experts), -1)
        assert moved[expert] > 1e-3
        assert np.all(np.delete(moved, expert) == 0)  # two layers reach no further
        assert float(jnp.max(jnp.abs(after.arrived - before.arrived))) > 1e-5

    def test_whether_a_request_runs_or_waits(self) -> None:
        turned = self.nodes.replace(running=self.nodes.waiting, waiting=self.nodes.running)
        before, after = encode(self.variables, self.nodes), encode(self.variables, turned)
        assert np.all(np.max(np.abs(after.experts - before.experts), -1) > 1e-2)


def degenerate(case: str) -> GraphFeatures:
    nodes = one_of(busy_nodes())
    none, all_slots = jnp.zeros_like(nodes.running), jnp.ones_like(nodes.running)
    match case:
        case "no requests":
            return nodes.replace(running=none, waiting=none, requests=0 * nodes.requests)
        case "all running":
            return nodes.replace(running=all_slots, waiting=none)
        case "all waiting":
            return nodes.replace(running=none, waiting=all_slots)
        case "one expert":
            return of_experts(lambda x: x[:1], nodes)
        case "nothing but zeros":
            return jax.tree.map(jnp.zeros_like, nodes)
    raise AssertionError(case)


@quick_jit
def value_and_gradients(variables: Any, nodes: GraphFeatures) -> Any:
    def loss(variables: Any, features: tuple[jax.Array, ...]) -> jax.Array:
        arrived, experts, requests = features
        found = HAN(CONFIG).apply(variables, nodes.replace(arrived=arrived, experts=experts, requests=requests))
        return jnp.sum(found.arrived**3) + jnp.sum(found.experts**3)

    return jax.value_and_grad(loss, (0, 1))(variables, (nodes.arrived, nodes.experts, nodes.requests))


def test_every_parameter_matters() -> None:
    _, (gradients, _) = value_and_gradients(variables_of(CONFIG), one_of(busy_nodes()))
    by_name = traverse_util.flatten_dict(gradients, sep="/")
    assert len(by_name) > 30
    assert not [name for name, gradient in by_name.items() if not np.any(gradient)]


@pytest.mark.parametrize("case", ["no requests", "all running", "all waiting", "one expert", "nothing but zeros"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_degenerate_graphs_have_finite_values_and_gradients(case: str, scale: float) -> None:
    variables = jax.tree.map(lambda x: scale * np.asarray(x), variables_of(CONFIG))
    for x in jax.tree.leaves(value_and_gradients(variables, degenerate(case))):
        assert np.all(np.isfinite(x))


def test_attention_weights_are_sown() -> None:
    nodes = some_nodes("paper-3", 8.0, 1)
    _, kept = quick_jit(functools.partial(HAN(CONFIG).apply, mutable="intermediates"))(variables_of(CONFIG), nodes)
    for layer in ("layer_0", "layer_1"):
        weights = {name: np.asarray(value) for name, (value,) in kept["intermediates"][layer].items()}
        queues = np.stack([nodes.running, nodes.waiting], -2)
        requests = weights["request_attention"]
        assert np.all(requests[~np.broadcast_to(queues[..., None, :], requests.shape)] == 0)
        np.testing.assert_allclose(requests.sum(-1), np.repeat(queues.any(-1)[..., None], 4, -1), atol=1e-5)
        assert np.ptp(requests[:, 1, 0][queues[:, 1, 0].repeat(4, 0).reshape(4, 4, -1)]) > 1e-3
        np.testing.assert_allclose(weights["expert_attention"].sum(-1), 1.0, atol=1e-5)
        assert weights["expert_attention"].shape == (4, 1, 4, NUM_EXPERTS)
        semantic = weights["semantic_attention"]
        np.testing.assert_allclose(semantic.sum(-1), 1.0, atol=1e-5)
        assert np.all(semantic[:, [0, 2]] == [0, 0, 1])  # where nothing runs or waits, all weight is on the arrived
        assert np.all((semantic[..., 0] > 0) == queues[..., 0, :].any(-1))


def test_requests_are_not_computed_in_the_last_layer() -> None:
    layers = variables_of(CONFIG)["params"]
    assert set(layers["layer_0"]) - set(layers["layer_1"]) == {"request", "expert_to_running", "expert_to_waiting"}


def test_projections_preserve_the_scale_of_values_at_initialisation() -> None:
    """The initialiser takes relations and heads for what they are, and not for inputs."""
    params = quick_jit(HAN(CONFIG).init)(jax.random.key(0), busy_nodes())["params"]
    for name in ("request_to_expert", "expert_to_arrived"):
        kernel = np.asarray(params["layer_1"][name]["kernel"])
        np.testing.assert_allclose(kernel.std() * np.sqrt(CONFIG.features), 1.0, rtol=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 30}, "features is 30, must be a multiple of heads, 4"),
        ({"layers": 0}, "layers is 0, must be at least 1"),
        ({"heads": -1}, "heads is -1, must be at least 1"),
    ],
)
def test_illegal_sizes_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HANConfig(**fields)
