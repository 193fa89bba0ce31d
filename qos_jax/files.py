"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib

from qos_jax.errors import InputError


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
