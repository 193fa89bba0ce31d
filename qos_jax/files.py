"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib

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
