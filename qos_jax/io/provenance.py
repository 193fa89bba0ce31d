"""Provenance of results (versions, machine, commit), and conversion of results to plain values for strict JSON."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qos_jax.io.files import write_whole

_PACKAGES = ("qos_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and the main packages, and the platform, processor and device, by name."""
    packages = {name: _version(name) for name in _PACKAGES}
    machine = {"platform": platform.platform(), "processor": _processor(), "device": jax.devices()[0].device_kind}
    return {"python": platform.python_version()} | packages | machine


def command_of(program: str) -> str:
    """Returns what was typed to start this program, but for --out: where a result lies is no part of it."""
    typed, kept = iter(sys.argv[1:]), list[str]()
    for text in typed:
        if text == "--out":
            next(typed, None)
        elif not text.startswith("--out="):
            kept.append(text)
    return shlex.join(["qos-jax", program, *kept])


def fingerprint(*paths: str | os.PathLike[str]) -> str:
    """Returns what tells files apart: 16 digits of a SHA-256 of their contents; of a folder, of all files in it."""
    found = hashlib.sha256()
    for path in map(pathlib.Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def write_result(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a result, which holds its ``command``, as strict JSON; says on stderr whose result it replaces.

    Raises:
      InputError: the file cannot be written.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        earlier = json.loads(path.read_text(encoding="utf-8")).get("command")
        if earlier != result["command"]:
            print(f"note: {path} of another command is replaced: {earlier}", file=sys.stderr)
    write_whole(path, json.dumps(plain(result), indent=1, allow_nan=False))


def made_by(command: str) -> dict[str, Any]:
    """Returns where a result comes from: ``command``, ``date`` in UTC, and ``versions``."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"command": command, "date": date, "versions": versions()}


def plain(value: Any) -> Any:
    """Returns a value as types of strict JSON: arrays become lists, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # qos_jax may run from its source folder


def _processor() -> str:
    """Returns the processor's name; on Linux it is only in a file."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_hash() -> str | None:
    """Returns the commit of the working tree that contains this package; None for an installed package."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None  # git is not installed
    return done.stdout.strip() or None
