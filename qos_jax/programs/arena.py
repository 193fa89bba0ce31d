"""Judges routers by one rule in several worlds.

qos-jax arena --trained=runs/trained --out=runs/arena

All routers get the same requests and observe what a proxy in front of the engines can know, whose counts are up to
``--scrape`` seconds old; oracles are told the truth about requests on top. A router of your own takes part under
--routers=arena,package.module:factory, a trained one under --trained; of a run of several training seeds all take
part, as one router.

Written are, anew after each table, the page arena.md, arena.csv with a line for each world, view, router, load and
seeds, and arena.json, which holds ``command``, ``date``, ``versions``, ``config`` and ``tables``: for each world and
view its ``world``, ``flags`` and ``scrape_s``, ``gains`` over impact_greedy as in results.json, and ``rows``. The same
command goes on with an arena that was stopped or killed, if commit, modules of own routers and trained routers are the
same.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl.flags import FlagValues

import qos_jax
from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun, evaluate, scenarios
from qos_jax.io.files import csv_text, parse_json, writable_folder, write_whole
from qos_jax.io.provenance import command_of, fingerprint, git_hash, made_by, plain, write_result
from qos_jax.io.text_files import read_text
from qos_jax.programs import choices
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.router_flags import check_held_out, routers_named, run_folders
from qos_jax.programs.world_flags import import_plugins, notes_on, numbers, world_of_text
from qos_jax.report.arena_page import REFERENCE, arena_markdown
from qos_jax.report.gains import paired_gains
from qos_jax.routers import VARIANTS, Router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder

_METRICS = ("qos", "score", "violation_rate", "drop_rate", "latency_per_token_s", "ttft_s", "energy_j_per_request")


def main(values: FlagValues) -> None:
    """Judges the routers in every world, and writes the tables."""
    import_plugins(values, values.routers)
    worlds, scrapes_s, loads = _worlds(values), numbers("scrape", values.scrape), numbers("load", values.load)
    seeds = list(range(values.first_seed, values.first_seed + values.seeds))
    runs = {name: _trained(values.trained, name) for name in worlds}
    for asked in ([*values.routers, *trained] for trained in runs.values()):
        check_held_out(asked, values.first_seed, seeds)
    chosen = {
        name: world_of_text(f"--world={name}", f"{text} --observe=proxy --scrape={scrapes_s[0]}")
        for name, text in worlds.items()
    }
    built = {name: world.build() for name, world in chosen.items()}
    for name, world in chosen.items():
        notes_on(world, *built[name])
    routers = {
        name: _routers([*values.routers, *runs[name]], *each, refusing=values.refusing) for name, each in built.items()
    }
    warmup = int(values.warmup * values.requests)
    config = {"loads": loads, "seeds": seeds, "requests": values.requests, "warmup": warmup}
    code = _fingerprint(values.routers, values.plugins or (), runs)
    folder, places = writable_folder(values.out), [(name, scrape_s) for name in worlds for scrape_s in scrapes_s]
    tables = _unfinished(folder, code, len(places))
    with ProgressBar(len(places), "table", f"{len(worlds)} worlds; compiles") as bar:
        for name, scrape_s in places[len(tables) :]:
            env, params = built[name]
            seen = params.replace(scrape_s=params.scrape_s * 0 + scrape_s)
            judged = evaluate(env, seen, routers[name], scenarios(seen, loads, seeds), values.requests, warmup=warmup)
            tables.append({"world": name, "flags": worlds[name], "scrape_s": scrape_s, **_table(judged, runs[name])})
            found = plain({"config": config, "code": code, "tables": tables} | made_by(command_of("arena")))
            _write(folder, found)
            bar.update(len(tables), doing=name)
    print(arena_markdown(found))
    print(f"written: {folder / 'arena.md'}")


def _table(judged: Sequence[RouterRun], trained: Sequence[str]) -> dict[str, Any]:
    """Returns a row for each router, load and seed, and the gains over impact_greedy."""
    rows = []
    for run in judged:
        name, training_seed = _name_and_seed(run.router.name, trained)
        row = {"router": name, "training_seed": training_seed, "kind": run.router.kind}
        metrics = {metric: run.metrics[metric] for metric in _METRICS}
        rows.append(row | dataclasses.asdict(run.scenario) | metrics)
    return {"gains": [gain for gain in paired_gains(rows) if gain["reference"] == REFERENCE], "rows": rows}


def _fingerprint(routers: Sequence[str], plugins: Sequence[str], runs: Mapping[str, Sequence[str]]) -> str:
    """Returns what tells apart by which code and trained routers a table is made: other ones void it."""
    modules = {*plugins, *(text.partition(":")[0] for text in routers if ":" in text)}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    contents = fingerprint(*filter(None, files), *run_folders([run for of_world in runs.values() for run in of_world]))
    return f"{qos_jax.__version__} {git_hash() or ''} {contents}"


def _unfinished(folder: pathlib.Path, code: str, count: int) -> list[dict[str, Any]]:
    """Returns the first tables of the same command if it was stopped before it had made ``count`` of them."""
    try:
        earlier = parse_json(read_text(folder / "arena.json"), "arena.json")
        is_same = earlier["command"] == command_of("arena") and earlier["code"] == code
        tables = list(earlier["tables"]) if is_same else []
    except (InputError, KeyError, TypeError):  # there is none, or one of an earlier release
        return []
    if not 0 < len(tables) < count:
        return []
    print(f"note: goes on after {len(tables)} of {count} tables in {folder / 'arena.json'}", file=sys.stderr)
    return tables


def _write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes all tables so far."""
    tables = found["tables"]
    lines = [{"world": each["world"], "scrape_s": each["scrape_s"]} | row for each in tables for row in each["rows"]]
    write_result(folder / "arena.json", found)
    write_whole(folder / "arena.csv", csv_text(lines))
    write_whole(folder / "arena.md", arena_markdown(found))


