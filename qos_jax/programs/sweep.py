"""Trains a grid of runs and writes what came out into one table.

qos-jax sweep --grid=preset=paper-3,edge-8 --grid=agent=mvr,sac \
    --each="--steps=200000 --seeds=3 --vary=load=0.6,0.9" --out=runs/sweep

--grid lists values of flags of ``qos-jax train`` that need programs of their own: each combination is a process, one
after the other. Seeds and what --vary lists share one program and train side by side within it. A sweep that was
stopped or killed goes on with the same command, and what is done is not done again.

--list prints the commands instead of running them, --only=I runs the I-th: an element of a Slurm array, or a task of
Ray. The table has all runs that are done, so a last call without --only completes it.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.io.files import csv_text, writable_folder, write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs.train import command_of
from qos_jax.programs.train_once import ended_together, train_once
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.selection import evaluations, kept_evaluation


def main(values: FlagValues) -> None:
    """Trains what is not done yet and writes the table of what is."""
    cells = {",".join(cell): [*(f"--{one}" for one in cell), *shlex.split(values.each)] for cell in _cells(values.grid)}
    if values.only is not None and values.only >= len(cells):
        raise InputError(f"--only={values.only}: the grid has {len(cells)} combinations, counted from 0")
    paths = {name: pathlib.Path(values.out).absolute() / (name or "run") for name in cells}
    if values.list:
        for name, asked in cells.items():
            print(command_of(asked, paths[name]))
        return
    folder = writable_folder(values.out)
    for number, (name, asked) in enumerate(cells.items()):
        if values.only in (None, number):
            print(f"{number + 1} of {len(cells)}: {name}", flush=True)
            with ended_together():
                train_once(paths[name], asked, quiet=False)
    rows = [row | {"cell": name} for name, path in paths.items() for row in _results(path)]
    found = {"grid": values.grid, "each": values.each, "versions": versions(), "rows": rows}
    write_whole(folder / "sweep.json", json.dumps(found, indent=1, allow_nan=False))
    write_whole(folder / "sweep.csv", csv_text(rows))
    for row in rows:
        print(row["cell"], *(f"{name} {value:.4g}" for name, value in row.items() if name != "cell"), sep="  ")
    print(f"written: {folder / 'sweep.csv'}")


def _cells(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the combinations of the grid, as FLAG=VALUE.

    Raises:
      InputError: an entry is no list of values for a flag, or there twice.
    """
    axes: dict[str, list[str]] = {}
    for text in grid:
        name, equals, listed = text.partition("=")
        if not equals or not all(listed.split(",")) or name in axes or name in ("out", "resume"):
            raise InputError(f"--grid={text}: give FLAG=VALUE,VALUE, with a flag of qos-jax train, each once")
        axes[name] = [f"{name}={value}" for value in dict.fromkeys(listed.split(","))]
    return list(itertools.product(*axes.values()))


def _results(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields what the evaluation of the kept weights says, for each run in a folder that is done."""
    if not (path / CONFIG).exists():
        return
    folder = RunFolder.reopen(path)
    try:
        records = folder.records()
    except InputError as error:
        print(f"warning: the table lacks a run: {error}", file=sys.stderr)
        return
    if not evaluations(records) or not folder.finished:
        return
    kept = kept_evaluation(records)
    for run, qos, gain, after in zip(folder.training.runs, kept["qos"], kept["gains"], kept["kept_after"], strict=True):
        yield dict(run) | {
            "steps": records[-1]["steps"],
            "kept_after": after,
            "seconds": records[-1]["seconds"],
            "qos": qos,
            "gain_over_impact_greedy": gain,
        }
