"""Sweeps and studies that are killed at random moments, with all that they have started, go on where they were."""

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

import pytest

from tests.quick_compilation import quick_compilation

ROOT = pathlib.Path(__file__).parent.parent
KILLS = 13  # of each; with those of the training program more than 50
SIZES = (
    "--agent=baseline_rl --set=chunk=8,updates=2,batch_size=16,capacity=128,prefill=4,hidden=8x8 --num_envs=4 "
    "--evaluation_envs=2 --evaluation_steps=20 --steps=512 --evaluate_every=64 --checkpoint_minutes=0"
)
SWEEP = ("experiments.sweep", "--grid=seed=0,1", f"--each={SIZES}")
STUDY = ("tests.small_study",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with quick_compilation(tmp_path_factory.mktemp("cache")) as variables:
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


@pytest.mark.parametrize("command", [SWEEP, STUDY], ids=["sweep", "reproduce"])
def test_killed_again_and_again(command: Sequence[str], variables: dict[str, str], tmp_path: pathlib.Path) -> None:
    began = time.perf_counter()
    finish(start(command, tmp_path / "whole", variables))
    took_s = time.perf_counter() - began
    for _ in range(KILLS):
        process = start(command, tmp_path / "killed", variables)
        time.sleep(random.uniform(0.3, 0.6) * took_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        whole_files(tmp_path / "killed")
    finish(start(command, tmp_path / "killed", variables))
    results = [json.loads(next((tmp_path / name).glob("s*.json")).read_text())["rows"] for name in ("whole", "killed")]
    for row in (*results[0], *results[1]):
        row.pop("seconds", None)
    assert results[0] == results[1]
