"""Files that appear whole or not at all, and files of others, of which nothing is taken for granted."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.errors import InputError


def writable_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Makes a folder, so that one that cannot be written to is known before the work and not after it.

    Raises:
      InputError: the folder cannot be made or written to.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file under another name first, so that nobody ever sees half of it; makes its folder.

    Raises:
      InputError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with a column for each name that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse_json(text: str, where: str, **options: Any) -> Any:
    """Returns what a text says.

    Args:
      text: in JSON.
      where: it is from, for the message.
      **options: of ``json.loads``.

    Raises:
      InputError: it is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {error}") from error


def read_columns(
    path: str | os.PathLike[str], needed: Sequence[str], others: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Returns arrays of an ``.npz`` by name, of one axis at least; nothing in the file is executed.

    Args:
      path: of the file.
      needed: names that must be there.
      others: names that are taken if they are.

    Raises:
      InputError: the file is missing or damaged, lacks a column, or has one of Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            if missing := [name for name in needed if name not in file.files]:
                raise InputError(f"{path}: no column {', '.join(missing)}; it has {', '.join(file.files)}")
            return {name: np.atleast_1d(file[name]) for name in (*needed, *others) if name in file.files}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: is not a readable .npz file: {error}") from error


def numbers_in(path: str | os.PathLike[str], name: str, column: np.ndarray) -> np.ndarray:
    """Returns a column as floating-point numbers, of its own precision if it has one.

    Raises:
      InputError: it holds something else.
    """
    if column.dtype.kind not in "biuf":
        raise InputError(f"{path}: column {name} is of kind {column.dtype}, must be numbers")
    return column if column.dtype.kind == "f" else column.astype(np.float64)
