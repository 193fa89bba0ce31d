"""Figures of the simulator beside a measured run."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from qos_jax.evaluation.fidelity import LATENCIES, LOADS, SimulatedRun, latencies_s, latency_errors
from qos_jax.evaluation.measured_run import MeasuredRun
from qos_jax.report.style import EXPERT_COLOURS, GREY, INK, PALE, RC, WIDTH_INCHES, legend_above
from qos_jax.sim.types import RequestLog

_SIMULATED = EXPERT_COLOURS[0]


@matplotlib.rc_context(RC)
def latency_scatter(run: MeasuredRun, log: RequestLog) -> Figure:
    """Draws each request's simulated latencies against the measured ones; on the diagonal both are equal."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.1), layout="constrained")
    measured, simulated, errors = latencies_s(run, run), latencies_s(run, log), latency_errors(run, log)
    for axes, (name, title) in zip(figure.subplots(1, 3), LATENCIES.items(), strict=True):
        scale, unit = (1e3, "ms") if name == "tpot_s" else (1.0, "s")
        real, ours = scale * measured[name], scale * simulated[name]
        low, high = min(np.nanmin(real), np.nanmin(ours)), max(np.nanmax(real), np.nanmax(ours))
        margin = 0.05 * (high - low)
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=GREY, linewidth=0.8, zorder=1)
        axes.scatter(real, ours, s=9, color=_SIMULATED, alpha=0.45, linewidths=0)
        axes.set(title=f"{title}, {unit}", xlabel="measured", xlim=ends, ylim=ends, aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.MaxNLocator(5))
        mean, median = (100 * errors[name][field] for field in ("mean_error", "median_error"))
        text = f"mean {mean:+.2f} %\nmedian |error| {median:.1f} %"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=8, color=INK)
    figure.axes[0].set_ylabel("simulated")
    figure.set_label(
        f"Latencies of {len(run.arrival_s)} requests, {run.name}: simulated against measured; on the line both are "
        "equal. Far from it lie requests that lost their memory and started over in one of the two only."
    )
    return figure


@matplotlib.rc_context(RC)
def load_timeline(run: MeasuredRun, simulated: SimulatedRun) -> Figure:
    """Draws requests waiting and running and the KV memory in use over time, measured and simulated."""
    figure = Figure(figsize=(WIDTH_INCHES, 5.0), layout="constrained")
    for axes, name in zip(figure.subplots(3, 1, sharex=True), ("waiting", "running", "kv_share"), strict=True):
        scale, unit = (100, ", %") if name == "kv_share" else (1, "")
        axes.plot(run.tick_s, scale * getattr(run, name), label="measured", color=PALE, linewidth=3.2)
        axes.plot(run.tick_s, scale * getattr(simulated, name), label="simulated", color=_SIMULATED, linewidth=1.1)
        axes.set_title(LOADS[name] + unit)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    figure.axes[-1].set_xlabel("time since the first arrival, s")
    legend_above(figure, figure.axes[0])
    figure.set_label(f"What the engine held at each look, {run.name}: measured, and in the simulator.")
    return figure
