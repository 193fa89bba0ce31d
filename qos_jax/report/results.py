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

import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from qos_jax.evaluation.evaluate import Run
from qos_jax.evaluation.statistics import summarise
from qos_jax.io.files import write_whole
from qos_jax.io.provenance import plain, versions
from qos_jax.report import pages
from qos_jax.report.html import _html


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


def _labels(run: Run) -> dict[str, Any]:
    scenario = run.scenario
    return {
        "router": run.router.name, "kind": run.router.kind, "load": scenario.load, "rate_per_s": scenario.rate_per_s,
    }  # fmt: skip
