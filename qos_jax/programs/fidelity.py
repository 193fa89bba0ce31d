"""Compares the simulator with a measured run of a real engine: each request, each second, and what is left out.

qos-jax fidelity --run=$QOS_JAX_DATA/golden-rtx4090 \
    --profiles=$QOS_JAX_DATA/profiles/rtx4090_llama3.1-8b --out=runs/fidelity

The timing is fitted to the kernel tables alone; of the run itself enters what the engine was given. Written are
fidelity.json, two pictures, and index.html, a page that holds all of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from absl.flags import FlagValues

from qos_jax.evaluation import fidelity
from qos_jax.evaluation.fidelity import SimulatedRun
from qos_jax.evaluation.measured_run import MeasuredRun, read_run
from qos_jax.fleet import profile_fitting
from qos_jax.fleet.engines import ENGINES
from qos_jax.fleet.kernel_tables import KernelTables, read_tables
from qos_jax.fleet.profile_fitting import tables_as_json
from qos_jax.fleet.table_fitting import fit_tables
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import plain, versions
from qos_jax.programs.fit_profile import link_of
from qos_jax.report import fidelity_plots, pages
from qos_jax.report.pictures import Drawing, Picture, write_figure


def main(values: FlagValues) -> None:
    """Simulates the run, compares, prints the error table and writes everything."""
    folder = writable_folder(values.out)
    run, link = _run(values), link_of(values)
    tables = read_tables(*(f"{values.profiles}_{name}.csv" for name in ("dense", "attention", "per_sequence")))
    kernels, timing = _timing(values, run, tables if link is None else profile_fitting.with_exchange(tables, link))
    one_gpu = None if link is None else _timing(values, run, tables)[1]
    simulated = fidelity.simulate(run, timing)
    found = _results(run, simulated, kernels, timing, one_gpu)
    found["link"] = None if link is None else dataclasses.asdict(link)
    write_whole(folder / "fidelity.json", json.dumps(plain(found), indent=1, allow_nan=False))
    drawings: dict[str, Drawing] = {
        "latencies": partial(fidelity_plots.latency_scatter, run, simulated.log),
        "timeline": partial(fidelity_plots.load_timeline, run, simulated),
    }
    pictures = [write_figure(folder, name, drawing) for name, drawing in drawings.items()]
    write_whole(folder / "index.html", _page(found, [each for each in pictures if each is not None]))
    for name, row in found["latencies"].items():
        print(
            f"{fidelity.LATENCIES[name]:10} measured {_amount(name, row['measured']):>9}, "
            f"simulated {_amount(name, row['simulated']):>9}, mean {_percent(row['mean_error'], 2)}, "
            f"median |error| {100 * row['median_error']:.1f} %"
        )
    print(f"written: {folder / 'index.html'}")


def _run(values: FlagValues) -> MeasuredRun:
    """Returns the measured run, with its engine and the prefixes that its requests share as the flags say."""
    run = read_run(values.run, values.kv_blocks)
    if values.engine is not None:
        engine = ENGINES[values.engine]
        run = dataclasses.replace(run, async_scheduling=engine.async_scheduling, prefix_cache=engine.prefix_cache)
    if values.shared_prefixes != "none":
        run = fidelity.with_shared_prefixes(run, run.kv_blocks if values.shared_prefixes == "lru" else None)
    return run


def _timing(
    values: FlagValues, run: MeasuredRun, tables: KernelTables
) -> tuple[profile_fitting.Iterations, dict[str, Any]]:
    """Returns the iterations of the kernels, and the timing that is fitted to them."""
    kernels = profile_fitting.assemble(tables, values.num_layers, run.kv_blocks * run.block_size)
    timing: dict[str, Any] = profile_fitting.fit_timing(kernels)
    if values.form == "tables":
        fitted = fit_tables(tables, kernels, values.num_layers)
        host = {"host_s": values.host_us, "host_per_sequence_s": values.host_per_sequence_us}
        timing["kernels"] = fitted.replace(**{name: np.array([us / 1e6]) for name, us in host.items()})
    return kernels, timing


def _results(
    run: MeasuredRun,
    simulated: SimulatedRun,
    kernels: profile_fitting.Iterations,
    timing: Mapping[str, Any],
    one_gpu: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "run": run.name,
        "requests": len(run.arrival_s),
        "command": shlex.join(["qos-jax", "fidelity", *sys.argv[1:]]),
        "versions": versions(),
        "engine": {name: getattr(run, name) for name in ("kv_blocks", "async_scheduling", "prefix_cache")},
        "timing": dict(timing) | ({"kernels": tables_as_json(timing["kernels"])} if "kernels" in timing else {}),
        "latencies": fidelity.latency_errors(run, simulated.log),
        "loads": fidelity.load_errors(run, simulated),
        "iterations": fidelity.parts_of_time(simulated.iterations, kernels, timing),
        "decode": fidelity.decode_errors(run, timing),
        "recomputation": fidelity.recomputation(run, simulated, timing),
        "without": fidelity.parts_left_out(run, timing, one_gpu),
        "shared_prefix_tokens": 0 if run.shared_tokens is None else int(run.shared_tokens.sum()),
        "each_request": {
            "measured": fidelity.latencies_s(run, run),
            "simulated": fidelity.latencies_s(run, simulated.log),
            "simulated_preemptions": simulated.log.preemptions,
        },
    }


def _page(found: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    lead = (
        f"{found['requests']} requests, {found['run']}. The simulator was given the arrivals, the token counts and the "
        "size of the KV memory, and timing that was fitted to kernel tables; nothing was fitted to the run."
    )
    if (link := found["link"]) is not None:
        lead += (
            f" What two GPUs exchange is not in the tables and counts at an assumed {link['gb_per_s']:g} GB/s and "
            f"{link['latency_us']:g} us for each exchange."
        )
    if shared := found["shared_prefix_tokens"]:
        lead += f" {shared:,} tokens of the prompts are taken from the prefix cache."
    parts = [
        _latency_table(found["latencies"]),
        pages.figures(pictures),
        "<h2>What the engine held, mean over its looks</h2>",
        _load_table(found["loads"]),
        "<h2>What the cost of an iteration leaves out</h2>",
        _left_out(found),
        "<h2>What each part of the model is worth</h2>",
        "<p>Errors of the mean latencies if one part were missing.</p>",
        _without_table(found["without"]),
        "<h2>How this was made</h2>",
        pages.meanings({"command": found["command"]} | found["versions"]),
    ]
    return pages.page("The simulator beside a measured run", lead, parts)


def _latency_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    heads = ["mean", "measured", "simulated", "error of the mean", "median |error|", "95 % within", "correlation"]
    cells = [
        [
            fidelity.LATENCIES[name], _amount(name, row["measured"]), _amount(name, row["simulated"]),
            _percent(row["mean_error"], 2), f"{100 * row['median_error']:.1f} %", f"{100 * row['p95_error']:.1f} %",
            f"{row['correlation']:.4f}",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    return pages.rows_table(heads, cells)


def _load_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    cells = []
    for name, row in rows.items():
        scale, unit = (100, " %") if name == "kv_share" else (1, "")
        values = (row[field] for field in ("measured", "simulated", "mean_difference"))
        shown = ("not recorded" if math.isnan(value) else f"{scale * value:.1f}{unit}" for value in values)
        cells.append([fidelity.LOADS[name], *shown])
    return pages.rows_table(["", "measured", "simulated", "mean |difference|"], cells)


def _left_out(found: Mapping[str, Any]) -> str:
    again = found["recomputation"]
    heads = ["iterations", "number", "share of time", "form against kernel tables", "of the run"]
    cells = [
        [row["kind"], f"{row['iterations']:,}", f"{100 * row['share']:.1f} %", _percent(row["form_error"]),
         _percent(row["of_the_run"])]
        for row in found["iterations"]
    ]  # fmt: skip
    seconds = [
        [name, str(row["ticks"]), f"{row['measured']:,.0f}", f"{row['predicted']:,.0f}", _percent(row["error"])]
        for name, row in found["decode"].items()
    ]
    text = (
        f"The simulator preempts {again['preemptions']} times and computes {again['tokens']:,} tokens once more, whose "
        f"arithmetic is {100 * again['share']:.1f} % of its time. An engine with prefix caching may find some of them."
    )
    engine = pages.rows_table(["decode only", "looks", "tokens", "by the form", "time of the form"], seconds)
    return (
        "<p>The iterations of the simulated run, and how far the form is from the kernel "
        "tables at the measured batch nearest to each; below 0 it is too fast.</p>"
        f"{pages.rows_table(heads, cells)}"
        "<p><br>The looks since the one before which the engine computed no new prompt: the tokens that it gave, and "
        "those that the form gives at the engine's own batches. Memory is called full where somebody waited and fewer "
        "requests ran each time, the batch where somebody waited and as many ran as may.</p>"
        f"{engine}<p><br>{text}</p>"
    )


def _without_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    cells = [[part, *(_percent(row[name]) for name in fidelity.LATENCIES)] for part, row in rows.items()]
    return pages.rows_table(["left out", *(f"mean {title}" for title in fidelity.LATENCIES.values())], cells)


def _amount(name: str, value: float) -> str:
    return f"{1e3 * value:.2f} ms" if name == "tpot_s" else f"{value:.2f} s"


def _percent(value: float, decimals: int = 1) -> str:
    return "not measured" if math.isnan(value) else f"{round(100 * value, decimals) + 0.0:+.{decimals}f} %"
