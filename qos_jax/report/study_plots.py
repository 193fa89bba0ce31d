"""Figures of studies: QoS and gains in panels of worlds, as curves, as levels, and against a cost.

As in ``plots``, every function returns a matplotlib ``Figure`` of its own, whose label is its caption, at a ``width``.
Panels are titled "PRESET, LAW"; where presets have several panels each starts a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qos_jax.report import style
from qos_jax.report.style import FULL, Look, Width

Panels = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of a panel by its title

_LEAST_SHARE = 0.5  # of the greatest QoS of a figure; points below it would hide the differences above


@style.styled
def qos_panels(
    panels: Panels,
    x_label: str,
    caption: str,
    *,
    ticks: Mapping[float, str] | None = None,
    gains: Panels | None = None,
    width: Width = FULL,
) -> Figure:
    """Draws mean QoS with its interval in a panel for each title, one curve per router, under one legend.

    Below each panel of QoS is one of the gains of learned routers over the best heuristic, on an axis of its own.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``x``, ``mean``, ``low`` and ``high``.
      x_label: of the horizontal axes.
      caption: the figure's label.
      ticks: texts of the values of x; by default these are numbers.
      gains: by title, rows as in ``panels`` of paired gains.
      width: of the figure.
    """
    kinds = {row["router"]: row["kind"] for rows in panels.values() for row in rows}
    looks = style.looks(kinds, width, [{row["router"] for row in rows} for rows in panels.values()])
    top = max(row["mean"] for rows in panels.values() for row in rows)
    has_gains = any((gains or {}).values())
    lines = _lines(list(panels), _columns(len(panels), width))
    figure = Figure(figsize=(width.inches, (3.1 if has_gains else 2.1) * len(lines)), layout="constrained")
    ratios = [2, 1.1] if has_gains else [1]
    grid = figure.subplots(
        len(ratios) * len(lines), max(map(len, lines)), squeeze=False, height_ratios=ratios * len(lines)
    )
    for axes in grid.flatten():
        axes.set_visible(False)
    for number, titles in enumerate(lines):
        for column, title in enumerate(titles):
            stack = list(grid[len(ratios) * number : len(ratios) * (number + 1), column])
            for axes in stack:
                axes.set_visible(True)
                _set_ticks(axes, panels[title], ticks)
            _curves(stack[0], panels[title], looks)
            stack[0].set(title=style.wrapped(title, width.inches / grid.shape[1] - 0.35, width), ylim=(0, 1.05 * top))
            stack[-1].set_xlabel(x_label)
            if has_gains:
                stack[0].tick_params(labelbottom=False)
                _gain_curves(stack[1], (gains or {}).get(title, ()), looks, width)
            if column:
                stack[0].tick_params(labelleft=False)
            else:
                stack[0].set_ylabel("mean QoS")
                stack[-1].set_ylabel("gain (zoomed)" if has_gains else "mean QoS")
    style.legend_outside(figure, style.legend_entries(looks), width)
    below = " Below: paired gain of the learned routers over the best heuristic, on its own scale." if has_gains else ""
    figure.set_label(f"{caption}{below}{style.grey_note(looks)}")
    return figure


@style.styled
def qos_trade_off(panels: Panels, x_label: str, caption: str, *, width: Width = FULL) -> Figure:
    """Draws mean QoS against its cost in a panel for each title, a point with both intervals for each router.

    Routers below half of the greatest QoS are written at the foot of their panel.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``mean``, ``low`` and ``high``, and ``cost_mean``, ``cost_low``
        and ``cost_high``.
      x_label: of the cost.
      caption: the figure's label.
      width: of the figure.
    """
    kinds = {row["router"]: row["kind"] for rows in panels.values() for row in rows}
    looks = style.looks(kinds, width)
    least = _LEAST_SHARE * max(row["mean"] for rows in panels.values() for row in rows)
    columns = min(len(panels), 2) if width == FULL else 1
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width.inches, (3.0 if width == FULL else 2.4) * lines), layout="constrained")
    every = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (title, rows) in zip(every, panels.items(), strict=False):
        for row in rows:
            if row["mean"] >= least:
                _point(axes, row, looks[row["router"]], width)
        low = [f"{style.display_name(row['router'])} {row['mean']:.3f}" for row in rows if row["mean"] < least]
        if low:
            text = style.wrapped(f"Below: {', '.join(low)}", width.inches / columns - 0.7, width)
            axes.text(0.02, 0.02, text, transform=axes.transAxes, color=style.GREY).set_in_layout(False)
        axes.set(title=title, xlabel=x_label)
        axes.grid(axis="x")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    bottom, top = every[0].get_ylim()
    every[0].set_ylim(bottom - 0.2 * (top - bottom), top)  # room for the routers below
    for axes in every[::columns]:
        axes.set_ylabel("mean QoS (zoomed)")
    drawn = {row["router"] for rows in panels.values() for row in rows if row["mean"] >= least}
    points = {
        name: look | {"marker": _marker(kinds[name], look), "linestyle": ""}
        for name, look in looks.items()
        if name in drawn
    }
    style.legend_outside(figure, style.legend_entries(points), width)
    figure.set_label(caption)
    return figure


@style.styled
def qos_levels(panels: Panels, caption: str, *, width: Width = FULL) -> Figure:
    """Draws mean QoS with its interval in a panel for each title, a line per router, the best on top.

    Args:
      panels: by title, rows with ``router``, ``kind``, ``mean``, ``low`` and ``high``.
      caption: the figure's label.
      width: of the figure.
    """
    kinds = {row["router"]: row["kind"] for rows in panels.values() for row in rows}
    looks = style.looks(kinds, width)
    lines = _lines(list(panels), 2 if width == FULL else 1)
    line_inches = 0.175 if width == FULL else 0.15
    heights = [0.5 + line_inches * max(len(panels[title]) for title in titles) for titles in lines]
    figure = Figure(figsize=(width.inches, sum(heights)), layout="constrained")
    grid = figure.subplots(len(lines), max(map(len, lines)), sharex=True, squeeze=False, height_ratios=heights)
    for axes in grid.flatten():
        axes.set_visible(False)
    for across, titles in zip(grid, lines, strict=True):
        for axes, title in zip(across, titles, strict=False):
            axes.set_visible(True)
            _levels(axes, sorted(panels[title], key=lambda row: row["mean"]), looks, width)
            axes.set(title=style.wrapped(title, width.inches / grid.shape[1] / 2, width))
            axes.tick_params(axis="x", labelbottom=True)
    means = [row["mean"] for rows in panels.values() for row in rows]
    lows = [row["low"] for rows in panels.values() for row in rows]
    left = max(0.0, min(lows) - 0.02)  # few training seeds have endless intervals
    grid[0, 0].set_xlim(left, 1.05 * max(means) - 0.05 * left)
    for axes in grid[-1]:
        axes.set_xlabel("mean QoS of a request" if left == 0 else "mean QoS of a request (zoomed)")
    figure.set_label(caption)
    return figure


def _columns(panels: int, width: Width) -> int:
    if width.is_column:
        return min(2, panels)
    return 4 if panels > 6 else min(3, panels)


def _lines(titles: Sequence[str], columns: int) -> list[list[str]]:
    """Returns the titles in rows; where presets have several panels, a row holds those of one preset only."""
    groups: dict[str, list[str]] = {}
    for title in titles:
        groups.setdefault(title.partition(",")[0], []).append(title)
    if len(groups) == len(titles):
        groups = {"": list(titles)}
    return [group[start : start + columns] for group in groups.values() for start in range(0, len(group), columns)]


def _set_ticks(axes: Axes, rows: Sequence[Mapping[str, Any]], ticks: Mapping[float, str] | None) -> None:
    values = sorted({row["x"] for row in rows})
    axes.set_xticks(values, [ticks[value] for value in values] if ticks else [f"{value:g}" for value in values])


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Look]) -> None:
    for name in dict.fromkeys(row["router"] for row in rows):
        points = sorted((row for row in rows if row["router"] == name), key=lambda row: row["x"])
        x, mean, low, high = _values(points)
        look: Look = {"marker": ".", "markersize": 3} | looks[name]
        axes.plot(x, mean, label=style.display_name(name), **look)
        if looks[name]["zorder"] > 3:
            axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.14, linewidth=0)
        if points[0]["kind"] == "learned":
            for place, value in zip(x, mean, strict=True):
                style.add_tip(axes, place, value, f"{style.display_name(name)}, {place:g}: {value:.3f}")


def _gain_curves(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], width: Width) -> None:
    axes.axhline(0, color=style.INK, linewidth=0.8, zorder=1)
    for name in dict.fromkeys(row["router"] for row in rows):
        points = sorted((row for row in rows if row["router"] == name), key=lambda row: row["x"])
        x, mean, low, high = _values(points)
        axes.plot(x, mean, **looks[name])
        axes.vlines(x, low, high, color=looks[name]["color"], linewidth=1.2 * width.lines)
        for row in points:
            interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if np.isfinite(row["low"]) else ""
            text = f"{style.display_name(name)}, {row['x']:g}: {row['mean']:+.3f}{interval}"
            style.add_tip(axes, row["x"], row["mean"], text)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g}" if abs(value) > 1e-9 else "0")


def _values(points: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns x, mean, low and high, each [P]; None becomes NaN."""
    return np.array([[row[field] for field in ("x", "mean", "low", "high")] for row in points], np.float64).T


def _point(axes: Axes, row: Mapping[str, Any], look: Look, width: Width) -> None:
    colour, cost, mean = look["color"], row["cost_mean"], row["mean"]
    axes.plot([row["cost_low"], row["cost_high"]], [mean, mean], color=colour, linewidth=1.2 * width.lines)
    axes.plot([cost, cost], [row["low"], row["high"]], color=colour, linewidth=1.2 * width.lines)
    label = style.display_name(row["router"])
    axes.plot(cost, mean, _marker(row["kind"], look), color=colour, label=label)


def _marker(kind: str, look: Look) -> str:
    return "D" if kind == "oracle" else str(look.get("marker", "o"))


def _levels(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], width: Width) -> None:
    for height, row in enumerate(rows):
        colour = looks[row["router"]]["color"]
        axes.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=1.6 * width.lines)
        axes.plot(row["mean"], height, "o", color=colour)
    axes.set_yticks(range(len(rows)), [style.display_name(row["router"]) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
