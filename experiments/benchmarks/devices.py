"""Environments spread over the JAX devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def use_one_device_per_core() -> None:
    """Makes every CPU core a JAX device, unless XLA_FLAGS is set; call it before the first computation."""
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")


def spread_environments(num_envs: int) -> tuple[Array, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Spreads E environments over the devices, at most one device per environment.

    Args:
      num_envs: E; above the number of devices it must be a multiple of it.

    Returns:
      A key [E] for each environment, and a decorator that runs a function of arrays [E, ...] on all devices, each with
      its part of the environments.
    """
    devices = jax.devices()[: min(jax.device_count(), num_envs)]
    mesh = jax.make_mesh((len(devices),), ("env",), axis_types=(AxisType.Auto,), devices=devices)
    spec = PartitionSpec("env")

    def spread(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    return jax.device_put(jax.random.split(jax.random.key(0), num_envs), NamedSharding(mesh, spec)), spread
