"""Puts the router of a training run into the package, without its training state, and writes its card.

qos-jax train --preset=paper-3 --out=runs/mvr
qos-jax evaluate --preset=paper-3 --routers=impact_greedy,runs/mvr --requests=1500 --seeds=16 --out=runs/paper-3
python -m experiments.ship_router --run=runs/mvr --results=runs/paper-3
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil

from absl import flags

import qos_jax
from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, write_whole
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.report.results import RESULTS
from qos_jax.training.load import learner_of, weights_of
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.shipped import CARD

_FOLDER = pathlib.Path(qos_jax.__file__).parent / "training" / "pretrained"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "ship_router")
    group.string("run", None, "Folder of the training run, on a preset.", required=True)
    group.integer("seed", None, "Which seed of a run of several, of which the evaluation is.")
    group.string("results", None, "Folder of an evaluation of that router on its preset.", required=True)


def main(values: flags.FlagValues) -> None:
    """Copies configuration and weights, and writes the card."""
    run = RunFolder.reopen(values.run)
    seeds = run.training.seeds
    seed = seeds[0] if values.seed is None else values.seed
    if run.latest is None or run.config["world"] is None or seed not in seeds:
        raise InputError(f"{values.run}: must be a run on a preset, with a checkpoint and seed {seed}")
    found = parse_json((pathlib.Path(values.results) / RESULTS).read_text(encoding="utf-8"), values.results)
    name = run.path.name if len(seeds) == 1 else f"{run.path.name}@{seed}"
    # Results call a router by the name of its run alone where no other seed of that run takes part.
    rows = [row for row in found["rows"] if row["router"] in (name, run.path.name)] if name in found["command"] else []
    if not rows:
        raise InputError(f"{values.results}: is no evaluation of {name!r}")
    by_load: dict[float, list[float]] = {}
    for row in rows:
        by_load.setdefault(row["load"], []).append(row["qos"])
    # Whoever reads them has no use for where the folders were.
    command = re.sub(r"--out=\S+", f"--out=runs/{run.path.name}", run.config["command"])
    evaluated = re.sub(r"[^ ,=]*/(?=[^/ ,]+(?:[ ,]|$))", "runs/", found["command"])
    card = {
        "trained": command,
        "seed": seed,
        "steps": run.latest,
        "evaluated": evaluated,
        "versions": found["versions"],
        "seeds": found["config"]["seeds"],
        "requests": found["config"]["requests"],
        "warmup": found["config"]["warmup"],
        "qos": by_load,
    }
    weights = weights_of(run, learner_of(run), seeds.index(seed))
    training = {**run.config["training"], "runs": [run.training.runs[seeds.index(seed)]]}
    config = {**run.config, "training": training, "command": command}
    folder = _FOLDER / config["world"]["preset"]
    shutil.rmtree(folder, ignore_errors=True)
    RunFolder.start(folder, config).save(run.latest, None, weights)
    write_whole(folder / CARD, json.dumps(card, indent=1))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"written: {folder}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_program(
        define, main, name="python -m experiments.ship_router", summary="puts a trained router into the package"
    )
