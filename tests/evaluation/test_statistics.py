"""Statistics of evaluations against scipy, against hand-computed cases, and by the coverage of their intervals."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import scipy.stats

from qos_jax.errors import InputError
from qos_jax.evaluation.statistics import (
    crossed_interval,
    crossed_p_value,
    holm,
    interquartile_mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    summarise,
)

KEY = jax.random.key(0)


def scores(runs: int = 10, tasks: int = 4, seed: int = 0) -> np.ndarray:
    """Tasks whose means lie far apart, so that it matters whether runs are resampled within them."""
    return np.random.default_rng(seed).normal(10.0 * np.arange(tasks), 1.0, (runs, tasks))


@pytest.mark.parametrize("confidence", [0.95, pytest.param(0.8, marks=pytest.mark.slow)])
def test_the_interval_over_seeds_is_students(confidence: float) -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 7)
    summary = summarise(values, confidence)
    interval = scipy.stats.t.interval(confidence, 6, loc=values.mean(), scale=scipy.stats.sem(values))
    assert summary["mean"] == pytest.approx(values.mean())
    assert (summary["low"], summary["high"]) == pytest.approx(interval)


def test_one_seed_has_no_interval() -> None:
    summary = summarise([0.7])
    assert summary["mean"] == 0.7
    assert np.isnan([summary["low"], summary["high"]]).all()


@pytest.mark.parametrize("shape", [(10, 4), (7, 1), (3, 3), (1, 1)])
def test_the_interquartile_mean_is_scipys(shape: tuple[int, int]) -> None:
    table = scores(*shape)
    estimate = interquartile_mean(KEY, table)
    assert estimate.value == pytest.approx(scipy.stats.trim_mean(table, 0.25, axis=None))
    assert estimate.low <= estimate.value <= estimate.high


def test_one_run_gone_wild_does_not_move_the_interquartile_mean() -> None:
    table = scores(8, 1)
    wild = table.copy()
    wild[table.argmax()] = 1e6
    assert interquartile_mean(KEY, wild).value == interquartile_mean(KEY, table).value


def test_the_bootstrap_of_one_task_is_scipys() -> None:
    values = np.random.default_rng(1).exponential(1.0, 30)
    estimate = stratified_bootstrap(KEY, np.mean, values[:, None], resamples=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=np.random.default_rng(2)
    ).confidence_interval
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_runs_are_resampled_within_their_task() -> None:
    table = np.tile([0.0, 1.0, 5.0], (6, 1))  # nothing varies within a task
    assert stratified_bootstrap(KEY, np.mean, table) == (2.0, 2.0, 2.0)
    estimate = stratified_bootstrap(KEY, np.mean, scores(20))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / np.sqrt(80), rel=0.2)


def test_the_key_decides() -> None:
    first, again, other = (interquartile_mean(jax.random.key(seed), scores()) for seed in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_the_probability_of_improvement_is_mann_and_whitneys() -> None:
    rng = np.random.default_rng(3)
    better, baseline = rng.integers(0, 6, (9, 3)).astype(float), rng.integers(0, 5, (5, 3)).astype(float)
    expected = np.mean(scipy.stats.mannwhitneyu(better, baseline).statistic / (9 * 5))
    estimate = probability_of_improvement(KEY, better, baseline)
    assert estimate.value == pytest.approx(expected)
    assert 0.0 <= estimate.low < estimate.value < estimate.high <= 1.0


def test_probabilities_of_known_cases() -> None:
    table = scores()
    assert probability_of_improvement(KEY, table + 100.0, table) == (1.0, 1.0, 1.0)
    assert probability_of_improvement(KEY, table, table + 100.0) == (0.0, 0.0, 0.0)
    assert probability_of_improvement(KEY, np.ones((4, 2)), np.ones((3, 2))) == (0.5, 0.5, 0.5)


def test_the_profile_is_the_share_above_each_threshold() -> None:
    table = np.array([[0.1, 0.6], [0.3, 0.8], [0.5, 1.0], [0.7, 1.0]])
    profile = performance_profile(KEY, table, [0.0, 0.3, 0.65, 1.0])
    np.testing.assert_allclose(profile.value, [1.0, 6 / 8, 4 / 8, 0.0])
    assert (profile.low <= profile.value).all()
    assert (profile.value <= profile.high).all()
    assert (profile.low[[0, -1]] == profile.high[[0, -1]]).all()
    assert (profile.low[1:-1] < profile.high[1:-1]).all()


def test_what_the_pairs_share_cancels() -> None:
    rng = np.random.default_rng(4)
    luck = rng.normal(0.0, 100.0, (12, 3))
    gain = rng.normal(1.0, 0.1, (12, 3))
    difference = paired_difference(KEY, luck + gain, luck)
    interval = scipy.stats.t.interval(0.95, 11, loc=gain.mean(), scale=scipy.stats.sem(gain.mean(1)))
    assert difference.student == pytest.approx((gain.mean(), *interval))
    assert difference.bootstrap.value == pytest.approx(gain.mean())
    assert difference.bootstrap.high - difference.bootstrap.low == pytest.approx(np.diff(interval)[0], rel=0.4)


@pytest.mark.parametrize("confidence", [0.95, pytest.param(0.8, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence: float) -> None:
    """The percentile bootstrap of 20 runs covers slightly less than nominal; with 200 tables the noise is 3 %."""
    truth, options = 15.0, {"confidence": confidence, "resamples": 150}
    covered = np.zeros(3)
    for seed in range(200):
        key, table, baseline = jax.random.key(seed), scores(20, seed=seed), scores(20, seed=1000 + seed)
        difference = paired_difference(key, table, baseline - truth, **options)
        intervals = (stratified_bootstrap(key, np.mean, table, **options), *difference)
        covered += [interval.low <= truth <= interval.high for interval in intervals]
    assert covered / 200 == pytest.approx([confidence] * 3, abs=0.06)


TABLE = np.ones((2, 3))
BAD = {
    "one axis": (lambda: interquartile_mean(KEY, np.ones(3)), r"shape \(3,\)"),
    "no run": (lambda: interquartile_mean(KEY, np.ones((0, 3))), r"shape \(0, 3\)"),
    "not finite": (lambda: performance_profile(KEY, TABLE * np.nan, [0.5]), "score is nan"),
    "other tasks": (lambda: probability_of_improvement(KEY, TABLE, np.ones((2, 4))), r"\[3, 4\] tasks"),
    "no pairs": (lambda: paired_difference(KEY, TABLE, np.ones((4, 3))), r"\(2, 3\) and \(4, 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_a_crossed_interval_covers_the_truth_at_least_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        grid = rng.normal(size=(5, 1)) + 2 * rng.normal(size=(1, 5)) + rng.normal(size=(5, 5))
        interval = crossed_interval(grid)
        covered += interval["low"] <= 0.0 <= interval["high"]
    assert covered >= 935  # three standard errors below 95 %


def test_a_crossed_interval_of_one_training_seed_is_students() -> None:
    interval = crossed_interval(np.array([[0.1, 0.2, 0.4]]))
    values = np.array([0.1, 0.2, 0.4])
    assert interval["high"] - interval["mean"] == pytest.approx(4.30265 * values.std(ddof=1) / math.sqrt(3), rel=1e-4)
    assert math.isnan(crossed_interval(np.array([[0.3]]))["low"])


def test_a_p_value_of_one_training_seed_is_students() -> None:
    values = np.array([0.1, -0.2, 0.4, 0.3])
    assert crossed_p_value(values[None]) == pytest.approx(scipy.stats.ttest_1samp(values, 0.0).pvalue)
    assert math.isnan(crossed_p_value(np.array([[0.3]])))


def test_a_p_value_is_below_five_percent_where_the_interval_excludes_zero() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        grid = 0.4 + rng.normal(size=(4, 6))
        interval = crossed_interval(grid)
        assert (crossed_p_value(grid) < 0.05) == (interval["low"] > 0 or interval["high"] < 0)


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    """By hand: 4 x 0.005, 3 x 0.01, then 2 x 0.03, which 1 x 0.04 may not fall below."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.6]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []
