"""Fidelity: a measured run of a real engine on one GPU, replayed by the simulator, and the errors of the replay.

The replay uses only the inputs of the engine: arrivals, token counts and KV memory. Timing comes from another source,
such as kernel tables (``qos_jax.fleet.profile_fitting``). The measurements of the run (times of its tokens, and state
of its scheduler over time) therefore test the timing and the scheduling rules together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.evaluation.measured_run import MeasuredRun
from qos_jax.fleet.profile_fitting import KINDS, TIMING_UNITS, Iterations, predicted_s
from qos_jax.sim.iterations import Activity, IterationLog, iterations_of
from qos_jax.sim.replay import replay
from qos_jax.sim.types import ExpertProfile, RequestLog, RequestTrace
from qos_jax.workload.prefix_sharing import BlockIds, prefix_hits

LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}
LOADS = {"running": "requests running", "waiting": "requests waiting", "kv_share": "KV memory in use"}

_POINTS_PER_TICK = 200
_UNLIMITED = 10**6  # blocks, or places in a queue


@dataclasses.dataclass(frozen=True)
class SimulatedRun:
    """The requests of a measured run in the simulator."""

    log: RequestLog
    running: np.ndarray  # [T] requests, at the ticks of the measured run
    waiting: np.ndarray  # [T] requests
    kv_share: np.ndarray  # [T] share of the KV blocks in use
    iterations: Iterations  # all iterations, in order


def simulate(run: MeasuredRun, timing: Mapping[str, Any]) -> SimulatedRun:
    """Replays a measured run, in float64 for its requests and in float32 for its iterations.

    Args:
      run: gives the inputs of the engine and the ticks.
      timing: coefficients of an iteration, as ``profile_fitting.fit_timing`` returns them, and in ``kernels`` its
        tables, if these count in their place.

    Raises:
      InputError: a request does not fit the memory.
    """
    experts, trace = _expert(run, timing), _trace(run)
    iterations = iterations_of(
        experts, trace, np.zeros(len(run.arrival_s), int), 0, 0.0, np.inf,
        block_size=run.block_size,
    )  # fmt: skip
    cached = iterations.cached_tokens
    present = iterations.activity != Activity.ABSENT
    blocks = -(-cached // run.block_size).sum(1)
    index = np.searchsorted(iterations.start_s, run.tick_s, side="right") - 1
    busy = (index >= 0) & (run.tick_s <= (iterations.start_s + iterations.duration_s)[index])
    return SimulatedRun(
        log=replay_run(run, timing),
        running=np.where(busy, (cached > 0).sum(1)[index], 0),
        waiting=np.where(busy, (present & (cached == 0)).sum(1)[index], 0),
        kv_share=np.where(busy, blocks[index], 0) / run.kv_blocks,
        iterations=_batches(iterations, cached),
    )


def with_shared_prefixes(run: MeasuredRun, capacity_blocks: int | None) -> MeasuredRun:
    """Returns the run whose prompts share prefixes: blocks that an earlier request had need not be computed.

    Requests use the cache in order of arrival, each for its prompt and its answer, and nobody has the same answer.

    Args:
      run: with the ids of its blocks.
      capacity_blocks: of a cache that evicts the block used longest ago; None is a cache without end.

    Raises:
      InputError: the run has no ids, or its engine no prefix cache.
    """
    if run.prompt_blocks is None:
        raise InputError(f"{run.name}: has no prefix_blocks.jsonl, must have it for prefixes that requests share")
    if not run.prefix_cache:
        raise InputError(f"{run.name}: its engine has no prefix cache, must have one for prefixes that requests share")
    full = (run.prompt_tokens + run.output_tokens) // run.block_size - [len(ids) for ids in run.prompt_blocks]
    ends = -np.cumsum(np.maximum(full, 0))  # answers have the negative ids
    answers = [list(range(end, end + count)) for end, count in zip(ends, full, strict=True)]
    asked = BlockIds(run.prompt_tokens, run.prompt_blocks, answers)
    return dataclasses.replace(run, shared_tokens=prefix_hits(asked, run.block_size, capacity_blocks=capacity_blocks))


def replay_run(run: MeasuredRun, timing: Mapping[str, Any]) -> RequestLog:
    """Returns the log of the requests of a measured run in the simulator; see ``simulate``."""
    log = replay(
        _expert(run, timing), _trace(run), np.zeros(len(run.arrival_s), int),
        block_size=run.block_size,
    )  # fmt: skip
    if log.dropped.any():
        raise InputError(
            f"{run.name}: request {int(np.argmax(log.dropped)) + 1} does not fit {run.kv_blocks} KV blocks"
        )
    return log


def latencies_s(run: MeasuredRun, log: MeasuredRun | RequestLog) -> dict[str, np.ndarray]:
    """Returns TTFT [J] s, TPOT [J] s/token (NaN for answers of one token) and end-to-end latency [J] s, by name.

    Args:
      run: gives the arrivals and output tokens.
      log: gives the times of the tokens; the run itself for the measured latencies.
    """
    later_tokens = np.where(run.output_tokens > 1, run.output_tokens - 1, np.nan)
    return {
        "ttft_s": log.first_token_s - run.arrival_s,
        "tpot_s": (log.finish_s - log.first_token_s) / later_tokens,
        "e2e_s": log.finish_s - run.arrival_s,
    }


def latency_errors(run: MeasuredRun, log: RequestLog) -> dict[str, dict[str, float]]:
    """Returns the errors of the simulated latencies, for each of ``LATENCIES``.

    Returns:
      By name: both means (``measured``, ``simulated``), the relative error of the mean (``mean_error``), median and
      95th percentile of the absolute relative error of a request (``median_error``, ``p95_error``), and
      ``correlation`` over the requests.
    """
    errors = {}
    measured, simulated = latencies_s(run, run), latencies_s(run, log)
    for name in LATENCIES:
        defined = np.isfinite(measured[name])
        real, model = measured[name][defined], simulated[name][defined]
        relative = np.abs(model / real - 1)
        errors[name] = {
            "measured": float(real.mean()),
            "simulated": float(model.mean()),
            "mean_error": float(model.mean() / real.mean() - 1),
            "median_error": float(np.median(relative)),
            "p95_error": float(np.percentile(relative, 95)),
            "correlation": float(np.corrcoef(real, model)[0, 1]),
        }
    return errors


def load_errors(run: MeasuredRun, simulated: SimulatedRun) -> dict[str, dict[str, float]]:
    """Returns both means over the ticks and the mean absolute difference, for each of ``LOADS``."""
    errors = {}
    for name in LOADS:
        real, model = getattr(run, name), getattr(simulated, name)
        errors[name] = {
            "measured": float(real.mean()),
            "simulated": float(model.mean()),
            "mean_difference": float(np.abs(model - real).mean()),
        }
    return errors


def parts_of_time(run: Iterations, kernels: Iterations, timing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the share of a run's time and the error of the cost model, for each kind of iteration.

    Each iteration of the run is compared with the nearest measured batch of the same kind in the kernel tables, in the
    logarithms of prompt tokens, requests and cached tokens.

    Args:
      run: iterations of the run.
      kernels: measured iterations, as ``profile_fitting.assemble`` returns them.
      timing: coefficients of the cost model.

    Returns:
      Rows of ``kind``, ``iterations``, ``share`` of the run's time, ``form_error``, the mean error of the cost model
      over that time (NaN without a measured batch), and ``of_the_run``, the product of the two.
    """
    from scipy.spatial import KDTree  # slow to import

    rows = []
    table_error = predicted_s(timing, kernels) / kernels.time_s - 1
    for kind in KINDS:
        in_run, measured = run.kind == kind, kernels.kind == kind
        if not in_run.any():
            continue
        share, form_error = run.time_s[in_run].sum() / run.time_s.sum(), np.nan
        if measured.any():
            _, nearest = KDTree(_log_counts(kernels, measured)).query(_log_counts(run, in_run))
            form_error = np.average(table_error[measured][nearest], weights=run.time_s[in_run])
        rows.append(
            {
                "kind": kind,
                "iterations": int(in_run.sum()),
                "share": float(share),
                "form_error": float(form_error),
                "of_the_run": float(share * form_error),
            }
        )
    return rows


