"""What a study found: rows of many worlds brought down to means, gains, a picture and a part of a page.

Routers are compared on the same requests, so a gain is the mean of paired differences. A learned router stands for all
its training seeds: its interval holds the spread over them and that over the evaluation's seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qos_jax import pages, study_plots
from qos_jax.report import METRICS, Metric
from qos_jax.statistics import crossed_interval

Row = Mapping[str, Any]

PLAN, BOUND = "hindsight_plan", "upper_bound"  # names of what is no router, in rows of kind oracle
_REFERENCE = "oracle_impact"
_MOST_CURVES = 8  # of learned routers, which need a colour each
_PAPERS_HEURISTICS = ("bert_router", "round_robin", "shortest_queue")


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The rows of a study: one for each world, router, training seed, load and seed, with all metrics; None for NaN."""

    name: str
    title: str
    question: str
    axis: str | None  # what differs between the worlds, if that is drawn
    rows: Sequence[Row]
    metrics: tuple[str, ...] = ()  # told in the tables beside QoS
    cost: str | None = None  # a metric, if QoS is drawn against that

    @property
    def worlds(self) -> list[str]:
        """Labels, in order."""
        return list(dict.fromkeys(row["world"] for row in self.rows))

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each router by name, the best mean QoS first and oracles last."""
        kinds = {row["router"]: row["kind"] for row in self.rows}
        means = {name: np.mean([row["qos"] for row in self.rows if row["router"] == name]) for name in kinds}
        return {name: kinds[name] for name in sorted(kinds, key=lambda name: (kinds[name] == "oracle", -means[name]))}

    def loads(self, world: str) -> list[float]:
        """Returns the loads of a world."""
        return sorted({row["load"] for row in self.rows if row["world"] == world})

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """``world``, ``load``, ``router``, ``kind``, ``metric``, ``mean``, ``low`` and ``high``."""
        return [
            {"world": world, "load": load, "router": router, "kind": kind, "metric": metric} | crossed_interval(grid)
            for world in self.worlds
            for load in self.loads(world)
            for router, kind in self.kinds.items()
            for metric in METRICS
            if (grid := self._grid(world, load, router, metric)).size
        ]

    @cached_property
    def cells(self) -> dict[tuple[str, float, str, str], dict[str, Any]]:
        """Rows of the summary by world, load, router and metric."""
        return {(row["world"], row["load"], row["router"], row["metric"]): row for row in self.summary}

    @cached_property
    def gains(self) -> list[dict[str, Any]]:
        """What learned routers gain: ``world``, ``load``, ``router``, ``best`` and ``best_qos`` of the heuristics.

        Also ``mean``, ``low``, ``high`` of the paired gain over it, ``least`` and ``greatest`` of a training seed, and
        ``oracle``, the QoS of the impact-greedy oracle, or None.
        """
        return [
            gain
            for world in self.worlds
            for load in self.loads(world)
            for router, kind in self.kinds.items()
            if kind == "learned" and (gain := self._gain(world, load, router))
        ]

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """What the paper claims of its router, for learned ones: ``world``, ``load``, ``router`` and relative changes.

        ``qos`` and ``latency_per_token_s`` are against the best of the paper's three heuristics in that metric,
        ``qos_per_gb_s`` against round robin.
        """
        means = {place: row["mean"] for place, row in self.cells.items()}
        rows = []
        for gain in self.gains:
            world, load = gain["world"], gain["load"]
            if not all((world, load, name, "qos") in means for name in _PAPERS_HEURISTICS):
                continue
            against = {
                "qos": max(means[world, load, name, "qos"] for name in _PAPERS_HEURISTICS),
                "latency_per_token_s": min(
                    means[world, load, name, "latency_per_token_s"] for name in _PAPERS_HEURISTICS
                ),
                "qos_per_gb_s": means[world, load, "round_robin", "qos_per_gb_s"],
            }
            changes = {
                metric: means[world, load, gain["router"], metric] / other - 1 for metric, other in against.items()
            }
            rows.append({"world": world, "load": load, "router": gain["router"]} | changes)
        return rows

    @cached_property
    def shares(self) -> list[dict[str, Any]]:
        """Which part of the gap between the best heuristic and a hindsight plan each router closes.

        ``world``, ``load``, ``router``, ``kind``, ``best`` and ``best_qos`` of the heuristics, ``plan`` and ``bound``,
        the QoS of the plan and the bound, and ``mean``, ``low``, ``high`` of the share: paired gains over the mean gap.
        """
        return [
            share
            for world in self.worlds
            for load in self.loads(world)
            if (planned := self._grid(world, load, PLAN, "qos")).size
            for router, kind in self.kinds.items()
            if router not in (PLAN, BOUND) and (share := self._share(world, load, router, planned))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        return dataclasses.asdict(self) | {
            "gains": self.gains,
            "claims": self.claims,
            "shares": self.shares,
            "summary": self.summary,
        }

    def _gain(self, world: str, load: float, router: str) -> dict[str, Any]:
        grid, (best, best_grid) = self._grid(world, load, router, "qos"), self._best(world, load)
        if not grid.size or not best_grid.size:
            return {}
        gains, oracle = grid - best_grid, self._grid(world, load, _REFERENCE, "qos")
        return {
            "world": world, "load": load, "router": router, "best": best, "best_qos": float(best_grid.mean()),
            **crossed_interval(gains), "least": float(gains.mean(1).min()), "greatest": float(gains.mean(1).max()),
            "oracle": float(oracle.mean()) if oracle.size else None,
        }  # fmt: skip

    def _share(self, world: str, load: float, router: str, planned: np.ndarray) -> dict[str, Any]:
        grid, (best, best_grid) = self._grid(world, load, router, "qos"), self._best(world, load)
        if not grid.size or not best_grid.size:
            return {}
        gap = float(planned.mean() - best_grid.mean())
        return {
            "world": world, "load": load, "router": router, "kind": self.kinds[router],
            "best": best, "best_qos": float(best_grid.mean()), "plan": float(planned.mean()),
            "bound": float(self._grid(world, load, BOUND, "qos").mean()),
            **crossed_interval((grid - best_grid) / gap),
        }  # fmt: skip

    def _best(self, world: str, load: float) -> tuple[str, np.ndarray]:
        """Returns the best heuristic and its QoS [1, seeds]; empty without one."""
        grids = {name: self._grid(world, load, name, "qos") for name, kind in self.kinds.items() if kind == "heuristic"}
        return max(grids.items(), key=lambda item: item[1].mean() if item[1].size else -1.0, default=("", np.empty(0)))

    def _grid(self, world: str, load: float, router: str, metric: str) -> np.ndarray:
        """Returns a metric [training seeds, seeds]."""
        rows = [row for row in self.rows if row["world"] == world and row["load"] == load and row["router"] == router]
        training_seeds = sorted({row["training_seed"] for row in rows})
        values = [
            [row[metric] for row in sorted(rows, key=lambda row: row["seed"]) if row["training_seed"] == each]
            for each in training_seeds
        ]
        return np.array(values, np.float64)  # None becomes NaN


def study_figure(result: StudyResult) -> Figure:
    """Draws mean QoS against load in a panel for each world, or against what differs between the worlds.

    Beside a plan, and where curves of many learned routers would hide each other, it is levels: a panel for each load.
    """
    rows = [row for row in result.summary if row["metric"] == "qos"]
    if result.cost:
        return _trade_off(result, result.cost)
    if result.shares or list(result.kinds.values()).count("learned") > _MOST_CURVES:
        there = [(world, load) for world in result.worlds for load in result.loads(world)]
        levels: dict[str, list[Row]] = {
            f"{world}, load {load:g}": [row for row in rows if (row["world"], row["load"]) == (world, load)]
            for world, load in there
        }
        caption = f"{result.title}: mean QoS of a request, with 95 % intervals."
        if result.shares:
            levels = {title: _upper_half(panel) for title, panel in levels.items()}
            caption = f"{result.title}: mean QoS of a request, with 95 % intervals, of all that earn half of the bound."
        return study_plots.qos_levels(levels, caption)
    caption = f"{result.title}: mean QoS of a request, with 95 % intervals; dashed: oracles."
    if result.axis is None:
        panels = {world: [row | {"x": row["load"]} for row in rows if row["world"] == world] for world in result.worlds}
        return study_plots.qos_panels(panels, "load", caption)
    panels = {
        f"load {load:g}": [row | {"x": result.worlds.index(row["world"])} for row in rows if row["load"] == load]
        for load in sorted({row["load"] for row in rows})
    }
    return study_plots.qos_panels(panels, result.axis, caption, ticks=result.worlds)


def _trade_off(result: StudyResult, cost: str) -> Figure:
    """Draws mean QoS against a metric, in a panel for each world and load."""
    panels = {
        f"{world}, load {load:g}": [
            row | {f"cost_{field}": result.cells[world, load, name, cost][field] for field in ("mean", "low", "high")}
            for name in result.kinds
            if (row := result.cells.get((world, load, name, "qos")))
        ]
        for world in result.worlds
        for load in result.loads(world)
    }
    caption = f"{result.title}: mean QoS of a request against {METRICS[cost].meaning}, with 95 % intervals."
    return study_plots.qos_trade_off(panels, METRICS[cost].title, caption)


def _upper_half(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with at least half of the greatest mean."""
    least = 0.5 * max(row["mean"] for row in rows)
    return [row for row in rows if row["mean"] >= least]


