"""Serving engines: their defaults, and the settings of one. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses

from qos_jax.fleet.catalogue import Device
from qos_jax.sim.constants import BLOCK_SIZE_TOKENS, TOKEN_BUDGET

MEMORY_SHARE = 0.9  # vLLM's default gpu_memory_utilization
_LARGE_MEMORY_GB = 70 * 2**30 / 1e9  # from here on vLLM takes larger iterations


@dataclasses.dataclass(frozen=True)
class Engine:
    """What an engine does by default."""

    async_scheduling: bool  # an iteration is scheduled when the one before it starts
    prefix_cache: bool  # a preempted request finds its own blocks again
    token_budget: int | None  # tokens in one iteration; None for vLLM's default on the device


ENGINES = {
    "vllm": Engine(
        async_scheduling=True, prefix_cache=True, token_budget=None
    ),  # as vLLM runs by default, 0.14 to 0.32
    "vllm-sync": Engine(async_scheduling=False, prefix_cache=False, token_budget=TOKEN_BUDGET),
}

KINDS = ENGINES | {
    "sglang": Engine(async_scheduling=True, prefix_cache=True, token_budget=None),
    "llama.cpp": Engine(async_scheduling=False, prefix_cache=False, token_budget=TOKEN_BUDGET),
}
"""What an expert of a fleet file may run. All are simulated by vLLM's rule of scheduling, with their own switches:
sglang overlaps scheduling, too; llama.cpp does not, and its logical batch is 2,048 tokens."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How the engine of one expert is set; None takes the default of its kind."""

    kind: str = "vllm"  # of KINDS
    max_num_seqs: int = 32  # requests in one iteration
    max_waiting: int = 32  # requests in the queue; a full one drops further ones
    token_budget: int | None = None  # tokens in one iteration
    block_size: int = BLOCK_SIZE_TOKENS  # tokens of a KV block
    memory_share: float = MEMORY_SHARE  # of the device's memory
    kv_blocks: int | None = None  # instead of what the memory leaves
    prefix_cache: bool | None = None
    async_scheduling: bool | None = None

    def resolved(self, device_name: str, device: Device) -> Engine:
        """Returns the switches and the token budget on a device."""
        default = KINDS[self.kind]
        budget = self.token_budget or default.token_budget or default_token_budget(device_name, device)
        return Engine(
            async_scheduling=default.async_scheduling if self.async_scheduling is None else self.async_scheduling,
            prefix_cache=default.prefix_cache if self.prefix_cache is None else self.prefix_cache,
            token_budget=budget,
        )


def default_token_budget(device_name: str, device: Device) -> int:
    """Returns vLLM's default of `max_num_batched_tokens` on a device (vllm/engine/arg_utils.py, 0.32)."""
    large = device.memory_gb >= _LARGE_MEMORY_GB and device_name != "A100"
    return 8192 if large else TOKEN_BUDGET
