"""Provenance of results (versions, machine, commit), and conversion of results to plain values for strict JSON."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_PACKAGES = ("qos_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and the main packages, and the platform, processor and device, by name."""
    packages = {name: _version(name) for name in _PACKAGES}
    machine = {"platform": platform.platform(), "processor": _processor(), "device": jax.devices()[0].device_kind}
    return {"python": platform.python_version()} | packages | machine


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
