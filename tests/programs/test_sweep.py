"""A sweep trains a grid, each combination once, and what trains side by side is what trains alone."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from qos_jax import load_router
from qos_jax.routers.base import Router
from tests.helpers.programs import Program, assert_refused, program_of
from tests.helpers.quick_compilation import quick_compilation

ROOT = pathlib.Path(__file__).parents[2]
SIZES = (
    "--preset=paper-3 --agent=baseline_rl --set=chunk=8,updates=2,batch_size=16,capacity=128,prefill=4,hidden=8x8 "
    "--evaluation_envs=2 --evaluation_steps=20 --steps=256"
)
EACH = f"{SIZES} --seeds=2 --vary=load=0.5,1 --vary=learning_rate=0.001,0.01"


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    with quick_compilation() as variables:
        yield variables


@pytest.fixture
def program(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield program_of("sweep")


@pytest.fixture(scope="module")
def done(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a sweep of which one of two combinations is done."""
    folder = tmp_path_factory.mktemp("sweep") / "done"
    command = [
        sys.executable,
        "-m",
        "qos_jax.programs",
        "sweep",
        "--grid=num_envs=4,8",
        f"--each={EACH}",
        f"--out={folder}",
    ]
    subprocess.run([*command, "--only=0"], cwd=ROOT, env=os.environ | variables, check=True, capture_output=True)
    return folder


def distance(a: Router, b: Router) -> float:
    """Returns the Euclidean distance of the weights of two routers."""
    return float(np.linalg.norm(ravel_pytree(a.params)[0] - ravel_pytree(b.params)[0]))


def rows_of(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["rows"]


@pytest.mark.slow
def test_the_table_has_every_run_that_is_done(done: pathlib.Path) -> None:
    rows = rows_of(done)
    varied = [(row["load"], row["learning_rate"], row["seed"]) for row in rows]
    assert varied == [(load, rate, seed) for load in (0.5, 1.0) for rate in (0.001, 0.01) for seed in (0, 1)]
    assert {row["cell"] for row in rows} == {"num_envs=4"}
    assert {row["qos"] for row in rows[:4]}.isdisjoint({row["qos"] for row in rows[4:]})  # another load
    assert (done / "sweep.csv").read_text().count("\n") == 1 + len(rows)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done: pathlib.Path, program: Program) -> None:
    before, rows = (done / "num_envs=4" / "metrics.jsonl").stat().st_mtime_ns, rows_of(done)
    assert program("--grid=num_envs=4,8", f"--each={EACH}", f"--out={done}", "--only=0") == 0
    assert (done / "num_envs=4" / "metrics.jsonl").stat().st_mtime_ns == before
    assert rows_of(done) == rows


@pytest.mark.slow
def test_runs_side_by_side_are_those_alone(
    done: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    flags = [
        *SIZES.split(),
        "--num_envs=4",
        "--seed=1",
        "--load=1",
        "--learning_rate=0.01",
        f"--out={tmp_path / 'one'}",
    ]
    subprocess.run(
        [sys.executable, "-m", "qos_jax.programs", "train", *flags], cwd=ROOT, env=os.environ | variables, check=True
    )
    alone, together = load_router(tmp_path / "one"), load_router(done / "num_envs=4", run=7)
    other = load_router(done / "num_envs=4", run=6)
    # Two programs round differently, and one action that falls the other way changes what is learned from it.
    assert distance(together, alone) < 0.1 * distance(other, alone)


def test_commands_are_listed_for_other_engines(
    program: Program, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("--grid=preset=paper-3,edge-8", "--grid=agent=mvr,sac")
    assert program(*grid, "--each=--steps=9 --vary=alpha=0.1,0.2", "--list", f"--out={tmp_path / 'out'}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1] == (
        "qos-jax train --preset=paper-3 --agent=sac --steps=9 --vary=alpha=0.1,0.2 "
        f"--out={tmp_path / 'out' / 'preset=paper-3,agent=sac'}"
    )
    assert not list(tmp_path.iterdir())


BAD = {
    "no values": ("--grid=preset", "--grid=preset: give FLAG=VALUE,VALUE"),
    "twice": ("--grid=seed=1 --grid=seed=2", "--grid=seed=2: give FLAG=VALUE,VALUE"),
    "beyond the grid": ("--grid=seed=1,2 --only=2", "--only=2: the grid has 2 combinations"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(
    program: Program, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, message = BAD[name]
    assert_refused(program, capsys, message, *arguments.split(), f"--out={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())
