"""Profiles of experts for the simulator: timing, KV memory and power of LLMs on devices, as arrays.

How timing is got is in ``scaling``, and what is known of LLMs and devices in ``catalogue``. KV memory is what vLLM has
available: 90 % of the device's memory, less the weights and 1.237 GB for activations and the CUDA context. For
Llama-3.1-8B on an RTX 4090 these are 2,588 blocks, as vLLM 0.19 reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.engines import ENGINES, EngineSettings
from qos_jax.fleet.experts import Expert, experts_of
from qos_jax.fleet.profile_fitting import tables_from_json
from qos_jax.io.text_files import shown
from qos_jax.sim.types import ExpertProfile, IterationTables, SharedCards
from qos_jax.sim.validation import checked_tables


def expert_profile(
    pairs: Sequence[tuple[str, str]], max_running: int = 32, max_waiting: int = 32, engine: str = "vllm-sync"
) -> ExpertProfile:
    """Builds the profile of N experts.

    Args:
        pairs: LLM and device of each expert, names in `catalogue.LLMS`, with `:FORMAT` if the weights are not in 16
            bit, and `catalogue.DEVICES`.
        max_running: maximum number of requests in one iteration.
        max_waiting: maximum number of waiting requests; an expert with a full queue drops further ones.
        engine: of all experts, a name in `ENGINES`.

    Returns:
        The profile, fields are NumPy arrays [N]; see `profile_of`.

    Raises:
        InputError: there is no pair, a name is unknown, an LLM does not fit its device, or a limit is below 1.
    """
    for name, limit in (("max_running", max_running), ("max_waiting", max_waiting)):
        if limit < 1:
            raise InputError(f"{name} is {limit}, must be at least 1")
    check_engine(engine)
    return profile_of(experts_of(pairs, max_running, max_waiting, engine))


def profile_of(experts: Sequence[Expert]) -> ExpertProfile:
    """Builds the profile of N experts.

    Returns:
        The profile, fields are NumPy arrays [N]. `kernels` holds the tables of all experts, if all of them have some:
        those whose kernels were measured, and those whose timing follows from the law of scaling. Of LLMs that share a
        card, the idle power is that of the first, and the others have what they take beyond it.

    Raises:
        InputError: there is no expert, or an LLM does not fit its device.
    """
    if not experts:
        raise InputError("there are no experts; give one or more pairs of an LLM and a GPU")
    timings = [expert.timing() for expert in experts]
    tables = [
        checked_tables(tables_from_json(timing.kernels), 1, name=f"{expert.name}: kernels")
        for expert, timing in zip(experts, timings, strict=True)
        if timing.kernels is not None
    ]
    block_bytes = np.array([expert.engine.block_size * float(expert.llm.kv_bytes_per_token) for expert in experts])
    cards = _shared_cards(experts)
    shares = np.zeros(len(experts), bool) if cards is None else cards.number < np.arange(len(experts))
    power_w = {
        name: np.array([getattr(expert.device, name) for expert in experts])
        for name in ("idle_w", "busy_w", "standby_w")
    }
    return ExpertProfile(
        **{name: np.array([timing.coefficients[name] for timing in timings]) for name in timings[0].coefficients},
        kernels=_side_by_side(tables) if len(tables) == len(experts) else None,
        kv_blocks=np.array([expert.kv_blocks for expert in experts]),
        max_running=np.array([expert.engine.max_num_seqs for expert in experts]),
        max_waiting=np.array([expert.engine.max_waiting for expert in experts]),
        network_s=np.array([expert.link_delay_s for expert in experts]),
        **{
            name: np.where(shares, np.maximum(watts - power_w["idle_w"], 0.0), watts) for name, watts in power_w.items()
        },
        standby_s=np.array([expert.device.standby_s for expert in experts]),
        cards=cards,
        kv_block_gb=block_bytes / 1e9,
        **engine_fields(experts),
    )


def _shared_cards(experts: Sequence[Expert]) -> SharedCards | None:
    """Returns which experts share a card: its number is that of its first expert."""
    cards = [expert.card if expert.card is not None else number for number, expert in enumerate(experts)]
    if len(set(cards)) == len(cards):
        return None
    number = np.array([cards.index(card) for card in cards], np.int32)
    return SharedCards(number, np.array([expert.load_s for expert in experts]))


def engine_fields(experts: Sequence[Expert], engine: str | None = None) -> dict[str, np.ndarray]:
    """Returns the fields [N] of `ExpertProfile` that the engine sets.

    Args:
        experts: the N experts.
        engine: a name in `ENGINES` that all of them run by its defaults, instead of their own settings.

    Raises:
        InputError: the engine is unknown.
    """
    if engine is not None:
        check_engine(engine)
    engines = [
        (expert.engine if engine is None else EngineSettings(engine)).resolved(expert.device_name, expert.device)
        for expert in experts
    ]
    names = ("token_budget", "async_scheduling", "prefix_cache")
    return {name: np.array([getattr(each, name) for each in engines]) for name in names}


def check_engine(name: str) -> None:
    """Checks the name of an engine.

    Raises:
        InputError: it is not in `ENGINES`.
    """
    if not isinstance(name, str) or name not in ENGINES:
        raise InputError(f"engine {shown(name)} is unknown; choose from {', '.join(ENGINES)}")


def _side_by_side(tables: Sequence[IterationTables]) -> IterationTables:
    """Returns the tables of several experts as one; shorter ones get knots at which their last slope goes on."""

    def joined(*rows: np.ndarray) -> np.ndarray:
        longest = max(row.shape[-1] for row in rows)
        return np.concatenate([row if row.ndim == 1 else _extended(row, longest) for row in rows])

    return jax.tree.map(joined, *tables)


def _extended(row: np.ndarray, length: int) -> np.ndarray:
    """Returns ``row`` [1, K] as [1, ``length``]: each further number is larger by its last step."""
    further = np.arange(1, length - row.shape[-1] + 1)
    return np.append(row, row[:, -1:] + (row[:, -1:] - row[:, -2:-1]) * further, axis=-1)
