"""Statistics of evaluations: what can be said of routers, and how surely.

Scores come as a table [R, T]: R runs (seeds) on each of T tasks (loads, worlds). The bootstrap is stratified: runs are
drawn again within each task, so that every resample has the same tasks. All chance comes from an explicit key, and
intervals are percentiles of the resamples. Why these statistics: Agarwal et al., "Deep reinforcement learning at the
edge of the statistical precipice", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from jax import Array
from numpy.typing import ArrayLike

from qos_jax.errors import InputError


class Estimate(NamedTuple):
    """A statistic and its interval: numbers, or arrays of one shape."""

    value: Any
    low: Any
    high: Any


class PairedDifference(NamedTuple):
    """The mean of paired differences, with two intervals."""

    student: Estimate  # over the runs, each of them the mean of its tasks
    bootstrap: Estimate  # stratified by task


def summarise(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Returns mean and Student's t interval over seeds; with one seed the interval is NaN."""
    samples = np.asarray(values, np.float64)
    mean = float(samples.mean())
    if len(samples) < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(samples) - 1) * samples.std(ddof=1) / np.sqrt(len(samples))
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def crossed_interval(values: np.ndarray) -> dict[str, float]:
    """Returns mean and 95 % interval of a grid [training seeds, evaluation seeds], each row and column a draw.

    The variance of the mean is taken to be the sum of that over rows and that over columns, which counts the noise of
    single cells twice: the interval is a little too wide. Student's quantile is that of the axis with fewer draws; an
    axis of one draw tells nothing of its spread and does not count. With one cell the interval is NaN.
    """
    axes = [means for means in (values.mean(1), values.mean(0)) if len(means) > 1]
    mean, half = float(values.mean()), float("nan")
    if axes:
        error = np.sqrt(sum(means.var(ddof=1) / len(means) for means in axes))
        half = float(scipy.stats.t.ppf(0.975, min(map(len, axes)) - 1) * error)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def stratified_bootstrap(
    key: Array,
    statistic: Callable[..., Any],
    *tables: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Estimates a statistic of one or more tables of scores, with its percentile interval.

    Args:
      key: decides which runs are drawn again.
      statistic: takes the tables as arrays, returns a number or an array.
      *tables: scores [R, T]. Each table has runs of its own, and is resampled on its own.
      confidence: of the interval.
      resamples: how often the runs are drawn again.

    Raises:
      InputError: a table is not [R, T], is empty or has a value that is not finite, or two tables differ in their
        tasks.
    """
    checked = [_checked(table) for table in tables]
    if len({table.shape[1] for table in checked}) > 1:
        raise InputError(f"scores have {[table.shape[1] for table in checked]} tasks, must have the same ones")
    runs = [
        np.asarray(jax.random.randint(key, (resamples, *table.shape), 0, len(table)))
        for key, table in zip(jax.random.split(key, len(checked)), checked, strict=True)
    ]
    values = [
        statistic(*(np.take_along_axis(table, drawn[i], 0) for table, drawn in zip(checked, runs, strict=True)))
        for i in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Estimate(statistic(*checked), low, high)


def interquartile_mean(key: Array, scores: ArrayLike, **options: Any) -> Estimate:
    """Estimates the mean of the middle half of all scores [R, T].

    A quarter of them, rounded down, is left out at either end. ``options`` are those of ``stratified_bootstrap``.
    """
    return stratified_bootstrap(key, _interquartile_mean, scores, **options)


def probability_of_improvement(key: Array, ours: ArrayLike, others: ArrayLike, **options: Any) -> Estimate:
    """Estimates how probably a run of ours [R, T] beats one of the others [R', T] on a task drawn by lot.

    It is the mean over the tasks of Mann and Whitney's U divided by R R'; a tie counts as half.
    """
    return stratified_bootstrap(key, _share_won, ours, others, **options)


def performance_profile(key: Array, scores: ArrayLike, thresholds: ArrayLike, **options: Any) -> Estimate:
    """Estimates the share of scores [R, T] above each threshold [K]; the interval holds for each threshold alone."""
    levels = np.asarray(thresholds, np.float64)
    return stratified_bootstrap(key, lambda table: (table[..., None] > levels).mean((0, 1)), scores, **options)


def paired_difference(
    key: Array, ours: ArrayLike, others: ArrayLike, *, confidence: float = 0.95, **options: Any
) -> PairedDifference:
    """Estimates the mean of ours - others, both [R, T], where run r of a task is the same requests for both.

    What makes requests easy or hard cancels, so the intervals are far narrower than those of two means.

    Raises:
      InputError: the shapes differ, or as ``stratified_bootstrap``.
    """
    ours, others = _checked(ours), _checked(others)
    if ours.shape != others.shape:
        raise InputError(f"paired scores have shapes {ours.shape} and {others.shape}, must have the same")
    difference = ours - others
    return PairedDifference(
        student=Estimate(*summarise(difference.mean(1), confidence).values()),
        bootstrap=stratified_bootstrap(key, np.mean, difference, confidence=confidence, **options),
    )


def _interquartile_mean(scores: np.ndarray) -> float:
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def _share_won(ours: np.ndarray, others: np.ndarray) -> float:
    difference = ours[:, None] - others[None]
    return float(np.mean((difference > 0) + (difference == 0) / 2))


def _checked(scores: ArrayLike) -> np.ndarray:
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"scores have shape {table.shape}, must be [R, T] with at least one run and one task")
    if not np.isfinite(table).all():
        raise InputError(f"a score is {table[~np.isfinite(table)][0]}, must be finite")
    return table
