"""The report of an evaluation as one page of HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qos_jax.evaluation.metrics import METRICS
from qos_jax.report import pages
from qos_jax.report.gains import (
    BEST_HEURISTIC,
    Gain,
    gain_text,
    gains_of,
    main_comparisons,
    opponents_text,
    verdict_text,
)
from qos_jax.report.pictures import Picture
from qos_jax.report.style import display_name
from qos_jax.report.summary_table import SummaryTable

_GAINS_PICTURE = "gains_against_load"
_GAINS_NOTE = (
    "Difference in QoS on the same requests, mean over the seeds with half the width of its 95 % confidence interval. "
    "Better and worse: the interval excludes 0. The best heuristic is that with the highest mean QoS at the load."
)
_MEANS_NOTE = (
    "Mean over the seeds, with half the width of its 95 % confidence interval. Bold: the best router that is no "
    "oracle. Oracles, in italics, know the truth. A click on the head of a column sorts the table."
)


def report_html(results: Mapping[str, Any], pictures: Mapping[str, Picture], title: str) -> str:
    """Returns the report as a page that needs no other file.

    Args:
      results: of ``results_of``.
      pictures: by name, in order; gains_against_load is shown first, beside its table.
      title: heading of the page.
    """
    table = SummaryTable(results["summary"])
    seeds = sorted({row["seed"] for row in results["rows"]})
    made = {"command": results["command"], "date": results["date"], "seeds": ", ".join(map(str, seeds))}
    others = [each for name, each in pictures.items() if name != _GAINS_PICTURE]
    parts = [
        _gains(results["gains"], pictures.get(_GAINS_PICTURE)),
        "<h2>QoS by load</h2>",
        f'<p class="note">{_MEANS_NOTE}</p>',
        _qos(table),
        pages.figures(others),
        "<h2>All metrics</h2>",
        *(_load(table, load) for load in table.loads),
        "<h2>Meaning of the metrics</h2>",
        pages.meanings({METRICS[name].title: METRICS[name].meaning for name in table.metrics}),
        "<h2>How this was made</h2>",
        pages.meanings(made | results["versions"]),
        pages.literal(json.dumps(results["config"], indent=2)),
    ]
    return pages.page(title, _lead(table, len(seeds), max(row["requests"] for row in results["rows"])), parts)


def _lead(table: SummaryTable, seeds: int, requests: int) -> str:
    routers = [router for router, kind in table.kinds.items() if kind != "oracle"]
    best = [f"<strong>{escape(display_name(each))}</strong> with {table.mean_qos(each):.3f}" for each in routers[:2]]
    ranking = f" Highest mean QoS over the loads, oracles aside: {', then '.join(best)}." if best else ""
    return (
        f"{_count(len(table.kinds), 'router')} decided on the same {requests:,} requests at each of "
        f"{_count(len(table.loads), 'load')} with {_count(seeds, 'seed')}.{ranking}"
    )


def _gains(gains: Sequence[Gain], picture: Picture | None) -> str:
    pairs = main_comparisons(gains)
    if not pairs:
        return ""
    verdicts = "".join(f"<li>{_verdict(gains_of(gains, *pair))}</li>" for pair in pairs)
    table = _gains_table([gain for pair in pairs for gain in gains_of(gains, *pair)])
    every = pages.folded("Every router against each reference", _gains_table(gains))
    shown = picture.html() if picture else ""
    return (
        f'<h2>Paired gains</h2><p class="note">{_GAINS_NOTE}</p><ul>{verdicts}</ul>'
        f'<div class="beside">{shown}{table}</div>{every}'
    )


def _verdict(rows: Sequence[Gain]) -> str:
    router, reference, which = display_name(rows[0]["router"]), display_name(rows[0]["reference"]), ""
    if rows[0]["reference"] == BEST_HEURISTIC:
        reference = f"the {reference}"
        which = f" <small>({escape(opponents_text(rows, display_name))})</small>"
    return f"<strong>{escape(router)}</strong> against {escape(reference)}{which}: {verdict_text(rows)}."


def _gains_table(gains: Sequence[Gain]) -> str:
    rows = [
        [
            escape(display_name(gain["router"])), f"{gain['load']:g}", pages.cell(*gain_text(gain)),
            f'<span class="{gain["verdict"]}">{gain["verdict"]}</span>', escape(display_name(gain["against"])),
        ]
        for gain in gains
    ]  # fmt: skip
    return pages.cells_table(["router", "load", "gain in QoS", "verdict", "against"], rows)


def _qos(table: SummaryTable) -> str:
    heads = [f"load {load:g}<small>{table.rates_per_s[load]:.1f} requests/s</small>" for load in table.loads]
    columns = [_column(table, "qos", load) for load in table.loads]
    means = [f"{table.mean_qos(router):.3f}" for router in table.kinds]
    return pages.table([*heads, "mean"], table.kinds, [*columns, means])


def _load(table: SummaryTable, load: float) -> str:
    heads = [escape(METRICS[metric].title) for metric in table.metrics]
    columns = [_column(table, metric, load) for metric in table.metrics]
    return pages.folded(
        f"Load {load:g}, {table.rates_per_s[load]:.1f} requests/s", pages.table(heads, table.kinds, columns)
    )


def _column(table: SummaryTable, metric: str, load: float) -> list[str]:
    best = table.best(metric, load)
    return [pages.cell(*table.cell(metric, load, router), router in best) for router in table.kinds]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
