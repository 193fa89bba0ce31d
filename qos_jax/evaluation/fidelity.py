"""Fidelity: the measured run of a real engine on one GPU, replayed by the simulator, and how far the two are apart.

Only what the engine was given enters the replay: when which request came, how many tokens it has, and the KV memory.
Timing comes from elsewhere, such as kernel tables (``qos_jax.fleet.profile_fitting``). So what was measured of the run, the
times of its tokens and what its scheduler held at each second, tests timing and scheduling rules together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.spatial import KDTree

from qos_jax.errors import InputError
from qos_jax.evaluation.measured_run import MeasuredRun
from qos_jax.fleet.profile_fitting import KINDS, TIMING_UNITS, Iterations
from qos_jax.sim.cost import iteration_s
from qos_jax.sim.iterations import Activity, IterationLog, iterations_of
from qos_jax.sim.replay import replay
from qos_jax.sim.types import ExpertProfile, RequestLog, RequestTrace

LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}
LOADS = {"running": "requests running", "waiting": "requests waiting", "kv_share": "KV memory in use"}

_POINTS = 200  # of a tick
_ENDLESS = 10**6  # blocks, or places in a queue


@dataclasses.dataclass(frozen=True)
class SimulatedRun:
    """The same requests in the simulator."""

    log: RequestLog
    running: np.ndarray  # [T] requests, at the ticks of the measured run
    waiting: np.ndarray  # [T] requests
    kv_share: np.ndarray  # [T]
    iterations: Iterations  # all that ran, in order


def simulate(run: MeasuredRun, timing: Mapping[str, float]) -> SimulatedRun:
    """Replays a measured run, in float64 for its requests and in float32 for its iterations.

    Args:
      run: what the engine was given.
      timing: coefficients of one iteration, as ``fitting.fit_timing`` returns them.

    Raises:
      InputError: a request does not fit the memory.
    """
    experts, trace = _expert(run, timing), _trace(run)
    iterations = iterations_of(
        experts, trace, np.zeros(len(run.arrival_s), int), 0, 0.0, np.inf,
        token_budget=run.token_budget, block_size=run.block_size,
    )  # fmt: skip
    computed = _computed(iterations)
    here = iterations.activity != Activity.ABSENT
    blocks = -(-computed // run.block_size).sum(1)
    at = np.searchsorted(iterations.start_s, run.tick_s, side="right") - 1
    busy = (at >= 0) & (run.tick_s <= (iterations.start_s + iterations.duration_s)[at])
    return SimulatedRun(
        log=replayed(run, timing),
        running=np.where(busy, (computed > 0).sum(1)[at], 0),
        waiting=np.where(busy, (here & (computed == 0)).sum(1)[at], 0),
        kv_share=np.where(busy, blocks[at], 0) / run.kv_blocks,
        iterations=_batches(iterations, computed),
    )


def replayed(run: MeasuredRun, timing: Mapping[str, float]) -> RequestLog:
    """Returns what happens to the requests of a measured run in the simulator; see ``simulate``."""
    log = replay(
        _expert(run, timing), _trace(run), np.zeros(len(run.arrival_s), int),
        token_budget=run.token_budget, block_size=run.block_size,
    )  # fmt: skip
    if log.dropped.any():
        raise InputError(
            f"{run.name}: request {int(np.argmax(log.dropped)) + 1} does not fit {run.kv_blocks} KV blocks"
        )
    return log


def latencies_s(run: MeasuredRun, log: MeasuredRun | RequestLog) -> dict[str, np.ndarray]:
    """Returns TTFT [J] s, TPOT [J] s/token (NaN for answers of one token) and end-to-end latency [J] s by name."""
    later_tokens = np.where(run.output_tokens > 1, run.output_tokens - 1, np.nan)
    return {
        "ttft_s": log.first_token_s - run.arrival_s,
        "tpot_s": (log.finish_s - log.first_token_s) / later_tokens,
        "e2e_s": log.finish_s - run.arrival_s,
    }


def latency_errors(run: MeasuredRun, log: RequestLog) -> dict[str, dict[str, float]]:
    """Returns for each of ``LATENCIES`` how far the simulator is off.

    That is: both means (``measured``, ``simulated``), the relative error of the mean (``mean_error``), median and 95th
    percentile of the size of the relative error of a request (``median_error``, ``p95_error``), and ``correlation``.
    """
    errors = {}
    measured, simulated = latencies_s(run, run), latencies_s(run, log)
    for name in LATENCIES:
        known = np.isfinite(measured[name])
        real, ours = measured[name][known], simulated[name][known]
        off = np.abs(ours / real - 1)
        errors[name] = {
            "measured": float(real.mean()),
            "simulated": float(ours.mean()),
            "mean_error": float(ours.mean() / real.mean() - 1),
            "median_error": float(np.median(off)),
            "p95_error": float(np.percentile(off, 95)),
            "correlation": float(np.corrcoef(real, ours)[0, 1]),
        }
    return errors


def load_errors(run: MeasuredRun, simulated: SimulatedRun) -> dict[str, dict[str, float]]:
    """Returns for each of ``LOADS`` both means over the ticks and the mean size of their difference."""
    errors = {}
    for name in LOADS:
        real, ours = getattr(run, name), getattr(simulated, name)
        errors[name] = {
            "measured": float(real.mean()),
            "simulated": float(ours.mean()),
            "mean_difference": float(np.abs(ours - real).mean()),
        }
    return errors


def parts_of_time(run: Iterations, kernels: Iterations, timing: Mapping[str, float]) -> list[dict[str, Any]]:
    """Says for each kind of iteration how much of a run it is, and how far the cost form is off there.

    The form is compared with the kernel tables at the measured batch of the same kind that is nearest to each iteration
    of the run, in the logarithms of its prompt tokens, requests and cached tokens.

    Args:
      run: iterations that ran.
      kernels: measured ones, as ``fitting.assemble`` returns them.
      timing: coefficients of the form.

    Returns:
      Rows of ``kind``, ``iterations``, ``share`` of the run's time, ``form_error``, the mean over that time (NaN where
      no such batch was measured), and ``of_the_run``, the product of the two.
    """
    rows = []
    table_error = _predicted_s(kernels, timing) / kernels.time_s - 1
    for kind in KINDS:
        mine, measured = run.kind == kind, kernels.kind == kind
        if not mine.any():
            continue
        share, form_error = run.time_s[mine].sum() / run.time_s.sum(), np.nan
        if measured.any():
            _, nearest = KDTree(_logarithms(kernels, measured)).query(_logarithms(run, mine))
            form_error = np.average(table_error[measured][nearest], weights=run.time_s[mine])
        rows.append(
            {
                "kind": kind,
                "iterations": int(mine.sum()),
                "share": float(share),
                "form_error": float(form_error),
                "of_the_run": float(share * form_error),
            }
        )
    return rows


def decode_errors(run: MeasuredRun, timing: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Compares the cost form with the engine itself, in the ticks in which it computed no new prompt.

    The form is taken at the batches that the engine had then, interpolated between the looks; the last block of a
    request counts as half full. What kernel tables do not hold, such as the time of the scheduler, shows here.

    Returns:
      For ticks in which nobody waited (``memory free``) and those in which somebody did, while for the second tick on
      end fewer requests ran, so that hardly a preempted one came back (``memory full``): the number of ``ticks``, the
      ``measured`` tokens, those ``predicted`` at the same batches, and the relative ``error`` of the form's time; NaN
      where there is no such tick.
    """
    tokens = np.diff(run.tick_s) * run.output_tokens_per_s[1:]
    predicted = _decoded_tokens(run, timing)
    fell = np.diff(run.running) < 0
    only_decoded = run.prompt_tokens_per_s[1:] == 0
    ticks = {
        "memory free": only_decoded & (run.waiting[1:] == 0) & (run.waiting[:-1] == 0),
        "memory full": only_decoded & (run.waiting[1:] > 0) & fell & np.append(False, fell[:-1]),
    }
    errors = {}
    for name, mine in ticks.items():
        measured, ours = float(tokens[mine].sum()), float(predicted[mine].sum())
        error = measured / ours - 1 if mine.any() else np.nan
        errors[name] = {"ticks": int(mine.sum()), "measured": measured, "predicted": ours, "error": error}
    return errors


