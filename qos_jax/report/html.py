"""The report of an evaluation as one page of HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qos_jax.evaluation.metrics import METRICS
from qos_jax.report import pages
from qos_jax.report.summary_table import _Table

_NOTE = (
    "Mean over seeds, with half the width of its 95 % confidence interval. Bold: the best router that is no oracle. "
    "Oracles, in italics, are told what a router cannot know."
)


def _html(results: Mapping[str, Any], pictures: Sequence[tuple[str, bytes]], title: str) -> str:
    table = _Table(results["summary"])
    seeds = sorted({row["seed"] for row in results["rows"]})
    made = {"command": results["command"], "date": results["date"], "seeds": ", ".join(map(str, seeds))}
    parts = [
        pages.figures(pictures),
        "<h2>QoS by load</h2>",
        f'<p class="note">{_NOTE}</p>',
        _html_qos(table),
        "<h2>All metrics</h2>",
        *(_html_load(table, load) for load in table.loads),
        "<h2>What they mean</h2>",
        pages.meanings({METRICS[name].title: METRICS[name].meaning for name in table.metrics}),
        "<h2>How this was made</h2>",
        pages.meanings(made | results["versions"]),
        pages.literal(json.dumps(results["config"], indent=2)),
    ]
    return pages.page(title, _html_lead(table, len(seeds), max(row["requests"] for row in results["rows"])), parts)


def _html_lead(table: _Table, seeds: int, requests: int) -> str:
    routers = [router for router, kind in table.kinds.items() if kind != "oracle"]
    best = [f"<strong>{pages.spoken(router)}</strong> with {table.mean_qos(router):.3f}" for router in routers[:2]]
    ranking = f" Highest mean QoS over the loads, oracles aside: {', then '.join(best)}." if best else ""
    return (
        f"{_count(len(table.kinds), 'router')} decided on the same {requests:,} requests at each of "
        f"{_count(len(table.loads), 'load')} with {_count(seeds, 'seed')}.{ranking}"
    )


def _html_qos(table: _Table) -> str:
    heads = [f"load {load:g}<small>{table.rates_per_s[load]:.1f} requests/s</small>" for load in table.loads]
    columns = [_html_column(table, "qos", load) for load in table.loads]
    means = [f"{table.mean_qos(router):.3f}" for router in table.kinds]
    return pages.table([*heads, "mean"], table.kinds, [*columns, means])


def _html_load(table: _Table, load: float) -> str:
    heads = [escape(METRICS[metric].title) for metric in table.metrics]
    columns = [_html_column(table, metric, load) for metric in table.metrics]
    return pages.folded(
        f"Load {load:g}, {table.rates_per_s[load]:.1f} requests/s", pages.table(heads, table.kinds, columns)
    )


def _html_column(table: _Table, metric: str, load: float) -> list[str]:
    best = table.best(metric, load)
    return [pages.cell(*table.cell(metric, load, router), router in best) for router in table.kinds]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
