"""The summary of an evaluation as a table of routers by loads, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.evaluation.metrics import METRICS

TERMINAL_COLUMNS = 120


class SummaryTable:
    """The summary of results.json by metric, load and router.

    Attributes:
      loads: in ascending order.
      rates_per_s: arrival rate of each load [requests/s].
      metrics: names of the metrics, in the order of ``METRICS``.
      kinds: kind of each router by name: the best mean QoS first, oracles after all others.
    """

    def __init__(self, summary: Sequence[Mapping[str, Any]]) -> None:
        """Takes the ``summary`` of results.json."""
        self.loads = sorted({row["load"] for row in summary})
        self.rates_per_s = {row["load"]: row["rate_per_s"] for row in summary}
        self.metrics = [name for name in METRICS if any(row["metric"] == name for row in summary)]
        self._rows = {(row["metric"], row["load"], row["router"]): row for row in summary}
        kinds = {row["router"]: row["kind"] for row in summary}
        self.kinds = dict(sorted(kinds.items(), key=lambda item: (item[1] == "oracle", -self.mean_qos(item[0]))))

    def mean_qos(self, router: str) -> float:
        """Returns the QoS of a router, mean over the loads."""
        return float(np.mean([self._rows["qos", load, router]["mean"] for load in self.loads]))

    def cell(self, metric: str, load: float, router: str) -> tuple[str, str]:
        """Returns the mean and half the width of its interval, as text; "-" and "" where there is none."""
        row, shown = self._rows[metric, load, router], METRICS[metric]
        if row["mean"] is None:
            return "-", ""
        half = "" if row["low"] is None else f"{shown.scale * (row['high'] - row['low']) / 2:.{shown.decimals}f}"
        return f"{shown.scale * row['mean']:.{shown.decimals}f}", half

    def best(self, metric: str, load: float) -> set[str]:
        """Returns the routers that show the best value, oracles left out; none where that is most of them."""
        better = METRICS[metric].better
        routers = [router for router, kind in self.kinds.items() if kind != "oracle"]
        values = {router: self._rows[metric, load, router]["mean"] for router in routers}
        known = {router: better * value for router, value in values.items() if value is not None}
        if not known or not better:
            return set()
        best_text, _ = self.cell(metric, load, max(known, key=lambda router: known[router]))
        winners = {router for router in known if self.cell(metric, load, router)[0] == best_text}
        return winners if 2 * len(winners) <= len(routers) else set()


def terminal_table(results: Mapping[str, Any], metrics: Sequence[str] = ("qos",)) -> str:
    """Returns a table of routers by loads for each metric, best mean QoS on top, at most 120 columns wide.

    A star marks the best value of a load among the routers that are no oracles.
    """
    table = SummaryTable(results["summary"])
    heads = ["load", *(f"{name} (oracle)" if kind == "oracle" else name for name, kind in table.kinds.items())]
    lines = []
    for metric in metrics:
        lines.append(f"{METRICS[metric].title}: {METRICS[metric].meaning}")
        lines += text_table(heads, [_terminal_column(table, metric, load) for load in table.loads])
    return "\n".join(lines)


def text_table(heads: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table with the heads on its left, in blocks of at most 120 characters across.

    An empty line follows each block.
    """
    first, width = max(map(len, heads)), 2 + max(len(cell) for column in columns for cell in column)
    per_block = max(1, (TERMINAL_COLUMNS - first) // width)
    lines = []
    for start in range(0, len(columns), per_block):
        rows = zip(heads, *columns[start : start + per_block], strict=True)
        texts = [head.ljust(first) + "".join(cell.rjust(width) for cell in cells) for head, *cells in rows]
        lines += [*(text.rstrip() for text in texts), ""]
    return lines


def _terminal_column(table: SummaryTable, metric: str, load: float) -> list[str]:
    best = table.best(metric, load)
    column = [f"{load:g} "]
    for router in table.kinds:
        mean, half = table.cell(metric, load, router)
        column.append(f"{mean} +-{half}" if half else mean)
        column[-1] += "*" if router in best else " "
    return column


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_origin(found: Mapping[str, Any]) -> str:
    """Returns where a result comes from, see ``io.provenance.made_by``, as a list in Markdown."""
    made = {name: found[name] for name in ("command", "date")} | found["versions"]
    return "\n".join(f"- {name}: `{value}`" for name, value in made.items())
