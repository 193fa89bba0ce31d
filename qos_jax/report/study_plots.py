"""Figures of studies: what routers earn in one world beside another, as curves or as levels, and at which cost.

As in ``plots``, every function returns a matplotlib ``Figure`` of its own, whose label is its caption.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qos_jax.report import style


@matplotlib.rc_context(style.RC)
def qos_panels(
    panels: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str, caption: str, ticks: Sequence[str] = ()
) -> Figure:
    """Draws mean QoS with its interval in a panel for each title, one curve per router, under one legend.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``x``, ``mean``, ``low`` and ``high``.
      x_label: of the horizontal axes.
      caption: the figure's label.
      ticks: texts of x = 0, 1, ... where x is no number.
    """
    looks = _panel_looks(panels)
    top = max(row["mean"] for rows in panels.values() for row in rows)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(style.WIDTH_INCHES, 0.9 + 2.6 * lines), layout="constrained")
    every = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, (title, rows) in zip(every, panels.items(), strict=False):
        for name in dict.fromkeys(row["router"] for row in rows):
            points = sorted((row for row in rows if row["router"] == name), key=lambda row: row["x"])
            values = [[row[field] for field in ("x", "mean", "low", "high")] for row in points]
            x, mean, low, high = np.array(values, np.float64).T  # None becomes NaN
            axes.plot(x, mean, label=style.spoken(name), marker="o", markersize=2.5, **looks[name])
            if looks[name]["zorder"] > 3:
                axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.14, linewidth=0)
        axes.set(title=title, xlabel=x_label, ylim=(0, 1.05 * top))
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    every[0].set_ylabel("mean QoS of a request")
    _common_legend(figure, every)
    figure.set_label(caption)
    return figure


@matplotlib.rc_context(style.RC)
def qos_trade_off(panels: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str, caption: str) -> Figure:
    """Draws mean QoS against what it costs in a panel for each title, a point with both intervals for each router.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``mean``, ``low`` and ``high``, and ``cost_mean``, ``cost_low``
        and ``cost_high``.
      x_label: of the cost.
      caption: the figure's label.
    """
    looks = _panel_looks(panels)
    figure = Figure(figsize=(style.WIDTH_INCHES, 4.2), layout="constrained")
    every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (title, rows) in zip(every, panels.items(), strict=True):
        for row in rows:
            colour, cost, mean = looks[row["router"]]["color"], row["cost_mean"], row["mean"]
            axes.plot([row["cost_low"], row["cost_high"]], [mean, mean], color=colour, linewidth=1.2)
            axes.plot([cost, cost], [row["low"], row["high"]], color=colour, linewidth=1.2)
            marker = "D" if row["kind"] == "oracle" else "o"
            axes.plot(cost, mean, marker, markersize=5, color=colour, label=style.spoken(row["router"]))
        axes.set(title=title, xlabel=x_label)
        axes.grid(axis="x")
    every[0].set_ylabel("mean QoS of a request")
    _common_legend(figure, every)
    figure.set_label(caption)
    return figure


@matplotlib.rc_context(style.RC)
def qos_levels(panels: Mapping[str, Sequence[Mapping[str, Any]]], caption: str) -> Figure:
    """Draws mean QoS with its interval in a panel for each title, a line per router, the best on top.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``mean``, ``low`` and ``high``.
      caption: the figure's label.
    """
    looks = _panel_looks(panels)
    columns = min(2, len(panels))
    sizes = [len(rows) for rows in panels.values()]
    heights = [0.6 + 0.2 * max(sizes[first : first + columns]) for first in range(0, len(sizes), columns)]  # inches
    figure = Figure(figsize=(style.WIDTH_INCHES, sum(heights)), layout="constrained")
    every = figure.subplots(len(heights), columns, sharex=True, squeeze=False, height_ratios=heights).flatten()
    for axes, (title, rows) in zip(every, panels.items(), strict=False):
        rows = sorted(rows, key=lambda row: row["mean"])
        for height, row in enumerate(rows):
            colour = looks[row["router"]]["color"]
            axes.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=1.6)
            axes.plot(row["mean"], height, "o", markersize=4.5, color=colour)
        axes.set_yticks(range(len(rows)), [style.spoken(row["router"]) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set(title=title)
    means = [row["mean"] for rows in panels.values() for row in rows]
    lows = [row["low"] for rows in panels.values() for row in rows]
    every[0].set_xlim(max(-0.02, min(lows) - 0.02), 1.1 * max(means))  # few training seeds have endless intervals
    for axes in every[-columns:]:
        axes.set_xlabel("mean QoS of a request")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    figure.set_label(caption)
    return figure


def _common_legend(figure: Figure, every: Iterable[Axes]) -> None:
    """Puts one legend above all panels, of what is not grey."""
    lines = {str(line.get_label()): line for axes in every for line in axes.get_lines()}
    notable = {
        label: line
        for label, line in lines.items()
        if line.get_color() != style.PALE and not label.startswith("_")  # so matplotlib calls what has no label
    }
    figure.legend(notable.values(), notable.keys(), loc="outside upper center", ncols=min(4, len(notable)))


def _panel_looks(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Returns how to draw each router; learned ones that never meet in a panel may share a colour."""
    kinds = {row["router"]: row["kind"] for rows in panels.values() for row in rows}
    looks = {name: style.curve_look(name, kind) for name, kind in kinds.items()}
    looks |= {name: look for name, look in style.line_looks(kinds).items() if kinds[name] == "oracle"}
    together = [{row["router"] for row in rows} for rows in panels.values()]
    spare: dict[str, int] = {}  # 0: the colour of learned routers
    # By name, so that variants of a router, which are named after it, get the same colour in every panel.
    for name in sorted(name for name in kinds if kinds[name] == "learned"):
        taken = {spare[other] for panel in together if name in panel for other in panel & spare.keys()}
        spare[name] = next(number for number in itertools.count() if number not in taken)
        if spare[name]:
            colour = style.SPARE_COLOURS[(spare[name] - 1) % len(style.SPARE_COLOURS)]
            looks[name] |= {"color": colour, "linewidth": 1.6}
    return looks
