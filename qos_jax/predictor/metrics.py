"""How good predictions are: what they explain, whether they mean what they say, and what routing by them earns.

Everything is of M prompts that the predictor has not learned from, and N experts. What a prediction is compared with,
such as each expert's mean, comes from the prompts it has learned from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from qos_jax.errors import InputError
from qos_jax.predictor.data import PredictionTable
from qos_jax.predictor.heads import Forecast, bucket_edges, bucket_of
from qos_jax.predictor.predictor import Predictor

NUM_BINS = 10


def held_out_columns(
    predictor: Predictor, train: PredictionTable, test: PredictionTable, num_buckets: int
) -> dict[str, np.ndarray]:
    """Returns predictions and truth side by side, as ``scores_of`` reads them and for models of the error.

    Args:
      predictor: learned from ``train``.
      train: for each expert's mean, buckets and commonest bucket, and for the best single expert.
      test: M prompts, with embeddings by the predictor's encoder.
      num_buckets: K of the buckets, which are those of the heads if these have any.

    Returns:
      For Q each of ``score``, ``log_length`` and ``output_tokens``: ``Q``, ``predicted_Q`` and ``mean_Q``, the expert's
      mean in training, all [M, N]. For Q each of the first two: ``Q_bucket``, ``predicted_Q_bucket`` (the likeliest; in
      regression, that of the predicted value) and ``commonest_Q_bucket``, all [M, N], and if the heads have buckets
      ``Q_probabilities`` [M, N, K]. And ``best_single`` [M], the best expert in training. Without lengths, only score.
    """
    columns = {"best_single": np.full(len(test), train.score.mean(0).argmax())}
    if test.embeddings is None:
        raise InputError(f"{test.source}: has no embeddings, from which predictions are made")
    score, length = predictor.forecast(test.embeddings)
    columns |= _quantity("score", score.amount, train.score, test.score)
    columns |= _buckets("score", score, train.score, test.score, num_buckets)
    if length is not None and train.output_tokens is not None and test.output_tokens is not None:
        log_train, log_test = np.log(train.output_tokens), np.log(test.output_tokens)
        columns |= _quantity("log_length", length.value, log_train, log_test)
        columns |= _quantity("output_tokens", length.amount, train.output_tokens, test.output_tokens)
        columns |= _buckets("log_length", length, log_train, log_test, num_buckets)
    return columns


def scores_of(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns all scores, see the functions below, of ``held_out_columns``, which may be those of several folds."""
    scores: dict[str, Any] = {"prompts": len(columns["score"])}
    for name in ("score", "log_length", "output_tokens"):
        if name in columns:
            scores[name] = quantity_scores(columns[name], columns[f"predicted_{name}"], columns[f"mean_{name}"])
    for name in ("score", "log_length"):
        if name in columns:
            label, predicted = columns[f"{name}_bucket"], columns[f"predicted_{name}_bucket"]
            scores[name] |= bucket_scores(label, predicted, columns[f"commonest_{name}_bucket"])
        if f"{name}_probabilities" in columns:
            probabilities = columns[f"{name}_probabilities"]
            happened = np.eye(probabilities.shape[-1])[columns[f"{name}_bucket"]]
            there = probabilities > 0.0  # not the empty buckets of experts with fewer
            bins = reliability(probabilities[there], happened[there])
            scores[name] |= {"bucket_ece": calibration_error(bins), "bucket_reliability": bins}
    return scores | {"routing": routing(columns["score"], columns["predicted_score"], columns["best_single"])}


