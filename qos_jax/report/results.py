"""Results of an evaluation as files: results.json, summary.csv, summary.tex, report.html and pictures.

``results.json`` is strict JSON; what is not a number (the interval of one seed, the latency where nothing was answered)
is null. It holds

* ``config``: what was evaluated, in the caller's words; ``command``: what to type to get it again; ``date``: in UTC;
* ``versions``: of Python and the packages, and the platform, processor and device that they ran on;
* ``gains``: who is better than whom at which load, and by how much; see ``gains.paired_gains``;
* ``rows``: one object per router, load and seed: ``router``, ``kind``, ``load`` (share of the fleet's saturation rate),
  ``rate_per_s``, ``seed``, and every metric of ``METRICS`` under its name, in the unit that the name ends in;
* ``summary``: one object per router, load and metric: ``router``, ``kind``, ``load``, ``rate_per_s``, ``metric``, and
  ``mean``, ``low`` and ``high``: the mean over the seeds and the ends of its 95 % confidence interval.

``summary.csv`` is ``summary`` with a line for each object. ``summary.tex`` is QoS by router and load.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.statistics import summarise
from qos_jax.io.files import csv_text, write_whole
from qos_jax.io.imports import in_one_line
from qos_jax.io.provenance import made_by, plain
from qos_jax.report.gains import paired_gains
from qos_jax.report.html import report_html
from qos_jax.report.latex import latex_table
from qos_jax.report.pictures import Drawing, picture_or_warning, write_or_warn

RESULTS = "results.json"


def results_of(runs: Sequence[RouterRun], config: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Returns what results.json holds, as plain values; see the module."""
    rows = [_labels(run) | {"seed": run.scenario.seed} | run.metrics for run in runs]
    groups: dict[tuple[str, float], list[RouterRun]] = {}
    for run in runs:
        groups.setdefault((run.router.name, run.scenario.load), []).append(run)
    summary = [
        _labels(group[0]) | {"metric": metric} | summarise([run.metrics[metric] for run in group])
        for group in groups.values()
        for metric in group[0].metrics
    ]
    results = {
        "config": config,
        **made_by(command),
        "gains": paired_gains(rows),
        "rows": rows,
        "summary": summary,
    }
    return plain(results)


def write_report(
    out_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    figures: Mapping[str, Drawing] | Callable[[], Mapping[str, Drawing]],
    *,
    title: str = "Routers compared",
) -> pathlib.Path:
    """Writes results.json, summary.csv, summary.tex, report.html with all of it in one file, and the pictures.

    The files are written in this order, each whole or not at all. A figure that cannot be drawn is one line on stderr;
    all else is written.

    Args:
      out_dir: folder to write to; made if it is not there.
      results: of ``results_of``.
      figures: drawings by name, see ``pictures``, or what returns them. Functions are called after the numbers are
        written.
      title: heading of the report.

    Returns:
      The path of report.html.

    Raises:
      InputError: the folder cannot be written to.
    """
    folder = pathlib.Path(out_dir)
    write_whole(folder / RESULTS, json.dumps(results, indent=1, allow_nan=False))
    write_whole(folder / "summary.csv", csv_text(results["summary"]))
    write_whole(folder / "summary.tex", latex_table(results))
    try:
        drawings = _drawings(figures) if callable(figures) else figures
        drawn = {name: picture_or_warning(name, drawing) for name, drawing in drawings.items()}
        pictures = {name: each for name, each in drawn.items() if each is not None}
        write_whole(folder / "report.html", report_html(results, pictures, title))
        for name, each in pictures.items():
            write_or_warn(folder, name, each)
    except KeyboardInterrupt:
        print(f"stopped: {folder / RESULTS} is written, the report and pictures are not", file=sys.stderr)
        raise
    return folder / "report.html"


def _drawings(figures: Callable[[], Mapping[str, Drawing]]) -> Mapping[str, Drawing]:
    try:
        return figures()
    except Exception as error:  # pictures are worth less than the numbers
        print(f"warning: the pictures are left out: {in_one_line(error)}", file=sys.stderr)
        return {}


def _labels(run: RouterRun) -> dict[str, Any]:
    scenario = run.scenario
    return {
        "router": run.router.name, "kind": run.router.kind, "load": scenario.load, "rate_per_s": scenario.rate_per_s,
    }  # fmt: skip
