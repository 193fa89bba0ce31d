"""Puts the router of a training run into the package, without its training state, and writes its card.

qos-jax train --preset=paper-3 --out=runs/mvr
qos-jax evaluate --preset=paper-3 --routers=impact_greedy,runs/mvr --requests=1500 --seeds=16 --out=runs/paper-3
python -m experiments.ship_router --run=runs/mvr --results=runs/paper-3
"""

from __future__ import annotations

import json
import pathlib
import shutil

from absl import flags

import qos_jax
from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, write_whole
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.report.results import RESULTS
from qos_jax.training.run_folder import CONFIG, RunFolder
from qos_jax.training.shipped import CARD

_FOLDER = pathlib.Path(qos_jax.__file__).parent / "training" / "pretrained"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "ship_router")
    group.string("run", None, "Folder of the training run, of one seed on a preset.", required=True)
    group.string("results", None, "Folder of an evaluation of that run on its preset.", required=True)


def main(values: flags.FlagValues) -> None:
    """Copies configuration and weights, and writes the card."""
    run = RunFolder.reopen(values.run)
    if run.latest is None or len(run.training.seeds) > 1 or run.config["world"] is None:
        raise InputError(f"{values.run}: must be a run of one seed on a preset, with a checkpoint")
    found = parse_json((pathlib.Path(values.results) / RESULTS).read_text(encoding="utf-8"), values.results)
    rows = [row for row in found["rows"] if row["router"] == run.path.name]
    if not rows:
        raise InputError(f"{values.results}: has no router {run.path.name!r}")
    by_load: dict[float, list[float]] = {}
    for row in rows:
        by_load.setdefault(row["load"], []).append(row["qos"])
    card = {
        "trained": run.config["command"],
        "steps": run.latest,
        "evaluated": found["command"],
        "versions": found["versions"],
        "seeds": found["config"]["seeds"],
        "requests": found["config"]["requests"],
        "warmup": found["config"]["warmup"],
        "qos": by_load,
    }
    folder, checkpoint = _FOLDER / run.config["world"]["preset"], run.checkpoint(run.latest)
    shutil.rmtree(folder, ignore_errors=True)
    kept = folder / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint / "weights", kept / "weights")
    checksums = parse_json((checkpoint / "checksums.json").read_text(encoding="utf-8"), values.run)
    write_whole(kept / "checksums.json", json.dumps({"weights": checksums["weights"]}))
    shutil.copy(run.path / CONFIG, folder / CONFIG)
    write_whole(folder / CARD, json.dumps(card, indent=1))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"written: {folder}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_program(
        define, main, name="python -m experiments.ship_router", summary="puts a trained router into the package"
    )
