"""Tells which orders of routers survive an error of the model.

qos-jax robustness --preset=paper-3 --routers=main,runs/mvr --out=runs/robustness

Routers keep what they are: their tuned numbers and weights, and by default the unchanged profile that they observe. The
world is changed, one change after the other: each coefficient of an iteration and the KV blocks, the engine, the
quality of predictions, the clock, and the law of arrivals. Written are robustness.json and the page robustness.md.

robustness.json holds ``config``, ``command``, ``date`` and ``versions`` as results.json does, and

* ``kinds``: of the routers; ``pairs``: number of pairs of ranked routers and load;
* ``worlds``, the unchanged one first: each its ``label`` and ``change``, ``qos`` by router and load,
  ``rank_correlation`` by load, ``orders`` and ``claims``, see ``qos_jax.evaluation.robustness``;
* ``rows``: one object per world, router, load and seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.evaluation import robustness
from qos_jax.evaluation.evaluate import RouterRun, Scenario, evaluate, scenarios
from qos_jax.evaluation.robustness import Amounts, Change
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import command_of, made_by, plain, write_result
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.router_flags import check_held_out, routers_named
from qos_jax.programs.world_flags import import_plugins, notes_on, numbers, world_config
from qos_jax.report.robustness_page import robustness_markdown
from qos_jax.routers import Router
from qos_jax.sim.env import Environment
from qos_jax.sim.types import ExpertProfile
from qos_jax.worlds.config import WorldConfig

_METRICS = ("qos", "violation_rate", "drop_rate", "latency_per_token_s")


def main(values: FlagValues) -> None:
    """Judges the routers in every world, and writes the numbers and the page."""
    import_plugins(values, values.routers)
    env, params = (world := world_config(values)).build()
    changes = _changes(values, world, params.experts)
    seeds = range(values.first_seed, values.first_seed + values.seeds)
    asked = scenarios(params, numbers("load", values.load), seeds)
    every_seed = {change.scenario(scenario).seed for change in changes for scenario in asked}
    check_held_out(values.routers, values.first_seed, sorted(every_seed))
    routers = routers_named(values.routers, env, params)
    notes = notes_on(world, env, params)
    folder = writable_folder(values.out)
    warmup, environments, judged = int(values.warmup * values.requests), _Environments(env, world), []
    with ProgressBar(len(changes), "world", f"{len(routers)} routers; compiles") as bar:
        for change in changes:
            changed, there = change.params(world, params), [change.scenario(scenario) for scenario in asked]
            judged.append(
                evaluate(environments.of(change), changed, routers, there, values.requests, warmup=warmup)
            )  # fmt: skip
            bar.update(len(judged), doing=change.label)
    config = world.described() | notes | {
        "saturation_per_s": float(params.saturation_per_s), "loads": list(dict.fromkeys(each.load for each in asked)),
        "seeds": list(seeds), "requests": values.requests, "warmup": warmup,
    }  # fmt: skip
    found = plain(_found(changes, routers, asked, judged) | {"config": config} | made_by(command_of("robustness")))
    write_result(folder / "robustness.json", found)
    write_whole(folder / "robustness.md", page := robustness_markdown(found, world.name))
    print(page)
    print(f"written: {folder / 'robustness.md'}")


def _changes(values: FlagValues, world: WorldConfig, experts: ExpertProfile) -> list[Change]:
    """Returns the unchanged world and the changes that the flags ask for.

    Raises:
      InputError: a kind of changes is unknown.
    """
    if unknown := [name for name in values.changes if name not in robustness.GROUPS]:
        raise InputError(f"--changes={unknown[0]}: choose some of {', '.join(robustness.GROUPS)}")
    amounts = Amounts(values.coefficient_by, values.rate_by, values.late_by)
    groups = dict.fromkeys(values.changes)
    return [
        Change(),
        *robustness.changes(world, experts, amounts, groups=list(groups), belief=values.belief, seeds=values.seeds),
    ]


class _Environments:
    """The environments of changed worlds, each once: an environment is what is compiled."""

    def __init__(self, env: Environment, world: WorldConfig) -> None:
        self.env, self.world = env, world

    def of(self, change: Change) -> Environment:
        """Returns the environment of a change; one where metrics are late keeps snapshots of the fleet."""
        if change.late_s == 0 or self.env.spec.history > 0:
            return self.env
        return dataclasses.replace(self.world, staleness_s=change.late_s).build()[0]


def _found(
    changes: Sequence[Change], routers: Sequence[Router], asked: Sequence[Scenario], judged: Sequence[list[RouterRun]]
) -> dict[str, Any]:
    """Returns what the runs of each world say, and the runs."""
    kinds = {router.name: router.kind for router in routers}
    loads = list(dict.fromkeys(scenario.load for scenario in asked))
    ranked = [place for place, kind in enumerate(kinds.values()) if kind != "oracle"]
    ranked_kinds = {name: kind for name, kind in kinds.items() if kind != "oracle"}
    qos = [np.array([run.metrics["qos"] for run in runs]).reshape(len(kinds), len(loads), -1) for runs in judged]
    before = qos[0][ranked]
    worlds = []
    for change, levels in zip(changes, qos, strict=True):
        after = levels[ranked]
        means = zip(kinds, levels.mean(-1), strict=True)
        correlations = zip(loads, robustness.rank_correlations(before, after), strict=True)
        worlds.append(
            {
                "label": change.label, "change": dataclasses.asdict(change),
                "qos": {name: dict(zip(loads, each, strict=True)) for name, each in means},
                "rank_correlation": dict(correlations),
                "orders": robustness.orders(list(ranked_kinds), loads, before, after),
                "claims": robustness.claims(ranked_kinds, loads, before, after),
            }
        )  # fmt: skip
    rows = [
        {"world": change.label, "router": run.router.name, "kind": run.router.kind, **dataclasses.asdict(run.scenario)}
        | {name: run.metrics[name] for name in _METRICS}
        for change, runs in zip(changes, judged, strict=True)
        for run in runs
    ]
    return {"kinds": kinds, "pairs": math.comb(len(ranked), 2) * len(loads), "worlds": worlds, "rows": rows}
