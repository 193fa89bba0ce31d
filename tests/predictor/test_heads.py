"""Heads: buckets, losses, and the forecasts of an ensemble."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import InputError
from qos_jax.predictor.heads import (
    Buckets,
    Head,
    HeadConfig,
    HeadNetwork,
    Standard,
    bucket_edges,
    bucket_of,
    fit_amounts,
    fit_scale,
)
from tests.helpers.quick_compilation import quick_compilation

NONE = np.inf


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
    with quick_compilation():
        yield


def column(*values):
    return np.array(values, float)[:, None]


def head_of(config, values, amounts=None, members=2):
    """Returns a head with a fitted scale and initial weights."""
    keys = jax.random.split(jax.random.key(0), members)
    weights = jax.vmap(HeadNetwork(config, values.shape[1]).init, (0, None))(keys, jnp.zeros(4))
    return Head(config, fit_scale(config, values, amounts), weights)


class TestBucketEdges:
    @pytest.mark.parametrize(
        ("values", "edges"),
        [
            (range(1, 11), [2, 4, 6, 8]),
            ([0] * 6 + [0.5] + [1] * 3, [0, 0.5, NONE, NONE]),  # each of the two common values has its own bucket
            ([0] * 9 + [1], [0, NONE, NONE, NONE]),
            ([0] + [1] * 9, [0, NONE, NONE, NONE]),
            ([3] * 10, [NONE, NONE, NONE, NONE]),
        ],
    )
    def test_by_hand(self, values, edges):
        np.testing.assert_array_equal(bucket_edges(column(*values), 5), [edges])

    def test_distinct_values_fill_buckets_equally(self):
        values = np.random.default_rng(0).random((100, 3))
        for expert in range(3):
            counts = np.bincount(bucket_of(bucket_edges(values, 5), values)[:, expert])
            np.testing.assert_array_equal(counts, [20] * 5)

    @settings(max_examples=50)
    @given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(2, 6))
    def test_no_bucket_is_empty_and_equal_values_stay_together(self, values, num_buckets):
        edges = bucket_edges(column(*values), num_buckets)
        used = np.unique(bucket_of(edges, column(*values)))
        assert used.tolist() == list(range(1 + np.isfinite(edges).sum()))
        if len(set(values)) > 1:
            assert len(used) > 1  # different values are in different buckets, whatever the quantiles


class TestBuckets:
    def test_cross_entropy_by_hand(self):
        scale = Buckets(
            jnp.array([[0.5]]), jnp.array([[0.2, 0.8]]), jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))
        )
        outputs = jnp.log(jnp.array([[[3.0, 1.0]]]))  # shares of 1:3 and outputs of 3:1 give equal probabilities
        for value in (0.1, 0.9):
            assert scale.losses(outputs, jnp.array([[value]])) == pytest.approx(np.log(2.0))
        # An edge belongs to the bucket below.
        assert scale.losses(jnp.zeros((1, 1, 2)), jnp.array([[0.5]])) == pytest.approx(-np.log(0.25))

    @pytest.mark.parametrize("form", ["buckets", "regression"])
    def test_before_training_the_mean_is_expected(self, form):
        values = np.random.default_rng(0).random((50, 3))
        forecast = head_of(HeadConfig(form, (8,)), values).forecast(jnp.ones((2, 4)))
        np.testing.assert_allclose(forecast.value, np.tile(values.mean(0), (2, 1)), rtol=1e-5)
        np.testing.assert_allclose(forecast.amount, forecast.value, rtol=1e-5)
        if form == "buckets":
            np.testing.assert_allclose(forecast.probabilities, 0.2, rtol=1e-5)

    def test_an_empty_bucket_is_never_expected(self):
        head = head_of(HeadConfig("buckets", ()), column(*[0] * 6, 0.5, *[1] * 3), column(*range(10)))
        forecast = head.decode(jnp.full((1, 1, 5), 50.0).at[..., :3].set(0.0))
        np.testing.assert_allclose(forecast.probabilities, [[[0.6, 0.1, 0.3, 0.0, 0.0]]], rtol=1e-5)
        assert forecast.amount == pytest.approx(4.5)
        assert np.isfinite(head.losses(jnp.ones((1, 4)), jnp.array([[0.7]]))).all()


class TestEnsemble:
    def test_members_are_averaged_before_they_are_decoded(self):
        head = head_of(HeadConfig("buckets", ()), column(*range(10)))
        (kernel,) = [x for x in jax.tree.leaves(head.weights) if x.ndim == 4]
        evidence = jnp.zeros_like(kernel).at[0, ..., 4].set(1.0).at[1, ..., 4].set(-1.0)
        weights = jax.tree.map(lambda x: evidence if x.ndim == 4 else x, head.weights)
        undecided = head.replace(weights=weights).forecast(jnp.ones((1, 4)))
        np.testing.assert_allclose(undecided.probabilities, 0.2, rtol=1e-5)


class TestRegression:
    def test_losses_are_in_standard_deviations(self):
        scale = Standard(jnp.array([2.0]), jnp.array([4.0]), jnp.array(False), jnp.ones(1), jnp.ones(()))
        assert scale.losses(jnp.array([[[0.5]]]), jnp.array([[10.0]])) == pytest.approx(0.5 * 1.5**2)

    def test_an_expert_of_equal_values_is_no_trouble(self):
        head = head_of(HeadConfig("regression", ()), column(*[3.0] * 10))
        assert head.forecast(jnp.ones((1, 4))).value == pytest.approx(3.0)

    def test_expected_amounts_are_those_of_lognormals(self):
        rng = np.random.default_rng(0)
        predicted = rng.normal(5.0, 0.7, (20_000, 2))
        spread = np.array([0.3, 0.8])
        amounts = np.exp(predicted + spread * rng.normal(size=predicted.shape))
        scale = fit_scale(HeadConfig("regression"), predicted, amounts)
        fitted = fit_amounts(scale, predicted, amounts)
        assert fitted.power == pytest.approx(1.0)
        np.testing.assert_allclose(fitted.ratio, np.exp(spread**2 / 2.0), rtol=0.03)

    def test_expected_amounts_are_flatter_where_what_is_long_varies_less(self):
        rng = np.random.default_rng(0)
        predicted = rng.normal(5.0, 0.7, (20_000, 1))
        amounts = np.minimum(np.exp(predicted + rng.normal(size=predicted.shape)), 300.0)
        fitted = fit_amounts(fit_scale(HeadConfig("regression"), predicted, amounts), predicted, amounts)
        expected = fitted.ratio * np.exp(fitted.power * predicted)
        assert fitted.power < 0.9
        np.testing.assert_allclose(expected.mean(), amounts.mean(), rtol=1e-4)
        longest = predicted[:, 0] > np.quantile(predicted, 0.9)
        np.testing.assert_allclose(expected[longest].mean(), amounts[longest].mean(), rtol=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "ranking"}, "form is 'ranking', must be one of buckets, regression"),
        ({"hidden": (64, 0)}, r"hidden is \(64, 0\)"),
        ({"hidden": (6.5,)}, r"hidden is \(6.5,\)"),
        ({"num_buckets": 1}, "num_buckets is 1"),
    ],
)
def test_a_bad_shape_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        HeadConfig(**change)
