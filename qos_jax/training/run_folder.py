"""A training run on disk; ``qos_jax.training.load`` takes the router out of it.

The folder of a run holds

* ``config.json``: the world, what is trained in it, and with which versions, see ``run_format``; the network is rebuilt
  from it. ``resumed`` has the versions of each later part of the run, and the steps at which that began;
* ``metrics.jsonl``: one record per line, see ``qos_jax.training.loop``;
* ``checkpoints/STEPS/``: two Orbax items, ``state``, which training goes on from bit for bit, and ``weights``, which
  is all that a router needs; and ``checksums.json`` of all their files, as a bit that has flipped would be read. Files
  that others put there, as desktops do, do not count.

A checkpoint is written under a hidden name and then renamed, so that whatever ends the program, and whenever, the last
whole checkpoint is there. What a killed program left under hidden names goes when the run is started or resumed. After
a power cut config.json is whole, and a checkpoint that is not is refused; the one before it is there. Lines of
metrics.jsonl are written before the checkpoint that they lead to, and those beyond it are dropped when the run is
resumed. Of several processes each writes its part of a checkpoint, so all of them must see the folder. All else is
written by the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qos_jax.agent.learner import Learner, TrainState
from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, path_of, remove, remove_temporaries, writable_folder, write_whole
from qos_jax.io.provenance import git_hash, versions
from qos_jax.training.config import TrainingConfig
from qos_jax.training.parallel import leads, wait_for_all
from qos_jax.training.run_format import FORMAT, upgraded
from qos_jax.worlds.config import WorldConfig

CONFIG, METRICS = "config.json", "metrics.jsonl"

_KEPT = 2  # checkpoints
_CHECKSUMS = "checksums.json"
_OF_A_PART = ("versions", "git")  # fields of config.json that may differ between the parts of a run
_RANDOM = ("jax_default_prng_impl", "jax_threefry_partitionable")  # settings that numbers drawn depend on


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
        """Takes a folder that holds this configuration already."""
        self.path = path
        self.config = config

    @classmethod
    def start(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Makes the folder of a new run.

        Args:
          path: of the folder, which may be there but must not hold a run.
          config: what ``make_config`` returns.

        Raises:
          InputError: the folder holds a run already, or cannot be written to, or Orbax cannot.
        """
        _check_path(path)
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
        config = read_config(folder)
        _check_path(folder)
        return cls(folder, config)

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
        self.check_same(config)
        steps = config["training"]["steps"]
        begins, part = self.latest or 0, {name: config[name] for name in _OF_A_PART}
        try:
            earlier = [each for each in self.config.get("resumed", []) if each["steps"] < begins]
            changes = _changes((earlier or [self.config])[-1], part)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{self.path / CONFIG}: versions or resumed are not what was written: {error}") from error
        if changes and leads():
            print(f"note: {self.path} goes on after {begins} steps with {changes}", file=sys.stderr)
        resumed = {"resumed": [*earlier, {"steps": begins, **part}]} if begins < steps else {}
        flags = {} if config["flags"] is None else {"flags": config["flags"]}
        training = {**self.config["training"], "steps": steps}
        self.config = {**self.config, **flags, **resumed, "training": training}
        if leads():
            self._remove_remains()
            self._write_config()

    def check_same(self, config: Mapping[str, Any]) -> None:
        """Compares what fixes a run with the configuration that it shall go on with; only ``steps`` may be larger.

        Raises:
          InputError: they differ, or the run was written in an earlier format.
        """
        if self.config.get("began_as"):
            raise InputError(
                f"{self.path / CONFIG}: was written in format {self.config['began_as']}: "
                "its router can be loaded, but training cannot go on"
            )
        for field in ("spec", "world", "random"):
            if field in self.config and field in config:  # earlier versions did not write all
                _check_same(f"{self.path / CONFIG}: {field}", self.config[field], config[field])
        before, after = (dict(each["training"]) for each in (self.config, config))
        if after.pop("steps") < before["steps"]:
            raise InputError(
                f"{self.path / CONFIG}: training.steps is {before['steps']}, but fewer are asked for: "
                "a run can only be prolonged"
            )
        del before["steps"]
        _check_same(f"{self.path / CONFIG}: training", before, after)

    @property
    def latest(self) -> int | None:
        """Steps of the newest checkpoint, None where there is none."""
        return max(self._saved(), default=None)

    def checkpoint(self, steps: int) -> pathlib.Path:
        """Returns where the checkpoint after so many steps is."""
        return self.path / "checkpoints" / str(steps)

    def save(self, steps: int, state: TrainState | None, weights: Any) -> None:
        """Writes the checkpoint after so many steps, if it is not there, and drops all but the newest two.

        Args:
          steps: environment steps so far, of each seed.
          state: everything that training goes on from; None if nobody shall go on.
          weights: what a router needs of it.

        Raises:
          InputError: it cannot be written; the checkpoints before it are as they were.
        """
        if steps in self._saved():
            return
        if state is not None and not self.training.save_replay:
            state = state.replace(replay=None)
        items = {"weights": weights} | ({} if state is None else {"state": state})
        hidden = self._hidden(steps)
        if leads():
            remove(hidden)
        wait_for_all(f"before checkpoint {steps}")
        try:
            with _raising_only(), ocp.StandardCheckpointer() as checkpointer:  # waits for both at its end
                for name, item in items.items():
                    checkpointer.save(hidden / name, item)
            if leads():
                for name in items:  # Orbax writes the path of the hidden folder into it; the rename below commits
                    (hidden / name / "commit_success.txt").unlink(missing_ok=True)
                write_whole(hidden / _CHECKSUMS, json.dumps({item: _checksums(hidden / item) for item in items}))
                os.replace(hidden, self.checkpoint(steps))
        except Exception as error:  # Orbax and TensorStore raise whatever they like on full disks
            kept = f"the last one is {self.checkpoint(self.latest)}" if self.latest is not None else "there is none"
            raise InputError(f"{hidden}: checkpoint cannot be written ({_first_line(error)}); {kept}") from error
        if leads():
            self._remove_old()
        wait_for_all(f"checkpoint {steps}")

    def restore_state(self, steps: int, like: TrainState) -> TrainState:
        """Returns the state after so many steps; a replay that was not saved is empty.

        Args:
          steps: of the checkpoint.
          like: a state of the same shapes, and where its leaves shall be if it says so; may be abstract.

        Raises:
          InputError: the checkpoint cannot be read, or is not like that.
        """
        if self.training.save_replay:
            return self._restore(steps, "state", like)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like.replay)
        return self._restore(steps, "state", like.replace(replay=None)).replace(replay=empty)

    def restore_weights(self, steps: int, like: Any) -> Any:
        """Returns the weights after so many steps; see ``restore_state``."""
        return self._restore(steps, "weights", like)

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
        for path in self._hidden(0).parent.glob(".*"):
            if path.name[1:].isdecimal():
                remove(path)

    def _remove_old(self) -> None:
        for old in self._saved()[:-_KEPT]:
            hidden = self._hidden(old)
            remove(hidden)
            with contextlib.suppress(OSError):  # it stays then, which does no harm
                os.replace(self.checkpoint(old), hidden)
            remove(hidden)

    def _hidden(self, steps: int) -> pathlib.Path:
        return self.path / "checkpoints" / f".{steps}"

    def _restore(self, steps: int, item: str, like: Any) -> Any:
        """Reads one item on to the devices of ``like``, by default the first one, wherever it was made."""
        path = self.checkpoint(steps) / item
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first), like
        )
        self._check_whole(steps, item)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                _check_alike(path, checkpointer.metadata(path).item_metadata.tree, target)
                return checkpointer.restore(path, target)
        except InputError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever they like on broken files
            raise InputError(f"{path}: cannot be restored ({_first_line(error)}): {_otherwise(path.parent)}") from error

    def _check_whole(self, steps: int, item: str) -> None:
        path = self.checkpoint(steps)
        try:
            text = (path / _CHECKSUMS).read_text(encoding="utf-8", errors="replace")
            expected = dict(parse_json(text, str(path / _CHECKSUMS))[item].items())
            found = _checksums(path / item, expected)
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path / _CHECKSUMS}: cannot be read: {_otherwise(path)}") from error
        if not expected:
            raise InputError(f"{path / _CHECKSUMS}: {item} is empty: {_otherwise(path)}")
        for name in sorted(expected):
            if expected[name] != found.get(name):
                raise InputError(f"{path / item / name}: is not what was written: {_otherwise(path)}")

    def _saved(self) -> list[int]:
        folder = self.path / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


