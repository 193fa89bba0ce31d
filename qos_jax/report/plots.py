"""Figures: what routers earn under load, how long answers take, who serves them, and what happens inside an expert.

Every function returns a matplotlib ``Figure`` of its own and leaves pyplot's global state alone; the figure's label
(``Figure.get_label``) is its caption. How routers look is said in ``style``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import Run
from qos_jax.evaluation.metrics import latency_per_token_s
from qos_jax.report import style
from qos_jax.sim.iterations import Activity, IterationLog
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile

_ACTIVITIES: dict[Activity, tuple[str, dict[str, Any]]] = {
    Activity.PREFILL: ("prefill", {"facecolor": "#D55E00"}),
    Activity.DECODE: ("decode", {"facecolor": "#7DB8DD"}),
    Activity.WAITING: ("waiting", {"facecolor": "#E3E3E3"}),
    Activity.PREEMPTED: ("preempted, waiting again", {"facecolor": "#CC79A7"}),
}
_TIMELINE_POINTS, _SAMPLES_PER_POINT = 300, 20
_FEWEST_IN_BIN = 20


@matplotlib.rc_context(style.RC)
def qos_against_load(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws mean QoS with its confidence band against load: one curve per router, labelled at its right end.

    Args:
      summary: the ``summary`` of results.json; only its rows of the metric "qos" are read.
    """
    rows = sorted((row for row in summary if row["metric"] == "qos"), key=lambda row: row["load"])
    figure = Figure(figsize=(style.WIDTH_INCHES, 5.2))
    axes = figure.add_axes((0.075, 0.095, 0.66, 0.8))
    ends = []
    for name in dict.fromkeys(row["router"] for row in rows):
        points = [row for row in rows if row["router"] == name]
        load, mean, low, high = (_column(points, field) for field in ("load", "mean", "low", "high"))
        if len(load) == 1:  # one point is drawn as a level
            load, mean, low, high = load + np.array([-0.05, 0.05]), *(np.repeat(x, 2) for x in (mean, low, high))
        look = style.curve_look(name, points[0]["kind"])
        axes.plot(load, mean, label=name, **look)
        if look["zorder"] > 2:
            opacity = 0.07 if points[0]["kind"] == "oracle" else 0.14
            axes.fill_between(load, low, high, color=look["color"], alpha=opacity, linewidth=0, zorder=look["zorder"])
        ends.append((float(mean[-1]), name, look))
    axes.set(xlabel="load (arrivals as a share of what the fleet can finish)", ylabel="mean QoS of a request")
    axes.margins(x=0)
    axes.set_ylim(0, 1.05 * max(row["mean"] for row in rows))
    style.label_ends(figure, axes, ends)
    _label_loads(axes, {row["load"]: row["rate_per_s"] for row in rows})
    figure.set_label(
        "Mean QoS of a request against load; all routers get the same requests. Bands are 95 % confidence intervals "
        "over seeds, dashed curves are oracles, which are told what a router cannot know."
    )
    return figure


@matplotlib.rc_context(style.RC)
def latency_cdf(runs: Sequence[Run], experts: ExpertProfile, limit_s: float) -> Figure:
    """Draws for each router the share of its requests that were answered within a latency per token.

    A curve ends below 1 where requests were dropped. The seeds of a router are pooled; their warm-up is left out.

    Args:
      runs: runs at one load, of the routers to be compared.
      experts: profile of the N experts.
      limit_s: latency limit [s/token], drawn as a vertical line.
    """
    latencies_s = {name: _pooled_latency_s(mine, experts) for name, mine in _by_router(runs).items()}
    in_time = {name: float(np.mean(latency_s <= limit_s)) for name, latency_s in latencies_s.items()}
    looks = style.line_looks({run.router.name: run.router.kind for run in runs})
    figure = Figure(figsize=(style.WIDTH_INCHES, 4.4))
    axes = figure.add_axes((0.075, 0.115, 0.6, 0.855))
    for name in sorted(latencies_s, key=lambda name: -in_time[name]):
        answered_s = np.sort(latencies_s[name][np.isfinite(latencies_s[name])])
        share = np.arange(1, len(answered_s) + 1) / len(latencies_s[name])
        label = f"{100 * in_time[name]:.0f} %  {style.spoken(name)}"
        axes.plot(1e3 * answered_s, share, drawstyle="steps-post", label=label, **looks[name])
        axes.plot(1e3 * answered_s[-1:], share[-1:], "o", markersize=3.5, color=looks[name]["color"], clip_on=False)
    axes.axvline(1e3 * limit_s, color=style.INK, linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.5e3 * limit_s), max(right, 2e3 * limit_s))  # wide enough for two ticks
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.text(1e3 * limit_s, 0.02, f" limit {1e3 * limit_s:g} ms", transform=axes.get_xaxis_transform())
    axes.set(xlabel="latency per token, ms", ylabel="share of all requests", ylim=(0, 1.01))
    axes.legend(title="within the limit", alignment="left", loc="upper left", bbox_to_anchor=(1.03, 1), borderaxespad=0)
    figure.set_label(
        f"Share of the requests that were answered within a latency per token, at load {runs[0].scenario.load:g}. "
        "Where a curve ends below 1, the rest was dropped."
    )
    return figure


