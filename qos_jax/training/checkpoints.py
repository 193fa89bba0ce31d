"""Checkpoints of a training run: Orbax items with checksums, whole or not there.

``checkpoints/STEPS/`` holds the items, and ``checksums.json`` of all their files, as a bit that has flipped would be
read. Files that others put there, as desktops do, do not count. A checkpoint is written under a hidden name and then
renamed, so that whatever ends the program, and whenever, the last whole checkpoint is there. Of several processes each
writes its part of a checkpoint, so all of them must see the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, remove, write_whole
from qos_jax.training.parallel import leads, wait_for_all
from qos_jax.training.run_config import CONFIG

_KEPT = 2
_CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one run, by the steps after which they were written."""

    def __init__(self, run: pathlib.Path) -> None:
        """Takes the folder of the run.

        Raises:
          InputError: Orbax cannot write below it.
        """
        if found := next((character for character in "\\[" if character in str(run)), None):
            raise InputError(f"{run}: Orbax cannot keep checkpoints below a path with {found!r}: take another folder")
        if any("\ud800" <= character <= "\udfff" for character in str(run)):  # as Python has bytes that are not text
            raise InputError(
                f"{run}: Orbax cannot keep checkpoints below a path that is not UTF-8: take another folder"
            )
        self.folder = run / "checkpoints"

    @property
    def latest(self) -> int | None:
        """Steps of the newest one, None where there is none."""
        return max(self._saved(), default=None)

    def path(self, steps: int) -> pathlib.Path:
        """Returns where the one after so many steps is."""
        return self.folder / str(steps)

    def save(self, steps: int, items: Mapping[str, Any]) -> None:
        """Writes the one after so many steps, if it is not there, and drops all but the newest two.

        Args:
          steps: environment steps so far, of each seed.
          items: trees of arrays by their names.

        Raises:
          InputError: it cannot be written; those before it are as they were.
        """
        if steps in self._saved():
            return
        hidden = self._hidden(steps)
        if leads():
            remove(hidden)
        wait_for_all(f"before checkpoint {steps}")
        try:
            with _raising_only(), ocp.StandardCheckpointer() as checkpointer:  # waits for all at its end
                for name, item in items.items():
                    checkpointer.save(hidden / name, item)
            if leads():
                for name in items:  # Orbax writes the path of the hidden folder into it; the rename below commits
                    (hidden / name / "commit_success.txt").unlink(missing_ok=True)
                write_whole(hidden / _CHECKSUMS, json.dumps({item: _checksums(hidden / item) for item in items}))
                os.replace(hidden, self.path(steps))
        except Exception as error:  # Orbax and TensorStore raise whatever they like on full disks
            kept = f"the last one is {self.path(self.latest)}" if self.latest is not None else "there is none"
            raise InputError(f"{hidden}: checkpoint cannot be written ({_first_line(error)}); {kept}") from error
        if leads():
            self._remove_old()
        wait_for_all(f"checkpoint {steps}")

    def restore(self, steps: int, item: str, like: Any) -> Any:
        """Reads one item on to the devices of ``like``, by default the first one, wherever it was made.

        Args:
          steps: of the checkpoint.
          item: its name.
          like: a tree of the same shapes, and where its leaves shall be if it says so; may be abstract.

        Raises:
          InputError: it cannot be read, or is not like that.
        """
        path = self.path(steps) / item
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

    def remove_remains(self) -> None:
        """Removes what a killed program left under hidden names."""
        for path in self.folder.glob(".*"):
            if path.name[1:].isdecimal():
                remove(path)

    def _remove_old(self) -> None:
        for old in self._saved()[:-_KEPT]:
            hidden = self._hidden(old)
            remove(hidden)
            with contextlib.suppress(OSError):  # it stays then, which does no harm
                os.replace(self.path(old), hidden)
            remove(hidden)

    def _check_whole(self, steps: int, item: str) -> None:
        path = self.path(steps)
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

    def _hidden(self, steps: int) -> pathlib.Path:
        return self.folder / f".{steps}"

    def _saved(self) -> list[int]:
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in there if path.name.isdecimal())


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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
