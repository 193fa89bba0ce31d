"""Experts: an LLM on a device behind an engine, with what follows from them. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import DEVICES, MEASURED, Device, Llm, llm_named
from qos_jax.fleet.engines import EngineSettings
from qos_jax.fleet.profile_file import errors_in, load_kernels, load_profile, read_profile, source_in
from qos_jax.fleet.scaling import Timing, timing_of

OVERHEAD_GB = 1.237  # activations and CUDA context; 1.236 to 1.238 reproduce the 2,588 blocks of vLLM 0.19


@dataclasses.dataclass(frozen=True)
class Expert:
    """One LLM on one device."""

    llm_name: str
    device_name: str
    llm: Llm
    device: Device
    engine: EngineSettings
    label: str | None = None  # its name; that of the LLM and of the device by default
    answers_of: str | None = None  # the LLM of a quality table or generator that answers like it; its own by default
    link_delay_s: float = 0.0  # s of network delay, added to the latency only
    url: str | None = None  # of the real engine, for a gateway
    model: str | None = None  # what the real engine calls its LLM; ``llm_name`` by default
    api_key_env: str | None = None  # environment variable with the key of the real engine
    profile: str | None = None  # file of fitted timing, instead of what the catalogue knows
    card: str | None = None  # name of a card that several LLMs share; None for a card of its own
    load_s: float = 0.0  # s to load its LLM in place of another one on the card

    @property
    def name(self) -> str:
        """Its own name, or those of LLM and device."""
        return self.label or f"{self.llm_name} @ {self.device_name}"

    @property
    def answers(self) -> str:
        """Whose answers it gives: the LLM's name without the format of its weights, unless it says another."""
        return self.answers_of or self.llm_name.partition(":")[0]

    @property
    def kv_blocks(self) -> int:
        """KV blocks that fit in memory beside the weights.

        Raises:
          InputError: there is no room for any.
        """
        if self.engine.kv_blocks is not None:
            return self.engine.kv_blocks
        llm, device = self.llm, self.device
        free_gb = self.engine.memory_share * device.memory_gb - llm.weights_gb - OVERHEAD_GB
        blocks = math.floor(free_gb * 1e9 / (self.engine.block_size * llm.kv_bytes_per_token))
        if blocks < 1:
            room_gb = self.engine.memory_share * device.memory_gb - OVERHEAD_GB
            raise InputError(
                f"LLM {self.llm_name} with {llm.weights_gb:g} GB of weights does not fit {self.device_name}, "
                f"which has {room_gb:.1f} GB for weights and KV cache"
            )
        return blocks

    def timing(self) -> Timing:
        """Returns its timing, and how it was got.

        Raises:
          InputError: the file of its profile cannot be used.
        """
        path = self.profile or MEASURED.get((self.llm_name, self.device_name))
        return timing_of(self.llm, self.device) if path is None else _measured_timing(str(path))


def experts_of(
    pairs: Sequence[tuple[str, str]], max_running: int = 32, max_waiting: int = 32, engine: str = "vllm-sync"
) -> tuple[Expert, ...]:
    """Returns the experts of names in the catalogue; see ``expert_profile``."""
    settings = EngineSettings(engine, max_running, max_waiting)
    experts = []
    for llm, device in pairs:
        found = llm_named(llm)
        if device not in DEVICES:
            raise InputError(f"GPU {device!r} is unknown; choose from {', '.join(DEVICES)}")
        experts.append(Expert(llm, device, found, DEVICES[device], settings))
    return tuple(experts)


def _measured_timing(path: str) -> Timing:
    profile = read_profile(path)
    kernels = load_kernels(path) if profile.get("version", 1.0) != 1.0 else None
    origin, basis = source_in(profile, path)
    step, prompt = errors_in(profile, path, "hinge" if kernels is None else "tables")
    file = path.rpartition("/")[2]
    return Timing(load_profile(path), kernels, origin, f"{basis}, {file}", step, prompt)
