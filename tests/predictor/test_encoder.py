"""The encoder against the published networks in NumPy, with and without padding, and its gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.predictor.encoder import EncoderConfig, TextEncoder, mean_pool
from qos_jax.predictor.pretrained import Pretrained, load_pretrained
from tests.helpers.numpy_encoder import numpy_embedding, numpy_states
from tests.helpers.tiny_encoder import CONFIGS, VOCABULARY, tiny_tensors, write_tiny_encoder

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    intermediate_size=24,
    max_positions=64,
    num_token_types=2,
)

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(layout, tmp_path_factory) -> Pretrained:
    return load_pretrained(write_tiny_encoder(tmp_path_factory.mktemp(layout), layout))


def states_of(pretrained: Pretrained, ids, mask=None) -> np.ndarray:
    ids = np.atleast_2d(ids).astype(np.int32)
    mask = np.ones(ids.shape, bool) if mask is None else np.atleast_2d(mask)
    return np.asarray(apply(pretrained.config, pretrained.weights, ids, mask))


@functools.partial(quick_jit, static_argnums=0)
def apply(config: EncoderConfig, weights, ids, mask):
    return TextEncoder(config).apply(weights, ids, mask)


def some_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(VOCABULARY), length)


class TestPublishedNetworks:
    @pytest.mark.parametrize("length", [1, 7, 64])
    def test_states_are_those_of_the_published_network(self, tiny, layout, length):
        expected = numpy_states(tiny_tensors(layout, 0), CONFIGS[layout], some_ids(length))
        np.testing.assert_allclose(states_of(tiny, some_ids(length))[0], expected, atol=1e-5)

    def test_embedding_is_the_mean_state_at_unit_length(self, tiny, layout):
        ids = some_ids(5)
        mask = np.arange(7)[None] < 5
        embedding = quick_jit(mean_pool)(states_of(tiny, np.pad(ids, (0, 2)), mask), mask)[0]
        expected = numpy_embedding(tiny_tensors(layout, 0), CONFIGS[layout], ids)
        np.testing.assert_allclose(embedding, expected, atol=1e-5)

    def test_order_of_tokens_matters(self, tiny):
        ids = some_ids(7)
        forward, backward = states_of(tiny, ids)[0], states_of(tiny, ids[::-1])[0][::-1]
        assert np.abs(forward - backward).max() > 0.1


class TestMask:
    def test_what_padding_holds_and_how_long_it_is_changes_nothing(self, tiny):
        ids = some_ids(5)
        alone = states_of(tiny, ids)[0]
        for length in (7, 64):
            padded = np.concatenate([ids, some_ids(length - 5, seed=1)])
            np.testing.assert_allclose(states_of(tiny, padded, np.arange(length) < 5)[0, :5], alone, atol=1e-5)

    def test_texts_beside_it_change_nothing(self, tiny):
        ids = np.stack([some_ids(7, seed) for seed in range(3)])
        mask = np.arange(7) < np.array([7, 3, 5])[:, None]
        together = states_of(tiny, ids, mask)
        for row in range(3):
            np.testing.assert_allclose(states_of(tiny, ids[row], mask[row])[0], together[row], atol=1e-5)

    def test_text_of_no_tokens_has_finite_states_and_gradients(self, tiny):
        ids, mask = np.zeros((1, 7), np.int32), np.zeros((1, 7), bool)

        @quick_jit
        @jax.value_and_grad
        def loss(weights):
            states = TextEncoder(tiny.config).apply(weights, ids, mask)
            return mean_pool(states, mask).sum() + states.sum()

        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss(tiny.weights)))


def test_every_weight_that_a_text_uses_has_a_gradient(tiny):
    ids = some_ids(7)[None]
    mask = np.ones(ids.shape, bool)

    @quick_jit
    @jax.grad
    def gradient(weights):
        return jnp.square(TextEncoder(tiny.config).apply(weights, ids, mask)[..., 0]).sum()

    largest = {
        jax.tree_util.keystr(path): np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(tiny.weights))
    }
    # The bias of the keys adds a constant to all logits of a query, so the result does not depend on it.
    assert [name for name, value in largest.items() if not value > 1e-4 and "['key']['bias']" not in name] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "hidden_size is 16, must be a multiple of num_heads, 3"),
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"num_token_types": -1}, "num_token_types is -1, must be at least 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0, must lie between 0 and 1"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)
