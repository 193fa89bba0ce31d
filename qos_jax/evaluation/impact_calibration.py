"""Calibration of the impact estimate: predictions compared to outcomes.

The decisions of a run of ``qos_jax.evaluation.evaluate`` are simulated once more, and the impact of the action taken is
predicted at each of them. The outcomes are in the run's exact log. The violations that a request caused among the
requests present at its arrival are the difference to an exact replay of the same decisions without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.metrics import in_time_of, latency_per_token_s
from qos_jax.impact.estimate import Impact, ImpactForm, impact
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult, replay_many
from qos_jax.sim.types import Request
from qos_jax.sim.world import World, WorldSpec, advance, dispatch, empty_world, observe

NUM_BINS = 10  # of predicted probabilities


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcomes of a run of J requests."""

    counted: np.ndarray  # [J] bool: sent to an expert after the warm-up
    latency_per_token_s: np.ndarray  # [J] s/token, NaN where dropped
    in_time: np.ndarray  # [J] bool
    removed: np.ndarray  # [C] int, indices of the counted requests that were removed from a replay, one at a time
    violations: np.ndarray  # [C] int, violations that each removed request caused among the requests present


def outcome_of(env: Environment, params: EnvParams, run: RouterRun, *, warmup: int = 0, removals: int = 32) -> Outcome:
    """Returns the outcomes of a run, with the violations that some of its requests caused.

    Args:
      env: the environment of the run; only its spec is used.
      params: its parameters; only the experts are used.
      run: of one router on one scenario.
      warmup: number of leading requests that are not counted.
      removals: number of replays with one request removed; these requests are spread evenly over those that count.

    Raises:
      InputError: the router sent no counted request to an expert, or the world has sessions, failures or
        shared cards.
    """
    if env.spec.failures:
        raise InputError("failures are True, must be False: replays without a request know no failures")
    if env.spec.shared_cards:
        raise InputError("shared_cards are True, must be False: a request may change which LLM is loaded")
    if env.spec.sessions:
        raise InputError(f"sessions are {env.spec.sessions}, must be 0: a request changes the prompts after it")
    experts = jax.tree.map(np.asarray, params.experts)
    counted = (run.assignment >= 0) & (np.arange(len(run.assignment)) >= warmup)
    sent = np.flatnonzero(counted)
    if not len(sent):
        raise InputError(
            f"router {run.router.name!r} has sent no request after the warm-up of {warmup}: choose another"
        )
    removed = sent[np.linspace(0, len(sent) - 1, min(removals, len(sent))).round().astype(int)]
    others = [np.where(np.arange(len(run.assignment)) == j, -1, run.assignment) for j in removed]
    replays = replay_many(experts, [run.trace] * len(removed), others, block_size=env.spec.engine.block_size)

    def in_time(replayed: ReplayResult) -> np.ndarray:
        return in_time_of(experts, run.trace, run.assignment, replayed)

    realised = in_time(run.replayed)
    return Outcome(
        counted=counted,
        latency_per_token_s=latency_per_token_s(experts, run.trace, run.assignment, run.replayed),
        in_time=realised,
        removed=removed,
        violations=np.array(
            [
                np.sum((in_time(without).astype(int) - realised)[_present_at_arrival(run, j)])
                for j, without in zip(removed, replays, strict=True)
            ],
            int,
        ),
    )


def _present_at_arrival(run: RouterRun, j: int) -> np.ndarray:
    """Returns [J] bool: the requests that were on the expert of request ``j`` when it arrived."""
    same_expert = (run.assignment == run.assignment[j]) & (np.arange(len(run.assignment)) < j)
    return same_expert & (run.replayed.log.finish_s > run.trace.arrival_s[j])


