"""A study as a figure, as a page and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure

from qos_jax.evaluation.metrics import METRICS, Metric
from qos_jax.evaluation.study import ResultRow, StudyResult
from qos_jax.report import pages, study_plots
from qos_jax.report.pictures import Picture
from qos_jax.report.style import FULL, Width, chosen, display_name
from qos_jax.report.summary_table import markdown_table

_MAX_CURVES = 8  # of learned routers, which need a colour each


def study_figure(result: StudyResult, *, routers: Sequence[str] | None = None, width: Width = FULL) -> Figure:
    """Draws mean QoS against load in a panel for each world, or against what differs between the worlds.

    With a plan, or with more learned routers than colours, it is levels: a panel for each world and load.

    Args:
      result: of the study.
      routers: to draw; all by default.
      width: of the figure.
    """
    names = chosen(result.kinds, routers)
    rows = [row for row in result.summary if row["metric"] == "qos" and row["router"] in names]
    if result.cost:
        return _trade_off(result, rows, result.cost, width)
    if result.shares or [result.kinds[name] for name in names].count("learned") > _MAX_CURVES:
        return _levels(result, rows, width)
    gains = [gain for gain in result.gains if gain["router"] in names]
    caption = f"{result.title}: mean QoS of a request, with 95 % intervals; dashed: oracles."
    if result.axis is None:
        panels, below = (_by_world(result, each) for each in (rows, gains))
        return study_plots.qos_panels(panels, "load", caption, gains=below, width=width)
    at = _places(result.worlds)
    panels, below = (_by_load(each, at) for each in (rows, gains))
    ticks = {place: world for world, place in at.items()}
    return study_plots.qos_panels(panels, result.axis, caption, ticks=ticks, gains=below, width=width)


def _by_world(result: StudyResult, rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    return {world: [dict(row) | {"x": row["load"]} for row in rows if row["world"] == world] for world in result.worlds}


def _by_load(rows: Sequence[ResultRow], at: dict[str, float]) -> dict[str, list[ResultRow]]:
    return {
        f"load {load:g}": [dict(row) | {"x": at[row["world"]]} for row in rows if row["load"] == load]
        for load in sorted({row["load"] for row in rows})
    }


def _places(worlds: Sequence[str]) -> dict[str, float]:
    """Returns where each world lies on the horizontal axis: at its value where all are numbers."""
    try:
        return {world: float(world) for world in worlds}
    except ValueError:
        return {world: float(place) for place, world in enumerate(worlds)}


def _levels(result: StudyResult, rows: Sequence[ResultRow], width: Width) -> Figure:
    """Draws mean QoS in a panel for each world and load; with a plan only of routers above half of the bound."""
    panels: dict[str, list[ResultRow]] = {
        f"{world}, load {load:g}": [row for row in rows if (row["world"], row["load"]) == (world, load)]
        for world in result.worlds
        for load in result.loads(world)
    }
    caption = f"{result.title}: mean QoS of a request, with 95 % intervals"
    if result.shares:
        panels = {title: _upper_half(panel) for title, panel in panels.items()}
        caption += ", of all routers above half of the bound"
    return study_plots.qos_levels(panels, f"{caption}.", width=width)


def _trade_off(result: StudyResult, rows: Sequence[ResultRow], cost: str, width: Width) -> Figure:
    """Draws mean QoS against a metric, in a panel for each world and load."""
    panels: dict[str, list[ResultRow]] = {
        f"{world}, load {load:g}": [
            dict(row)
            | {
                f"cost_{field}": result.cells[world, load, row["router"], cost][field]
                for field in ("mean", "low", "high")
            }
            for row in rows
            if (row["world"], row["load"]) == (world, load)
        ]
        for world in result.worlds
        for load in result.loads(world)
    }
    caption = f"{result.title}: mean QoS of a request against {METRICS[cost].meaning}, with 95 % intervals."
    return study_plots.qos_trade_off(panels, METRICS[cost].title, caption, width=width)


def _upper_half(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Returns the rows with at least half of the greatest mean."""
    least = 0.5 * max(row["mean"] for row in rows)
    return [row for row in rows if row["mean"] >= least]


def study_html(result: StudyResult, picture: Picture | None) -> str:
    """Returns the part of a page that shows a study.

    Args:
      result: of the study.
      picture: of ``study_figure``, if it could be drawn.
    """
    shown = pages.figures([picture] if picture else [])
    parts = [f"<h2>{escape(result.title)}</h2>", f"<p>{escape(result.question)}</p>", shown]
    if result.gains:
        parts += [f"<h3>{_GAINS_TITLE}</h3>", pages.rows_table(*_gains_table(result))]
    if result.claims:
        parts += [f"<h3>{_CLAIMS_TITLE}</h3>", pages.rows_table(*_claims_table(result))]
    if result.shares:
        parts += [f"<h3>{_SHARES_TITLE}</h3>", pages.rows_table(*_shares_table(result))]
    for world in result.worlds:
        load = _shown_load(result, world)
        title = f"All metrics: {escape(world)}, load {load:g}"
        parts.append(pages.folded(title, _metrics_html(result, world, load)))
    return "\n".join(parts)