@contextlib.contextmanager
def _raising_only() -> Iterator[None]:
    """Keeps threads of Orbax and TensorStore from printing what goes wrong; it is raised in this one.

    Some threads outlive an error, so they stay silent after one.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, printing = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except Exception:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    sys.unraisablehook = printing


def make_config(
    learner: Learner,
    training: TrainingConfig,
    world: WorldConfig | None = None,
    *,
    command: str | None = None,
    flags: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns what config.json holds, as plain values.

    Args:
      learner: its environment and its configuration, which takes the place of ``training.agent``.
      training: what is trained.
      world: where; None for an environment of the user's own, which then has to be given again to resume.
      command: that began the run.
      flags: of that command that fix the run; None where it was begun from Python.
    """
    resolved = dataclasses.replace(training, agent=learner.config)
    config = {
        "format": FORMAT,
        "spec": dataclasses.asdict(learner.env.spec),
        "experts": learner.env.expert_names,
        "world": None if world is None else world.to_dict(),
        "training": resolved.to_dict(),
        "command": command,
        "flags": None if flags is None else list(flags),
        "versions": versions(),
        "git": git_hash(),
        "random": {name: getattr(jax.config, name) for name in _RANDOM},
    }
    return dict(json.loads(json.dumps(config)))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the config.json of a run, of any format; see ``run_format``.

    Raises:
      InputError: it is not there, or not usable.
    """
    file = path_of(path) / CONFIG
    try:
        config = parse_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; give the folder of a training run") from error
    return upgraded(config, str(file))


def _check_path(path: str | os.PathLike[str]) -> None:
    folder = pathlib.Path(path).absolute()
    if found := next((character for character in "\\[" if character in str(folder)), None):
        raise InputError(f"{folder}: Orbax cannot keep checkpoints below a path with {found!r}: take another folder")
    if any("\ud800" <= character <= "\udfff" for character in str(folder)):  # as Python has bytes that are not text
        raise InputError(f"{folder}: Orbax cannot keep checkpoints below a path that is not UTF-8: take another folder")


def _checksums(folder: pathlib.Path, expected: Container[str] | None = None) -> dict[str, str]:
    """Returns the SHA-256 of each expected file below a folder; by default of all but hidden ones."""
    sums = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        counts = name in expected if expected is not None else not path.name.startswith(".")
        if counts and path.is_file():
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _otherwise(checkpoint: pathlib.Path) -> str:
    return f"move {checkpoint} out of the run's folder to take the checkpoint before it"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what differs between two parts of a run, as far as both say it."""
    old, new = ({**each.get("versions", {}), "git": each.get("git")} for each in (before, now))
    return ", ".join(
        f"{name} {new[name]} (was {old[name]})"
        for name in new
        if None not in (old.get(name), new[name]) and old[name] != new[name]
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_same(name: str, saved: Any, asked: Any) -> None:
    if isinstance(saved, dict) and isinstance(asked, dict) and saved.keys() == asked.keys():
        for field in saved:
            _check_same(f"{name}.{field}", saved[field], asked[field])
    elif saved != asked:
        raise InputError(f"{name} is {saved!r}, but {asked!r} is asked for: a run goes on as it began")


def _check_alike(path: pathlib.Path, metadata: Any, target: Any) -> None:
    saved, wanted = _described(metadata), _described(target)
    for leaf in [*wanted, *saved]:
        if saved.get(leaf) != wanted.get(leaf):
            earlier = path.name == "state" and leaf not in saved
            hint = "; a run of an earlier version can be loaded, but training cannot go on" if earlier else ""
            raise InputError(
                f"{path}: {leaf} is {saved.get(leaf, 'absent')}, must be {wanted.get(leaf, 'absent')} by {CONFIG}{hint}"
            )


def _described(tree: Any) -> dict[str, str]:
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        described[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{leaf.dtype}{list(leaf.shape)}"
    return described


def _record(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("steps"), int):
            return record
    raise InputError(f"{path}, line {number}: {line[:80]!r} is not a JSON object with steps")
