"""Keeps compiled programs on disk, so that they are compiled once on a machine and not at every start.

JAX's own cache writes its files in place: a program that is killed at that moment leaves a broken one, which is never
replaced. So each program works on a folder of its own, of hard links to the files that are shared, and what it compiled
is linked back whole when it ends. Folders that killed programs left behind go when they are a day old.

The cache lies in ``~/.cache/qos_jax``, or below ``XDG_CACHE_HOME``. Where JAX is told of another
(``JAX_COMPILATION_CACHE_DIR``), or to keep none (``JAX_ENABLE_COMPILATION_CACHE=false``), nothing is done here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import shutil
import tempfile
import time

import jax

_OWN = "run-"  # how folders of single programs begin
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
    """Links all files, but those that are there already."""
    for file in here.iterdir():
        if file.is_file():
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(file, there / file.name)


def _sweep(shared: pathlib.Path) -> None:
    for folder in shared.glob(f"{_OWN}*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