@matplotlib.rc_context(style.RC)
def routing_shares(runs: Sequence[Run], expert_names: Sequence[str]) -> Figure:
    """Draws for each router which share of its requests each expert answered, and which was dropped; best QoS on top.

    Args:
      runs: runs at one load; the seeds of a router are averaged, their warm-up is left out.
      expert_names: N names; experts of one name are drawn as one.
    """
    by_router = _by_router(runs)
    qos = {name: float(np.mean([run.metrics["qos"] for run in mine])) for name, mine in by_router.items()}
    routers = sorted(by_router, key=lambda name: qos[name])
    shares = np.array([np.mean([_shares(run, expert_names) for run in by_router[name]], 0) for name in routers])
    figure = Figure(figsize=(style.WIDTH_INCHES, 1.3 + 0.27 * len(routers)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(routers))
    colours = style.expert_colours(expert_names) | {"dropped": style.PALE}
    for (name, colour), share in zip(colours.items(), shares.T, strict=True):
        bars = axes.barh(range(len(routers)), share, left=left, height=0.8, color=colour, edgecolor="white", label=name)
        texts = [f"{100 * each:.0f}" if each >= 0.045 else "" for each in share]
        axes.bar_label(bars, texts, label_type="center", fontsize=7.5, color=style.ink_on(colour))
        left += share
    for row, name in enumerate(routers):
        axes.text(1.012, row, f"{qos[name]:.3f}", va="center")
    axes.text(1.012, len(routers) - 0.3, "QoS", color=style.GREY)
    axes.set_yticks(range(len(routers)), [style.spoken(name) for name in routers])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(routers) - 0.4), xlabel="share of requests, %")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
    style.legend_above(figure, axes)
    figure.set_label(
        f"Who answers under each router, in % of the requests, at load {runs[0].scenario.load:g}. Dropped are requests "
        "that the router refused or that found the queue of their expert full."
    )
    return figure


