"""The training program from end to end: what it writes, that killing it changes nothing, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import qos_jax
from qos_jax import InputError, load_router
from qos_jax.agent import AGENTS
from qos_jax.agent.overrides import overridden
from qos_jax.programs import train
from qos_jax.programs.train import configs_of, parsed
from qos_jax.training.config import TrainingConfig
from qos_jax.training.run_folder import RunFolder
from tests.helpers.instant_env import assert_equal
from tests.helpers.programs import ROOT, Program, assert_refused, program_of, start_training
from tests.helpers.quick_compilation import quick_compilation

CHUNKS = 8
TINY = (
    "--preset=paper-3",
    "--agent=baseline_rl",
    "--set=chunk=8,updates=2,batch_size=16,capacity=64,prefill=4,hidden=8x8",
    "--num_envs=4",
    "--randomise=none",
    "--evaluation_envs=2",
    "--evaluation_steps=20",
    f"--steps={CHUNKS * 32}",
    "--evaluate_every=64",
    "--checkpoint_minutes=0",
)


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Environment variables by which other processes compile as this one does."""
    with quick_compilation() as variables:
        yield os.environ | variables


@pytest.fixture
def program() -> Iterator[Program]:
    yield program_of("train")


@pytest.fixture
def evaluation() -> Iterator[Program]:
    yield program_of("evaluate")


