"""Results of an evaluation, for machines (results.json), for the eye (PNGs and report.html) and for the terminal.

``results.json`` is strict JSON; what is not a number (the interval of one seed, the latency where nothing was answered)
is null. It holds

* ``config``: what was evaluated, in the caller's words; ``command``: what to type to get it again; ``date``: in UTC;
* ``versions``: of Python and the packages, and the platform, processor and device that they ran on;
* ``rows``: one object per router, load and seed: ``router``, ``kind``, ``load`` (share of the fleet's saturation rate),
  ``rate_per_s``, ``seed``, and every metric of ``METRICS`` under its name, in the unit that the name ends in;
* ``summary``: one object per router, load and metric: ``router``, ``kind``, ``load``, ``rate_per_s``, ``metric``, and
  ``mean``, ``low`` and ``high``: the mean over the seeds and the ends of its 95 % confidence interval.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from qos_jax import pages
from qos_jax.evaluation import Run
from qos_jax.files import write_whole
from qos_jax.statistics import summarise


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    meaning: str
    decimals: int
    better: int = 0  # 1: more is better, -1: less is, 0: neither by itself
    scale: float = 1.0  # from the unit in results.json to the one in the title


METRICS = {
    "qos": Metric("QoS", "mean score of all requests, a late answer and a dropped request counting 0", 3, 1),
    "score": Metric("score", "mean quality of the answers given, late ones included, between 0 and 1", 3, 1),
    "violation_rate": Metric("late or dropped, %", "requests whose latency per token exceeded their limit", 1, -1, 100),
    "drop_rate": Metric("dropped, %", "requests refused by the router or by a full expert", 1, -1, 100),
    "latency_per_token_s": Metric("ms per token", "mean of (finish - arrival + network) / output tokens", 1, -1, 1e3),
    "latency_per_token_p50_s": Metric("p50, ms", "half of the answers take at most this long per token", 1, -1, 1e3),
    "latency_per_token_p95_s": Metric("p95, ms", "95 % of the answers take at most this long per token", 1, -1, 1e3),
    "latency_per_token_p99_s": Metric("p99, ms", "99 % of the answers take at most this long per token", 1, -1, 1e3),
    "ttft_s": Metric("TTFT, ms", "mean time from arrival to first token", 0, -1, 1e3),
    "tpot_s": Metric("TPOT, ms", "mean time per output token after the first", 1, -1, 1e3),
    "preemptions": Metric("preemptions", "how often a running request lost its KV memory and had to start over", 0, -1),
    "kv_utilisation": Metric("KV use, %", "KV memory in use, mean over time and experts", 1, 0, 100),
    "qos_per_gb_s": Metric("QoS per GB s", "QoS earned per GB of KV memory and second that it was held", 3, 1),
    "energy_j_per_request": Metric("J per request", "energy of the whole fleet per request that arrived", 1, -1),
    "energy_j_per_token": Metric("J per token", "energy of the whole fleet per token that was answered", 2, -1),
    "qos_per_kj": Metric("QoS per kJ", "QoS earned per kJ", 3, 1),
    "busy_fraction": Metric("busy, %", "time in which an expert runs an iteration, mean over experts", 1, 0, 100),
    "requests": Metric("requests", "requests counted, those behind the warm-up", 0),
}
_PACKAGES = ("qos_jax", "jax", "jaxlib", "flax", "numpy")
_TERMINAL_COLUMNS = 120
_NOTE = (
    "Mean over seeds, with half the width of its 95 % confidence interval. Bold: the best router that is no oracle. "
    "Oracles, in italics, are told what a router cannot know."
)


def results_of(runs: Sequence[Run], config: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Returns what results.json holds, as plain values; see the module."""
    rows = [_labels(run) | {"seed": run.scenario.seed} | run.metrics for run in runs]
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.router.name, run.scenario.load), []).append(run)
    summary = [
        _labels(group[0]) | {"metric": metric} | summarise([run.metrics[metric] for run in group])
        for group in groups.values()
        for metric in group[0].metrics
    ]
    results = {
        "config": config,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "rows": rows,
        "summary": summary,
    }
    return plain(results)


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages, and what they run on."""
    packages = {name: _version(name) for name in _PACKAGES}
    machine = {"platform": platform.platform(), "processor": _processor(), "device": jax.devices()[0].device_kind}
    return {"python": platform.python_version()} | packages | machine


def write_report(
    out_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    figures: Mapping[str, Figure],
    *,
    title: str = "Routers compared",
) -> pathlib.Path:
    """Writes results.json, NAME.png of each figure, and report.html with all of it in one file.

    Everything is made before anything is written, and each file appears whole or not at all.

    Args:
      out_dir: folder to write to; made if it is not there.
      results: what ``results_of`` returns.
      figures: figures by name; the label of each is its caption.
      title: heading of the report.

    Returns:
      The path of report.html.

    Raises:
      InputError: the folder cannot be written to.
    """
    folder = pathlib.Path(out_dir)
    pictures = {name: pages.png(figure) for name, figure in figures.items()}
    captioned = [(str(figure.get_label()), pictures[name]) for name, figure in figures.items()]
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files["results.json"] = json.dumps(results, indent=1, allow_nan=False).encode()
    files["report.html"] = _html(results, captioned, title).encode()
    for name, content in files.items():
        write_whole(folder / name, content)
    return folder / "report.html"


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


def _labels(run: Run) -> dict[str, Any]:
    scenario = run.scenario
    return {
        "router": run.router.name, "kind": run.router.kind, "load": scenario.load, "rate_per_s": scenario.rate_per_s,
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Returns the value in the terms of strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # qos_jax run from its source folder


def _processor() -> str:
    """Returns the processor's name, which Linux tells only in a file."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
