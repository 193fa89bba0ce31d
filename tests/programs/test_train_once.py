"""Runs that other programs need are found again by the flags that made them."""

from __future__ import annotations

import pathlib

import pytest

from qos_jax import InputError
from qos_jax.programs.train import configs_of, parsed
from qos_jax.programs.train_once import _is_done
from qos_jax.training.run import training_run


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset=edge-2026"],  # whose network reads cached prefixes
        pytest.param(["--preset=edge-8", "--randomise=load,preferences"], marks=pytest.mark.slow),
        ["--preset=paper-3", "--load=0.7"],  # whose rate clip follows from the load
    ],
)
def test_a_run_is_known_by_its_flags(flags: list[str], tmp_path: pathlib.Path) -> None:
    with training_run(*configs_of(parsed(flags))).open_folder(tmp_path / "run", command="", flags=flags):
        pass
    assert not _is_done(tmp_path / "run", flags)
    with pytest.raises(InputError, match="holds another run"):
        _is_done(tmp_path / "run", [*flags, "--set=updates=3"])
