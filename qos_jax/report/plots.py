"""Figures that compare routers: QoS and gains against load, latencies, routing shares, and learning curves.

Every function returns a matplotlib ``Figure`` of its own and leaves pyplot's global state alone. The figure's label
(``Figure.get_label``) is its caption. ``width`` is ``style.FULL`` or ``style.COLUMN``; ``pictures.write_figure`` draws
and writes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.metrics import latency_per_token_s
from qos_jax.report import style
from qos_jax.report.gains import BEST_HEURISTIC, gain_text
from qos_jax.report.style import FULL, Width
from qos_jax.sim.types import ExpertProfile

_MAX_LIMITS = 10  # latency limits that a picture of latencies goes up to
_MIN_GAIN_RANGE = 0.01  # QoS; a smaller range would show noise as structure


@style.styled
def qos_against_load(
    summary: Sequence[Mapping[str, Any]], *, routers: Sequence[str] | None = None, width: Width = FULL
) -> Figure:
    """Draws mean QoS with its confidence band against load, one curve for each router.

    Args:
      summary: the ``summary`` of results.json; only its rows of the metric "qos" are read.
      routers: to draw; all by default, where ordinary heuristics share grey if they are many.
      width: of the figure.
    """
    rows = sorted((row for row in summary if row["metric"] == "qos"), key=lambda row: row["load"])
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["router"], []).append(row["mean"])
    kinds = {row["router"]: row["kind"] for row in rows}
    names = sorted(style.chosen(kinds, routers), key=lambda name: -float(np.mean(means[name])))
    looks = style.looks({name: kinds[name] for name in names}, width)
    figure = Figure(figsize=(width.inches, 3.7 if width == FULL else 2.5), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        points = [row for row in rows if row["router"] == name]
        load, mean, low, high = (column(points, field) for field in ("load", "mean", "low", "high"))
        _add_tips(axes, name, points)
        if len(load) == 1:  # one point is drawn as a level
            load, mean, low, high = load + np.array([-0.05, 0.05]), *(np.repeat(x, 2) for x in (mean, low, high))
        look = looks[name]
        axes.plot(load, mean, label=style.display_name(name), **look)
        if look["zorder"] > 2:
            opacity = 0.07 if kinds[name] == "oracle" else 0.14
            axes.fill_between(load, low, high, color=look["color"], alpha=opacity, linewidth=0, zorder=look["zorder"])
    axes.set(xlabel="load: arrival rate over the fleet's saturation rate", ylabel="mean QoS of a request")
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.05 * max(row["mean"] for row in rows if row["router"] in names))
    _label_loads(axes, {row["load"]: row["rate_per_s"] for row in rows}, width)
    style.legend_outside(figure, style.legend_entries(looks), width, beside=True)
    figure.set_label(
        "Mean QoS of a request against load. All routers get the same requests. Bands are 95 % confidence intervals "
        f"over seeds; dashed curves are oracles, which know the truth.{style.grey_note(looks)}"
    )
    return figure


@style.styled
def gains_against_load(
    gains: Sequence[Mapping[str, Any]],
    *,
    reference: str | None = None,
    routers: Sequence[str] | None = None,
    width: Width = FULL,
) -> Figure:
    """Draws the paired gain in QoS of each router over a reference against load, with 95 % intervals.

    The vertical axis is zoomed to the learned routers, or without one to the two best heuristics. Routers that are
    below it at most of the loads are left out, and the caption names them.

    Args:
      gains: the ``gains`` of results.json.
      reference: one of theirs; by default impact_greedy if it took part, otherwise the best heuristic.
      routers: to draw; by default all but oracles.
      width: of the figure.

    Raises:
      InputError: there are no gains over the reference, or none of the routers.
    """
    references = list(dict.fromkeys(gain["reference"] for gain in gains))
    reference = reference or ("impact_greedy" if "impact_greedy" in references else BEST_HEURISTIC)
    rows = [gain for gain in gains if gain["reference"] == reference]
    if not rows:
        raise InputError(f"there are no gains over {reference!r}; choose from {', '.join(references) or 'none'}")
    kinds = {row["router"]: row["kind"] for row in rows}
    asked = style.chosen(kinds, routers)
    shown = [name for name in asked if kinds[name] != "oracle" or routers is not None] or asked
    bottom, top = _gain_range([row for row in rows if row["router"] in shown])
    means = {name: np.array([row["mean"] for row in rows if row["router"] == name]) for name in shown}
    names = [name for name in shown if np.mean(means[name] > bottom) > 0.5]
    names.sort(key=lambda name: -float(means[name].mean()))
    looks = style.looks({name: kinds[name] for name in names}, width)
    figure = Figure(figsize=(width.inches, 3.2 if width == FULL else 2.3), layout="constrained")
    axes = figure.add_subplot()
    _gain_curves(axes, rows, looks, width)
    axes.set(ylim=(bottom, top), xlabel="load: arrival rate over the fleet's saturation rate")
    axes.set_ylabel(f"paired gain in QoS over\n{style.display_name(reference)} (zoomed)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g}" if abs(value) > 1e-9 else "0")
    _label_loads(axes, {row["load"]: row["rate_per_s"] for row in rows}, width)
    style.legend_outside(figure, style.legend_entries(looks), width, beside=True)
    hidden = ", ".join(style.display_name(name) for name in shown if name not in names)
    note = f" Below the picture at most loads: {hidden}." if hidden else ""
    figure.set_label(
        f"Paired gain in QoS over {style.display_name(reference)} on the same requests, with 95 % intervals; above 0 a "
        f"router is better.{note}{style.grey_note(looks)}"
    )
    return figure


@style.styled
def latency_cdf(
    runs: Sequence[RouterRun],
    experts: ExpertProfile,
    limit_s: float,
    *,
    routers: Sequence[str] | None = None,
    width: Width = FULL,
) -> Figure:
    """Draws for each router the share of its requests that were answered within a latency per token.

    A curve ends below 1 where requests were dropped. The seeds of a router are pooled; their warm-up is left out.

    Args:
      runs: runs at one load.
      experts: profile of the N experts.
      limit_s: latency limit [s/token], drawn as a vertical line.
      routers: to draw; by default those of ``style.notable``.
      width: of the figure.
    """
    kinds = {run.router.name: run.router.kind for run in runs}
    names = style.notable(kinds) if routers is None else style.chosen(kinds, routers)
    by_router = _by_router(runs)
    latencies_s = {name: _pooled_latency_s(by_router[name], experts) for name in names}
    in_time = {name: float(np.mean(latency_s <= limit_s)) for name, latency_s in latencies_s.items()}
    names.sort(key=lambda name: -in_time[name])
    looks = style.looks({name: kinds[name] for name in names}, width)
    figure = Figure(figsize=(width.inches, 3.3 if width == FULL else 2.4), layout="constrained")
    axes = figure.add_subplot()
    entries = []
    for name in names:
        answered_s = np.sort(latencies_s[name][np.isfinite(latencies_s[name])])
        share = np.arange(1, len(answered_s) + 1) / len(latencies_s[name])
        label = f"{100 * in_time[name]:.0f} %  {style.display_name(name)}"
        look = looks[name] | {"marker": ""}
        entries.append((axes.plot(1e3 * answered_s, share, drawstyle="steps-post", label=label, **look)[0], label))
        axes.plot(1e3 * answered_s[-1:], share[-1:], "o", color=look["color"])
    axes.axvline(1e3 * limit_s, color=style.INK, linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    # Wide enough for two ticks, and not so wide that late answers hide what happens around the limit.
    axes.set_xlim(min(left, 0.5e3 * limit_s), min(max(right, 2e3 * limit_s), _MAX_LIMITS * 1e3 * limit_s))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.text(1e3 * limit_s, 0.02, f" limit {1e3 * limit_s:g} ms", transform=axes.get_xaxis_transform())
    axes.set(
        xlabel=f"latency per token, ms (up to {_MAX_LIMITS} times the limit)",
        ylabel="share of all requests",
        ylim=(0, 1.01),
    )
    style.legend_outside(figure, entries, width, beside=True, title="within the limit", alignment="left")
    figure.set_label(
        f"Share of the requests that were answered within a latency per token, at load {runs[0].scenario.load:g}. "
        "Where a curve ends below 1, the other requests were dropped."
    )
    return figure


@style.styled
def routing_shares(
    runs: Sequence[RouterRun], expert_names: Sequence[str], *, routers: Sequence[str] | None = None, width: Width = FULL
) -> Figure:
    """Draws for each router the shares of its requests that each expert answered and that were dropped.

    The router with the best QoS is on top.

    Args:
      runs: runs at one load; the seeds of a router are averaged, their warm-up is left out.
      expert_names: N names; experts of one name are drawn as one.
      routers: to draw; all by default.
      width: of the figure.
    """
    by_router = _by_router(runs)
    names = style.chosen({run.router.name: run.router.kind for run in runs}, routers)
    qos = {name: float(np.mean([run.metrics["qos"] for run in by_router[name]])) for name in names}
    names.sort(key=lambda name: qos[name])
    shares = np.array([np.mean([_shares(run, expert_names) for run in by_router[name]], 0) for name in names])
    row_inches = 0.23 if width == FULL else 0.19
    figure = Figure(figsize=(width.inches, 0.7 + row_inches * len(names)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(names))
    colours = style.expert_colours(expert_names) | {"dropped": style.PALE}
    for (name, colour), share in zip(colours.items(), shares.T, strict=True):
        bars = axes.barh(range(len(names)), share, left=left, height=0.8, color=colour, edgecolor="white", label=name)
        texts = [f"{100 * each:.0f}" if each >= (0.045 if width == FULL else 0.09) else "" for each in share]
        axes.bar_label(bars, texts, label_type="center", fontsize=width.text_points - 1, color=style.ink_on(colour))
        left += share
    for row, name in enumerate(names):
        axes.text(1.012, row, f"{qos[name]:.3f}", va="center")
    axes.text(1.012, len(names) - 0.3, "QoS", color=style.GREY)
    axes.set_yticks(range(len(names)), [style.display_name(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel="share of requests, %")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
    handles, labels = axes.get_legend_handles_labels()
    style.legend_outside(figure, list(zip(handles, labels, strict=True)), width, handlelength=1.2)
    figure.set_label(
        f"Share of the requests that each expert answers under each router, in %, at load {runs[0].scenario.load:g}. "
        "Dropped are requests that the router refused, or whose expert had a full queue."
    )
    return figure


@style.styled
def learning_curve(records: Sequence[Mapping[str, Any]], *, width: Width = FULL) -> Figure:
    """Draws the QoS of a policy in training against steps and against minutes, beside that of impact_greedy.

    Args:
      records: of the run, see ``training``; only evaluations are read.
      width: of the figure.

    Raises:
      InputError: there is no evaluation.
    """
    rows = [record for record in records if record["kind"] == "evaluation"]
    if not rows:
        raise InputError("the run has no evaluation yet, so there is no learning curve")
    qos = np.array([row["qos"] for row in rows])  # [evaluations, seeds]
    look = style.looks({"": "learned", "impact_greedy": "heuristic"}, width)
    figure = Figure(figsize=(width.inches, 2.5 if width == FULL else 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(*((1, 2) if width == FULL else (2, 1)), sharey=True)).flatten()
    names = ("steps of the environments of one seed", "minutes of training, compilation not counted")
    for axes, name, field, unit in zip(panels, names, ("steps", "seconds"), (1, 60), strict=True):
        done = column(rows, field) / unit
        label = style.display_name("impact_greedy")
        axes.axhline(rows[-1]["impact_greedy"], label=label, **look["impact_greedy"])
        if qos.shape[1] > 1:
            axes.plot(done, qos, color=style.LEARNED_COLOUR, linewidth=0.7, alpha=0.5)
        label = "learned" if qos.shape[1] == 1 else "learned, mean of the seeds"
        axes.plot(done, qos.mean(1), label=label, **look[""])
        axes.set_xlabel(name)
        axes.margins(x=0.02)
    panels[0].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for axes in panels[:: 1 if width.is_column else 2]:
        axes.set_ylabel("QoS (zoomed)")
    handles, labels = panels[0].get_legend_handles_labels()
    style.legend_outside(figure, list(zip(handles, labels, strict=True)), width)
    figure.set_label(
        "Mean QoS of the policy on requests that it does not learn from, the same at each evaluation, against "
        "training. Thin lines are seeds; compilation is not counted."
    )
    return figure


def _gain_curves(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, style.Look], width: Width) -> None:
    axes.axhline(0, color=style.INK, linewidth=0.8, zorder=1)
    loads = sorted({row["load"] for row in rows})
    shift = 0.006 * (loads[-1] - loads[0] or 1.0)  # so that intervals do not hide each other
    for number, name in enumerate(looks):
        points = sorted((row for row in rows if row["router"] == name), key=lambda row: row["load"])
        load, mean, low, high = (column(points, field) for field in ("load", "mean", "low", "high"))
        load += shift * (number - (len(looks) - 1) / 2)
        look: style.Look = {"marker": "o"} | looks[name]
        axes.plot(load, mean, label=style.display_name(name), **look)
        axes.vlines(load, low, high, color=look["color"], linewidth=1.2 * width.lines, zorder=3)
        _add_tips(axes, name, points, load)


def _gain_range(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the limits of the vertical axis: around 0 and the intervals of learned routers, or the best two."""
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["router"], []).append(row["mean"])
    learned = {row["router"] for row in rows if row["kind"] == "learned"}
    shown = learned or set(sorted(means, key=lambda name: -float(np.mean(means[name])))[:2])
    ends = [0.0]
    for row in rows:
        if row["router"] in shown:
            ends += [row[field] for field in ("mean", "low", "high") if row[field] is not None]
    margin = max(0.2 * (max(ends) - min(ends)), _MIN_GAIN_RANGE / 2)
    return min(ends) - margin, max(ends) + margin


