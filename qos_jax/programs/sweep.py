"""Trains a grid of runs and puts what came out into one table.

qos-jax sweep --grid=preset=paper-3,edge-8 --grid=agent=mvr,sac \
    --each="--steps=200000 --seeds=3 --vary=load=0.6,0.9" --out=runs/sweep

What --grid lists are flags of ``qos-jax train`` whose values are different programs: each combination is a process
of its own, one after the other. What is the same program, seeds and all that --vary of ``qos-jax train`` lists,
trains side by side within it, on as many devices as it is given. A sweep that was stopped or killed goes on with the
same command, and what is done is not done again.

--list prints the commands instead of running them, --only=I runs the I-th: an element of a Slurm array, or a task of
Ray. The table is of all runs that are done, so a last call without --only makes it whole.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

from absl import flags

from qos_jax.errors import InputError
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs import common
from qos_jax.programs.train_once import command_of, train_once
from qos_jax.training.run_folder import CONFIG, RunFolder

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_multi_string("grid", [], "FLAG=VALUE,VALUE: values for a flag of qos-jax train; may be repeated.")
    flags.DEFINE_string("each", "--steps=200000", "More flags of qos-jax train, the same for all.")
    flags.DEFINE_bool("list", False, "Only print the commands.")
    flags.DEFINE_integer("only", None, "Run only this combination of the grid, counted from 0.", 0)
    flags.DEFINE_string("out", "runs/sweep", "Folder of the sweep.")


def main(argv: list[str]) -> None:
    """Trains what is not done yet and writes the table of what is."""
    del argv
    cells = {",".join(cell): [*(f"--{one}" for one in cell), *shlex.split(FLAGS.each)] for cell in _cells()}
    if FLAGS.only is not None and FLAGS.only >= len(cells):
        raise InputError(f"--only={FLAGS.only}: the grid has {len(cells)} combinations, counted from 0")
    paths = {name: pathlib.Path(FLAGS.out).absolute() / (name or "run") for name in cells}
    if FLAGS.list:
        for name, asked in cells.items():
            print(shlex.join(["python", *command_of(asked)[1:], f"--out={paths[name]}"]))
        return
    folder = writable_folder(FLAGS.out)
    for number, (name, asked) in enumerate(cells.items()):
        if FLAGS.only in (None, number):
            print(f"{number + 1} of {len(cells)}: {name}", flush=True)
            train_once(paths[name], asked, quiet=False)
    rows = [row | {"cell": name} for name, path in paths.items() for row in _results(path)]
    found = {"grid": FLAGS.grid, "each": FLAGS.each, "versions": versions(), "rows": rows}
    write_whole(folder / "sweep.json", json.dumps(found, indent=1, allow_nan=False))
    write_whole(folder / "sweep.csv", common.csv_text(rows))
    for row in rows:
        print(row["cell"], *(f"{name} {value:.4g}" for name, value in row.items() if name != "cell"), sep="  ")
    print(f"written: {folder / 'sweep.csv'}")


def _cells() -> list[tuple[str, ...]]:
    """Returns the combinations of the grid, as FLAG=VALUE.

    Raises:
      InputError: an entry is no list of values for a flag, or there twice.
    """
    axes: dict[str, list[str]] = {}
    for text in FLAGS.grid:
        name, equals, values = text.partition("=")
        if not equals or not all(values.split(",")) or name in axes or name in ("out", "resume"):
            raise InputError(f"--grid={text}: give FLAG=VALUE,VALUE, with a flag of qos-jax train, each once")
        axes[name] = [f"{name}={value}" for value in dict.fromkeys(values.split(","))]
    return list(itertools.product(*axes.values()))


def _results(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the last evaluation of each run in a folder that is done."""
    if not (path / CONFIG).exists():
        return
    folder = RunFolder.reopen(path)
    evaluations = [record for record in folder.records() if record["kind"] == "evaluation"]
    if not evaluations or folder.latest is None or folder.latest < folder.config["steps"]:
        return
    last = evaluations[-1]
    for run, qos, gain in zip(folder.config["runs"], last["qos"], last["gains"], strict=True):
        yield run | {"steps": last["steps"], "seconds": last["seconds"], "qos": qos, "gain_over_impact_greedy": gain}


if __name__ == "__main__":
    common.start(define_flags, main)