def study_markdown(result: StudyResult, budget: str, made: Mapping[str, str]) -> str:
    """Returns a page of Markdown, which shows NAME.png beside it.

    Args:
      result: of the study.
      budget: one sentence or more on what was spent.
      made: how, by name.
    """
    parts = [
        f"# {result.title}",
        result.question,
        budget,
        f"![{result.title}]({result.name}.png)",
        f"## {_GAINS_TITLE}",
        markdown_table(*_gains_table(result)),
    ]
    if result.claims:
        parts += [f"## {_CLAIMS_TITLE}", markdown_table(*_claims_table(result))]
    if result.shares:
        parts += [f"## {_SHARES_TITLE}", markdown_table(*_shares_table(result))]
    if result.metrics:
        parts += [f"## {_METRICS_TITLE}", markdown_table(*_metrics_table(result))]
    parts += ["## How this was made", "\n".join(f"- {name}: `{value}`" for name, value in made.items())]
    return "\n\n".join(parts) + "\n"


_GAINS_TITLE = "Gains over the best heuristic"
_CLAIMS_TITLE = "Change against the best of BERT router, round robin and shortest queue in each metric"
_SHARES_TITLE = "Share of the gap between the best heuristic and the plan"
_METRICS_TITLE = "All routers, with 95 % intervals"


_HeadsAndRows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _gains_table(result: StudyResult) -> _HeadsAndRows:
    heads = (
        "router",
        "world",
        "load",
        "best heuristic",
        "QoS",
        "gain",
        "p, corrected",
        "over training seeds",
        display_name("oracle_impact"),
    )
    rows: list[tuple[str, ...]] = [
        (
            display_name(gain["router"]), gain["world"], f"{gain['load']:g}",
            f"{display_name(gain['best'])} {gain['best_qos']:.3f}",
            f"{gain['best_qos'] + gain['mean']:.3f}",
            f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
            "" if math.isnan(gain["p"]) else f"{gain['p']:.3f}" if gain["p"] >= 0.001 else "< 0.001",
            f"{gain['training_seeds']}: {gain['least']:+.3f} to {gain['greatest']:+.3f}",
            "" if gain["oracle"] is None else f"{gain['oracle']:.3f}",
        )
        for gain in result.gains
    ]  # fmt: skip
    return heads, rows


def _claims_table(result: StudyResult) -> _HeadsAndRows:
    heads = ("router", "world", "load", "QoS", "latency per token", "QoS per GB s, against round robin")
    metrics = ("qos", "latency_per_token_s", "qos_per_gb_s")
    rows = [
        (display_name(row["router"]), row["world"], f"{row['load']:g}", *(_change(row[metric]) for metric in metrics))
        for row in result.claims
    ]
    return heads, rows


def _change(share: float) -> str:
    """Returns a change in percent; a router that answers nothing has no latency to compare."""
    return f"{share:+.1%}" if np.isfinite(share) else "-"


def _shares_table(result: StudyResult) -> _HeadsAndRows:
    heads = ("router", "world", "load", "best heuristic", "plan", "upper bound", "share of the gap")
    rows: list[tuple[str, ...]] = [
        (
            display_name(share["router"]), share["world"], f"{share['load']:g}",
            f"{display_name(share['best'])} {share['best_qos']:.3f}",
            f"{share['plan']:.3f}", f"{share['bound']:.3f}",
            f"{share['mean']:+.0%} [{share['low']:+.0%}, {share['high']:+.0%}]",
        )
        for share in result.shares
    ]  # fmt: skip
    return heads, rows


def _metrics_table(result: StudyResult) -> _HeadsAndRows:
    metrics = ("qos", *result.metrics)
    shown = [(world, _shown_load(result, world)) for world in result.worlds]
    rows = [
        (
            display_name(name), world, f"{load:g}",
            *(
                " ± ".join(filter(None, _mean_and_half(result.cells[world, load, name, metric], METRICS[metric])))
                for metric in metrics
            ),
        )
        for world, load in shown
        for name in result.kinds
        if (world, load, name, "qos") in result.cells
    ]  # fmt: skip
    return ("router", "world", "load", *(METRICS[metric].title for metric in metrics)), rows


def _metrics_html(result: StudyResult, world: str, load: float) -> str:
    rows = [row for row in result.summary if row["world"] == world and row["load"] == load]
    kinds = {name: kind for name, kind in result.kinds.items() if any(row["router"] == name for row in rows)}
    cells = {(row["router"], row["metric"]): row for row in rows}
    told = {name: metric for name, metric in METRICS.items() if any(row["metric"] == name for row in rows)}
    columns = [
        [pages.cell(*_mean_and_half(cells[name, of], metric), False) for name in kinds] for of, metric in told.items()
    ]
    return pages.table([metric.title for metric in told.values()], kinds, columns)


def _shown_load(result: StudyResult, world: str) -> float:
    return min(result.loads(world), key=lambda load: abs(load - 0.9))


def _mean_and_half(row: ResultRow, metric: Metric) -> tuple[str, str]:
    """Returns a mean and half the width of its interval, which is empty where there is none."""
    if not np.isfinite(row["mean"]):
        return "-", ""
    half = (row["high"] - row["low"]) / 2 * metric.scale
    text = f"{half:.{metric.decimals}f}" if np.isfinite(half) else ""
    return f"{row['mean'] * metric.scale:.{metric.decimals}f}", text
