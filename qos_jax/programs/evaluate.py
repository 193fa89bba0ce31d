"""Compares routers on the same requests, at several loads and seeds.

qos-jax evaluate --preset=paper-3 --routers=all --load=0.3,0.6,0.9,1.1 --seeds=5 --out=runs/table

The folder of a training run names its router: --routers=all,runs/paper-3. Of a run with several seeds it is the first
one's, or another one's with --routers=runs/paper-3@3. A router that was trained with preferences takes others with
--routers=runs/dial:energy=2:drop=0.5. One that places too many requests, or too few, on a fleet that it was not trained
on is corrected with --routers=runs/any-fleet:margin=0.05, the QoS by which a placement must exceed a drop.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl.flags import FlagValues
from matplotlib.figure import Figure

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun, Scenario, evaluate
from qos_jax.io.files import writable_folder
from qos_jax.io.provenance import command_of, plain
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.router_flags import check_held_out, routers_named, run_folders
from qos_jax.programs.world_flags import import_plugins, notes_on, numbers, world_config
from qos_jax.report import expert_plots, plots
from qos_jax.report.gains import terminal_gains
from qos_jax.report.pictures import Drawing
from qos_jax.report.results import RESULTS, results_of, write_report
from qos_jax.report.summary_table import terminal_table
from qos_jax.routers import Router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.iterations import iterations_of
from qos_jax.sim.types import ExpertProfile
from qos_jax.training.run_folder import RunFolder

_DEFAULT_LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
_WINDOW_S = 3.0  # of one expert's iterations, to be looked at closely


def main(values: FlagValues) -> None:
    """Evaluates, prints a table and writes the report."""
    import_plugins(values, values.routers)
    env, params = (world := world_config(values)).build()
    scenarios = _scenarios(values, params)
    check_held_out(values.routers, values.first_seed, [scenario.seed for scenario in scenarios])
    routers = routers_named(values.routers, env, params)
    notes = notes_on(world, env, params)
    curves = _learning_curves(values.routers)  # read before the work, as all input is
    folder = writable_folder(values.out)
    warmup = int(values.warmup * values.requests)
    config = (
        world.described()
        | notes
        | {
            "inputs": world.inputs(),
            "weights": {router.name: _weights(router) for router in routers if router.params is not None},
            "saturation_per_s": float(params.saturation_per_s),
            "rates_per_s": list(dict.fromkeys(scenario.rate_per_s for scenario in scenarios)),
            "seeds": list(dict.fromkeys(scenario.seed for scenario in scenarios)),
            "requests": values.requests,
            "warmup": warmup,
        }
    )
    if not values.overwrite:
        _check_free(folder, config, routers)
    with ProgressBar(len(routers), "router", f"{len(scenarios)} x {values.requests} requests; compiles") as bar:
        done: list[Router] = []

        def progress(router: Router) -> None:
            done.append(router)
            bar.update(len(done))

        runs = evaluate(env, params, routers, scenarios, values.requests, warmup=warmup, progress=progress)
    results = results_of(runs, config, command_of("evaluate"))
    report = write_report(
        folder, results, lambda: _figures(env, params, runs, results) | curves, title=f"Routers on {world.name}"
    )
    print(terminal_gains(results))
    print(terminal_table(results))
    print(f"written: {report}")


def _scenarios(values: FlagValues, params: EnvParams) -> list[Scenario]:
    rates, loads = numbers("rate", values.rate), numbers("load", values.load)
    if rates and loads:
        raise InputError("--load and --rate are both given: give one")
    saturation_per_s = float(params.saturation_per_s)
    by_load = {rate / saturation_per_s: rate for rate in rates}
    by_load |= {load: load * saturation_per_s for load in (() if rates else loads or _DEFAULT_LOADS)}
    seeds = range(values.first_seed, values.first_seed + values.seeds)
    return [Scenario(load, rate, seed) for load, rate in by_load.items() for seed in seeds]


def _check_free(folder: pathlib.Path, config: Mapping[str, Any], routers: Sequence[Router]) -> None:
    """Checks that the folder holds no results but of this evaluation.

    Raises:
      InputError: it does.
    """
    path = folder / RESULTS
    if not path.exists():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        names = {row["router"] for row in earlier["rows"]}
        if (earlier["config"], names) == (plain(config), {router.name for router in routers}):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # of something else
    raise InputError(f"{path} is of another evaluation: give another --out, or --overwrite")


def _weights(router: Router) -> str:
    """Returns what tells the weights of two routers apart that have one name."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(router.params):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]


def _learning_curves(texts: Sequence[str]) -> dict[str, Drawing]:
    """Returns what draws the learning curves of training runs; a warning tells of one whose records are damaged."""
    curves: dict[str, Drawing] = {}
    for folder in run_folders(texts):
        try:
            records = RunFolder.reopen(folder).records()
        except InputError as error:
            print(f"warning: the learning curve of {folder.name} is left out: {error}", file=sys.stderr)
            continue
        curves[f"learning_curve_{folder.name}"] = partial(plots.learning_curve, records)
    return curves


def _figures(
    env: Environment, params: EnvParams, runs: Sequence[RouterRun], results: dict[str, Any]
) -> dict[str, Drawing]:
    """Returns what draws the pictures; those of one load are at the load nearest to 0.9."""
    experts = jax.tree.map(np.asarray, params.experts)
    load = min({run.scenario.load for run in runs}, key=lambda load: abs(load - 0.9))
    at_load = [run for run in runs if run.scenario.load == load]
    best = max([run for run in at_load if run.router.kind != "oracle"] or at_load, key=lambda run: run.metrics["qos"])
    limit_s = float(np.mean(best.trace.latency_limit_s))
    figures: dict[str, Drawing] = {
        "qos_against_load": partial(plots.qos_against_load, results["summary"]),
        "gains_against_load": partial(plots.gains_against_load, results["gains"]),
        "latency_cdf": partial(plots.latency_cdf, at_load, experts, limit_s),
        "routing_shares": partial(plots.routing_shares, at_load, env.expert_names),
        "expert_timelines": partial(expert_plots.expert_timelines, best, experts, env.expert_names),
    }
    if not results["gains"]:
        del figures["gains_against_load"]
    if not np.isfinite(limit_s):  # some users have no limit per token
        del figures["latency_cdf"]
    busiest = int(np.argmax(best.replayed.busy_s))
    served_s = best.trace.arrival_s[(best.assignment == busiest) & ~best.replayed.log.dropped]
    runs_alone = not (env.spec.failures or env.spec.shared_cards)  # as the expert of the picture does
    if served_s.size and runs_alone:
        start_s = float(served_s[served_s.size // 2]) - 1e-3
        figures["iterations"] = partial(_iterations, env, experts, best, busiest, start_s)
    return figures


def _iterations(
    env: Environment, experts: ExpertProfile, run: RouterRun, expert: int, start_s: float, **options: Any
) -> Figure:
    window = iterations_of(
        experts, run.trace, run.assignment, expert, start_s, start_s + _WINDOW_S,
        block_size=env.spec.engine.block_size,
    )  # fmt: skip
    return expert_plots.iteration_gantt(window, env.expert_names[expert], **options)
