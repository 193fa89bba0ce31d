"""How figures look: names, colours, widths and legends. A router looks the same in every figure.

The colours can be told apart by colour-blind readers. Heuristics in ``HIGHLIGHTED`` have a colour of their own, learned
routers are thick, oracles are dark and dashed. Other heuristics share grey where they are too many for colours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Width:
    """A width of figures, with the sizes that stay readable at it."""

    inches: float
    text_points: float
    lines: float  # scale of line widths and markers
    dots_per_inch: int  # of a PNG

    @property
    def is_column(self) -> bool:
        """Whether the figure fits one column of a two-column page, or a phone."""
        return self.inches < 5

    @property
    def characters(self) -> int:
        """Characters of a legend that fit side by side."""
        return int(self.inches * 72 / (0.56 * self.text_points))


FULL = Width(7.0, 8.0, 1.0, 200)
COLUMN = Width(3.4, 7.0, 0.75, 300)

HIGHLIGHTED = {
    "impact_greedy": "#0072B2",
    "shortest_queue": "#009E73",
    "vllm_dp": "#56B4E9",
    "bert_router": "#D55E00",
    "bert_router_feasible": "#E69F00",
    "round_robin": "#CC79A7",
    "rollout": "#332288",
}
LEARNED_COLOUR = "#C1121F"
LEARNED_COLOURS = (LEARNED_COLOUR, "#882255", "#117733", "#999933", "#661100", "#6699CC", "#AA4499")
OTHER_COLOURS = ("#44AA99", "#AA7744", "#6699CC", "#999933")
EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999933")
ORACLE_DASHES = ((4, 2), (1, 1.5), (8, 2, 1, 2))
INK, GREY, PALE = "#1A1A1A", "#7A7A7A", "#BDBDBD"
TIP = "tip: "  # starts the gid of an artist whose text a page shows on hover

Look = dict[str, Any]  # keyword arguments of Line2D

_LONGEST_NAME = 40  # characters of a router's name, so that there is room for what is drawn
_LEARNED_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NAMES = {
    "random": "random",
    "round_robin": "round robin",
    "shortest_queue": "shortest queue",
    "shortest_tokens": "fewest queued tokens",
    "least_kv": "least KV memory",
    "power_of_two": "power of two choices",
    "vllm_dp": "vLLM data-parallel",
    "vllm_dp_2026": "vLLM data-parallel (2026)",
    "latency_headroom": "latency headroom",
    "bert_router": "BERT router",
    "bert_router_feasible": "BERT router (feasible)",
    "impact_greedy": "impact-greedy",
    "impact_greedy_equal_gpus": "impact-greedy (equal GPUs)",
    "impact_greedy_later_prompts": "impact-greedy (later prompts)",
    "impact_greedy_no_drop": "impact-greedy (no drops)",
    "oracle_score": "score oracle",
    "oracle_impact": "impact oracle",
    "rollout": "rollout planner",
    "mvr": "MVR (learned)",
    "best_heuristic": "best heuristic",
}
_WORDS = {"mvr": "MVR", "sac": "SAC", "rl": "RL", "kv": "KV", "bert": "BERT", "vllm": "vLLM", "gpus": "GPUs"}


def rc(width: Width = FULL) -> dict[Any, Any]:
    """Returns the settings of matplotlib for a width."""
    return {
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": width.text_points,
        "text.parse_math": False,  # a $ in the name of a folder is a $
        "axes.titlesize": width.text_points,
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
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.4,
        "lines.linewidth": 1.8 * width.lines,
        "lines.markersize": 4.0 * width.lines,
    }


_P = ParamSpec("_P")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Makes a function draw in the style of its argument ``width``, and leave matplotlib's settings alone."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        width = kwargs.get("width", FULL)
        assert isinstance(width, Width)
        with matplotlib.rc_context(rc(width)):
            return draw(*args, **kwargs)

    return drawn


def display_name(router: str) -> str:
    """Returns the name of a router as people know it; of an unknown one its own name in words."""
    if router in _NAMES:
        return _NAMES[router]
    if _base(router) != router:
        return f"{display_name(_base(router))} + admission"
    if re.fullmatch(r"expert_\d+", router):
        return f"{router.replace('_', ' ')} only"
    router = router.encode(errors="backslashreplace").decode()  # where a folder's name is not UTF-8
    if len(router) > _LONGEST_NAME:
        router = f"{router[: _LONGEST_NAME - 23]}...{router[-20:]}"
    router = router.removeprefix("learner_")  # as the studies call methods that are trained in full
    text = re.sub(r"(?<![^_])(paper|edge|jetson|campus)_(\d+)(?![^_])", r"\1-\2", router)
    first, *others = [_WORDS.get(word, word) for word in text.split("_")]
    if first == "MVR" and others:
        return f"{first} ({' '.join(others)})"
    if others and re.fullmatch(r"[a-z]+-\d+", others[-1]):
        others[-1] = f"({others[-1]})"
    return " ".join([first, *others])


def chosen(kinds: Mapping[str, str], routers: Sequence[str] | None) -> list[str]:
    """Returns the routers that are asked for, or all of them.

    Raises:
      InputError: one that is asked for is not there.
    """
    if unknown := [name for name in routers or () if name not in kinds]:
        raise InputError(f"router {unknown[0]!r} is not in the results; choose from {', '.join(kinds)}")
    return list(kinds) if routers is None else list(dict.fromkeys(routers))


def notable(kinds: Mapping[str, str]) -> list[str]:
    """Returns the routers that are no ordinary heuristics, and those in ``HIGHLIGHTED``; all if there is none."""
    names = [name for name, kind in kinds.items() if kind != "heuristic" or name in HIGHLIGHTED]
    return names or list(kinds)


def looks(kinds: Mapping[str, str], width: Width = FULL, panels: Sequence[Collection[str]] = ()) -> dict[str, Look]:
    """Returns how to draw each router.

    Args:
      kinds: kind of each router by name.
      width: of the figure.
      panels: the routers of each panel; learned routers that never meet in one may look the same. By default all meet.
    """
    rules = dict.fromkeys(_base(name) for name, kind in kinds.items() if kind not in ("learned", "oracle"))
    others = [name for name in rules if name not in HIGHLIGHTED]
    spare = dict(zip(others, OTHER_COLOURS, strict=False)) if len(others) <= len(OTHER_COLOURS) else {}
    colours = HIGHLIGHTED | spare
    learned = _numbers([name for name, kind in kinds.items() if kind == "learned"], panels or [set(kinds)])
    dashes = itertools.cycle(ORACLE_DASHES)
    found: dict[str, Look] = {}
    for name, kind in kinds.items():
        if kind == "oracle":
            look: Look = {"color": INK, "linestyle": (0, next(dashes)), "linewidth": 1.2, "zorder": 3}
        elif kind == "learned":
            number = learned[name]
            colour = LEARNED_COLOURS[number % len(LEARNED_COLOURS)]
            # With another marker each time round the colours, so that no two routers look alike.
            marker = _LEARNED_MARKERS[(number + number // len(LEARNED_COLOURS)) % len(_LEARNED_MARKERS)]
            look = {"color": colour, "linewidth": 1.8 if number else 2.6, "marker": marker, "zorder": 5}
        elif _base(name) in colours:
            look = {"color": colours[_base(name)], "linewidth": 1.6, "zorder": 4}
            look |= {} if _base(name) == name else {"linestyle": (0, (2, 1))}
        else:
            look = {"color": PALE, "linewidth": 0.9, "zorder": 2}
        found[name] = look | {"linewidth": look["linewidth"] * width.lines}
    return found


def expert_colours(expert_names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each name."""
    return dict(zip(dict.fromkeys(expert_names), itertools.cycle(EXPERT_COLOURS), strict=False))