def _worlds(values: FlagValues) -> dict[str, str]:
    """Returns the flags of each world by its name.

    Raises:
      InputError: a name is unknown or there twice, or a world of the user's has no name.
    """
    if unknown := [name for name in values.worlds if name not in choices.ARENA_WORLDS]:
        raise InputError(f"--worlds={unknown[0]}: choose some of {', '.join(choices.ARENA_WORLDS)}")
    worlds = {name: choices.ARENA_WORLDS[name] for name in values.worlds}
    for text in values.world:
        name, colon, rest = text.partition(":")
        if not colon or not name.strip() or name.strip() in worlds:
            raise InputError(f"--world={text}: give NAME: FLAGS with a name of its own")
        worlds[name.strip()] = rest.strip()
        world_of_text(f"--world={name.strip()}", rest)
    if not worlds:
        raise InputError("--worlds= names none; give one of them, or a --world")
    return worlds


def _trained(folder: str | None, world: str) -> list[str]:
    """Returns the runs that were trained for a world, FOLDER or FOLDER@SEED: that of its name, or those in it."""
    if folder is None:
        return []
    path = pathlib.Path(folder) / world
    runs = [found.parent for found in sorted([*path.glob(CONFIG), *path.glob(f"*/{CONFIG}")])]
    seeds_of = {run: list(dict.fromkeys(RunFolder.reopen(run).training.seeds)) for run in runs}
    return [f"{run}@{seed}" if len(seeds) > 1 else f"{run}" for run, seeds in seeds_of.items() for seed in seeds]


def _name_and_seed(name: str, trained: Sequence[str]) -> tuple[str, int]:
    """Returns the name of a router and its training seed; the seed is a part of the name where a run has several."""
    for text in trained:
        run, at, seed = text.rpartition("@")
        if at and (name == text or name.startswith(f"{text}+")):
            return pathlib.Path(run).name + name.removeprefix(text), int(seed)
    return name, 0


def _routers(texts: Sequence[str], env: Environment, params: EnvParams, *, refusing: bool) -> list[Router]:
    routers = routers_named(texts, env, params)
    if REFERENCE not in [router.name for router in routers]:
        routers += routers_named([REFERENCE], env, params)
    if not refusing:
        return routers
    varied = [router for router in routers if router.kind != "oracle" and "+" not in router.name]
    return [*routers, *(change(router) for change in VARIANTS.values() for router in varied)]
