"""Makes the project's figures anew: trains what they need, compares, and writes tables, pictures and one page.

qos-jax reproduce --figure=all --budget=full --out=runs/reproduce
qos-jax reproduce --figure=load,staleness --budget=quick --out=runs/quick
qos-jax reproduce --figure=load --presets=edge-8 --budget=full --out=runs/edge-8

``qos_jax.programs.studies`` lists the studies. Below --out, ``runs`` holds trained routers and ``cells`` the results
of each world. Every study is written as json, csv, md and png as soon as it is done; ``index.html`` shows them all.
Finished parts are kept, so the same command goes on with a run that was stopped or killed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl.flags import FlagValues

import qos_jax
from qos_jax.agent.recipes import recipe
from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun, Scenario, evaluate, scenarios
from qos_jax.evaluation.hindsight import plan
from qos_jax.evaluation.metrics import metrics_of
from qos_jax.evaluation.study import BOUND, PLAN, StudyResult
from qos_jax.evaluation.upper_bound import upper_bound
from qos_jax.io.files import csv_text, parse_json, writable_folder, write_whole
from qos_jax.io.provenance import git_hash, plain, versions
from qos_jax.io.text_files import read_text, shown
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.studies import BUDGETS, DIALS, STUDIES, TRAINED, Study, Trained, World
from qos_jax.programs.train_once import ended_together, train_once
from qos_jax.report import pages
from qos_jax.report.pictures import Picture, write_figure
from qos_jax.report.study_report import study_figure, study_html, study_markdown
from qos_jax.routers import PLANNERS, Router, make_router, router_names
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import ExpertProfile
from qos_jax.training.load import load_router
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.run_format import upgraded_training
from qos_jax.workload.client_arrivals import read_clients, superposition
from qos_jax.workload.trace_files import read_trace
from qos_jax.workload.traces import with_gaps
from qos_jax.worlds.build import make

_DATA = "QOS_JAX_DATA"  # folder of measured data; studies leave out what needs it where it is not set
_OF_TRAINING = ("most_steps", "most_training_seeds")  # of a budget: the runs themselves say what they had
_WARM_UP = 0.1  # leading share of the requests that does not count


def main(values: FlagValues) -> None:
    """Trains and compares what is not there yet, and writes the studies."""
    names = list(STUDIES) if values.figure == ["all"] else list(dict.fromkeys(values.figure))
    if unknown := [name for name in names if name not in STUDIES]:
        raise InputError(f"--figure={unknown[0]}: choose all, or some of {', '.join(STUDIES)}")
    only = _presets(values.presets, names)
    maker = _Maker(writable_folder(values.out), values.budget, only)
    work = {name: worlds for name in names if (worlds := maker.worlds(name))}
    named = [name for worlds in work.values() for world in worlds for name in maker.trained(world)]
    runs = list(dict.fromkeys(_run_of(name) for name in named))
    results = []
    with ProgressBar(len(runs) + sum(map(len, work.values())), "task", "trains") as bar:
        with ended_together(), concurrent.futures.ThreadPoolExecutor(values.jobs) as pool:
            for _ in pool.map(maker.train, runs):
                bar.update(bar.done + 1, doing="trains")
        for name, worlds in work.items():
            rows = []
            for world in worlds:
                rows += maker.cell(name, world)
                bar.update(bar.done + 1, doing=f"{name}: {world.label}")
            results.append(maker.study(name, rows))
            maker.page(results)
    print(f"written: {maker.folder / 'index.html'}")


class _Maker:
    """Makes runs, cells and studies in a folder, each once."""

    def __init__(self, folder: pathlib.Path, budget: str, only: Sequence[str] = ()) -> None:
        self.folder, self.budget, self.budget_name = folder, BUDGETS[budget], budget
        self.only = only  # presets whose worlds are made; all if empty
        self.pictures: dict[str, Picture | None] = {}
        self.commits: dict[str, set[str]] = {}  # at which the cells of each study were computed
        self.known: dict[tuple[Any, ...], Router] = {}  # routers by name and world, so that they compile once

    def worlds(self, study: str) -> list[World]:
        """Returns the worlds of a study that the budget and the data at hand allow."""
        asked = [world for world in STUDIES[study].worlds if not self.only or world.preset in self.only]
        there = [world for world in asked if world.trace is None or _DATA in os.environ]
        if len(there) < len(asked):
            print(f"{study}: worlds with measured arrivals are left out, as {_DATA} is not set", file=sys.stderr)
        return _ends(there) if self.budget.ends_only else there

    def trained(self, world: World) -> list[str]:
        """Returns the learned routers of a world, each with all of its seeds."""
        return _ends(world.trained) if self.budget.ends_only else list(world.trained)

    def train(self, name: str) -> None:
        """Trains all seeds of a router in one run, or goes on with it."""
        trained = TRAINED[name]
        asked = [
            f"--preset={trained.preset}", f"--agent={trained.agent}", f"--randomise={trained.randomise}",
            *trained.flags, f"--steps={self._steps(name)}", f"--seeds={self._seeds(name)}",
        ]  # fmt: skip
        train_once(self.folder / "runs" / name, asked, quiet=True)

    def cell(self, study: str, world: World) -> list[dict[str, Any]]:
        """Returns what every router made of a world at each load and seed: one row each."""
        budget = {name: value for name, value in dataclasses.asdict(self.budget).items() if name not in _OF_TRAINING}
        asked = dataclasses.asdict(world) | budget | {"study": _asked(STUDIES[study])}
        asked |= {"trained": {name: self._training(name) for name in self.trained(world)}}
        asked = plain(asked | {name: DIALS[name] for name in world.trained if name in DIALS})
        path = self.folder / "cells" / f"{study}-{_file_name(world.label)}.json"
        kept: dict[str, Any] = _read(path) if path.exists() else {"asked": None}
        if _upgraded(kept["asked"]) != asked:
            rows = [row | {"world": world.label} for row in self._compare(STUDIES[study], world)]
            kept = plain({"asked": asked, "commit": git_hash(), "versions": versions(), "rows": rows})
            write_whole(path, json.dumps(kept, allow_nan=False))
        self.commits.setdefault(study, set()).add(kept.get("commit") or "unknown")
        return list(kept["rows"])

    def study(self, name: str, rows: Sequence[Mapping[str, Any]]) -> StudyResult:
        """Writes a study in all forms, and returns it."""
        study = STUDIES[name]
        result = StudyResult(
            name, study.title, study.question, study.axis, plain(list(rows)), study.metrics, study.cost
        )
        found = {"command": self._command(name), "versions": versions()} | result.to_dict()
        write_whole(self.folder / f"{name}.json", json.dumps(plain(found), indent=1, allow_nan=False))
        write_whole(self.folder / f"{name}.csv", csv_text(result.rows))
        write_whole(self.folder / f"{name}.md", study_markdown(result, self._spent(), self._made([name])))
        self.pictures[name] = write_figure(self.folder, name, partial(study_figure, result))
        return result

    def page(self, results: Sequence[StudyResult]) -> None:
        """Writes all studies so far as one page."""
        parts = [study_html(result, self.pictures[result.name]) for result in results]
        made = self._made([result.name for result in results])
        parts += ["<h2>How this was made</h2>", pages.meanings(made)]
        page = pages.page("Routing LLM requests at the edge: studies", self._spent(), parts)
        write_whole(self.folder / "index.html", page)

    def _compare(self, study: Study, world: World) -> Iterator[dict[str, Any]]:
        env, params = make(world.preset, **dict(world.fields), **_recorded(world))
        loads = _ends(study.loads) if self.budget.ends_only else study.loads
        asked = study.routers if world.routers is None else world.routers
        names = router_names(env) if asked == ("all",) else asked
        routers = [self._known(name, world, env, params) for name in names]
        seeds_of = {}
        for name in self.trained(world):
            for seed in range(self._seeds(name)):
                routers.append(self._learned(name, seed))
                seeds_of[routers[-1].name] = (name, seed)
        seeds = range(1000, 1000 + math.ceil(world.share_of_seeds * self.budget.seeds))
        requests = round(study.share * world.share_of_requests * self.budget.requests)
        # A plan is made of the whole trace, so there all of it counts.
        warmup = 0 if study.hindsight else int(_WARM_UP * requests)
        runs = evaluate(env, params, routers, scenarios(params, loads, seeds), requests, warmup=warmup)
        for run in runs:
            router, training_seed = seeds_of.get(run.router.name, (run.router.name, 0))
            yield {
                "router": router, "kind": run.router.kind, "training_seed": training_seed,
                **dataclasses.asdict(run.scenario), **run.metrics,
            }  # fmt: skip
        if study.hindsight:
            yield from _hindsight(env.spec.engine, jax.tree.map(np.asarray, params.experts), runs)

    def _known(self, name: str, world: World, env: Environment, params: EnvParams) -> Router:
        of = world.label if name in PLANNERS else env.spec.num_experts  # a planner samples the requests of its world
        if (name, of) not in self.known:
            self.known[name, of] = make_router(name, env, params)
        return self.known[name, of]

    def _learned(self, name: str, seed: int) -> Router:
        if (name, seed, "") not in self.known:
            run, preferences = DIALS.get(name, (name, None))
            path = self.folder / "runs" / run
            self.known[name, seed, ""] = load_router(path, seed=seed, name=f"{name} {seed}", preferences=preferences)
        return self.known[name, seed, ""]

    def _training(self, name: str) -> dict[str, Any]:
        """Returns the configuration of the run of a router: a cell of another recipe is not this one."""
        return RunFolder.reopen(self.folder / "runs" / _run_of(name)).training.to_dict()

    def _seeds(self, name: str) -> int:
        return min(_trained(name).seeds, self.budget.most_training_seeds)

    def _steps(self, name: str) -> int:
        trained, most = TRAINED[name], self.budget.most_steps
        steps = round(trained.share * recipe(trained.preset, trained.agent).steps)
        return steps if most is None else min(steps, most)

    def _spent(self) -> str:
        return (
            f"Budget {self.budget_name}: {self.budget.requests:,} requests of each load and of each of "
            f"{self.budget.seeds} seeds, where a study takes no other share of them, the same for every router; "
            "intervals are 95 %. Oracles are told what no router can know."
        )

    def _made(self, figures: Sequence[str]) -> dict[str, str]:
        commits = sorted(set().union(*(self.commits[figure] for figure in figures)))
        return {"command": self._command(",".join(figures)), "commit": ", ".join(commits)} | versions()

    def _command(self, figure: str) -> str:
        only = f" --presets={','.join(self.only)}" if self.only else ""
        return f"qos-jax reproduce --figure={figure} --budget={self.budget_name}{only}"


def _run_of(name: str) -> str:
    """Returns the training run of a router, one of TRAINED."""
    return DIALS[name][0] if name in DIALS else name


def _trained(name: str) -> Trained:
    return TRAINED[_run_of(name)]


def _hindsight(spec: EngineSpec, experts: ExpertProfile, runs: Sequence[RouterRun]) -> Iterator[dict[str, Any]]:
    """Yields what a plan makes of each scenario, improved from what all routers did there, and the bound."""
    of: dict[Scenario, list[RouterRun]] = {}
    for run in runs:
        of.setdefault(run.scenario, []).append(run)

    def planned_and_bounded(done: Sequence[RouterRun]) -> tuple[dict[str, float], dict[str, float]]:
        trace = done[0].trace
        best = plan(
            experts, trace, [run.assignment for run in done],
            block_size=spec.block_size,
        )  # fmt: skip
        (replayed,) = replay_many(experts, [trace], [best.assignment], block_size=spec.block_size)
        planned = metrics_of(experts, trace, best.assignment, replayed, 0)
        return planned, dict.fromkeys(planned, math.nan) | {"qos": upper_bound(experts, trace)}

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for scenario, metrics in zip(of, pool.map(planned_and_bounded, of.values()), strict=True):
            for name, values in zip((PLAN, BOUND), metrics, strict=True):
                yield {
                    "router": name, "kind": "oracle", "training_seed": 0, **dataclasses.asdict(scenario), **values
                }  # fmt: skip


def _presets(names: Sequence[str], figures: Sequence[str]) -> list[str]:
    """Returns the presets that are asked for, of which the studies have worlds; none if all are asked for."""
    there = dict.fromkeys(world.preset for figure in figures for world in STUDIES[figure].worlds)
    if unknown := [name for name in names if name != "all" and name not in there]:
        raise InputError(f"--presets={unknown[0]}: choose all, or some of {', '.join(there)}")
    return [] if "all" in names else list(names)


def _asked(study: Study) -> dict[str, Any]:
    return {"loads": study.loads, "routers": study.routers, "share": study.share, "version": qos_jax.__version__}


def _upgraded(asked: Any) -> Any:
    """Returns what a cell was asked for, in the terms of this version.

    Neither new fields of an agent nor another budget for trainings that it does not have void it.
    """
    trained = asked.get("trained") if isinstance(asked, dict) else None
    if not isinstance(trained, dict):
        return asked
    known = {name: upgraded_training(one) if isinstance(one, dict) else one for name, one in trained.items()}
    return {name: value for name, value in asked.items() if name not in _OF_TRAINING} | {"trained": known}


def _recorded(world: World) -> dict[str, Any]:
    """Returns the measured arrivals of a world as arguments of ``make``, which sets their rate."""
    if world.trace is None:
        return {}
    path = os.path.join(os.environ[_DATA], "traces", world.trace)
    if path.endswith(".npz"):
        return {"arrivals": superposition(read_clients(path))}
    return {"arrivals": with_gaps(read_trace(path).halves()[1])}


def _ends(values: Sequence[Any]) -> list[Any]:
    return [*values[:1], *values[1:][-1:]]


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in label)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns a cell: ``rows``, each a table, and ``asked``, what they are the results of."""
    try:
        kept = parse_json(read_text(path), str(path))
    except InputError as error:
        raise InputError(f"{error}; delete the file, which is damaged") from error
    rows = kept.get("rows") if isinstance(kept, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or "asked" not in kept:
        legal = "an object with asked, and rows, a list of objects"
        raise InputError(f"{path}: is {shown(kept)}, must be {legal}; delete the file, which is damaged")
    return kept
