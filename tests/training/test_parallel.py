"""Devices and processes share a run without changing what comes out."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import chex
import jax
import pytest

from experiments.servers import free_port
from qos_jax import InputError, load_router
from qos_jax.training.parallel import DeviceLayout
from qos_jax.training.run_folder import RunFolder
from tests.helpers.programs import ROOT, start_training
from tests.helpers.quick_compilation import quick_compilation

DEVICES, CHUNKS = 8, 50  # two updates in each
RUN = (
    "--preset=paper-3",
    "--agent=baseline_rl",
    "--set=chunk=4,updates=2,batch_size=16,capacity=128,warm_up=4,hidden=8x8",
    "--num_envs=16",
    "--randomise=load",
    "--evaluation_envs=2",
    "--evaluation_steps=20",
    f"--steps={CHUNKS * 64}",
)
SHARED = (*RUN, f"--set=chunk=4,updates=2,batch_size=16,capacity=128,warm_up=4,hidden=8x8,shards={DEVICES}")


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Environment variables by which other processes have eight devices."""
    with quick_compilation() as variables:
        yield os.environ | variables | {"XLA_FLAGS": devices_flag(DEVICES)}


def devices_flag(devices: int) -> str:
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def finish(process: subprocess.Popen) -> None:
    printed = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def alone(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a run of eight shards on one device."""
    folder = tmp_path_factory.mktemp("parallel") / "alone"
    finish(start_training(folder, variables, *SHARED))
    return folder


def assert_same_result(one: pathlib.Path, other: pathlib.Path) -> None:
    chex.assert_trees_all_close(load_router(one).params, load_router(other).params, rtol=1e-5, atol=1e-5)
    qos = [[each["qos"] for each in RunFolder.reopen(path).records() if "qos" in each] for path in (one, other)]
    assert len(qos[0]) == len(qos[1]) >= 5


@pytest.mark.slow
def test_devices_share_seeds_and_shards(variables: dict[str, str]) -> None:
    """To 1e-5 after 100 updates, with the same batches."""
    command = [sys.executable, "-m", "tests.helpers.parallel_run"]
    printed = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=True)
    differences = json.loads(printed.stdout)
    assert len(differences) == 2
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.slow
def test_devices_share_the_shards_of_a_run(
    alone: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    finish(start_training(tmp_path / "run", variables, *SHARED, f"--devices={DEVICES}"))
    assert_same_result(alone, tmp_path / "run")


@pytest.mark.slow
def test_processes_share_the_devices(alone: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    four = variables | {"XLA_FLAGS": devices_flag(DEVICES // 2)}
    here = ("--distributed", f"--coordinator_address={address}", "--num_processes=2")
    processes = [start_training(tmp_path / "run", four, *SHARED, *here, f"--process_id={i}") for i in range(2)]
    for process in processes:
        finish(process)
    assert_same_result(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(
    alone: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    process = start_training(folder, variables, *SHARED, f"--devices={DEVICES}", "--checkpoint_minutes=0")
    while process.poll() is None and not (RunFolder(folder, {}).latest or 0) >= 64 * CHUNKS // 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(start_training(folder, variables, "--resume", "--devices=2"))
    assert_same_result(alone, folder)


def test_devices_that_cannot_share_the_work_are_refused() -> None:
    devices = tuple(jax.devices()[:1] * 3)
    with pytest.raises(InputError, match=r"3 devices cannot share 2 seeds of 4 shards evenly: give --seeds=3 or"):
        DeviceLayout(num_seeds=2, shards=4, devices=devices)


def test_more_devices_than_there_are_are_refused(variables: dict[str, str], tmp_path: pathlib.Path) -> None:
    process = start_training(tmp_path / "run", variables, *RUN, "--devices=9")
    assert b"error: --devices=9: there are 8 devices of kind cpu" in process.communicate()[0]
    assert process.returncode == 2
