"""The memory that a training run needs at least, and the memory that is free."""

from __future__ import annotations

import contextlib
import pathlib

import jax

from qos_jax.agent.learner import TrainState
from qos_jax.agent.replay_buffer import num_bytes
from qos_jax.errors import InputError

_MEMORY = pathlib.Path("/proc/meminfo")


def needed_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of ``environments`` (states, warm states and probes), ``replay`` and ``weights``.

    Args:
      state: of training; may be abstract (``jax.eval_shape``).
    """
    parts = {
        "environments": (state.envs, state.warm_state, state.beside),
        "replay": state.replay,
        "weights": state.learner,
    }
    return {name: num_bytes(part) for name, part in parts.items()}


def available_bytes(device: jax.Device) -> int | None:
    """Returns the free memory of a device, of a CPU that of the machine, in bytes; None where it is unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = _MEMORY.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def check_fits(needed: dict[str, int], runs: int, devices: int, available: int | None) -> str:
    """Returns a line on the memory that runs side by side need.

    Args:
      needed: bytes of one run, see ``needed_bytes``.
      runs: number of runs side by side.
      devices: number of devices that share them.
      available: bytes of one device, if known.

    Raises:
      InputError: a device's part does not fit into its memory.
    """
    parts = ", ".join(f"{name} {_mega(runs * size)}" for name, size in needed.items())
    each = runs * sum(needed.values()) // devices
    if available is not None and each > available:
        raise InputError(
            f"training needs at least {_mega(each)} on each device ({parts}), but {_mega(available)} are free: "
            "take fewer environments (--num_envs), a smaller replay (--set=capacity=N), fewer --seeds or more --devices"
        )
    free = "" if available is None else f" of {_mega(available)} free"
    return f"memory: {parts}; at least {_mega(each)}{free}" + (" on each device" if devices > 1 else "")


def _mega(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