def predict(
    env: Environment,
    params: EnvParams,
    runs: Sequence[RouterRun],
    form: ImpactForm,
    widths_s: Sequence[float],
    length_cv: float,
) -> Impact:
    """Predicts the impact of each action taken in some runs.

    Args:
      env: the environment of the runs; only its spec is used.
      params: its parameters; the workload is not used.
      runs: R runs with the same number of requests J.
      form: of the estimate.
      widths_s: W widths of the logistic [s/token].
      length_cv: coefficient of variation of an output length given its prediction, see ``impact``.

    Returns:
      The estimate, NumPy arrays [R, J, W]; values have no meaning where the router dropped the request.
    """
    together = jax.tree.map(lambda *each: np.stack(each), *(run.trace.requests for run in runs))
    gaps_s = np.stack([np.diff(run.trace.arrival_s, prepend=0.0) for run in runs]).astype(np.float32)
    actions = np.stack([np.where(run.assignment < 0, env.spec.num_experts, run.assignment) for run in runs])
    widths = jnp.asarray(widths_s, jnp.float32)
    predicted = _predict(env.spec, form, length_cv, params, widths, (gaps_s, together, actions.astype(np.int32)))
    return jax.tree.map(np.asarray, predicted)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _predict(
    spec: WorldSpec, form: ImpactForm, length_cv: float, params: EnvParams, widths_s: Array, runs: tuple[Any, ...]
) -> Impact:
    def decide(world: World, x: tuple[Array, Request, Array]) -> tuple[World, Impact]:
        gap_s, request, action = x
        world = advance(spec, params.experts, world, gap_s)
        obs = observe(spec, params.observed_experts, world, request, params.staleness_s)
        predicted = jax.vmap(lambda width_s: impact(obs, width_s, length_cv, form))(widths_s)
        world, _ = dispatch(spec, params.experts, world, request, action)
        return world, jax.tree.map(lambda x: x[:, action], predicted)

    return jax.vmap(lambda run: lax.scan(decide, empty_world(spec, params.experts, params.scrape_s), run)[1])(runs)


def calibration_of(outcomes: Sequence[Outcome], predicted: Impact) -> list[dict[str, Any]]:
    """Compares predictions and outcomes of all runs for each of the W widths.

    Args:
      outcomes: of R runs.
      predicted: the impact predicted in these runs, [R, J, W].

    Returns:
      For each width: the ``agreement`` of ``latency_per_token_s`` and of ``violations``, the ``probability_scores`` of
      ``in_time``, and its ``reliability_bins`` under the name ``reliability``.
    """

    def of_width(w: int) -> dict[str, Any]:
        in_time = _pooled([predicted.in_time[r, each.counted, w] for r, each in enumerate(outcomes)])
        realised = _pooled([each.in_time[each.counted] for each in outcomes])
        answered = [each.counted & np.isfinite(each.latency_per_token_s) for each in outcomes]
        latency_s = _pooled([predicted.latency_per_token_s[r, mask, w] for r, mask in enumerate(answered)])
        violations = _pooled([predicted.violations_change[r, each.removed, w] for r, each in enumerate(outcomes)])
        return {
            "latency_per_token_s": agreement(
                latency_s, _pooled([o.latency_per_token_s[mask] for o, mask in zip(outcomes, answered, strict=True)])
            ),
            "in_time": probability_scores(in_time, realised),
            "violations": agreement(violations, _pooled([each.violations for each in outcomes])),
            "reliability": reliability_bins(in_time, realised),
        }

    return [of_width(w) for w in range(predicted.in_time.shape[-1])]


def agreement(predicted: np.ndarray, realised: np.ndarray) -> dict[str, float]:
    """Returns number, means, correlation (NaN if one of them is constant), bias and mean absolute error."""
    predicted, realised = np.asarray(predicted, np.float64), np.asarray(realised, np.float64)
    varied = min(np.ptp(predicted), np.ptp(realised)) > 0
    return {
        "number": len(predicted),
        "predicted": float(predicted.mean()),
        "realised": float(realised.mean()),
        "correlation": float(np.corrcoef(predicted, realised)[0, 1]) if varied else float("nan"),
        "bias": float(np.mean(predicted - realised)),
        "mae": float(np.mean(np.abs(predicted - realised))),
    }


def probability_scores(predicted: np.ndarray, happened: np.ndarray) -> dict[str, float]:
    """Returns scores of predicted probabilities.

    These are number, means, Brier score, Brier score of predicting the base rate (``base_brier``), and expected
    calibration error (``ece``): the difference between mean prediction and frequency in a bin, averaged over the
    predictions.
    """
    bins = reliability_bins(predicted, happened)
    base = float(np.mean(happened))
    return {
        "number": len(predicted),
        "predicted": float(np.mean(predicted)),
        "realised": base,
        "brier": float(np.mean((predicted - np.asarray(happened, float)) ** 2)),
        "base_brier": base * (1.0 - base),
        "ece": sum(each["number"] * abs(each["predicted"] - each["realised"]) for each in bins) / len(predicted),
    }


def reliability_bins(predicted: np.ndarray, happened: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """Returns number of predictions, their mean and the frequency of the event in each bin that is not empty."""
    index = np.minimum((np.asarray(predicted) * num_bins).astype(int), num_bins - 1)
    return [
        {
            "number": int(np.sum(index == bin_)),
            "predicted": float(np.mean(predicted[index == bin_])),
            "realised": float(np.mean(happened[index == bin_])),
        }
        for bin_ in np.unique(index)
    ]


def _pooled(each: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(values, np.float64) for values in each])
