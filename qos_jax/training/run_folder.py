"""A training run on disk; ``qos_jax.training.load`` takes the router out of it.

The folder of a run holds

* ``config.json``, see ``run_config``;
* ``metrics.jsonl``: one record per line, see ``loop``;
* ``checkpoints/STEPS/``, see ``checkpoints``: the items ``weights``, which is all that a router needs, and ``state``,
  with ``best`` of ``selection`` where that keeps any, which training goes on from bit for bit.

A run may be killed at any moment. What a killed program left under hidden names goes when the run is started or
resumed. After a power cut config.json is whole, and a checkpoint that is not is refused; the one before it is there.
Lines of metrics.jsonl are written before the checkpoint that they lead to, and those beyond it are dropped when the run
is resumed. Of several processes the first writes all but the checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qos_jax.agent.learner import TrainState
from qos_jax.errors import InputError
from qos_jax.io.files import path_of, remove_temporaries, writable_folder, write_whole
from qos_jax.training.checkpoints import Checkpoints
from qos_jax.training.config import TrainingConfig
from qos_jax.training.parallel import leads, wait_for_all
from qos_jax.training.run_config import CONFIG, check_same, read_config, with_part
from qos_jax.worlds.config import WorldConfig

METRICS = "metrics.jsonl"


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other programs from training in a folder; the system ends that with the process, however it ends.

    Raises:
      InputError: another one trains there, or the folder cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        if leads():
            try:
                file = stack.enter_context(open(folder / ".lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{folder}: another program trains in this folder: wait for it, or stop it") from error
            except OSError as error:
                raise InputError(f"{folder / '.lock'}: cannot be locked: {error.strerror}") from error
        yield


class RunFolder:
    """The folder of one training run; see the module. ``start`` makes one, ``reopen`` opens one."""

    def __init__(self, path: pathlib.Path, config: Mapping[str, Any]) -> None:
        """Takes a folder that holds this configuration already.

        Raises:
          InputError: Orbax cannot write below it.
        """
        self.path = path
        self.config = config
        self.checkpoints = Checkpoints(path)

    @classmethod
    def start(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Makes the folder of a new run.

        Args:
          path: of the folder, which may be there but must not hold a run.
          config: what ``make_config`` returns.

        Raises:
          InputError: the folder holds a run already, or cannot be written to, or Orbax cannot.
        """
        Checkpoints(pathlib.Path(path).absolute())  # before anything is made there
        run = cls(writable_folder(path).absolute(), config)
        if leads():
            if (run.path / CONFIG).exists():
                raise InputError(f"{run.path} holds a run already: resume it, or take another folder")
            run._remove_remains()
            run._write_config()
        wait_for_all("run folder")
        return run

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Opens the folder of a run.

        Raises:
          InputError: there is none, or its config.json is not usable.
        """
        folder = path_of(path).absolute()
        return cls(folder, read_config(folder))

    @property
    def training(self) -> TrainingConfig:
        """What is trained.

        Raises:
          InputError: config.json does not say so in terms that this version knows.
        """
        try:
            return TrainingConfig.from_dict(self.config["training"])
        except InputError as error:
            raise InputError(f"{self.path / CONFIG}: {error}") from error

    @property
    def world(self) -> WorldConfig | None:
        """The world of the run; None for an environment of the user's own.

        Raises:
          InputError: as ``training``.
        """
        try:
            return None if self.config["world"] is None else WorldConfig.from_dict(self.config["world"])
        except InputError as error:
            raise InputError(f"{self.path / CONFIG}: {error}") from error

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.latest is not None and self.latest >= self.training.steps

    def go_on(self, config: Mapping[str, Any]) -> None:
        """Begins another part of the run, with more steps if these are asked for, and writes that down.

        Args:
          config: what ``make_config`` returns now.

        Raises:
          InputError: the run is another one, see ``check_same``, or config.json cannot be written.
        """
        file, begins = str(self.path / CONFIG), self.latest or 0
        check_same(self.config, config, file)
        self.config, changes = with_part(self.config, config, begins, file)
        if leads():
            if changes:
                print(f"note: {self.path} goes on after {begins} steps with {changes}", file=sys.stderr)
            self._remove_remains()
            self._write_config()

    @property
    def latest(self) -> int | None:
        """Steps of the newest checkpoint, None where there is none."""
        return self.checkpoints.latest

    def save(self, steps: int, state: TrainState | None, weights: Any, best: Any = None) -> None:
        """Writes the checkpoint after so many steps, see ``Checkpoints.save``.

        Args:
          steps: environment steps so far, of each seed.
          state: everything that training goes on from; None if nobody shall go on.
          weights: what a router needs of it.
          best: what ``Selection`` goes on from; None if it keeps nothing.
        """
        if state is not None and not self.training.save_replay:
            state = state.replace(replay=None)
        items = {"weights": weights, "state": state, "best": best}
        self.checkpoints.save(steps, {name: item for name, item in items.items() if item is not None})

    def restore_state(self, steps: int, like: TrainState) -> TrainState:
        """Returns the state after so many steps; a replay that was not saved is empty.

        Args:
          steps: of the checkpoint.
          like: a state of the same shapes, and where its leaves shall be if it says so; may be abstract.

        Raises:
          InputError: the checkpoint cannot be read, or is not like that.
        """
        if self.training.save_replay:
            return self.checkpoints.restore(steps, "state", like)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like.replay)
        return self.checkpoints.restore(steps, "state", like.replace(replay=None)).replace(replay=empty)

    def restore_weights(self, steps: int, like: Any) -> Any:
        """Returns the weights after so many steps; see ``restore_state``."""
        return self.checkpoints.restore(steps, "weights", like)

    def restore_best(self, steps: int, like: Any) -> Any:
        """Returns what was saved as ``best`` after so many steps; see ``restore_state``."""
        return self.checkpoints.restore(steps, "best", like)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; ``record["steps"]`` is when it happened."""
        if not leads():
            return
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"{self.path / METRICS}: cannot be written: {error.strerror}") from error

    def records(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without a last one that was not written to its end.

        Raises:
          InputError: another line is not a JSON object with ``steps``, or the file cannot be read.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        try:
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        return [_record(path, number, line) for number, line in enumerate(lines, 1)]

    def rewind(self, steps: int | None) -> list[dict[str, Any]]:
        """Drops what metrics.jsonl says of the time after ``steps``, all of it without them, and returns the rest."""
        kept = [record for record in self.records() if steps is not None and record["steps"] <= steps]
        wait_for_all("metrics")  # have been read
        if leads():
            write_whole(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def _write_config(self) -> None:
        write_whole(self.path / CONFIG, json.dumps(self.config, indent=1, allow_nan=False))

    def _remove_remains(self) -> None:
        remove_temporaries(self.path, CONFIG, METRICS, "learning_curve*")
        self.checkpoints.remove_remains()


def _record(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("steps"), int):
            return record
    raise InputError(f"{path}, line {number}: {line[:80]!r} is not a JSON object with steps")
