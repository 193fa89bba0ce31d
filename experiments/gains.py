"""What trained routers gain over the best heuristic at each load, paired request by request, from evaluations on disk.

python -m experiments.gains --results=runs/m-poisson,runs/m-gamma

All learned routers of an evaluation are taken for seeds of one agent. The interval is Student's over the evaluation
seeds, of the mean over the training seeds; the least and the greatest gain of a training seed are given beside it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from qos_jax.errors import InputError
from qos_jax.evaluation import summarise

FLAGS = flags.FLAGS
_HEAD = "| world | load | best heuristic | learned | gain | over training seeds | oracle_impact |\n" + "|---" * 7 + "|"


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_list("results", [], "Folders of evaluations, each with a results.json.")


def main(argv: list[str]) -> None:
    """Prints one table row for each evaluation and load."""
    del argv
    if not FLAGS.results:
        raise InputError("--results= names no folder; give those that experiments.evaluate wrote")
    print(table(FLAGS.results))


def table(folders: Sequence[str]) -> str:
    """Returns a Markdown table of what learned routers gain.

    Args:
      folders: of evaluations, each with a ``results.json``.

    Raises:
      InputError: a folder has none, or no learned router is in it.
    """
    lines = [_HEAD]
    for folder in map(pathlib.Path, folders):
        rows = _rows(folder / "results.json")
        for load in sorted({row["load"] for row in rows}):
            lines.append(_line(folder.name, load, [row for row in rows if row["load"] == load]))
    return "\n".join(lines)


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no results.json of experiments.evaluate: {error}") from error
    if not any(row["kind"] == "learned" for row in rows):
        raise InputError(f"{path} has no learned router; evaluate with --routers=all,FOLDER")
    return rows


def _line(world: str, load: float, rows: list[dict[str, Any]]) -> str:
    heuristics, learned, oracles = (_qos(rows, kind) for kind in ("heuristic", "learned", "oracle"))
    best = max(heuristics, key=lambda name: heuristics[name].mean())
    gains = np.stack(list(learned.values())) - heuristics[best]  # [training seeds, evaluation seeds]
    gain, each = summarise(gains.mean(0)), gains.mean(1)
    oracle = f"{oracles['oracle_impact'].mean():.3f}" if "oracle_impact" in oracles else "-"
    cells = [
        world, f"{load:g}", f"{best} {heuristics[best].mean():.3f}", f"{heuristics[best].mean() + gain['mean']:.3f}",
        f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]", f"{each.min():+.3f} to {each.max():+.3f}",
        oracle,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _qos(rows: list[dict[str, Any]], kind: str) -> Mapping[str, np.ndarray]:
    """Returns the QoS [evaluation seeds] of each router of this kind."""
    names = list(dict.fromkeys(row["router"] for row in rows if row["kind"] == kind))
    return {
        name: np.array([row["qos"] for row in sorted(rows, key=lambda row: row["seed"]) if row["router"] == name])
        for name in names
    }


if __name__ == "__main__":
    common.start(define_flags, main)