def study_html(result: StudyResult, picture: bytes) -> str:
    """Returns the part of a page that shows a study."""
    parts = [
        f"<h2>{pages.spoken(result.title)}</h2>",
        f"<p>{result.question}</p>",
        pages.figures([(str(study_figure(result).get_label()), picture)]),
    ]
    if result.gains:
        parts += ["<h3>Gains over the best heuristic</h3>", pages.rows_table(*_gains_table(result))]
    if result.claims:
        parts += [f"<h3>{_CLAIMS_TITLE}</h3>", pages.rows_table(*_claims_table(result))]
    if result.shares:
        parts += [f"<h3>{_SHARES_TITLE}</h3>", pages.rows_table(*_shares_table(result))]
    for world in result.worlds:
        load = _shown_load(result, world)
        title = f"All metrics: {pages.spoken(world)}, load {load:g}"
        parts.append(pages.folded(title, _metrics_html(result, world, load)))
    return "\n".join(parts)


def study_markdown(result: StudyResult) -> str:
    """Returns a section of Markdown, which shows NAME.png beside it."""
    parts = [
        f"## {result.title}",
        result.question,
        f"![{result.title}]({result.name}.png)",
        _markdown(*_gains_table(result)),
    ]
    if result.claims:
        parts += [f"### {_CLAIMS_TITLE}", _markdown(*_claims_table(result))]
    if result.shares:
        parts += [f"### {_SHARES_TITLE}", _markdown(*_shares_table(result))]
    if result.metrics:
        parts += [f"### {_METRICS_TITLE}", _markdown(*_metrics_table(result))]
    return "\n\n".join(parts) + "\n"


