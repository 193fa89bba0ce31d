"""Metrics of predictions, by hand and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qos_jax import InputError
from qos_jax.predictor.metrics import (
    bucket_scores,
    calibration_error,
    quantity_scores,
    r_squared,
    rank_correlation,
    reliability_bins,
    routing,
)

TRUTH = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])


class TestRSquared:
    def test_by_hand(self):
        predicted = np.array([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5]])
        # The first expert is predicted exactly; on the second, the squared error is 3/4, and that of the mean is 1.
        np.testing.assert_allclose(r_squared(TRUTH, predicted, np.array([0.5, 1.0])), [1.0, 0.25])

    def test_a_baseline_may_differ_between_prompts(self):
        predicted = np.full((3, 2), 0.5)
        baseline = np.array([[0.0, 0.5], [0.0, 0.5], [0.5, 0.5]])
        np.testing.assert_allclose(r_squared(TRUTH, predicted, baseline), [1 - 0.5 / 1.0, 0.0])

    def test_nothing_can_be_explained_where_the_baseline_is_right(self):
        assert np.isnan(r_squared(np.ones((3, 1)), np.zeros((3, 1)), np.ones(1))).all()


class TestRankCorrelation:
    def test_as_scipy_has_it(self):
        rng = np.random.default_rng(0)
        truth, predicted = rng.integers(0, 4, (50, 6)), rng.normal(size=(50, 6)).round(1)
        usable = np.ptp(truth, axis=1) > 0
        expected = [stats.spearmanr(x, y).statistic for x, y in zip(truth[usable], predicted[usable], strict=True)]
        mean, number = rank_correlation(truth, predicted)
        assert (mean, number) == (pytest.approx(np.mean(expected)), usable.sum())

    def test_prompts_on_which_all_are_equal_do_not_count(self):
        assert rank_correlation(np.array([[1, 1, 1], [1, 2, 3]]), np.array([[3, 1, 2], [3, 2, 1]])) == (-1.0, 1)

    def test_one_expert_has_no_ranks(self):
        mean, number = rank_correlation(np.ones((3, 1)), np.ones((3, 1)))
        assert np.isnan(mean)
        assert number == 0


class TestRouting:
    def test_by_hand(self):
        predicted = np.array([[0.1, 0.2], [0.2, 0.1], [0.1, 0.2]])
        expected = {"routed": 2 / 3, "best_single": 2 / 3, "random": 3.5 / 6, "oracle": 2.5 / 3}
        assert routing(TRUTH, predicted, np.array(1)) == pytest.approx(expected)

    def test_the_best_single_may_differ_between_folds(self):
        assert routing(TRUTH, TRUTH, np.array([0, 0, 1]))["best_single"] == pytest.approx(1 / 3)


def test_buckets_by_hand():
    label, predicted = np.array([[0, 1], [2, 1]]), np.array([[0, 0], [2, 1]])
    assert bucket_scores(label, predicted, np.array([2, 1])) == {"accuracy": 0.75, "majority": 0.75}


class TestReliability:
    def test_bins_by_hand(self):
        bins = reliability_bins(np.array([0.4, 0.1, 0.3, 0.2]), np.array([1.0, 0.0, 0.0, 1.0]), num_bins=2)
        first, second = bins
        assert first == pytest.approx({"number": 2, "predicted": 0.15, "realised": 0.5, "standard_error": 0.5 / 2**0.5})
        assert second == pytest.approx(
            {"number": 2, "predicted": 0.35, "realised": 0.5, "standard_error": 0.5 / 2**0.5}
        )
        assert calibration_error(bins) == pytest.approx((0.35 + 0.15) / 2)

    def test_fewer_predictions_than_bins(self):
        assert [entry["number"] for entry in reliability_bins(np.array([0.4, 0.1]), np.ones(2))] == [1, 1]

    def test_larger_bins_count_for_more(self):
        bins = [{"number": 3, "predicted": 0.5, "realised": 0.4}, {"number": 1, "predicted": 0.5, "realised": 1.0}]
        assert calibration_error(bins) == pytest.approx(0.2)


class TestQuantityScores:
    def test_predictions_of_half_the_spread_have_slope_two(self):
        truth = np.random.default_rng(0).normal(size=(200, 3))
        scores = quantity_scores(truth, truth / 2.0, np.zeros(3))
        assert scores["slope"] == pytest.approx(2.0)
        assert scores["r2"] == pytest.approx(0.75)
        assert scores["mae"] == pytest.approx(scores["baseline_mae"] / 2.0)
        assert scores["rank_correlation"] == pytest.approx(1.0)
        assert scores["bias"] == pytest.approx(-truth.mean() / 2.0)

    def test_predictions_of_another_shape_do_not_broadcast(self):
        with pytest.raises(InputError, match=r"predicted has shape \(2,\), must be \[M, N\] = \[3, 2\]"):
            quantity_scores(TRUTH, TRUTH[0], np.zeros(2))
        with pytest.raises(InputError, match=r"predicted has shape \(3, 1\)"):
            routing(TRUTH, TRUTH[:, :1], np.array(1))

    def test_the_mean_of_a_prompt_explains_nothing_within_it(self):
        rng = np.random.default_rng(0)
        of_prompt, of_expert = rng.normal(size=(2000, 1)), rng.normal(size=(2000, 3))
        scores = quantity_scores(of_prompt + of_expert, np.broadcast_to(of_prompt, (2000, 3)), np.zeros(3))
        assert scores["r2"] == pytest.approx(0.5, abs=0.05)
        assert scores["within_r2"] == pytest.approx(0.0, abs=1e-6)
