"""Writing of files that appear whole or not at all, and checked reading of JSON and ``.npz`` files."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.errors import InputError

_LONGEST_NAME = 255  # bytes, on the file systems in use


def path_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a file or folder.

    Raises:
      InputError: it is of a type that names none.
    """
    if isinstance(name, str | os.PathLike):
        with contextlib.suppress(TypeError):  # of a path in bytes
            return pathlib.Path(name)
    raise InputError(f"path is {name!r:.80}, must be the name of a file or folder")


def writable_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Creates a folder and checks that it is writable, so that a long computation does not fail at its end.

    Raises:
      InputError: the folder cannot be created or written to.
    """
    folder = path_of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it appears whole; creates its folder.

    The content is on the disk before the name is, so a power cut leaves the file before it or the new one.

    Args:
      path: of the file.
      content: text is encoded as UTF-8; bytes of a file's name that are not UTF-8 are written as escapes.

    Raises:
      InputError: the file cannot be written.
    """
    path = path_of(path)
    temporary = path.with_name(f".{shortened(path.name, _LONGEST_NAME - 20)}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _keep_names(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def shortened(name: str, most: int) -> str:
    """Returns the name of a file in at most so many bytes; names that differ stay different."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    kept = content[: most - 9].decode(errors="ignore")  # without half of a character at its end
    return f"{kept}-{zlib.crc32(content):08x}"


def remove_temporaries(folder: pathlib.Path, *patterns: str) -> None:
    """Removes what ``write_whole`` left of files of such names when it was killed; nobody may be writing them."""
    for pattern in patterns:
        for path in folder.glob(f".{pattern}.*"):
            if path.suffix[1:].isdecimal():
                remove(path)


def remove(path: pathlib.Path) -> None:
    """Removes a file, a folder or a link, not what it points to, as far as the system allows it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _keep_names(folder: pathlib.Path) -> None:
    """Has the names in a folder outlast a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with a column for each name that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse_json(text: str, where: str, **options: Any) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: the JSON text.
      where: name of its source, for the message.
      **options: of ``json.loads``.

    Raises:
      InputError: the text is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {error}") from error


def most_unpacked(size: int) -> int:
    """Returns how many bytes a packed file of so many bytes may unpack to.

    Texts and tables shrink to a tenth or so. Small files may hold equal rows, which shrink far more, but need little
    memory. Files that are made to fill the memory shrink to a thousandth.
    """
    return max(size, 2**26, min(100 * size, 2**32))


def read_columns(
    path: str | os.PathLike[str], needed: Sequence[str], others: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Returns arrays of an ``.npz`` by name, with at least one axis; reading executes nothing in the file.

    Args:
      path: of the file.
      needed: names of required arrays.
      others: names of optional arrays.

    Raises:
      InputError: the file is missing or damaged, lacks a column, unpacks to too much, or has a column of Python
        objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if missing := [name for name in needed if name not in names]:
                raise InputError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}")
            wanted = [name for name in (*needed, *others) if name in names]
            size, most = sum(_array_bytes(archive, name) for name in wanted), most_unpacked(os.path.getsize(path))
            if size > most:
                raise InputError(f"{path}: is not a readable .npz file: its columns unpack to {size} bytes, more than "
                                 f"the {most} that are read of a file of this size")  # fmt: skip
            return {name: _read_array(archive, name) for name in wanted}
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy raise whatever they like on broken files
        raise InputError(f"{path}: is not a readable .npz file: {error}") from error


def _array_bytes(archive: zipfile.ZipFile, name: str) -> int:
    """Returns the size of an array by its header; elements without a size count as one byte."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise ValueError(f"column {name} is in version {version} of NumPy's format, must be in 1.0 or 2.0")
        shape, _, dtype = headers[version](file)
    return abs(math.prod(shape)) * max(dtype.itemsize, 1)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.atleast_1d(np.lib.format.read_array(file, allow_pickle=False))


def names_in(path: str | os.PathLike[str], name: str, column: np.ndarray) -> tuple[str, ...]:
    """Returns a column as texts; bytes are UTF-8.

    Raises:
      InputError: the column holds bytes that are not UTF-8, or has more than one axis.
    """
    if column.ndim > 1:
        raise InputError(f"{path}: column {name} has the shape {column.shape}, must have one axis")
    try:
        return tuple(each.decode() if isinstance(each, bytes) else str(each) for each in column.tolist())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: column {name} holds {error.object!r}, must be UTF-8") from error


def numbers_in(path: str | os.PathLike[str], name: str, column: np.ndarray) -> np.ndarray:
    """Returns a column as floating-point numbers; a floating-point column keeps its precision.

    Raises:
      InputError: the column does not hold numbers.
    """
    if column.dtype.kind not in "biuf":
        raise InputError(f"{path}: column {name} is of type {column.dtype}, must be numbers")
    return column if column.dtype.kind == "f" else column.astype(np.float64)
