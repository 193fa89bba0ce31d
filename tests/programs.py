"""Programs run in the process of the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import common

Program = Callable[..., int]  # takes the arguments, returns the exit status


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