def _add_tips(axes: Axes, name: str, points: Sequence[Mapping[str, Any]], x: np.ndarray | None = None) -> None:
    for number, row in enumerate(points):
        half = gain_text(row)[1]
        mean = f"{row['mean']:+.3f} ({row['verdict']})" if "verdict" in row else f"{row['mean']:.3f}"
        text = f"{style.display_name(name)}, load {row['load']:g}: {mean}{f' ± {half}' if half else ''}"
        style.add_tip(axes, row["load"] if x is None else x[number], row["mean"], text)


def _label_loads(axes: Axes, rates_per_s: Mapping[float, float], width: Width) -> None:
    """Puts a tick at each load that was simulated, and its rate above it."""
    loads = style.every_nth(sorted(rates_per_s), width)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    above = axes.secondary_xaxis("top")
    above.set_xticks(loads, [f"{rates_per_s[load]:.1f}" for load in loads])
    above.set_xlabel("requests per second")
    above.spines["top"].set_visible(False)


def column(rows: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    """Returns a field of all rows as floating-point numbers."""
    return np.array([row[field] for row in rows], np.float64)  # None becomes NaN


def _by_router(runs: Sequence[RouterRun]) -> dict[str, list[RouterRun]]:
    names = dict.fromkeys(run.router.name for run in runs)
    return {name: [run for run in runs if run.router.name == name] for name in names}


def _counted(run: RouterRun) -> slice:
    """Returns the requests that the metrics of the run count: those behind its warm-up."""
    return slice(len(run.assignment) - int(run.metrics["requests"]), None)


def _pooled_latency_s(runs: Sequence[RouterRun], experts: ExpertProfile) -> np.ndarray:
    """Returns the latencies per token [s/token] of the counted requests of all runs, infinite where dropped."""
    each = [latency_per_token_s(experts, run.trace, run.assignment, run.replayed)[_counted(run)] for run in runs]
    return np.nan_to_num(np.concatenate(each), nan=np.inf)


def _shares(run: RouterRun, expert_names: Sequence[str]) -> list[float]:
    """Returns which share of the counted requests the experts of each name answered, and last the dropped share."""
    dropped = run.replayed.log.dropped[_counted(run)]
    answered_by = np.asarray(expert_names)[run.assignment[_counted(run)][~dropped]]
    return [np.sum(answered_by == name) / len(dropped) for name in dict.fromkeys(expert_names)] + [dropped.mean()]