_CLAIMS_TITLE = "Change against the best of bert_router, round_robin and shortest_queue in each metric"
_SHARES_TITLE = "Share of the gap between the best heuristic and the plan"
_METRICS_TITLE = "All routers, with 95 % intervals"
_Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads, rows


def _gains_table(result: StudyResult) -> _Table:
    heads = ("router", "world", "load", "best heuristic", "QoS", "gain", "over training seeds", "oracle_impact")
    rows: list[tuple[str, ...]] = [
        (
            gain["router"], gain["world"], f"{gain['load']:g}", f"{gain['best']} {gain['best_qos']:.3f}",
            f"{gain['best_qos'] + gain['mean']:.3f}",
            f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
            f"{gain['least']:+.3f} to {gain['greatest']:+.3f}",
            "" if gain["oracle"] is None else f"{gain['oracle']:.3f}",
        )
        for gain in result.gains
    ]  # fmt: skip
    return heads, rows


def _claims_table(result: StudyResult) -> _Table:
    heads = ("router", "world", "load", "QoS", "latency per token", "QoS per GB s, against round_robin")
    metrics = ("qos", "latency_per_token_s", "qos_per_gb_s")
    rows = [
        (row["router"], row["world"], f"{row['load']:g}", *(_change(row[metric]) for metric in metrics))
        for row in result.claims
    ]
    return heads, rows


def _change(share: float) -> str:
    """Returns a change in percent; there is none in the latency of who answers nothing."""
    return f"{share:+.1%}" if np.isfinite(share) else "-"


def _shares_table(result: StudyResult) -> _Table:
    heads = ("router", "world", "load", "best heuristic", "plan", "no plan exceeds", "share of the gap")
    rows: list[tuple[str, ...]] = [
        (
            share["router"], share["world"], f"{share['load']:g}", f"{share['best']} {share['best_qos']:.3f}",
            f"{share['plan']:.3f}", f"{share['bound']:.3f}",
            f"{share['mean']:+.0%} [{share['low']:+.0%}, {share['high']:+.0%}]",
        )
        for share in result.shares
    ]  # fmt: skip
    return heads, rows


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _metrics_table(result: StudyResult) -> _Table:
    metrics = ("qos", *result.metrics)
    shown = [(world, _shown_load(result, world)) for world in result.worlds]
    rows = [
        (
            name, world, f"{load:g}",
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
    columns = [
        [pages.cell(*_mean_and_half(cells[name, metric], METRICS[metric]), False) for name in kinds]
        for metric in METRICS
    ]
    return pages.table([metric.title for metric in METRICS.values()], kinds, columns)


def _shown_load(result: StudyResult, world: str) -> float:
    return min(result.loads(world), key=lambda load: abs(load - 0.9))


def _mean_and_half(row: Row, metric: Metric) -> tuple[str, str]:
    """Returns a mean and half the width of its interval, which is empty where there is none."""
    if not np.isfinite(row["mean"]):
        return "-", ""
    half = (row["high"] - row["low"]) / 2 * metric.scale
    text = f"{half:.{metric.decimals}f}" if np.isfinite(half) else ""
    return f"{row['mean'] * metric.scale:.{metric.decimals}f}", text
