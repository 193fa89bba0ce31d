"""Fits the timing of an engine to a log of the requests that it served.

Where no kernels were measured, a log still tells when answers began and ended. The five coefficients of the cost model
and the delay of the link are those with which a replay of the log in the simulator has these times. A replay knows who
waited for whom, so the fit needs no record of batches, and requests at all loads count.

The fit begins with a linear regression on the batches that follow from the times of the log. Then the logarithms of
simulated over measured times, to the first token and per further token, are minimised by Gauss-Newton steps, of which
several lengths are tried, with a loss that outliers do not rule. Such a loss finds the times of usual requests, but
capacity rests on the mean: at the end all times are scaled by one factor that gives the log's mean end-to-end time.

Timing is fitted to the whole log. How well it tells requests that it has not seen is known from a fit to the earlier
ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.profile_file import TIMING_UNITS
from qos_jax.sim.replay import replay
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, RequestTrace

COEFFICIENTS = (*TIMING_UNITS, "network_s")
MIN_REQUESTS = 30  # answered, for a fit

_EARLY_SHARE = 0.7  # of the requests, for the fit that the later ones judge
_STEPS = (0.3, 0.1, 0.03)  # of a logarithm, for slopes: large ones first, as a replay changes in jumps
_MOST_ROUNDS = 12  # with one of them
_LEAST_GAIN = 0.003  # of the loss, to go on with it
_PRIOR = 0.3  # weight of a coefficient's deviation from its start against the residual of one request
_OUTLIER = 0.3  # residuals above it count less
_LINK_DELAY_S = 1e-3  # s, with which the fit begins
_LEAST = 1e-10  # s, or s/token
_WIDEST_SCALE = 0.4  # logarithm of the factor that corrects the mean


@dataclasses.dataclass(frozen=True)
class ServedRequests:
    """The J requests that one engine was sent, in order of arrival."""

    arrival_s: np.ndarray  # [J] s
    prompt_tokens: np.ndarray  # [J] tokens
    output_tokens: np.ndarray  # [J] tokens that it gave, at least 1
    first_token_s: np.ndarray  # [J] s since arrival; NaN where the answer was not streamed
    end_s: np.ndarray  # [J] s since arrival
    answered: np.ndarray  # [J] bool: to the end, and sent to no other engine before. Others only take the engine's time

    def times_s(self) -> dict[str, np.ndarray]:
        """Returns the measured times [J] of ``times_of``; NaN where a request has none that counts."""
        return times_of(self, self.first_token_s, np.where(self.answered, self.end_s, np.nan))


def times_of(requests: ServedRequests, first_token_s: np.ndarray, end_s: np.ndarray) -> dict[str, np.ndarray]:
    """Returns ``ttft_s`` [s], ``tpot_s`` [s/token] and ``e2e_s`` [s], [..., J] each, of times since arrival."""
    later_tokens = np.where(requests.output_tokens > 1, requests.output_tokens - 1, np.nan)
    return {
        "ttft_s": first_token_s + 0.0 * end_s,
        "tpot_s": (end_s - first_token_s) / later_tokens,
        "e2e_s": end_s,
    }


@dataclasses.dataclass(frozen=True)
class LogFit:
    """Timing that was fitted to a log."""

    timing: dict[str, float]  # of ``TIMING_UNITS``
    link_delay_s: float
    requests: int  # answered, of all replicas
    errors: dict[str, dict[str, dict[str, float]]]
    """``time_errors`` of this timing on the whole log, ``log``; and of one that was fitted to the earlier requests, on
    these, ``fitted``, and on the later ones, ``held_out``."""


def fit_log(name: str, replicas: Sequence[ServedRequests], start: ExpertProfile) -> LogFit:
    """Fits one timing to the logs of one or more equal engines.

    Args:
      name: of the engine, for messages.
      replicas: what each of the R engines was sent.
      start: its profile, [1] each, with the coefficients to begin with and the rules of the engine.

    Raises:
      InputError: fewer than ``MIN_REQUESTS`` were answered, or a request does not fit its KV memory.
    """
    answered = sum(int(each.answered.sum()) for each in replicas)
    if answered < MIN_REQUESTS:
        raise InputError(f"engine {name}: {answered} answers in the log, must be at least {MIN_REQUESTS} for a fit")
    early = [np.arange(len(each.arrival_s)) < _EARLY_SHARE * len(each.arrival_s) for each in replicas]
    every = [np.ones(len(each.arrival_s), bool) for each in replicas]
    fit = _Fit(name, replicas, start)
    of_early = fit.solve(early, fit.start)
    logs = fit.solve(every, of_early)
    coefficients = np.exp(logs)
    return LogFit(
        timing=dict(zip(TIMING_UNITS, coefficients[:-1].tolist(), strict=True)),
        link_delay_s=float(coefficients[-1]),
        requests=answered,
        errors={
            "log": fit.errors(logs, every),
            "fitted": fit.errors(of_early, early),
            "held_out": fit.errors(of_early, [~each for each in early]),
        },
    )


def time_errors(
    replicas: Sequence[ServedRequests], simulated: Sequence[dict[str, np.ndarray]], chosen: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Returns how far simulated times are from measured ones, by name of the time.

    Args:
      replicas: R engines.
      simulated: of each, times [J].
      chosen: of each, the requests [J] that count.

    Returns:
      Of ``ttft_s``, ``tpot_s`` and ``e2e_s``: ``measured`` and ``simulated`` means, ``mean_error`` of the mean,
      ``median_error``, the median of the absolute relative errors, and ``requests``; none of a time nobody has.
    """
    errors = {}
    for kind in ("ttft_s", "tpot_s", "e2e_s"):
        measured = np.concatenate([each.times_s()[kind][keep] for each, keep in zip(replicas, chosen, strict=True)])
        model = np.concatenate([each[kind][keep] for each, keep in zip(simulated, chosen, strict=True)])
        known = np.isfinite(measured) & np.isfinite(model)
        if known.any():
            real, model = measured[known], model[known]
            errors[kind] = {
                "measured": float(real.mean()),
                "simulated": float(model.mean()),
                "mean_error": float(model.mean() / real.mean() - 1),
                "median_error": float(np.median(np.abs(model / real - 1))),
                "requests": int(known.sum()),
            }
    return errors


