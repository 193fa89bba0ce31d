"""Where a result comes from: versions, machine and commit; and results as plain values that strict JSON can hold."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_PACKAGES = ("qos_jax", "jax", "jaxlib", "flax", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages, and what they run on."""
    packages = {name: _version(name) for name in _PACKAGES}
    machine = {"platform": platform.platform(), "processor": _processor(), "device": jax.devices()[0].device_kind}
    return {"python": platform.python_version()} | packages | machine


def plain(value: Any) -> Any:
    """Returns the value in the terms of strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # qos_jax run from its source folder


def _processor() -> str:
    """Returns the processor's name, which Linux tells only in a file."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_hash() -> str | None:
    """Returns the commit of the working tree that this package lies in, None where it is installed."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None  # there is no git
    return done.stdout.strip() or None
