"""Keeps compiled programs on disk, so that they are compiled once on a machine and not at every start.

JAX's own cache writes its files in place: a program that is killed at that moment leaves a broken one, which is never
replaced. So each program works on a folder of its own, of hard links to the files that are shared, and what it compiled
is linked back when it ends. A file that does not unpack, as after a full disk, is not linked, and a shared one is
removed; what has been checked is read-only. Folders that killed programs left behind go when they are a day old.

The cache lies in ``~/.cache/qos_jax``, or below ``XDG_CACHE_HOME``. Where JAX is told of another
(``JAX_COMPILATION_CACHE_DIR``), or to keep none (``JAX_ENABLE_COMPILATION_CACHE=false``), nothing is done here.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pathlib
import shutil
import stat
import sys
import tempfile
import time
import zlib

import jax

_OWN = "run-"  # how folders of single programs begin
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how its files begin
_ABANDONED_S = 24 * 3600.0


def use_cache() -> None:
    """Has JAX read compiled programs from disk and keep new ones; does nothing where the disk does not allow it."""
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    shared = pathlib.Path(home) / "qos_jax"
    with contextlib.suppress(OSError):
        shared.mkdir(parents=True, exist_ok=True)
        _sweep(shared)
        own = pathlib.Path(tempfile.mkdtemp(prefix=_OWN, dir=shared))
        _link(shared, own)
        atexit.register(_give_back, own, shared)
        jax.config.update("jax_compilation_cache_dir", str(own))
        # XLA's caches of kernels would put the folder's name into the keys of programs.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _give_back(own: pathlib.Path, shared: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        _link(own, shared)
    shutil.rmtree(own, ignore_errors=True)


def _link(here: pathlib.Path, there: pathlib.Path) -> None:
    """Links all files, but those that are there already, and removes broken ones."""
    for file in here.iterdir():
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            if _is_whole(file):
                os.link(file, there / file.name)
            elif file.is_file():
                file.unlink()


def _is_whole(file: pathlib.Path) -> bool:
    if not file.is_file():
        return False
    if file.name.endswith("-cache") and file.stat().st_mode & stat.S_IWUSR:
        try:
            _unpack(file.read_bytes())
        except Exception:  # each of the packers has errors of its own
            return False
        file.chmod(0o444)
    return True


def _unpack(content: bytes) -> None:
    """Unpacks by what JAX packs with: Zstandard where it is installed, otherwise zlib."""
    if content.startswith(_ZSTANDARD):
        module = "compression.zstd" if sys.version_info >= (3, 14) else "zstandard"
        importlib.import_module(module).decompress(content)
    else:
        zlib.decompress(content)


def _sweep(shared: pathlib.Path) -> None:
    for folder in shared.glob(f"{_OWN}*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
