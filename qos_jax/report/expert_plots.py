"""Figures of what happens inside experts: queues and memory over time, and single iterations; see ``report.plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.report import style
from qos_jax.report.style import FULL, Width
from qos_jax.sim.iterations import Activity, IterationLog
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile

_ACTIVITIES: dict[Activity, tuple[str, dict[str, Any]]] = {
    Activity.PREFILL: ("prefill", {"facecolor": "#D55E00"}),
    Activity.DECODE: ("decode", {"facecolor": "#7DB8DD"}),
    Activity.WAITING: ("waiting", {"facecolor": "#E3E3E3"}),
    Activity.PREEMPTED: ("preempted, waiting again", {"facecolor": "#CC79A7"}),
}
_TIMELINE_POINTS, _SAMPLES_PER_POINT = 300, 20


@style.styled
def expert_timelines(
    run: RouterRun, experts: ExpertProfile, expert_names: Sequence[str], *, width: Width = FULL
) -> Figure:
    """Draws requests waiting, requests running and KV memory in use of each expert over time; see ``expert_timeline``.

    Args:
      run: the run to draw.
      experts: profile of the N experts.
      expert_names: N names; experts of one name are drawn as their mean.
      width: of the figure.
    """
    arrival_s = np.asarray(run.trace.arrival_s)
    end_s = np.nanmax([arrival_s[-1], *run.replayed.log.finish_s])
    times_s = np.linspace(arrival_s[0], end_s, _TIMELINE_POINTS * _SAMPLES_PER_POINT)
    waiting, running, kv_share = expert_timeline(run, experts, times_s)
    figure = Figure(figsize=(width.inches, 4.5 if width == FULL else 3.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    titles = ("requests waiting", "requests running", "KV memory in use, %")
    for axes, title, values in zip(panels, titles, (waiting, running, 100 * kv_share), strict=True):
        for name, colour in style.expert_colours(expert_names).items():
            mean = _smoothed(values[:, np.asarray(expert_names) == name].mean(1))
            axes.plot(_smoothed(times_s), mean, label=name, color=colour, linewidth=1.2 * width.lines)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("time, s")
    handles, labels = panels[0].get_legend_handles_labels()
    style.legend_outside(figure, list(zip(handles, labels, strict=True)), width)
    figure.set_label(
        f"Requests and memory of each expert under {style.display_name(run.router.name)}, at load "
        f"{run.scenario.load:g}, seed {run.scenario.seed}. KV memory is interpolated between the first and the "
        "last token of each request."
    )
    return figure


def expert_timeline(
    run: RouterRun, experts: ExpertProfile, times_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns requests waiting, requests running and the share of KV memory in use, each [T, N], at ``times_s`` [T].

    All of it comes from the log of the run. A request waits from its arrival to its first token and runs from there to
    its last. Its tokens in memory are interpolated linearly between the two, as if it had not been preempted and all
    its iterations had taken the same time; its last block counts as half full.
    """
    trace, log = run.trace, run.replayed.log
    waiting, running, kv_tokens = np.zeros((3, len(times_s), np.shape(trace.output_tokens)[1]))
    for expert in range(waiting.shape[1]):
        served = (run.assignment == expert) & ~log.dropped
        first_s, finish_s = log.first_token_s[served], log.finish_s[served]
        per_s = (np.asarray(trace.output_tokens)[served, expert] - 1) / np.maximum(finish_s - first_s, 1e-9)  # tokens/s
        at_zero = np.asarray(trace.prompt_tokens)[served] + 1 - per_s * first_s  # tokens, extrapolated to time 0

        def over(from_s: np.ndarray, to_s: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
            return _sum_until(times_s, from_s, weight) - _sum_until(times_s, to_s, weight)

        waiting[:, expert] = over(np.asarray(trace.arrival_s)[served], first_s)
        running[:, expert] = over(first_s, finish_s)
        kv_tokens[:, expert] = over(first_s, finish_s, at_zero) + over(first_s, finish_s, per_s) * times_s
    blocks = (kv_tokens + running * (BLOCK_SIZE_TOKENS - 1) / 2) / BLOCK_SIZE_TOKENS
    return waiting, running, blocks / np.asarray(experts.kv_blocks)


@style.styled
def iteration_gantt(log: IterationLog, expert_name: str, *, width: Width = FULL) -> Figure:
    """Draws the iterations of one expert: a row per request, a cell per iteration, and below how long each took.

    Args:
      log: of ``sim.iterations.iterations_of``; about 100 iterations and 50 requests read well.
      expert_name: name of the expert.
      width: of the figure.

    Raises:
      InputError: the log has no iteration.
    """
    if len(log.start_s) == 0:
        raise InputError(f"{expert_name} runs no iteration in the window: choose another")
    num_requests, rows_inches = len(log.request), max(0.085 * len(log.request), 0.8)
    figure = Figure(figsize=(width.inches, rows_inches + 1.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(rows_inches, 1.0))
    for activity, (name, look) in _ACTIVITIES.items():
        cells = [_cell(log, iteration, row) for iteration, row in np.argwhere(log.activity == activity)]
        axes.add_collection(PolyCollection(cells, label=name, edgecolor="white", linewidth=0.3, **look))
    axes.set(
        xlim=(log.start_s[0], log.start_s[-1] + log.duration_s[-1]), ylim=(num_requests - 0.3, -0.7),
        ylabel=f"{num_requests} requests, in order of arrival", yticks=[],
    )  # fmt: skip
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False)
    prefills = (log.activity == Activity.PREFILL).any(1)
    colour = [_ACTIVITIES[Activity.PREFILL if prefill else Activity.DECODE][1]["facecolor"] for prefill in prefills]
    below.bar(log.start_s, 1e3 * log.duration_s, 0.9 * log.duration_s, align="edge", color=colour)
    below.set(xlabel="time, s", ylabel="iteration, ms")
    handles = [Patch(label=name, **look) for name, look in _ACTIVITIES.values()]
    entries = [(handle, str(handle.get_label())) for handle in handles]
    style.legend_outside(figure, entries, width, handlelength=1.2, handleheight=1.0)
    figure.set_label(
        f"{len(log.start_s)} iterations of {expert_name}: a row per request, a cell per iteration; below, the duration "
        "of each. While a prompt is computed, the running requests wait longer for their next token."
    )
    return figure


def _cell(log: IterationLog, iteration: int, row: int) -> list[tuple[float, float]]:
    left, right = log.start_s[iteration], log.start_s[iteration] + log.duration_s[iteration]
    return [(left, row - 0.45), (right, row - 0.45), (right, row + 0.45), (left, row + 0.45)]


def _smoothed(samples: np.ndarray) -> np.ndarray:
    """Returns the means of the samples that fall on one point of a timeline."""
    return samples.reshape(_TIMELINE_POINTS, _SAMPLES_PER_POINT).mean(1)


def _sum_until(times_s: np.ndarray, at_s: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """Returns for each of ``times_s`` the sum of the weights whose time ``at_s`` has come."""
    order = np.argsort(at_s)
    sums = np.cumsum(np.broadcast_to(weight, at_s.shape)[order])
    return np.append(0.0, sums)[np.searchsorted(at_s[order], times_s, side="right")]