def ink_on(colour: str) -> str:
    """Returns the colour of text that can be read on a colour."""
    red, green, blue = colors.to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def legend_entries(looks: Mapping[str, Look]) -> list[tuple[Line2D, str]]:
    """Returns a handle and a label for each look, in order; routers that look the same have one entry."""
    alike: dict[str, list[str]] = {}
    for name, look in looks.items():
        alike.setdefault(repr(sorted(look.items())), []).append(name)
    entries = [(Line2D([], [], **looks[names[0]]), _label(names, looks[names[0]])) for names in alike.values()]
    return sorted(entries, key=lambda entry: entry[0].get_color() == PALE)  # grey comes last


def grey_note(looks: Mapping[str, Look]) -> str:
    """Returns the sentence of a caption that names the grey curves; empty where there are none."""
    names = [display_name(name) for name, look in looks.items() if look["color"] == PALE]
    return f" Grey: {', '.join(names)}." if names else ""


def legend_outside(
    figure: Figure, entries: Sequence[tuple[Any, str]], width: Width, *, beside: bool = False, **options: Any
) -> None:
    """Puts a legend outside the panels of a figure, which is made higher for it.

    Args:
      figure: with a constrained layout.
      entries: handles and labels.
      width: of the figure.
      beside: right of the panels where there is room; otherwise, and by default, above them.
      **options: of ``Figure.legend``.
    """
    handles, labels = zip(*entries, strict=True)
    if beside and not width.is_column:
        figure.legend(handles, labels, loc="outside right upper", **options)
        return
    columns = _legend_columns(labels, width)
    rows = math.ceil(len(labels) / columns) + ("title" in options)
    figure.set_figheight(figure.get_figheight() + 1.65 * width.text_points / 72 * rows)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, **options)


