"""Training runs that other programs need: each is ``qos-jax train`` in a process of its own, and made once."""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from qos_jax.errors import InputError
from qos_jax.training.run_folder import CONFIG, RunFolder


def train_once(path: pathlib.Path, asked: Sequence[str], *, quiet: bool) -> None:
    """Trains into a folder, or goes on with the run in it, unless it is done.

    Args:
      path: of the folder.
      asked: flags of ``qos-jax train``, each as --FLAG=VALUE.
      quiet: what the program prints goes to a file beside the folder.

    Raises:
      InputError: the folder holds another run, or training failed.
    """
    if (path / CONFIG).exists() and _is_done(path, asked):
        return
    command = [*command_of(asked), f"--out={path}"] + (["--resume"] if (path / CONFIG).exists() else [])
    log, where = path.with_name(f"{path.name}.log"), "above"
    path.parent.mkdir(parents=True, exist_ok=True)
    if quiet:
        with open(log, "ab") as file:
            status, where = subprocess.run(command, stdout=file, stderr=file, check=False).returncode, str(log)
    else:
        status = subprocess.run(command, check=False).returncode
    if status:
        raise InputError(f"{shlex.join(command)} ended with status {status}; see {where}")


def command_of(asked: Sequence[str]) -> list[str]:
    """Returns the command that trains with some flags."""
    return [sys.executable, "-m", "qos_jax.programs", "train", *asked]


def _is_done(path: pathlib.Path, asked: Sequence[str]) -> bool:
    """Tells whether a run has all its steps.

    Raises:
      InputError: it was asked for with other flags.
    """
    folder = RunFolder.reopen(path)
    began = [text for text in shlex.split(folder.config["command"])[3:] if not text.startswith("--out=")]
    if sorted(began) != sorted(asked):
        raise InputError(f"{path} holds another run: {folder.config['command']}; give another --out, or delete it")
    return folder.latest is not None and folder.latest >= folder.config["steps"]
