"""Figures of the simulator beside a measured run of a real engine."""

from __future__ import annotations

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from qos_jax.evaluation.fidelity import LATENCIES, LOADS, SimulatedRun, latencies_s, latency_errors
from qos_jax.evaluation.measured_run import MeasuredRun
from qos_jax.report.style import EXPERT_COLOURS, FULL, GREY, INK, PALE, Width, legend_outside, styled
from qos_jax.sim.types import RequestLog

_SIMULATED = EXPERT_COLOURS[0]


@styled
def latency_scatter(run: MeasuredRun, log: RequestLog, *, width: Width = FULL) -> Figure:
    """Draws each request's simulated latencies against the measured ones; on the diagonal both are equal.

    Args:
      run: the measured run.
      log: of the same requests in the simulator.
      width: of the figure.
    """
    columns, lines = (3, 1) if width == FULL else (2, 2)
    height = lines * (width.inches / columns + 0.3)
    figure = Figure(figsize=(width.inches, height), layout="constrained")
    every = figure.subplots(lines, columns).flatten()
    measured, simulated, errors = latencies_s(run, run), latencies_s(run, log), latency_errors(run, log)
    for axes, (name, title) in zip(every, LATENCIES.items(), strict=False):
        scale, unit = (1e3, "ms") if name == "tpot_s" else (1.0, "s")
        x, y = scale * measured[name], scale * simulated[name]
        low, high = min(np.nanmin(x), np.nanmin(y)), max(np.nanmax(x), np.nanmax(y))
        margin = 0.05 * (high - low)
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=GREY, linewidth=0.8, zorder=1)
        axes.scatter(x, y, s=9 * width.lines, color=_SIMULATED, alpha=0.45, linewidths=0)
        axes.set(title=f"{title}, {unit}", xlabel="measured", xlim=ends, ylim=ends, aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.MaxNLocator(5 if width == FULL else 4))
        mean, median = (100 * errors[name][field] for field in ("mean_error", "median_error"))
        text = f"mean {mean:+.2f} %\nmedian |error| {median:.1f} %"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=width.text_points - 1, color=INK)
    for axes in every[len(LATENCIES) :]:
        axes.set_visible(False)
    for axes in every[::columns]:
        axes.set_ylabel("simulated")
    figure.set_label(
        f"Latencies of {len(run.arrival_s)} requests, {run.name}: simulated against measured; on the line both are "
        "equal. Far from it lie requests that were preempted in only one of the two."
    )
    return figure


@styled
def load_timeline(run: MeasuredRun, simulated: SimulatedRun, *, width: Width = FULL) -> Figure:
    """Draws requests waiting and running and the KV memory in use over time, measured and simulated.

    Args:
      run: the measured run.
      simulated: the same requests in the simulator.
      width: of the figure.
    """
    figure = Figure(figsize=(width.inches, 4.2 if width == FULL else 3.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, name in zip(panels, ("waiting", "running", "kv_share"), strict=True):
        scale, unit = (100, ", %") if name == "kv_share" else (1, "")
        measured, computed = (scale * getattr(each, name) for each in (run, simulated))
        axes.plot(run.tick_s, measured, label="measured", color=PALE, linewidth=3.2 * width.lines)
        axes.plot(run.tick_s, computed, label="simulated", color=_SIMULATED, linewidth=1.1 * width.lines)
        axes.set_title(LOADS[name] + unit)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("time since the first arrival, s")
    handles, labels = panels[0].get_legend_handles_labels()
    legend_outside(figure, list(zip(handles, labels, strict=True)), width)
    figure.set_label(f"Requests and memory in the engine over time, {run.name}: measured, and in the simulator.")
    return figure