@matplotlib.rc_context(style.RC)
def expert_timelines(run: Run, experts: ExpertProfile, expert_names: Sequence[str]) -> Figure:
    """Draws requests waiting, requests running and KV memory in use of each expert over time; see ``expert_timeline``.

    Args:
      run: the run to look at.
      experts: profile of the N experts.
      expert_names: N names; experts of one name are drawn as their mean.
    """
    arrival_s = np.asarray(run.trace.arrival_s)
    end_s = np.nanmax([arrival_s[-1], *run.replayed.log.finish_s])
    times_s = np.linspace(arrival_s[0], end_s, _TIMELINE_POINTS * _SAMPLES_PER_POINT)
    waiting, running, kv_share = expert_timeline(run, experts, times_s)
    figure = Figure(figsize=(style.WIDTH_INCHES, 5.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    titles = ("requests waiting", "requests running", "KV memory in use, %")
    for axes, title, values in zip(panels, titles, (waiting, running, 100 * kv_share), strict=True):
        for name, colour in style.expert_colours(expert_names).items():
            mean = _smoothed(values[:, np.asarray(expert_names) == name].mean(1))
            axes.plot(_smoothed(times_s), mean, label=name, color=colour, linewidth=1.2)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("time, s")
    style.legend_above(figure, panels[0])
    figure.set_label(
        f"What is on each expert under {style.spoken(run.router.name)}, at load {run.scenario.load:g}, seed "
        f"{run.scenario.seed}. KV memory is interpolated between the first and the last token of each request."
    )
    return figure


def expert_timeline(run: Run, experts: ExpertProfile, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns requests waiting, requests running and the share of KV memory in use, each [T, N], at ``times_s`` [T].

    All of it comes from the log of the run. A request waits from its arrival to its first token and runs from there to
    its last. Its tokens in memory are interpolated linearly between the two, as if it had not been preempted and all
    its iterations had taken the same time; its last block counts as half full.
    """
    trace, log = run.trace, run.replayed.log
    waiting, running, kv_tokens = np.zeros((3, len(times_s), np.shape(trace.output_tokens)[1]))
    for expert in range(waiting.shape[1]):
        mine = (run.assignment == expert) & ~log.dropped
        first_s, finish_s = log.first_token_s[mine], log.finish_s[mine]
        per_s = (np.asarray(trace.output_tokens)[mine, expert] - 1) / np.maximum(finish_s - first_s, 1e-9)  # tokens/s
        at_zero = np.asarray(trace.prompt_tokens)[mine] + 1 - per_s * first_s  # tokens, extrapolated to time 0

        def over(from_s: np.ndarray, to_s: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
            return _sum_until(times_s, from_s, weight) - _sum_until(times_s, to_s, weight)

        waiting[:, expert] = over(np.asarray(trace.arrival_s)[mine], first_s)
        running[:, expert] = over(first_s, finish_s)
        kv_tokens[:, expert] = over(first_s, finish_s, at_zero) + over(first_s, finish_s, per_s) * times_s
    blocks = (kv_tokens + running * (BLOCK_SIZE_TOKENS - 1) / 2) / BLOCK_SIZE_TOKENS
    return waiting, running, blocks / np.asarray(experts.kv_blocks)


@matplotlib.rc_context(style.RC)
def iteration_gantt(log: IterationLog, expert_name: str) -> Figure:
    """Draws the iterations of one expert: a row per request, a cell per iteration, and below how long each took.

    Args:
      log: what ``sim.iterations.iterations_of`` returns; about 100 iterations and 50 requests read well.
      expert_name: name of the expert.

    Raises:
      InputError: the log has no iteration.
    """
    if len(log.start_s) == 0:
        raise InputError(f"{expert_name} runs no iteration in the window: choose another")
    num_requests, rows_inches = len(log.request), max(0.1 * len(log.request), 0.8)
    figure = Figure(figsize=(style.WIDTH_INCHES, rows_inches + 2.1), layout="constrained")
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
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2, handleheight=1.0)
    figure.set_label(
        f"{len(log.start_s)} iterations of {expert_name}: a row per request, a cell per iteration; below, how long "
        "each took. While a prompt is computed, all others wait longer for their next token."
    )
    return figure


@matplotlib.rc_context(style.RC)
def reliability_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how often requests were in time against the probability that they were given, a panel per prediction.

    Args:
      rows: ``rows`` of the calibration program's results.json, of one router; the width that routes best and the one
        whose probabilities are best are drawn.
    """
    predictions = list(dict.fromkeys(row["prediction"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure = Figure(figsize=(style.WIDTH_INCHES, 0.9 + style.WIDTH_INCHES / len(predictions)), layout="constrained")
    panels = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, prediction in zip(panels, predictions, strict=True):
        axes.plot([0, 1], [0, 1], color=style.PALE, linewidth=0.8, zorder=1)
        for row in rows:
            if row["prediction"] == prediction and (row["routing_width"] or row["best_width"]):
                bins = [each for each in row["reliability"] if each["number"] >= _FEWEST_IN_BIN]
                name, dashes = ("best", "-") if row["best_width"] else ("routing", (0, style.ORACLE_DASHES[1]))
                axes.plot(
                    _column(bins, "predicted"), _column(bins, "realised"), marker="o", markersize=3, linestyle=dashes,
                    color=style.EXPERT_COLOURS[forms.index(row["form"])], label=f"{row['form']}, {name} width",
                )  # fmt: skip
        axes.set(title=f"predictions: {prediction}", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.set_xlabel("predicted probability to be in time")
    panels[0].set_ylabel("share that was in time")
    style.legend_above(figure, panels[0])
    figure.set_label(
        "How often requests were in time, against the probability that the impact estimate gave them when they were "
        "placed; on the diagonal both are equal. Solid is the width of the logistic with the best probabilities, "
        f"dotted the one that routes best. Bins of fewer than {_FEWEST_IN_BIN} requests are left out."
    )
    return figure


@matplotlib.rc_context(style.RC)
def prediction_reliability(quantities: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws what answers were like against what was predicted of them, a panel per quantity.

    Args:
      quantities: by name, each with the bins of ``reliability`` and the expected calibration error ``ece``, as
        ``predictor.metrics`` has them. Those with predictions above 1, such as tokens, get logarithmic axes.
    """
    figure = Figure(
        figsize=(style.WIDTH_INCHES, 0.7 + style.WIDTH_INCHES / max(len(quantities), 2)), layout="constrained"
    )
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, (name, quantity) in zip(panels, quantities.items(), strict=True):
        bins = quantity["reliability"]
        predicted, realised, error = (_column(bins, field) for field in ("predicted", "realised", "standard_error"))
        is_share = max(predicted.max(), realised.max()) <= 1.0
        ends = np.concatenate([predicted, realised - error, realised + error])
        margin = 0.05 * np.ptp(ends)
        low, high = (ends.min() - margin, ends.max() + margin) if is_share else (ends.min() / 1.2, ends.max() * 1.2)
        if not is_share:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter(ticker.ScalarFormatter())
                axis.set_minor_locator(ticker.NullLocator())
        axes.plot([low, high], [low, high], color=style.PALE, linewidth=0.8, zorder=1)
        axes.errorbar(
            predicted, realised, yerr=error, color=style.EXPERT_COLOURS[0], marker="o", markersize=4, linewidth=1
        )
        axes.set(title=f"{name}\noff by {quantity['ece']:.2g}", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel("predicted")
    panels[0].set_ylabel("mean that came true")
    figure.set_label(
        "What answers were like against what was predicted of them, on prompts that were not learned from; on the "
        "diagonal both are equal. Each point is a tenth of all predictions, with the standard error of its mean; off "
        "by is their mean distance from the diagonal, the expected calibration error."
    )
    return figure


@matplotlib.rc_context(style.RC)
def learning_curve(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the QoS of a policy in training against steps and against minutes, beside impact_greedy's.

    Args:
      records: of the run, see ``training``; only evaluations are read.

    Raises:
      InputError: there is no evaluation.
    """
    rows = [record for record in records if record["kind"] == "evaluation"]
    if not rows:
        raise InputError("the run has no evaluation yet, so there is no learning curve")
    qos = np.array([row["qos"] for row in rows])  # [evaluations, seeds]
    figure = Figure(figsize=(style.WIDTH_INCHES, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = ("steps of the environments of one seed", "minutes of training")
    for axes, name, field, unit in zip(panels, names, ("steps", "seconds"), (1, 60), strict=True):
        done = _column(rows, field) / unit
        axes.axhline(rows[-1]["impact_greedy"], label="impact greedy", **style.curve_look("impact_greedy", "heuristic"))
        if qos.shape[1] > 1:
            axes.plot(done, qos, color=style.LEARNED_COLOUR, linewidth=0.7, alpha=0.5)
        look = style.curve_look("", "learned")
        label = "learned" if qos.shape[1] == 1 else "learned, mean of the seeds"
        axes.plot(done, qos.mean(1), label=label, marker="o", markersize=4, **look)
        axes.set_xlabel(name)
        axes.margins(x=0.02)
    panels[0].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panels[0].set_ylabel("mean QoS of a held-out request")
    style.legend_above(figure, panels[0])
    figure.set_label(
        "QoS of the policy on requests that it was not trained on, always the same ones, against training. Thin lines "
        "are seeds; compilation is not counted."
    )
    return figure


def _label_loads(axes: Axes, rates_per_s: Mapping[float, float]) -> None:
    """Puts a tick at each load that was simulated, and its rate above it."""
    axes.set_xticks(list(rates_per_s), [f"{load:g}" for load in rates_per_s])
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(rates_per_s), [f"{rate:.1f}" for rate in rates_per_s.values()])
    above.set_xlabel("requests per second")
    above.spines["top"].set_visible(False)


def _cell(log: IterationLog, iteration: int, row: int) -> list[tuple[float, float]]:
    left, right = log.start_s[iteration], log.start_s[iteration] + log.duration_s[iteration]
    return [(left, row - 0.45), (right, row - 0.45), (right, row + 0.45), (left, row + 0.45)]


def _column(rows: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    return np.array([row[field] for row in rows], np.float64)  # None becomes NaN


def _by_router(runs: Sequence[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run.router.name for run in runs)
    return {name: [run for run in runs if run.router.name == name] for name in names}


def _counted(run: Run) -> slice:
    """Returns the requests that the metrics of the run count: those behind its warm-up."""
    return slice(len(run.assignment) - int(run.metrics["requests"]), None)


def _pooled_latency_s(runs: Sequence[Run], experts: ExpertProfile) -> np.ndarray:
    """Returns the latencies per token [s/token] of the counted requests of all runs, infinite where dropped."""
    each = [latency_per_token_s(experts, run.trace, run.assignment, run.replayed)[_counted(run)] for run in runs]
    return np.nan_to_num(np.concatenate(each), nan=np.inf)


def _shares(run: Run, expert_names: Sequence[str]) -> list[float]:
    """Returns which share of the counted requests the experts of each name answered, and last the dropped share."""
    dropped = run.replayed.log.dropped[_counted(run)]
    answered_by = np.asarray(expert_names)[run.assignment[_counted(run)][~dropped]]
    return [np.sum(answered_by == name) / len(dropped) for name in dict.fromkeys(expert_names)] + [dropped.mean()]


def _smoothed(samples: np.ndarray) -> np.ndarray:
    """Returns the means of the samples that fall on one point of a timeline."""
    return samples.reshape(_TIMELINE_POINTS, _SAMPLES_PER_POINT).mean(1)


def _sum_until(times_s: np.ndarray, at_s: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """Returns for each of ``times_s`` the sum of the weights whose time ``at_s`` has come."""
    order = np.argsort(at_s)
    sums = np.cumsum(np.broadcast_to(weight, at_s.shape)[order])
    return np.append(0.0, sums)[np.searchsorted(at_s[order], times_s, side="right")]
