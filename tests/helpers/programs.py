"""Programs run in the process of the tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from qos_jax.programs import common

Program = Callable[..., int]  # takes the arguments, returns the exit status


ROOT = pathlib.Path(__file__).parents[2]


def start_training(folder: str | os.PathLike[str], variables: dict[str, str], *arguments: str) -> subprocess.Popen:
    """Starts the training program in a process of its own."""
    command = [sys.executable, "-m", "qos_jax.programs", "train", *arguments, f"--out={folder}"]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def assert_refused(program: Program, capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    """Runs a program on bad input, which ends with one line that holds the message, and nothing else printed."""
    assert program(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out


def program_of(module: Any) -> Iterator[Program]:
    """Yields what runs a program of ``experiments``, whose flags are forgotten afterwards."""
    before = set(flags.FLAGS)
    module.define_flags()
    defined = set(flags.FLAGS) - before

    def run(*arguments: str) -> int:
        with (
            pytest.MonkeyPatch.context() as patch,
            flagsaver.flagsaver(),
            pytest.raises(SystemExit) as stopped,
        ):
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            common.run(module.main)
        return stopped.value.code or 0

    yield run
    for name in defined:
        delattr(flags.FLAGS, name)
