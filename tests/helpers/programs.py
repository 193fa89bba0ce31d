"""Runs programs in the process of the tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from qos_jax.programs import main
from qos_jax.programs.app import run_program

Program = Callable[..., int]  # takes the arguments, returns the exit status

ROOT = pathlib.Path(__file__).parents[2]


def start_training(folder: str | os.PathLike[str], variables: dict[str, str], *arguments: str) -> subprocess.Popen:
    """Starts the training program in another process."""
    command = [sys.executable, "-m", "qos_jax.programs", "train", *arguments, f"--out={folder}"]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def assert_refused(program: Program, capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    """Runs a program on bad input, which must print one line with the message and nothing else."""
    assert program(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out


def program_of(name: str) -> Program:
    """Returns a function that runs ``qos-jax NAME``, without a cache of compiled programs on disk."""
    import importlib

    program = main.PROGRAMS[name]

    def run(*arguments: str) -> int:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["qos-jax", *arguments])
            entry = importlib.import_module(program.module).main
            run_program(program.define, entry, name=f"qos-jax {name}", summary=program.summary)
        return stopped.value.code or 0

    return run