@pytest.fixture(scope="module")
def whole(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a run that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("train") / "new" / "whole"
    assert program_of("train")(*TINY, f"--out={folder}") == 0
    return folder


def lines_of(folder: pathlib.Path) -> int:
    return (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0


def wait_for_lines(folder: pathlib.Path, number: int, process: subprocess.Popen) -> None:
    while process.poll() is None and lines_of(folder) < number:
        time.sleep(0.002)


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Compares all that two runs have come to, but for the time that it took."""
    records = [RunFolder.reopen(path).records() for path in (one, other)]
    for each in [*records[0], *records[1]]:
        del each["seconds"]
    assert records[0] == records[1]
    assert_equal(load_router(one).params, load_router(other).params)


@pytest.mark.slow
def test_the_folder_is_complete(whole: pathlib.Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "tensorboard", ".lock",
        *(f"learning_curve{width}.{kind}" for width in ("", "_column") for kind in ("png", "pdf", "svg")),
    }  # fmt: skip
    assert (whole / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(whole / "checkpoints")) == ["224", "256"]
    assert any(path.stat().st_size > 1000 for path in (whole / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_run_can_be_repeated_from_what_is_written(whole: pathlib.Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["command"].startswith("qos-jax train --preset=paper-3 --agent=baseline_rl")
    assert (config["format"], config["world"]["preset"], config["world"]["trace"]) == (3, "paper-3", None)
    training = config["training"]
    assert (training["runs"], training["steps"], training["loads"]) == ([{"seed": 0}], 256, [])
    agent = training["agent"]
    assert (agent["num_envs"], agent["chunk"], agent["network"]["hidden"]) == (4, 8, [8, 8])
    assert agent["network"]["rate_clip_per_s"] == 10.7  # load 1.4 is 32 requests/s
    assert agent["hyper"]["learning_rate"] == AGENTS["baseline_rl"].hyper.learning_rate


@pytest.mark.slow
def test_metrics_cover_the_run(whole: pathlib.Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines if line["kind"] == "train"] == list(range(32, 257, 32))
    assert [line["steps"] for line in lines if line["kind"] == "evaluation"] == [0, 64, 128, 192, 256]


@pytest.mark.slow
def test_another_run_is_not_overwritten(
    program: Program, whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert program(*TINY, f"--out={whole}") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_one_line_starts_a_run_and_goes_on_with_it(program: Program, tmp_path: pathlib.Path) -> None:
    """As a job that is started again after each interruption, the first time without a folder."""
    line = (*TINY, "--resume=auto", f"--out={tmp_path / 'run'}")
    for steps, records in ((128, 7), (256, 13), (256, 13)):
        assert program(*line, f"--steps={steps}") == 0
        assert RunFolder.reopen(tmp_path / "run").latest == steps
        assert lines_of(tmp_path / "run") == records


@pytest.mark.slow
def test_a_flag_that_differs_is_refused_when_a_run_goes_on(
    program: Program, whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, differs in (
        ("--num_envs=8", "training.agent.num_envs is 4, but 8 is asked for"),
        ("--load=0.5", "training.loads is [], but [0.5] is asked for"),
        ("--preset=paper-6", "spec.num_experts is 3, but 6 is asked for"),
        ("--steps=64", "training.steps is 256, but fewer are asked for"),
    ):
        assert program(flag, "--resume", f"--out={whole}") == 2
        assert differs in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_killed_again_and_again_goes_on_bit_for_bit(
    whole: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """Killed into a chunk or into the writing of a checkpoint, and at last asked to stop."""
    folder, arguments = tmp_path / "killed", TINY
    for kill in range(4):
        process = start_training(folder, variables, *arguments)
        wait_for_lines(folder, lines_of(folder) + kill % 2, process)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)  # it may have been done by then
        arguments = ("--resume",) if (folder / "config.json").exists() else TINY
    process = start_training(folder, variables, *arguments)
    wait_for_lines(folder, lines_of(folder) + 1, process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0].decode()
    if process.returncode:
        assert process.returncode == 128 + signal.SIGTERM, printed
        assert "go on with --resume" in printed
        process = start_training(folder, variables, "--resume")
        printed = process.communicate()[0].decode()
    assert process.returncode == 0, printed
    assert "compilation: " in printed
    assert "after 256 steps" in printed
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_signal_ends_compilation_at_once(variables: dict[str, str], tmp_path: pathlib.Path) -> None:
    process = start_training(tmp_path / "run", variables | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, *TINY)
    while not (tmp_path / "run" / "tensorboard").exists():  # compilation begins then
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    *_, last = process.communicate()[0].decode().splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped before the first chunk, so nothing is lost: go on with --resume" in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_full_disk_ends_training_in_one_line(
    whole: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """Files may not become longer than a checkpoint's, as on a disk of its own for each; room comes, and it goes on."""
    limit = 8 * 1024
    program = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "runpy.run_module('qos_jax.programs', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *TINY, f"--out={tmp_path / 'run'}"],
        env=variables | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert "cannot be written" in done.stderr.splitlines()[-1]
    process = start_training(tmp_path / "run", variables, "--resume")
    printed = process.communicate()[0].decode()
    assert process.returncode == 0, printed
    assert_same_run(tmp_path / "run", whole)


class TestBoard:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file stays open
    @pytest.mark.parametrize("writes", [0, 1, 5])
    def test_training_outlives_a_writer_that_fails(
        self, writes: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        left = [writes]

        def write(self: Any, event: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        self.written(tmp_path, monkeypatch, write)
        (line,) = capfd.readouterr().err.splitlines()
        assert line == "warning: TensorBoard is left out: [Errno 28] No space left on device"

    @pytest.mark.parametrize(("most", "why"), [(1000, "cannot be ended"), (3, "not written fast enough")])
    def test_training_outlives_a_writer_that_blocks(
        self, most: int, why: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        released = threading.Event()
        monkeypatch.setattr(train._Board, "_MOST_WAITING", most)
        self.written(tmp_path, monkeypatch, lambda self, event: released.wait())
        released.set()
        (line,) = capfd.readouterr().err.splitlines()
        assert "TensorBoard is left out: its file" in line and why in line

    def test_what_is_written_can_be_read(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written(tmp_path, monkeypatch)
        (file,) = (tmp_path / "tensorboard").iterdir()
        content = file.read_bytes()
        assert content.count(b"train/loss") == 10

    def written(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, write: Any = None) -> None:
        monkeypatch.setattr(train._Board, "_PATIENCE_S", 0.5 if write else 60.0)
        if write:
            monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", write)
        board = train._Board(RunFolder(folder, {}))
        for steps in range(10):
            board.write([("train/loss", 0.5)], steps)
        board.close()


class TestStopAsked:
    def test_it_ends_at_once_before_training(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as raised, train._stop_asked():
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.code == 143
        assert capfd.readouterr().err.count("\n") == 1

    def test_it_is_told_while_training(self) -> None:
        with train._stop_asked() as should_stop:
            assert not should_stop()
            signal.raise_signal(signal.SIGTERM)
            assert should_stop()


def test_flags_are_kept_when_a_run_goes_on(tmp_path: pathlib.Path) -> None:
    config = {"training": TrainingConfig().to_dict(), "flags": ["--seed=3", "--checkpoint_minutes=7"]}
    folder = RunFolder(tmp_path, config)
    values, flags = train._with_earlier_flags(parsed(["--resume"]), folder)
    assert (values.checkpoint_minutes, values.seed) == (7.0, 3)
    assert set(flags) == {"--seed=3", "--checkpoint_minutes=7.0"}
    values, flags = train._with_earlier_flags(parsed(["--resume", "--checkpoint_minutes=0.5"]), folder)
    assert values.checkpoint_minutes == 0.5
    assert "--checkpoint_minutes=0.5" in flags


@pytest.mark.slow
def test_a_seed_repeats_bit_for_bit_and_another_one_differs(
    whole: pathlib.Path, variables: dict[str, str], tmp_path: pathlib.Path
) -> None:
    for name, flag in (("again", "--deterministic"), ("other", "--seed=1")):
        process = start_training(tmp_path / name, variables, *TINY, flag)
        printed = process.communicate()[0].decode()
        assert process.returncode == 0, printed
    assert_same_run(whole, tmp_path / "again")
    with pytest.raises(AssertionError):
        assert_same_run(whole, tmp_path / "other")


def tiny_recipe() -> qos_jax.Recipe:
    """The recipe that the flags of TINY describe."""
    _, training = configs_of(parsed(TINY))
    return qos_jax.Recipe(training.agent, training.steps, training.randomise)


@pytest.mark.slow
def test_the_library_trains_the_same_router(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = {"evaluation_envs": 2, "evaluation_steps": 20, "evaluate_every": 64}
    steps: list[int] = []
    trained = qos_jax.train(
        "paper-3", tiny_recipe(), out=tmp_path / "run",
        progress_fn=lambda progress: steps.append(progress.steps), **settings,
    )  # fmt: skip
    assert_same_run(tmp_path / "run", whole)
    assert_equal(trained.router.params, load_router(whole).params)
    assert trained.finished and steps[-1] == trained.metrics["steps"] == CHUNKS * 32
    assert [record["steps"] for record in trained.records if record["kind"] == "evaluation"] == [0, 64, 128, 192, 256]

    longer = qos_jax.train("paper-3", tiny_recipe(), steps=2 * CHUNKS * 32, out=tmp_path / "run", **settings)
    assert longer.metrics["steps"] == 2 * CHUNKS * 32
    assert longer.records[: len(trained.records)] == trained.records
    stopped = qos_jax.train("paper-3", tiny_recipe(), should_stop=lambda: True, **settings)
    assert not stopped.finished


@pytest.mark.slow
def test_it_is_compared_with_other_routers(
    evaluation: Program, variables: dict[str, str], whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    routers = f"--routers=round_robin,{whole}"
    assert evaluation(routers, "--load=0.5", "--requests=20", "--seeds=1", f"--out={tmp_path}/out") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["router"], row["kind"]) for row in rows] == [("round_robin", "heuristic"), ("whole", "learned")]


BAD_ROUTERS = {
    "{here}/absent": "/absent/config.json: cannot be read",
    "{whole}@7": "config.json: seed is 7, must be one of 0",
    "{whole}/checkpoints": "/checkpoints/config.json: cannot be read",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_ROUTERS)
def test_a_folder_that_holds_no_run_is_refused(
    evaluation: Program, whole: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert evaluation(f"--routers={name.format(here=tmp_path, whole=whole)}", f"--out={tmp_path}/out") == 2
    printed = capsys.readouterr().err
    assert BAD_ROUTERS[name] in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD_ARGUMENTS = {
    "agent": ("--agent=psychic", "agent 'psychic' is unknown"),
    "preset": ("--preset=paper-9", "'paper-9'"),
    "seeds": ("--seed=990 --seeds=20", "seeds must be below 1000"),
    "load": ("--load=high", "--load=high"),
    "setting without a value": ("--set=num_envs", "--set=num_envs: give FIELD=VALUE"),
    "setting unknown": ("--set=depth=3", "--set=depth=3: field 'depth' is unknown; choose from"),
    "setting of another kind": ("--set=chunk=long", "--set=chunk=long: give a value of the kind of"),
    "what does not vary": ("--vary=hidden=8,16", "--vary=hidden=8,16: choose load, or one of learning_rate"),
    "numbers to vary": ("--vary=alpha=low", "--vary=alpha=low: give FIELD=NUMBER,NUMBER"),
    "load that is given": ("--load=1 --vary=load=1,2", "--vary=load=1,2: the load is given or drawn already"),
    "size": ("--num_envs=0", "num_envs is 0, must be at least 1"),
    "nothing to resume": ("--resume", "/out/config.json: cannot be read"),
    "file where the folder should be": ("--out={here}/file", "/file cannot be written"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_input_ends_with_one_line_and_leaves_nothing(
    program: Program, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").touch()
    arguments, message = BAD_ARGUMENTS[name]
    assert_refused(program, capsys, message, f"--out={tmp_path}/out", *arguments.format(here=tmp_path).split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestOverridden:
    def test_fields_are_found_by_the_end_of_their_path(self) -> None:
        settings = {"num_envs": "64", "han.layers": "3", "energy": "0.5", "hidden": "32x16", "residual": "false"}
        settings |= {"slots": "20", "rate_clip_per_s": "2.5"}
        config = overridden(AGENTS["mvr"], settings)
        assert (config.num_envs, config.network.han.layers) == (64, 3)
        assert (config.network.hidden, config.network.residual) == ((32, 16), False)
        assert (config.network.slots, config.network.rate_clip_per_s) == (20, 2.5)
        assert config.hyper.weights.energy == 0.5
        assert config.hyper.learning_rate == AGENTS["mvr"].hyper.learning_rate

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("envs", "3", "field 'envs' is unknown; choose from network.encoder, "),
            ("weights", "3", "field 'weights' is unknown"),
            ("residual", "maybe", "give a value of the kind of True"),
            ("slots", "2.5", "give a value of the kind of 32"),
            ("rate_clip_per_s", "high", "give a number"),
            ("hidden", "wide", r"give a value of the kind of \(64,\)"),
        ],
    )
    def test_others_are_refused(self, name: str, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            overridden(AGENTS["mvr"], {name: text})
