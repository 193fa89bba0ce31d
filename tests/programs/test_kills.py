"""Sweeps, studies and predictors that are killed at random moments, with all that they have started, go on."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from qos_jax.io.files import remove
from qos_jax.predictor import load_predictor
from qos_jax.training.run_folder import locked
from tests.helpers.prediction_tables import made_up_table, write_npz
from tests.helpers.quick_compilation import quick_compilation

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 20  # of each
SIZES = (
    "--agent=baseline_rl --set=chunk=8,updates=2,batch_size=16,capacity=128,prefill=4,hidden=8x8 --num_envs=4 "
    "--evaluation_envs=2 --evaluation_steps=20 --steps=512 --evaluate_every=64 --checkpoint_minutes=0"
)
SWEEP = ("qos_jax.programs", "sweep", "--grid=seed=0,1", f"--each={SIZES}")
STUDY = ("tests.helpers.small_study",)
PREDICTOR = ("qos_jax.programs", "predictor", "--data={table}", "--score_column=quality", "--folds=2", "--hidden=4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    with quick_compilation() as variables:
        yield os.environ | variables


def start(command: Sequence[str], folder: pathlib.Path, variables: dict[str, str]) -> subprocess.Popen:
    """Starts a program as the leader of a group of processes, to which all that it starts belong."""
    return subprocess.Popen(
        [sys.executable, "-m", *command, f"--out={folder}"], cwd=ROOT, env=variables, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    printed = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, printed


def whole_files(folder: pathlib.Path) -> None:
    """Reads every file that a reader would take for whole."""
    for path in folder.rglob("*.json"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text())


def results(folder: pathlib.Path) -> Any:
    """What a program has found, but for what differs from one time to the next."""
    found = json.loads(next(path for path in folder.glob("*.json")).read_text())
    for row in found.get("rows", []):
        row.pop("seconds", None)
    return {name: value for name, value in found.items() if name not in ("command", "versions")}


@pytest.mark.parametrize(("command", "run"), [(SWEEP, "seed=0"), (STUDY, "runs/tiny")], ids=["sweep", "reproduce"])
def test_a_signal_ends_what_was_started_too(
    command: Sequence[str], run: str, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """A run that trained on would refuse the program that goes on with it."""
    process = start(command, tmp_path, variables)
    while not (tmp_path / run / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    with locked(tmp_path / run):  # nobody else is in it
        pass


@pytest.mark.parametrize(
    ("command", "part"),
    [(SWEEP, "seed=1"), (STUDY, "runs"), (PREDICTOR, "metrics.json")],
    ids=["sweep", "reproduce", "predictor"],
)
def test_killed_again_and_again(
    command: Sequence[str], part: str, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    table = write_npz(tmp_path / "table.npz", made_up_table(40, r2=0.9))
    command = [each.format(table=table) for each in command]
    finish(start(command, tmp_path / "whole", variables))
    kills, saved = 0, False
    while kills < KILLS:
        process = start(command, tmp_path / "killed", variables)
        try:
            printed = process.communicate(timeout=random.uniform(1, 10))[0].decode()
            assert process.returncode == 0, printed
            remove(tmp_path / "killed" / part)  # all was done: there must be something to do
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        whole_files(tmp_path / "killed")
        saved = saved or (tmp_path / "killed" / "predictor" / "config.json").exists()
        if saved:
            load_predictor(tmp_path / "killed")
    finish(start(command, tmp_path / "killed", variables))
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
