"""Metrics of predictions: explained variance, calibration, and the score of routing by them.

All metrics are over M held-out prompts and N experts. Baselines, such as each expert's mean, are from the training
prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.predictor.data import PredictionTable
from qos_jax.predictor.heads import Forecast, bucket_edges, bucket_of
from qos_jax.predictor.predictor import Predictor
from qos_jax.sim.validation import check_shapes

NUM_BINS = 10


def held_out_columns(
    predictor: Predictor, train: PredictionTable, test: PredictionTable, num_buckets: int
) -> dict[str, np.ndarray]:
    """Returns predictions and true values of held-out prompts, for ``scores_of`` and for models of the error.

    Args:
      predictor: trained on ``train``.
      train: gives each expert's mean, buckets and most common bucket, and the best single expert.
      test: M prompts, with embeddings by the predictor's encoder.
      num_buckets: K, that of the heads if they have buckets.

    Returns:
      ``best_single`` [M], the best expert in training. For each Q of ``score``, ``log_length`` and ``output_tokens``:
      ``Q``, ``predicted_Q`` and ``mean_Q``, the expert's mean in training, all [M, N]. For Q ``score`` and
      ``log_length`` also ``Q_bucket``, ``predicted_Q_bucket`` (the likeliest, or that of the predicted value in
      regression) and ``commonest_Q_bucket``, all [M, N], and ``Q_probabilities`` [M, N, K] if the heads have buckets.
      Without lengths, only the columns of the score.

    Raises:
      InputError: ``test`` has no embeddings.
    """
    columns = {"best_single": np.full(len(test), train.score.mean(0).argmax())}
    if test.embeddings is None:
        raise InputError(f"{test.source}: has no embeddings, must have them for predictions")
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
    """Returns all metrics of ``held_out_columns``, which may be joined from several folds; see the functions below."""
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
            occurred = np.eye(probabilities.shape[-1])[columns[f"{name}_bucket"]]
            nonempty = probabilities > 0.0  # an expert with fewer than K buckets has empty ones
            bins = reliability_bins(probabilities[nonempty], occurred[nonempty])
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
    """Returns R^2 [N] of each expert: 1 minus the squared error of the predictions over that of a baseline.

    Args:
      truth: [M, N] true values.
      predicted: [M, N].
      baseline: [N] or [M, N], each expert's mean over training prompts.

    Returns:
      [N], NaN for an expert whose baseline has no error.
    """
    error, base = np.sum((truth - predicted) ** 2, 0), np.sum((truth - baseline) ** 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, 1.0 - error / base, np.nan)


def rank_correlation(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, int]:
    """Returns Spearman's correlation over the experts as a mean over prompts, and the number of these prompts.

    Prompts whose true values, or predicted values, are all equal have no correlation and are left out.

    Args:
      truth: [M, N] true values.
      predicted: [M, N].
    """
    from scipy import stats  # slow to import

    ranks = [stats.rankdata(x, axis=1) for x in (truth, predicted)]
    ranks = [x - x.mean(1, keepdims=True) for x in ranks]
    length = np.sqrt(np.prod([np.sum(x**2, 1) for x in ranks], axis=0))
    correlations = np.sum(ranks[0] * ranks[1], 1)[length > 0] / length[length > 0]
    return float(correlations.mean()) if len(correlations) else float("nan"), len(correlations)


def routing(truth: np.ndarray, predicted: np.ndarray, best_single: np.ndarray) -> dict[str, float]:
    """Returns the mean score of four ways to send each prompt to one expert.

    Args:
      truth: [M, N] true scores.
      predicted: [M, N] predicted scores.
      best_single: [M] or [], the best expert on training prompts.

    Returns:
      The mean true score by name: ``routed`` to the highest predicted score, ``best_single``, ``random``, and
      ``oracle``, the highest true score.

    Raises:
      InputError: the shapes differ.
    """
    _check_same_shape(truth, predicted)
    prompt = np.arange(len(truth))
    return {
        "routed": float(truth[prompt, predicted.argmax(1)].mean()),
        "best_single": float(truth[prompt, best_single].mean()),
        "random": float(truth.mean()),
        "oracle": float(truth.max(1).mean()),
    }


def bucket_scores(label: np.ndarray, predicted: np.ndarray, majority: np.ndarray) -> dict[str, float]:
    """Returns the accuracies of the predicted bucket and of the most common bucket in training.

    Args:
      label: [M, N] true buckets.
      predicted: [M, N] predicted buckets.
      majority: [N] or [M, N], the most common bucket in training.
    """
    return {"accuracy": float(np.mean(label == predicted)), "majority": float(np.mean(label == majority))}


def reliability_bins(predicted: np.ndarray, realised: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """Returns the bins of a reliability diagram of predictions and true values of one shape.

    Bins have equal numbers of predictions instead of equal widths, as most predictions lie close together. Equal
    predictions may be in different bins.

    Returns:
      For each bin: ``number`` of predictions, mean ``predicted`` value, mean ``realised`` (true) value, and the
      ``standard_error`` of the latter.
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
    """Returns the expected calibration error: the mean over predictions of |predicted - realised| of their bin."""
    numbers = [entry["number"] for entry in bins]
    return float(np.average([abs(entry["predicted"] - entry["realised"]) for entry in bins], weights=numbers))


def quantity_scores(truth: np.ndarray, predicted: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Returns the metrics of one predicted quantity, such as the score or the output tokens.

    Args:
      truth: [M, N] true values.
      predicted: [M, N].
      baseline: [N] or [M, N], each expert's mean over training prompts.

    Returns:
      ``r2``, mean of the experts; ``r2_of_experts`` [N]; ``within_r2`` of the deviations from the mean of all experts
      on the prompt; ``slope`` of true on predicted differences from the baseline; ``mae`` and ``baseline_mae``, mean
      absolute errors; ``bias``; ``rank_correlation`` within prompts and ``ranked_prompts``, their number;
      ``reliability``, the bins, and ``ece``, the expected calibration error.

    Raises:
      InputError: the shapes differ.
    """
    _check_same_shape(truth, predicted)
    r2 = r_squared(truth, predicted, baseline)
    deviations, predicted_deviations = _deviations(truth - baseline), _deviations(predicted - baseline)
    correlation, ranked = rank_correlation(truth, predicted)
    bins = reliability_bins(predicted, truth)
    return {
        "r2": float(np.nanmean(r2)) if np.isfinite(r2).any() else float("nan"),
        "r2_of_experts": r2.tolist(),
        "within_r2": float(r_squared(deviations.ravel(), predicted_deviations.ravel(), np.zeros(()))),
        "slope": _slope(predicted - baseline, truth - baseline),
        "mae": float(np.mean(np.abs(truth - predicted))),
        "baseline_mae": float(np.mean(np.abs(truth - baseline))),
        "bias": float(np.mean(predicted - truth)),
        "rank_correlation": correlation,
        "ranked_prompts": ranked,
        "ece": calibration_error(bins),
        "reliability": bins,
    }


def _check_same_shape(truth: np.ndarray, predicted: np.ndarray) -> None:
    """Checks that predictions are [M, N] as the true values: fewer axes would broadcast."""
    num_prompts, num_experts = np.shape(truth)
    check_shapes({"predicted": (predicted, "MN")}, M=num_prompts, N=num_experts)


def _deviations(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the least-squares slope of y on x; NaN if x is constant."""
    x = x - x.mean()
    return float(np.sum(x * y) / np.sum(x**2)) if np.any(x) else float("nan")
