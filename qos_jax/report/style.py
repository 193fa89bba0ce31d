"""How figures look: the same router the same everywhere, in colours that colour-blind readers can tell apart.

Those in ``HIGHLIGHTED`` have their own colour, learned ones stand out, oracles are dashed and dark, others grey.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HIGHLIGHTED = {
    "impact_greedy": "#0072B2",
    "shortest_queue": "#009E73",
    "bert_router": "#D55E00",
    "bert_router_feasible": "#E69F00",
    "round_robin": "#CC79A7",
    "rollout": "#332288",
}
LEARNED_COLOUR = "#C1121F"
SPARE_COLOURS = ("#56B4E9", "#882255", "#117733", "#999933", "#661100", "#6699CC", "#AA4499")
EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999933")
ORACLE_DASHES = ((4, 2), (1, 1.5), (8, 2, 1, 2))
INK, GREY, PALE = "#1A1A1A", "#7A7A7A", "#BDBDBD"
WIDTH_INCHES, _CHARACTERS_ACROSS, _LABEL_POINTS = 8.4, 120, 8.5
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#EBEBEB",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
}


def curve_look(name: str, kind: str) -> dict[str, Any]:
    """Returns how to draw a router among many: learned ones thick, a few in colour, oracles dashed, others grey."""
    if kind == "oracle":
        return {"color": INK, "linestyle": (0, ORACLE_DASHES[0]), "linewidth": 1.2, "zorder": 3}
    if kind == "learned":
        return {"color": LEARNED_COLOUR, "linewidth": 3.0, "zorder": 5}
    if name in HIGHLIGHTED:
        return {"color": HIGHLIGHTED[name], "linewidth": 2.0, "zorder": 4}
    return {"color": PALE, "linewidth": 0.9, "zorder": 2}


def line_looks(kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns how to draw each of a few routers, given their kinds: all in colour, but for the oracles in dashes."""
    looks, spare, dashes = {}, itertools.cycle(SPARE_COLOURS), itertools.cycle(ORACLE_DASHES)
    learned = itertools.chain(["-"], itertools.cycle((0, each) for each in ORACLE_DASHES))
    for name, kind in kinds.items():
        looks[name] = curve_look(name, kind)
        if kind == "oracle":
            looks[name]["linestyle"] = (0, next(dashes))
        elif kind == "learned":
            looks[name]["linestyle"] = next(learned)
        elif name not in HIGHLIGHTED:
            looks[name] = {"color": next(spare), "linewidth": 1.2}
    return looks


def expert_colours(expert_names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each name."""
    return dict(zip(dict.fromkeys(expert_names), itertools.cycle(EXPERT_COLOURS), strict=False))


def ink_on(colour: str) -> str:
    """Returns the colour of text that can be read on a colour."""
    red, green, blue = colors.to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def spoken(router: str) -> str:
    """Returns the name of a router in words."""
    return router.replace("_", " ")


def legend_above(figure: Figure, axes: Axes) -> None:
    """Puts the legend of axes above all, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, _CHARACTERS_ACROSS // (max(map(len, labels)) + 6))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.2)


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, dict[str, Any]]]) -> None:
    """Writes each curve's name beside its right end, moved up or down as little as keeps the names apart."""
    ends = sorted(ends, key=lambda end: end[0])
    bottom, top = axes.get_ylim()
    axes_inches = axes.get_position().height * figure.get_figheight()
    line_height = 1.25 * _LABEL_POINTS / 72 * (top - bottom) / axes_inches  # in units of the y axis
    below = line_height * np.arange(len(ends))
    heights = scipy.optimize.isotonic_regression([end[0] for end in ends] - below).x
    heights = np.clip(heights, bottom, max(bottom, top - below[-1])) + below
    beside = axes.get_yaxis_transform()
    for height, (value, name, look) in zip(heights, ends, strict=True):
        font = {"color": look["color"], "fontweight": "bold"} if look["zorder"] > 2 else {"color": GREY}
        axes.plot([1, 1.03], [value, height], color=look["color"], linewidth=0.8, transform=beside, clip_on=False)
        axes.text(1.04, height, spoken(name), transform=beside, va="center", fontsize=_LABEL_POINTS, **font)