def _quantity(name: str, predicted: Any, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    mean = np.broadcast_to(train.mean(0), test.shape)
    return {name: test, f"predicted_{name}": np.asarray(predicted), f"mean_{name}": mean}


def _buckets(
    name: str, forecast: Forecast, train: np.ndarray, test: np.ndarray, num_buckets: int
) -> dict[str, np.ndarray]:
    edges = bucket_edges(train, num_buckets)
    counts = np.sum(bucket_of(edges, train)[..., None] == np.arange(num_buckets), axis=0)
    commonest = np.broadcast_to(counts.argmax(-1), test.shape)
    columns = {f"{name}_bucket": bucket_of(edges, test), f"commonest_{name}_bucket": commonest}
    if forecast.probabilities is None:
        return columns | {f"predicted_{name}_bucket": bucket_of(edges, np.asarray(forecast.value))}
    probabilities = np.asarray(forecast.probabilities)
    return columns | {f"predicted_{name}_bucket": probabilities.argmax(-1), f"{name}_probabilities": probabilities}


def r_squared(truth: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Returns for each expert [N] the share of squared error [M, N] that the predictions save over a baseline.

    NaN where the baseline makes no error. The baseline, [N] or [M, N], is the expert's mean over training prompts.
    """
    error, base = np.sum((truth - predicted) ** 2, 0), np.sum((truth - baseline) ** 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, 1.0 - error / base, np.nan)


def rank_correlation(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, int]:
    """Returns Spearman's correlation over the experts, mean of the prompts that have one, and how many these are.

    A prompt has none if all its true values, or all predicted ones, are equal.
    """
    ranks = [stats.rankdata(x, axis=1) for x in (truth, predicted)]
    ranks = [x - x.mean(1, keepdims=True) for x in ranks]
    length = np.sqrt(np.prod([np.sum(x**2, 1) for x in ranks], axis=0))
    each = np.sum(ranks[0] * ranks[1], 1)[length > 0] / length[length > 0]
    return float(each.mean()) if len(each) else float("nan"), len(each)


def routing(truth: np.ndarray, predicted: np.ndarray, best_single: np.ndarray) -> dict[str, float]:
    """Returns mean scores of prompts that are sent to one expert each.

    Args:
      truth: [M, N] scores.
      predicted: [M, N] scores; each prompt is ``routed`` to the highest.
      best_single: [M] or [], the expert that was best on training prompts.
    """
    prompt = np.arange(len(truth))
    return {
        "routed": float(truth[prompt, predicted.argmax(1)].mean()),
        "best_single": float(truth[prompt, best_single].mean()),
        "random": float(truth.mean()),
        "oracle": float(truth.max(1).mean()),
    }


def bucket_scores(label: np.ndarray, predicted: np.ndarray, majority: np.ndarray) -> dict[str, float]:
    """Returns how often the true bucket [M, N] is the predicted one, and how often the commonest in training [N]."""
    return {"accuracy": float(np.mean(label == predicted)), "majority": float(np.mean(label == majority))}


def reliability(predicted: np.ndarray, realised: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """Returns for each of some bins of equally many predictions: their number and mean, mean truth and its error.

    The error is the standard error of the mean truth. Bins have equally many predictions, not equal width, as most
    predictions lie close together. Equal predictions may be parted.
    """
    order = np.argsort(predicted, axis=None, kind="stable")
    return [
        {
            "number": len(rows),
            "predicted": float(predicted.ravel()[rows].mean()),
            "realised": float(realised.ravel()[rows].mean()),
            "standard_error": float(realised.ravel()[rows].std() / len(rows) ** 0.5),
        }
        for rows in np.array_split(order, num_bins)
        if len(rows)
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Returns the expected calibration error: mean distance, over predictions, of their bin's mean to its truth."""
    numbers = [each["number"] for each in bins]
    return float(np.average([abs(each["predicted"] - each["realised"]) for each in bins], weights=numbers))


def quantity_scores(truth: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Returns the scores of one predicted quantity, such as the score itself or the output tokens.

    Args:
      truth: [M, N].
      predicted: [M, N].
      baseline: [N] or [M, N], each expert's mean over training prompts.

    Returns:
      ``r2`` mean of the experts, ``r2_of_experts`` [N], ``within_r2`` of what differs from the other experts on the
      same prompt, ``slope`` by which truths differ from the baseline when predictions do by 1, ``mae`` and
      ``baseline_mae``, ``bias``, ``rank_correlation`` within prompts and ``ranked_prompts``, the bins of
      ``reliability`` and ``ece``.
    """
    r2 = r_squared(truth, predicted, baseline)
    better, told_better = _deviations(truth - baseline), _deviations(predicted - baseline)
    correlation, ranked = rank_correlation(truth, predicted)
    bins = reliability(predicted, truth)
    return {
        "r2": float(np.nanmean(r2)) if np.isfinite(r2).any() else float("nan"),
        "r2_of_experts": r2.tolist(),
        "within_r2": float(r_squared(better.ravel(), told_better.ravel(), np.zeros(()))),
        "slope": _slope(predicted - baseline, truth - baseline),
        "mae": float(np.mean(np.abs(truth - predicted))),
        "baseline_mae": float(np.mean(np.abs(truth - baseline))),
        "bias": float(np.mean(predicted - truth)),
        "rank_correlation": correlation,
        "ranked_prompts": ranked,
        "ece": calibration_error(bins),
        "reliability": bins,
    }


def _deviations(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the least-squares slope of y against x, NaN where x is constant."""
    x = x - x.mean()
    return float(np.sum(x * y) / np.sum(x**2)) if np.any(x) else float("nan")
