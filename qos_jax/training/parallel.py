"""How a training run is spread over devices: its seeds, and the shards of each seed.

A shard has a part of the environments, its own replay buffer, and draws its part of every batch from it; gradients are
averaged over the shards. The number of shards is fixed by the agent (``AgentConfig.shards``) and is part of the
algorithm. The number of devices is not: shards on one device run side by side, and the result is the same up to
rounding. Devices exchange one average of gradients per update, and nothing else.

Several processes, each with some of the devices, may run the same program. The first one leads: it alone reports.

A run has up to two leading axes on its arrays, [seeds, shards, ...], each only where there are several. Devices form a
grid of the same two axes. Each argument of a phase of training is of one of the kinds ``Part``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qos_jax.agent.learner import Learner, TrainState
from qos_jax.errors import InputError
from qos_jax.sim.env import EnvParams

Part = Literal["state", "world", "seed", "all"]
"""``state``: a ``TrainState``, whose weights all shards share; ``world``: the parameters of the environments; ``seed``:
one value for each seed; ``all``: shared by all."""

_SEEDS, _DEVICES, _SHARDS = "seeds", "devices", "shards"  # axes: of the grid the first two, within a device the last


@dataclasses.dataclass(frozen=True)
class DeviceLayout:
    """The axes of a run and the devices that they are spread over."""

    num_seeds: int = 1
    shards: int = 1
    devices: tuple[jax.Device, ...] = ()  # of all processes; empty: wherever JAX puts it
    worlds_differ: bool = False  # the environments' parameters have an axis

    def __post_init__(self) -> None:
        """Checks that the devices can share the work.

        Raises:
          InputError: they cannot.
        """
        if self.devices and self.shards % (len(self.devices) // self._rows):
            raise InputError(
                f"{len(self.devices)} devices cannot share {self.num_seeds} seeds of {self.shards} shards evenly: give "
                f"--seeds={len(self.devices)} or --set=shards={len(self.devices)}, or multiples of that"
            )

    @cached_property
    def mesh(self) -> Mesh | None:
        """The devices [seeds, devices of a seed]; None without any."""
        return Mesh(np.array(self.devices).reshape(self._rows, -1), (_SEEDS, _DEVICES)) if self.devices else None

    def one_shard(self, learner: Learner) -> Learner:
        """Returns what one shard of a learner runs, given that ``spread`` runs it."""
        if self.shards == 1:
            return learner
        config = learner.config
        sizes = {name: getattr(config, name) // self.shards for name in ("num_envs", "batch_size", "capacity")}
        axes = (_DEVICES, _SHARDS) if self.devices else (_SHARDS,)
        return dataclasses.replace(learner, config=dataclasses.replace(config, shards=1, **sizes), axes=axes)

    def worlds(self, params: EnvParams) -> EnvParams:
        """Returns the parameters of the environments, shard by shard if they differ."""
        if not self.worlds_differ or self.shards == 1:
            return params
        return jax.tree.map(lambda x: np.reshape(x, (self.shards, -1, *np.shape(x)[1:])), params)

    def spread(self, phase: Callable[..., Any], takes: Sequence[Part], gives: Sequence[Part]) -> Callable[..., Any]:
        """Lets a phase of one seed and shard run for all.

        Args:
          phase: a pure function that returns one part, or a tuple of several.
          takes: what its arguments are.
          gives: what it returns.
        """
        if self.shards > 1:
            ins, outs = self._prefixes(takes, gives, lambda axes: 0 if _DEVICES in axes else None)
            phase = jax.vmap(phase, ins, outs, axis_name=_SHARDS, axis_size=self._shards_of_device)
        if self.num_seeds > 1:
            ins, outs = self._prefixes(takes, gives, lambda axes: 0 if _SEEDS in axes else None)
            phase = jax.vmap(phase, ins, outs)
        if self.mesh is not None:
            ins, outs = self._prefixes(takes, gives, lambda axes: PartitionSpec(*axes))
            # Weights are the same on all devices of a seed, as gradients are averaged; JAX could only be told so by
            # marking every constant in the loops of the engine.
            phase = jax.shard_map(phase, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return phase

    def placed(self, part: Part, values: Any) -> Any:
        """Puts the leaves of an argument, the same in every process, where ``spread`` expects them."""
        where = self.shardings(part)

        def put(value: Any) -> jax.Array:
            value = np.asarray(value)
            if where is None:
                return jax.device_put(value)
            return jax.make_array_from_callback(value.shape, where, value.__getitem__)

        return jax.tree.map(put, values)

    def described(self, part: Part, like: Any) -> Any:
        """Returns the shapes of an argument, and where its leaves are."""
        if self.mesh is None:
            return like
        each = jax.tree.broadcast(self.shardings(part), like)
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like, each)

    def shardings(self, part: Part) -> Any:
        """Returns where ``spread`` has a part, as a prefix of its tree; None without devices."""
        mesh = self.mesh
        if mesh is None:
            return None
        return self._prefix(part, lambda axes: NamedSharding(mesh, PartitionSpec(*axes)))

    @property
    def _rows(self) -> int:
        """How many groups of seeds the devices are divided into."""
        return math.gcd(self.num_seeds, len(self.devices))

    @property
    def _shards_of_device(self) -> int:
        return self.shards // (len(self.devices) // self._rows) if self.devices else self.shards

    def _prefixes(self, takes: Sequence[Part], gives: Sequence[Part], value_of: Callable[..., Any]) -> tuple[Any, Any]:
        ins, outs = (tuple(self._prefix(part, value_of) for part in parts) for parts in (takes, gives))
        return ins, outs if len(outs) > 1 else outs[0]

    def _prefix(self, part: Part, value_of: Callable[[tuple[str, ...]], Any]) -> Any:
        """Returns ``value_of`` the axes of a part, leaf by leaf of what differs within it."""
        seeds = (_SEEDS,) if self.num_seeds > 1 else ()
        shards = (_DEVICES,) if self.shards > 1 else ()
        if part == "state":
            each = value_of((*seeds, *shards))
            return TrainState(value_of(seeds), each, each, each, each, each)
        return value_of({"world": shards if self.worlds_differ else (), "seed": seeds, "all": ()}[part])


def leads() -> bool:
    """Tells whether this is the process that writes and reports."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when all processes have come to the point that is named."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Returns for each flag whether any process has it set, as what follows must be the same in all."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(any(each)) for each in zip(*multihost_utils.process_allgather(np.array(flags)), strict=True))