class _Fit:
    """Replays the log with several sets of coefficients at once, always as many, so that one program is compiled."""

    def __init__(self, name: str, replicas: Sequence[ServedRequests], start: ExpertProfile) -> None:
        self.replicas = replicas
        self.sets = 2 * len(COEFFICIENTS) + 1  # a point, and a step up and down in each coefficient
        self.rules = start.replace(kernels=None, max_waiting=np.array([max(len(each.arrival_s) for each in replicas)]))
        tokens = max(int((each.prompt_tokens + each.output_tokens).max()) for each in replicas)
        if tokens > int(self.rules.kv_blocks[0]) * BLOCK_SIZE_TOKENS:
            raise InputError(
                f"engine {name}: a request of {tokens} tokens in the log does not fit its {self.rules.kv_blocks[0]} "
                "KV blocks; set engine.kv_blocks in the fleet file"
            )
        self.start = np.log(np.maximum(_regression(replicas, start), _LEAST))
        arrival_s, prompt_tokens, output_tokens = (
            np.tile(np.concatenate([getattr(each, name) for each in replicas]), self.sets)
            for name in ("arrival_s", "prompt_tokens", "output_tokens")
        )
        lanes = self.sets * len(replicas)
        lane = np.repeat(np.arange(lanes), [len(each.arrival_s) for each in replicas] * self.sets)
        self.order = np.argsort(arrival_s, kind="stable")
        self.assignment = lane[self.order]
        self.trace = RequestTrace(
            arrival_s=arrival_s[self.order],
            prompt_tokens=prompt_tokens[self.order],
            output_tokens=np.tile(output_tokens[self.order, None], (1, lanes)),
        )

    def simulate(self, logs: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Returns the times [K, J] of each replica with K sets of coefficients, whose logarithms are [K, 6]."""
        sets = np.exp(np.concatenate([logs, np.repeat(logs[:1], self.sets - len(logs), 0)]))  # [sets, 6]
        copies = len(self.replicas)
        fields = {name: np.repeat(column, copies) for name, column in zip(COEFFICIENTS, sets.T, strict=True)}
        lanes = self.sets * copies
        rules = jax.tree.map(lambda value: np.repeat(np.asarray(value), lanes), self.rules)
        experts = rules.replace(**fields)
        log = replay(experts, self.trace, self.assignment)
        delay_s = fields["network_s"][self.assignment]
        first_s, end_s = np.empty((2, len(self.order)))
        first_s[self.order] = log.first_token_s - self.trace.arrival_s + delay_s
        end_s[self.order] = log.finish_s - self.trace.arrival_s + delay_s
        ends = np.cumsum([len(each.arrival_s) for each in self.replicas])
        first_s, end_s = first_s.reshape(self.sets, -1)[: len(logs)], end_s.reshape(self.sets, -1)[: len(logs)]
        parts = (np.split(times, ends[:-1], axis=1) for times in (first_s, end_s))
        return [times_of(each, *both) for each, *both in zip(self.replicas, *parts, strict=True)]

    def residuals(self, logs: np.ndarray, chosen: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the residuals [K, R] of K sets of coefficients, [K, 6] logarithms."""
        columns = [_PRIOR * (logs - self.start)]
        for each, simulated, keep in zip(self.replicas, self.simulate(logs), chosen, strict=True):
            measured = each.times_s()
            streamed = np.isfinite(measured["ttft_s"])
            for kind in ("ttft_s", "tpot_s", "e2e_s"):
                counts = keep & np.isfinite(measured[kind]) & ((kind != "e2e_s") | ~streamed)
                columns.append(np.log(simulated[kind][:, counts] / measured[kind][counts]))
        return np.concatenate(columns, axis=1)

    def errors(self, logs: np.ndarray, chosen: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
        """Returns the ``time_errors`` of one set of coefficients, [6] logarithms, on the chosen requests."""
        simulated = [{kind: times[0] for kind, times in each.items()} for each in self.simulate(logs[None])]
        return time_errors(self.replicas, simulated, chosen)

    def solve(self, chosen: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
        """Returns the logarithms [6] of the best coefficients for the chosen requests, found from those of a start."""
        return self._with_mean(self._with_usual_times(chosen, start), chosen)

    def _with_mean(self, logs: np.ndarray, chosen: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the coefficients scaled so that the mean end-to-end time of the chosen requests is the measured."""
        end_s = [each.times_s()["e2e_s"] for each in self.replicas]
        counts = [keep & np.isfinite(times_s) for keep, times_s in zip(chosen, end_s, strict=True)]
        measured_s = sum(times_s[own].sum() for times_s, own in zip(end_s, counts, strict=True))
        for widest in (_WIDEST_SCALE, _WIDEST_SCALE / self.sets):  # the second time about between two of the first
            factors = np.linspace(-widest, widest, self.sets)
            simulated = self.simulate(logs + factors[:, None])
            simulated_s = sum(times["e2e_s"][:, own].sum(1) for times, own in zip(simulated, counts, strict=True))
            # A replay changes in jumps, and interpolation needs sums that do not fall.
            logs = logs + np.interp(measured_s, np.maximum.accumulate(simulated_s), factors)
        return logs

    def _with_usual_times(self, chosen: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
        """Returns the coefficients that minimise the loss."""
        logs, size = start, len(COEFFICIENTS)
        damping = np.logspace(-3.0, 3.0, self.sets)
        for step in _STEPS:
            steps = step * np.concatenate([np.zeros((1, size)), np.eye(size), -np.eye(size)])
            for _ in range(_MOST_ROUNDS):
                found = self.residuals(logs + steps, chosen)
                slopes = (found[1 : size + 1] - found[size + 1 :]) / (2 * step)  # [6, R]
                weighted = slopes / np.sqrt(1 + (found[0] / _OUTLIER) ** 2)
                normal = weighted @ slopes.T
                damped = normal + damping[:, None, None] * np.diag(np.diag(normal))
                tried = (
                    logs - np.linalg.solve(damped, np.tile((weighted @ found[0])[:, None], (self.sets, 1, 1)))[..., 0]
                )
                loss = _loss(self.residuals(tried, chosen))
                if loss.min() > (1 - _LEAST_GAIN) * _loss(found[:1])[0]:
                    break
                logs = tried[np.argmin(loss)]
        return logs


def _loss(residuals: np.ndarray) -> np.ndarray:
    """Returns the loss [K] of residuals [K, R], quadratic for small ones and linear for outliers."""
    return (np.sqrt(1 + (residuals / _OUTLIER) ** 2) - 1).sum(-1)


def _regression(replicas: Sequence[ServedRequests], start: ExpertProfile) -> np.ndarray:
    """Returns first values of ``COEFFICIENTS`` [6], by linear regression of the times on the batches of the log.

    The time from a request's first token to its last is a sum over its iterations. How many others were decoded with
    it, how many tokens they had cached and whose prompts were computed meanwhile follow from the times of all requests.
    A coefficient that no request determines is that of ``start``.
    """
    from scipy.optimize import nnls  # slow to import

    rows, times = [], []
    for each in replicas:
        decoded = np.isfinite(each.first_token_s) & (each.output_tokens > 1) & (each.end_s > each.first_token_s)
        first_s, end_s = (each.arrival_s + offset for offset in (each.first_token_s, each.end_s))
        first_s, end_s, prompts, tokens = (x[decoded] for x in (first_s, end_s, each.prompt_tokens, each.output_tokens))
        together_s = np.minimum(end_s[:, None], end_s) - np.maximum(first_s[:, None], first_s)
        share = np.maximum(together_s, 0.0) / (end_s - first_s)[:, None]  # of a row's time beside a column's
        during = (first_s > first_s[:, None]) & (first_s < end_s[:, None])
        steps = tokens - 1.0
        cached = share @ (prompts + tokens / 2)
        rows.append(np.stack([steps, during.sum(1), during @ prompts, steps * share.sum(1), steps * cached], 1))
        times.append(end_s - first_s)
    columns, time_s = np.concatenate(rows), np.concatenate(times)
    found = np.array([float(np.asarray(getattr(start, name))[0]) for name in COEFFICIENTS])
    if len(time_s) >= MIN_REQUESTS:
        scale = np.maximum(columns.max(0), 1.0)
        relative = columns / scale / time_s[:, None]
        step_s, prompt_s, token_s, sequence_s, kv_s = nnls(relative, np.ones(len(time_s)))[0] / scale
        fitted = np.array([step_s, step_s + prompt_s, token_s, sequence_s, kv_s, 0.0])
        found = np.where(fitted > 0, fitted, found)
    found[-1] = max(found[-1], _LINK_DELAY_S)
    return found
