"""Statistics of evaluations: estimates and confidence intervals for the comparison of routers.

Scores are tables [R, T] of R runs (seeds) on each of T tasks (loads, worlds). The bootstrap is stratified: runs are
resampled within each task, so every resample has the same tasks. Randomness comes from an explicit key, and intervals
are percentiles of the resamples. The choice of statistics follows Agarwal et al., "Deep reinforcement learning at the
edge of the statistical precipice", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from qos_jax.errors import InputError


class Estimate(NamedTuple):
    """A statistic and its confidence interval: numbers, or arrays of one shape."""

    value: Any
    low: Any
    high: Any


class PairedDifference(NamedTuple):
    """The mean of paired differences, with two intervals."""

    student: Estimate  # Student's t interval over the runs' means over tasks
    bootstrap: Estimate  # percentile interval, stratified by task


def summarise(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Returns ``mean``, ``low`` and ``high`` with Student's t interval over seeds [R]; NaN bounds for one seed."""
    samples = np.asarray(values, np.float64)
    mean = float(samples.mean())
    if len(samples) < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    half = _student_quantile((1 + confidence) / 2, len(samples) - 1) * samples.std(ddof=1) / np.sqrt(len(samples))
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def crossed_interval(values: np.ndarray) -> dict[str, float]:
    """Returns ``mean``, ``low`` and ``high`` of a grid [training seeds, evaluation seeds] with a 95 % interval.

    Rows and columns are random samples. The variance of the mean is estimated by the sum of the variances over rows and
    over columns, which counts the noise of single cells twice, so the interval is slightly too wide. Student's quantile
    is that of the axis with fewer samples. An axis with one sample is ignored, as its spread is unknown; with one cell
    the bounds are NaN.
    """
    mean, error, freedom = _crossed(values)
    half = float(_student_quantile(0.975, freedom) * error) if freedom else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half}


def crossed_p_value(values: np.ndarray) -> float:
    """Returns the two-sided p-value of a mean of 0, by the statistic of ``crossed_interval``; NaN for one cell."""
    import scipy.stats  # slow to import

    mean, error, freedom = _crossed(values)
    if not freedom:
        return float("nan")
    return float(2 * scipy.stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are corrected for their number by Holm's step-down method; NaN stays and counts as one."""
    order = sorted(range(len(p_values)), key=lambda i: (np.isnan(p_values[i]), p_values[i]))
    corrected, least = [float("nan")] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min((len(p_values) - rank) * p_values[i], 1.0))
        corrected[i] = p_values[i] if np.isnan(p_values[i]) else least
    return corrected


def _crossed(values: np.ndarray) -> tuple[float, float, int]:
    """Returns the mean of a grid, its standard error, and the degrees of freedom; 0 of these for one cell."""
    axes = [means for means in (values.mean(1), values.mean(0)) if len(means) > 1]
    error = float(np.sqrt(sum(means.var(ddof=1) / len(means) for means in axes)))
    return float(values.mean()), error, min(map(len, axes), default=1) - 1


def _student_quantile(probability: float, degrees_of_freedom: int) -> float:
    import scipy.stats  # slow to import

    return float(scipy.stats.t.ppf(probability, degrees_of_freedom))


def stratified_bootstrap(
    key: Array,
    statistic: Callable[..., Any],
    *tables: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Estimates a statistic of one or more tables of scores, with its percentile interval.

    Args:
      key: random key of the resamples.
      statistic: takes the tables as arrays and returns a number or an array.
      *tables: scores [R, T]. Tables may differ in R and are resampled independently.
      confidence: of the interval.
      resamples: number of resamples.

    Raises:
      InputError: a table is not [R, T], is empty or has a value that is not finite, or tables differ in T.
    """
    arrays = [_check(table) for table in tables]
    if len({table.shape[1] for table in arrays}) > 1:
        raise InputError(f"scores have {[table.shape[1] for table in arrays]} tasks, must have equal numbers of them")
    indices = [
        np.asarray(jax.random.randint(key, (resamples, *table.shape), 0, len(table)))
        for key, table in zip(jax.random.split(key, len(arrays)), arrays, strict=True)
    ]
    values = [
        statistic(*(np.take_along_axis(table, index[i], 0) for table, index in zip(arrays, indices, strict=True)))
        for i in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Estimate(statistic(*arrays), low, high)


def interquartile_mean(key: Array, scores: ArrayLike, **options: Any) -> Estimate:
    """Estimates the mean of the middle half of all scores [R, T].

    A quarter of the scores, rounded down, is left out at each end. ``options`` are those of ``stratified_bootstrap``.
    """
    return stratified_bootstrap(key, _interquartile_mean, scores, **options)


def probability_of_improvement(key: Array, scores: ArrayLike, baseline: ArrayLike, **options: Any) -> Estimate:
    """Estimates the probability that a run of ``scores`` [R, T] beats a run of ``baseline`` [R', T] on a random task.

    It is the mean over tasks of Mann and Whitney's U divided by R R'; a tie counts as half a win.
    """
    return stratified_bootstrap(key, _win_share, scores, baseline, **options)


def performance_profile(key: Array, scores: ArrayLike, thresholds: ArrayLike, **options: Any) -> Estimate:
    """Estimates the share of scores [R, T] above each threshold [K], with pointwise intervals."""
    levels = np.asarray(thresholds, np.float64)
    return stratified_bootstrap(key, lambda table: (table[..., None] > levels).mean((0, 1)), scores, **options)


def paired_difference(
    key: Array, scores: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95, **options: Any
) -> PairedDifference:
    """Estimates the mean of ``scores - baseline``, both [R, T], where run r of a task has the same requests in both.

    The difficulty of the requests cancels, so the intervals are far narrower than those of two separate means.

    Raises:
      InputError: the shapes differ, or as in ``stratified_bootstrap``.
    """
    scores, baseline = _check(scores), _check(baseline)
    if scores.shape != baseline.shape:
        raise InputError(f"paired scores have shapes {scores.shape} and {baseline.shape}, must have the same")
    difference = scores - baseline
    return PairedDifference(
        student=Estimate(*summarise(difference.mean(1), confidence).values()),
        bootstrap=stratified_bootstrap(key, np.mean, difference, confidence=confidence, **options),
    )


def _interquartile_mean(scores: np.ndarray) -> float:
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def _win_share(scores: np.ndarray, baseline: np.ndarray) -> float:
    difference = scores[:, None] - baseline[None]
    return float(np.mean((difference > 0) + (difference == 0) / 2))


def _check(scores: ArrayLike) -> np.ndarray:
    """Returns a table of scores as an array [R, T]."""
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"scores have shape {table.shape}, must be [R, T] with at least one run and one task")
    if not np.isfinite(table).all():
        raise InputError(f"a score is {table[~np.isfinite(table)][0]}, must be finite")
    return table
