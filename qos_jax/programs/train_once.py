"""Training runs that other programs need: each is ``qos-jax train`` in a process of its own, and made once."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import BinaryIO

from qos_jax.errors import InputError
from qos_jax.programs.train import configs_of, parsed
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder


def train_once(path: pathlib.Path, asked: Sequence[str], *, quiet: bool) -> None:
    """Trains into a folder, or goes on with the run in it, unless it is done.

    Args:
      path: of the folder.
      asked: flags of ``qos-jax train``, each as --FLAG=VALUE.
      quiet: what the program prints goes to a file beside the folder.

    Raises:
      InputError: the folder holds another run, or training failed.
    """
    begun = (path / CONFIG).exists()
    if begun and _is_done(path, asked):
        return
    flags = [*asked, f"--out={path}", *(["--resume"] if begun else [])]
    command = [sys.executable, "-m", "qos_jax.programs", "train", *flags]
    log = path.with_name(f"{path.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    if quiet:
        with open(log, "ab") as file:
            status = _status(command, file)
    else:
        status = _status(command, None)
    if status:
        raise InputError(f"{shlex.join(command)} ended with status {status}; see {log if quiet else 'above'}")


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Has SIGTERM end the training runs under way, each with a checkpoint, and then the program that waits for them.

    Else they would train on alone, and keep the program out of their folders when it is started again.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _ended.set()
        for process in list(_under_way):
            process.terminate()
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be taken
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_under_way: set[subprocess.Popen[bytes]] = set()
_ended = threading.Event()


def _status(command: Sequence[str], output: BinaryIO | None) -> int:
    """Runs a command and returns its exit status; both outputs go to a file, if one is given."""
    with subprocess.Popen(command, stdout=output, stderr=output) as process:
        _under_way.add(process)
        if _ended.is_set():  # the signal came while it was started
            process.terminate()
        try:
            return process.wait()
        finally:
            _under_way.discard(process)


def _is_done(path: pathlib.Path, asked: Sequence[str]) -> bool:
    """Tells whether a run has all its steps.

    Raises:
      InputError: it is another run than the one that the flags describe.
    """
    folder = RunFolder.reopen(path)
    world, training = configs_of(parsed(asked))
    if folder.world != world or folder.training.to_dict() != _resolved(folder, training.to_dict()):
        raise InputError(f"{path} holds another run: {folder.config['command']}; give another --out, or delete it")
    return folder.finished


def _resolved(folder: RunFolder, training: dict) -> dict:
    """Returns a configuration with what training derives, from the worlds and from what differs in them, of the run."""
    network, of_run = training["agent"]["network"], folder.training.agent.network
    for name in ("rate_clip_per_s", "with_preferences", "with_sessions"):
        network[name] = network[name] or getattr(of_run, name)
    return training