def recomputation(run: MeasuredRun, simulated: SimulatedRun, timing: Mapping[str, float]) -> dict[str, float]:
    """Returns ``preemptions`` in the simulator, the ``tokens`` that it computed once more, and their ``share`` of time.

    The share counts the arithmetic of these tokens only; an engine that finds a part of them cached saves at most that.
    """
    tokens = float(simulated.iterations.prompt_tokens.sum() - run.prompt_tokens.sum())
    return {
        "preemptions": int(simulated.log.preemptions.sum()),
        "tokens": int(tokens),
        "share": tokens * timing["prefill_per_token_s"] / float(simulated.iterations.time_s.sum()),
    }


def parts_left_out(run: MeasuredRun, timing: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns the relative errors of the mean latencies if one part of the model were missing, by part."""
    variants: dict[str, tuple[MeasuredRun, dict[str, float]]] = {
        "nothing": (run, {}),
        "reads of the KV cache": (run, {"per_kv_token_s": 0.0}),
        "time per request": (run, {"per_sequence_s": 0.0}),
        "arithmetic of prompts": (run, {"prefill_base_s": 0.0, "prefill_per_token_s": 0.0}),
        "limit of the KV memory": (dataclasses.replace(run, kv_blocks=_ENDLESS), {}),
    }
    errors = {}
    for name, (given, changed) in variants.items():
        of_log = latency_errors(run, replayed(given, {**timing, **changed}))
        errors[name] = {latency: row["mean_error"] for latency, row in of_log.items()}
    return errors


def _expert(run: MeasuredRun, timing: Mapping[str, float]) -> ExpertProfile:
    fields = {name: timing[name] for name in TIMING_UNITS}
    fields |= {"kv_blocks": run.kv_blocks, "max_running": run.max_running, "max_waiting": _ENDLESS}
    return ExpertProfile(**{name: np.array([value]) for name, value in fields.items()})


def _trace(run: MeasuredRun) -> RequestTrace:
    return RequestTrace(run.arrival_s, run.prompt_tokens, run.output_tokens[:, None])


def _computed(log: IterationLog) -> np.ndarray:
    """Returns the cached tokens [I, R] of each request at the end of each iteration."""
    total = np.cumsum(log.tokens, axis=0, dtype=np.int64)
    thrown_away = np.maximum.accumulate(np.where(log.activity == Activity.PREEMPTED, total, 0), axis=0)
    return np.where(log.activity == Activity.ABSENT, 0, total - thrown_away)


def _batches(log: IterationLog, computed: np.ndarray) -> Iterations:
    """Returns what the cost of each iteration depends on."""
    prefills, decodes = log.activity == Activity.PREFILL, log.activity == Activity.DECODE
    before = computed - log.tokens
    prompt_tokens, decoding = (log.tokens * prefills).sum(1), decodes.sum(1)
    continued = (prefills & (before > 0)).any(1)
    kind = np.select([continued, prompt_tokens == 0, decoding == 0], ["chunked", "decode", "prefill"], "mixed")
    kv_tokens = (before * decodes).sum(1)
    return Iterations(kind, prompt_tokens, decoding + prefills.sum(1), kv_tokens, log.duration_s)


def _decoded_tokens(run: MeasuredRun, timing: Mapping[str, float]) -> np.ndarray:
    """Returns the tokens [T - 1] that the form gives from each tick to the next, at the batches of the engine."""
    times_s = np.linspace(run.tick_s[:-1], run.tick_s[1:], _POINTS)
    requests = np.interp(times_s, run.tick_s, run.running)
    blocks = np.interp(times_s, run.tick_s, run.kv_share) * run.kv_blocks
    kv_tokens = np.maximum(run.block_size * (blocks - requests / 2), 0)
    batches = Iterations(np.full(times_s.shape, "decode"), np.zeros(times_s.shape), requests, kv_tokens, times_s)
    return np.mean(requests / _predicted_s(batches, timing), 0) * np.diff(run.tick_s)


def _predicted_s(iterations: Iterations, timing: Mapping[str, float]) -> np.ndarray:
    counts = (iterations.prompt_tokens, iterations.requests, iterations.kv_tokens)
    expert = ExpertProfile(**timing, kv_blocks=0, max_running=0, max_waiting=0)  # the cost reads none of the three
    return np.asarray(iteration_s(expert, *map(jnp.asarray, counts)), np.float64)


def _logarithms(iterations: Iterations, mine: np.ndarray) -> np.ndarray:
    columns = (iterations.prompt_tokens, iterations.requests, iterations.kv_tokens)
    return np.log1p(np.stack([column[mine] for column in columns], 1).astype(np.float64))