def _legend_columns(labels: Sequence[str], width: Width) -> int:
    """Returns the number of columns of a legend that is as wide as the figure at most."""
    for columns in range(len(labels), 1, -1):
        lengths = [max(map(len, each)) for each in np.array_split(np.array(labels), columns)]
        if sum(lengths) + 6 * columns <= width.characters:
            return columns
    return 1


def add_tip(axes: Axes, x: float, y: float, text: str) -> None:
    """Adds an invisible point to a panel, whose text a page shows on hover."""
    axes.scatter([x], [y], s=80, marker="s", alpha=0, linewidths=0, zorder=10, gid=f"{TIP}{text}")


def wrapped(title: str, inches: float, width: Width) -> str:
    """Returns a title in lines that fit above a panel."""
    return textwrap.fill(title, max(12, int(inches * 72 / (0.56 * width.text_points))), break_long_words=False)


def every_nth(values: Sequence[float], width: Width) -> list[float]:
    """Returns as many of the values, evenly, as fit an axis as tick labels."""
    step = math.ceil(len(values) / (3 * width.inches))
    return list(values[::step])


def _base(router: str) -> str:
    """Returns the rule that a router follows among the requests that it admits."""
    return router.removesuffix("+admission")


def _numbers(names: Sequence[str], panels: Sequence[Collection[str]]) -> dict[str, int]:
    """Returns a number for each name, a different one for names that meet in a panel.

    The variants of a router, which are named after it, get its number in the panels where it is not.
    """
    numbers: dict[str, int] = {}
    for name in sorted(names):
        taken = {numbers[other] for panel in panels if name in panel for other in panel if other in numbers}
        of_its_kind = [numbers[other] for other in reversed(numbers) if name.startswith(f"{other}_")]
        numbers[name] = next(number for number in (*of_its_kind, *range(len(names))) if number not in taken)
    return numbers


def _label(names: Sequence[str], look: Look) -> str:
    """Returns the label of one or several routers with the same look."""
    if len(names) == 1:
        return display_name(names[0])
    if look["color"] == PALE:
        return f"{len(names)} other heuristics"
    parts = [name.split("_") for name in names]
    start = _common(parts)
    end = _common([each[len(start) :][::-1] for each in parts])[::-1]
    shared = "_".join([*start, *end])
    if shared or "marker" in look:
        return f"{display_name(shared) if shared else 'learned router'}, one per panel"
    return ", ".join(map(display_name, names))


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    """Returns the words that all begin with."""
    alike = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))
    return [words[0] for words in alike]
