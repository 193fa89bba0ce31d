"""The state of the engine, and sums over its slots.

Shapes: ``L`` stands for any leading axes (environments, experts), ``S`` for the slots of one expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.sim.types import BLOCK_SIZE_TOKENS
from qos_jax.sim.validation import MAX_SIZE, checked_whole


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Sizes that are static under jit; a change recompiles."""

    slots: int  # S, requests on one expert, running and waiting
    block_size: int = BLOCK_SIZE_TOKENS  # tokens per KV block

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
          InputError: one is no whole number, or out of range.
        """
        checked_whole("slots", self.slots, 1)
        checked_whole("block_size", self.block_size, 1, MAX_SIZE)


class Slots(struct.PyTreeNode):
    """Requests on the experts in arrival order; a slot with 0 ``output_tokens`` is empty.

    Behind the last slot that is used all fields are 0.
    """

    prompt_tokens: Array  # [L, S] int32
    output_tokens: Array  # [L, S] int32
    generated: Array  # [L, S] int32 tokens emitted
    computed: Array  # [L, S] int32 tokens in the KV cache, those of scheduled iterations included; 0 while waiting
    emitting: Array  # [L, S] bool: the scheduled iteration will emit a token; asynchronous scheduling only
    decoding: Array  # [L, S] bool: ... by decoding, so that the newest token is not in the prefix cache yet
    cached_blocks: Array  # [L, S] int32 blocks that a preempted request would find again, or has found
    taken_at: Array  # [L, S] int32 value of ``taken_blocks`` at which the last of these is taken
    preemptions: Array  # [L, S] int32
    arrival_s: Array  # [L, S] s, relative to now
    first_token_s: Array  # [L, S] s since arrival; set once generated > 0
    finish_s: Array  # [L, S] s since arrival; set once finished
    payload: Any  # pytree with leaves [L, S]: the caller's data of each request

    @property
    def live(self) -> Array:
        """[L, S] bool: running or waiting."""
        return self.generated < self.output_tokens

    @property
    def running(self) -> Array:
        """[L, S] bool."""
        return self.live & (self.computed > 0)

    @property
    def waiting(self) -> Array:
        """[L, S] bool."""
        return self.live & (self.computed == 0)

    @property
    def finished(self) -> Array:
        """[L, S] bool: finished and not yet removed by ``compact``."""
        return (self.output_tokens > 0) & ~self.live


class ExpertState(struct.PyTreeNode):
    """The state of every expert, and integrals over time since they were last reset."""

    slots: Slots
    used: Array  # [L] int32 slots from the first on that hold a request, or have held one since they were compacted
    running: Array  # [L] int32 requests
    waiting: Array  # [L] int32 requests
    clock_s: Array  # [L] s, relative to now: when the next iteration may start
    scheduled_s: Array  # [L] s that the scheduled iteration will take, 0 if none is; asynchronous scheduling only
    taken_blocks: Array  # [L] int32 blocks taken from the head of the free queue, less those put there; may wrap around
    standby_left_s: Array  # [L] s of standby to come if no request does; as before the iterations that run now
    busy_s: Array  # [L] s of iterations
    standby_s: Array  # [L] s of standby
    kv_block_s: Array  # [L] blocks x s held during iterations
    steady: Array  # [L] bool: it only decodes until a request finishes, comes or lacks memory
    passes: Array  # [L] int32 passes through the engine's loops: the simulator's own work
    prefixes: Any = None  # pytree with leaves [L, ...]: the caller's, of what finished requests left in the cache

    @property
    def live(self) -> Array:
        """[L] int32 requests, running or waiting."""
        return self.running + self.waiting


def of_slots(values: Any) -> Array:
    """Returns values of the lanes [L] as [L, 1], to broadcast over the slots."""
    return jnp.asarray(values)[..., None]


def prefix_sums(dtype: Any, *columns: Array) -> list[Array]:
    """Returns the inclusive prefix sums over the slots of each integer column [L, S], below 2^24 exact in float32.

    On CPUs, the product with a triangular matrix of ones is many times faster than a scan; on GPUs it is as fast.
    """
    stacked = jnp.stack([column.astype(dtype) for column in columns])
    triangle = jnp.triu(jnp.ones((stacked.shape[-1],) * 2, dtype))
    sums = jnp.matmul(stacked, triangle, precision=lax.Precision.HIGHEST)
    return list(sums.astype(jnp.int32))  # larger ones become the largest int32


def slot_numbers(slots: Array) -> Array:
    """Returns the number of each slot in an array of that shape [L, S], int32."""
    return lax.broadcasted_iota(jnp.int32, slots.shape, slots.ndim - 1)


def totals(*columns: Array) -> list[Array]:
    """Returns the sum over the slots of each column [L, S], as one program for all of them."""
    return list(jnp.sum(jnp.stack([column.astype(jnp.int32) for column in columns]), -1, dtype=jnp.int32))


def total(values: Array) -> Array:
    """Returns the sum over the slots as int32, also when 64-bit types are enabled."""
    return jnp.sum(values, -1, dtype=jnp.int32)
