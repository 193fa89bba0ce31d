"""The summary of an evaluation as a table of routers by loads, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.evaluation.metrics import METRICS

_TERMINAL_COLUMNS = 120


def terminal_table(results: Mapping[str, Any], metrics: Sequence[str] = ("qos",)) -> str:
    """Returns a table of routers by loads for each metric, best mean QoS on top, at most 120 columns wide.

    A star marks the best value of a load among the routers that are no oracles.
    """
    table = _Table(results["summary"])
    heads = ["load", *(f"{name} (oracle)" if kind == "oracle" else name for name, kind in table.kinds.items())]
    blocks = []
    for metric in metrics:
        columns = [_terminal_column(table, metric, load) for load in table.loads]
        widths = [2 + max(map(len, column)) for column in (heads, *columns)]
        per_block = max(1, (_TERMINAL_COLUMNS - widths[0]) // max(widths[1:]))
        blocks.append(f"{METRICS[metric].title}: {METRICS[metric].meaning}")
        for first in range(0, len(columns), per_block):
            rows = zip(heads, *columns[first : first + per_block], strict=True)
            lines = [
                head.ljust(widths[0]) + "".join(cell.rjust(max(widths[1:])) for cell in cells) for head, *cells in rows
            ]
            blocks.append("\n".join(line.rstrip() for line in lines) + "\n")
    return "\n".join(blocks)


def _terminal_column(table: _Table, metric: str, load: float) -> list[str]:
    best = table.best(metric, load)
    column = [f"{load:g} "]
    for router in table.kinds:
        mean, half = table.cell(metric, load, router)
        column.append(f"{mean} +-{half}" if half else mean)
        column[-1] += "*" if router in best else " "
    return column


class _Table:
    """The summary, to be asked by metric, load and router.

    ``kinds`` has the routers in order: the best mean QoS first, oracles after all others.
    """

    def __init__(self, summary: Sequence[Mapping[str, Any]]) -> None:
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
        """Returns the routers that show the best value, oracles left out; nobody where that is most of them."""
        better = METRICS[metric].better
        routers = [router for router, kind in self.kinds.items() if kind != "oracle"]
        values = {router: self._rows[metric, load, router]["mean"] for router in routers}
        known = {router: better * value for router, value in values.items() if value is not None}
        if not known or not better:
            return set()
        best_text, _ = self.cell(metric, load, max(known, key=lambda router: known[router]))
        winners = {router for router in known if self.cell(metric, load, router)[0] == best_text}
        return winners if 2 * len(winners) <= len(routers) else set()
