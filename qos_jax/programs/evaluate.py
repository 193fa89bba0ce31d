"""Compares routers: every router on the same requests, at several loads and seeds.

qos-jax evaluate --preset=paper-3 --routers=all --load=0.3,0.6,0.9,1.1 --seeds=5 --out=runs/paper-3

A router that has been trained is named by the folder of its run: --routers=all,runs/mvr. It is the first seed's if the
run has several, or that of another seed with --routers=all,runs/mvr@3.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from tqdm import tqdm

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import Run, Scenario, evaluate
from qos_jax.io.files import writable_folder
from qos_jax.programs import common
from qos_jax.report import plots, style
from qos_jax.report.results import results_of, write_report
from qos_jax.report.summary_table import terminal_table
from qos_jax.routers import Router, make_router, router_names
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.iterations import iterations_of
from qos_jax.sim.types import Workload
from qos_jax.training.load import load_router
from qos_jax.training.run_folder import CONFIG, RunFolder

FLAGS = flags.FLAGS
_DEFAULT_LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
_WINDOW_S = 3.0  # of one expert's iterations, to be looked at closely


def define_flags() -> None:
    """Defines the flags of this program."""
    common.define_world_flags()
    flags.DEFINE_list("routers", ["all"], "Routers to compare: names, all, folders of training runs.")
    flags.DEFINE_list("load", None, "Arrival rates as fractions of the fleet's saturation rate; 0.3 to 1.3 by default.")
    flags.DEFINE_list("rate", None, "Arrival rates in requests/s, instead.")
    flags.DEFINE_integer("requests", 3000, "Requests of each load and seed.", lower_bound=10)
    flags.DEFINE_float("warmup", 0.1, "Leading share of them that the metrics do not count.", 0.0, 0.9)
    flags.DEFINE_integer("seeds", 5, "How many seeds.", lower_bound=1)
    flags.DEFINE_integer("first_seed", 1000, "The first of them; training uses seeds below 1000.", lower_bound=0)
    flags.DEFINE_string("out", "runs/evaluate", "Folder for results.json, report.html and pictures.")


def main(argv: list[str]) -> None:
    """Evaluates, prints a table and writes the report."""
    del argv
    rates, loads = common.numbers("rate", FLAGS.rate), common.numbers("load", FLAGS.load)
    if rates and loads:
        raise InputError("--load and --rate are both given: give one")
    env, params, config = common.world_from_flags()
    routers = _routers(env.spec.num_experts, params.workload)
    folder = writable_folder(FLAGS.out)
    saturation_per_s = float(params.saturation_per_s)
    rates = list(dict.fromkeys(rates or [load * saturation_per_s for load in loads or _DEFAULT_LOADS]))
    seeds = range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.seeds)
    scenarios = [Scenario(round(rate / saturation_per_s, 4), rate, seed) for rate in rates for seed in seeds]
    warmup = int(FLAGS.warmup * FLAGS.requests)
    config |= {"saturation_per_s": saturation_per_s, "rates_per_s": rates, "seeds": list(seeds)}
    config |= {"requests": FLAGS.requests, "warmup": warmup}

    with tqdm(total=len(routers), unit="router", dynamic_ncols=True) as bar:
        bar.set_description(f"{len(scenarios)} x {FLAGS.requests} requests; the first router compiles")
        runs = evaluate(env, params, routers, scenarios, FLAGS.requests, warmup=warmup, progress=lambda _: bar.update())
    results = results_of(runs, config, shlex.join(["qos-jax", "evaluate", *sys.argv[1:]]))
    print(terminal_table(results))
    figures = _figures(env, params, runs, results) | _learning_curves()
    report = write_report(folder, results, figures, title=f"Routers on {FLAGS.preset}")
    print(f"written: {report}")


def _routers(num_experts: int, workload: Workload) -> list[Router]:
    known = router_names(num_experts)
    asked = list(dict.fromkeys(name for each in FLAGS.routers for name in (known if each == "all" else [each])))
    if not asked:
        raise InputError(f"--routers= names none; choose all, or from {', '.join(known)}")
    runs = {name: run for name in asked if (run := _run_of(name))}
    folders = [folder.name for folder, _ in runs.values()]
    routers = []
    for name in asked:
        if name not in runs:
            routers.append(make_router(name, num_experts, workload))
            continue
        folder, seed = runs[name]
        clashes = folder.name in asked or folders.count(folder.name) > 1
        routers.append(load_router(folder, seed=seed, name=name if clashes else folder.name))
    return routers


def _run_of(name: str) -> tuple[pathlib.Path, int | None] | None:
    """Returns the folder and the seed that FOLDER or FOLDER@SEED names, None where it names no training run."""
    before, at, after = name.rpartition("@")
    folder, seed = (before, int(after)) if at and after.isdecimal() else (name, None)
    is_run = os.sep in folder or (pathlib.Path(folder) / CONFIG).exists()
    return (pathlib.Path(folder), seed) if is_run else None


def _learning_curves() -> dict[str, Figure]:
    folders = [run[0] for name in FLAGS.routers if (run := _run_of(name))]
    records = {folder.name: RunFolder.reopen(folder).records() for folder in folders}
    return {f"learning_curve_{name}": plots.learning_curve(record) for name, record in records.items()}


def _figures(env: Environment, params: EnvParams, runs: Sequence[Run], results: dict[str, Any]) -> dict[str, Figure]:
    """Draws the pictures; those of one load are at the load nearest to 0.9."""
    experts = jax.tree.map(np.asarray, params.experts)
    load = min({run.scenario.load for run in runs}, key=lambda load: abs(load - 0.9))
    at_load = [run for run in runs if run.scenario.load == load]
    notable = [run for run in at_load if run.router.name in style.HIGHLIGHTED or run.router.kind != "heuristic"]
    honest = [run for run in at_load if run.router.kind != "oracle"]
    best = max(honest or at_load, key=lambda run: run.metrics["qos"])
    limit_s = float(np.mean(best.trace.latency_limit_s))
    figures = {
        "qos_against_load": plots.qos_against_load(results["summary"]),
        "latency_cdf": plots.latency_cdf(notable or at_load, experts, limit_s),
        "routing_shares": plots.routing_shares(at_load, env.expert_names),
        "expert_timelines": plots.expert_timelines(best, experts, env.expert_names),
    }
    busiest = int(np.argmax(best.replayed.busy_s))
    served_s = best.trace.arrival_s[(best.assignment == busiest) & ~best.replayed.log.dropped]
    if served_s.size:
        start_s = float(served_s[served_s.size // 2]) - 1e-3
        window = iterations_of(
            experts, best.trace, best.assignment, busiest, start_s, start_s + _WINDOW_S,
            token_budget=env.spec.engine.token_budget, block_size=env.spec.engine.block_size,
        )  # fmt: skip
        figures["iterations"] = plots.iteration_gantt(window, env.expert_names[busiest])
    return figures


if __name__ == "__main__":
    common.start(define_flags, main)