def decode_errors(run: MeasuredRun, timing: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Compares the cost model with the engine, in ticks in which the engine computed no new prompt.

    The cost model is evaluated at the batches of the engine, interpolated between ticks; the last block of a request
    counts as half full. Without records of the KV memory, requests count from their first to their last token, with the
    prompt and what of the answer they have at a constant rate. This comparison includes time that kernel tables do not
    contain, such as that of the scheduler.

    Returns:
      The ticks are of three kinds: those without waiting requests (``memory free``), those with waiting requests in
      which the number of running requests fell, as in the tick before, so that few preempted requests resumed (``memory
      full``), and those with waiting requests in which as many ran as may (``batch full``). For each kind: the number
      of ``ticks``, the ``measured`` tokens, the tokens ``predicted`` at the same batches, and the relative ``error`` of
      the model's time; NaN without such a tick.
    """
    tokens = np.diff(run.tick_s) * run.output_tokens_per_s[1:]
    predicted = _decoded_tokens(run, timing)
    fell = np.diff(run.running) < 0
    only_decoded = run.prompt_tokens_per_s[1:] == 0
    all_run = run.running == run.max_running
    ticks = {
        "memory free": only_decoded & (run.waiting[1:] == 0) & (run.waiting[:-1] == 0),
        "memory full": only_decoded & (run.waiting[1:] > 0) & fell & np.append(False, fell[:-1]),
        "batch full": only_decoded & (run.waiting[1:] > 0) & all_run[1:] & all_run[:-1],
    }
    errors = {}
    for name, of_kind in ticks.items():
        measured, expected = float(tokens[of_kind].sum()), float(predicted[of_kind].sum())
        error = measured / expected - 1 if of_kind.any() else np.nan
        errors[name] = {"ticks": int(of_kind.sum()), "measured": measured, "predicted": expected, "error": error}
    return errors


def recomputation(run: MeasuredRun, simulated: SimulatedRun, timing: Mapping[str, Any]) -> dict[str, float]:
    """Returns the ``preemptions`` in the simulator, the ``tokens`` recomputed after them, and their ``share`` of time.

    The share includes only the arithmetic of these tokens, the maximum that an engine with a prefix cache can save.
    """
    shared_tokens = 0 if run.shared_tokens is None else run.shared_tokens.sum()
    tokens = float(simulated.iterations.prompt_tokens.sum() - run.prompt_tokens.sum() + shared_tokens)
    return {
        "preemptions": int(simulated.log.preemptions.sum()),
        "tokens": int(tokens),
        "share": tokens * timing["prefill_per_token_s"] / float(simulated.iterations.time_s.sum()),
    }


def parts_left_out(
    run: MeasuredRun, timing: Mapping[str, Any], one_gpu: Mapping[str, Any] | None = None
) -> dict[str, dict[str, float]]:
    """Returns the relative errors of the mean latencies with one part of the model left out, by part.

    Args:
      run: the measured run.
      timing: coefficients of an iteration and, in ``kernels``, its tables.
      one_gpu: the same without what the GPUs exchange, if they do.
    """
    variants: dict[str, tuple[MeasuredRun, dict[str, Any]]] = {
        "nothing": (run, {}),
        "limit of the KV memory": (dataclasses.replace(run, kv_blocks=_UNLIMITED), {}),
    }
    if one_gpu is not None:
        variants["exchange between the GPUs"] = (run, dict(one_gpu))
    if run.shared_tokens is not None:
        variants["prefixes that requests share"] = (dataclasses.replace(run, shared_tokens=None), {})
    for name, switch in (("asynchronous scheduling", "async_scheduling"), ("prefix cache", "prefix_cache")):
        if getattr(run, switch):
            off: dict[str, Any] = {switch: False}
            variants[name] = (dataclasses.replace(run, **off), {})
    if timing.get("kernels") is None:
        variants |= {
            "reads of the KV cache": (run, {"per_kv_token_s": 0.0}),
            "time per request": (run, {"per_sequence_s": 0.0}),
            "arithmetic of prompts": (run, {"prefill_base_s": 0.0, "prefill_per_token_s": 0.0}),
        }
    else:
        variants["tables, but for the five coefficients"] = (run, {"kernels": None})
    errors = {}
    for name, (changed_run, changed_timing) in variants.items():
        rows = latency_errors(run, replay_run(changed_run, {**timing, **changed_timing}))
        errors[name] = {latency: row["mean_error"] for latency, row in rows.items()}
    return errors


def _expert(run: MeasuredRun, timing: Mapping[str, Any]) -> ExpertProfile:
    fields: dict[str, Any] = {name: timing[name] for name in TIMING_UNITS}
    fields |= {"kv_blocks": run.kv_blocks, "max_running": run.max_running, "max_waiting": _UNLIMITED}
    fields |= {name: getattr(run, name) for name in ("token_budget", "async_scheduling", "prefix_cache")}
    arrays: dict[str, Any] = {name: np.array([value]) for name, value in fields.items()}
    return ExpertProfile(**arrays, kernels=timing.get("kernels"))


def _trace(run: MeasuredRun) -> RequestTrace:
    output_tokens = run.output_tokens[:, None]
    return RequestTrace(run.arrival_s, run.prompt_tokens, output_tokens, shared_tokens=run.shared_tokens)


def _batches(log: IterationLog, cached: np.ndarray) -> Iterations:
    """Returns the kind, the counts and the duration of each iteration."""
    prefills, decodes = log.activity == Activity.PREFILL, log.activity == Activity.DECODE
    before = cached - log.tokens
    prompt_tokens, decoding = (log.tokens * prefills).sum(1), decodes.sum(1)
    continued = (prefills & (before > 0)).any(1)
    kind = np.select([continued, prompt_tokens == 0, decoding == 0], ["chunked", "decode", "prefill"], "mixed")
    pairs = (log.tokens * (before + log.tokens / 2) * prefills).sum(1)
    return Iterations(
        kind=kind,
        prompt_tokens=prompt_tokens,
        requests=decoding + prefills.sum(1),
        kv_tokens=(before * decodes).sum(1),
        time_s=log.duration_s,
        prefix_tokens=(before * prefills).sum(1),
        pairs=pairs,
        decodes=decoding,
    )


def _decoded_tokens(run: MeasuredRun, timing: Mapping[str, Any]) -> np.ndarray:
    """Returns the tokens [T - 1] that the cost model predicts between ticks, at the batches of the engine."""
    times_s = np.linspace(run.tick_s[:-1], run.tick_s[1:], _POINTS_PER_TICK)
    if np.isnan(run.kv_share).any():
        decoding = (times_s[..., None] >= run.first_token_s) & (times_s[..., None] < run.finish_s)
        answered = (times_s[..., None] - run.first_token_s) / np.maximum(run.finish_s - run.first_token_s, 1e-9)
        requests = decoding.sum(-1)
        kv_tokens = (decoding * (run.prompt_tokens + answered * run.output_tokens)).sum(-1)
    else:
        requests = np.interp(times_s, run.tick_s, run.running)
        blocks = np.interp(times_s, run.tick_s, run.kv_share) * run.kv_blocks
        kv_tokens = np.maximum(run.block_size * (blocks - requests / 2), 0)
    kind, zeros = np.full(times_s.shape, "decode"), np.zeros(times_s.shape)
    batches = Iterations(kind, zeros, requests, kv_tokens, times_s, zeros, zeros, requests)
    return np.mean(requests / predicted_s(timing, batches), 0) * np.diff(run.tick_s)


def _log_counts(iterations: Iterations, selected: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the three counts [R', 3] of the selected iterations."""
    columns = (iterations.prompt_tokens, iterations.requests, iterations.kv_tokens)
    return np.log1p(np.stack([column[selected] for column in columns], 1).astype(np.float64))
