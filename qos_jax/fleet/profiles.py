"""Profiles of real LLMs on real GPUs: timing, KV memory and power, from measured kernels and published figures.

Timing was measured on each GPU for LLaMA-7B, or for an LLM of similar size; other LLMs are scaled from it. An iteration
reads all weight matrices once and multiplies each prompt token by them, so the step base and both prefill terms scale
with the parameters in these matrices. The KV slope scales with the KV bytes of a token, and the cost per sequence is
constant. The prefill line is the affine fit to prefills of 16 to 2,048 tokens. Its intercept lies below the step base,
which is the lower bound for short prompts. Output heads that share their weights with the embedding are not counted,
which neglects 3 % of mpt-7b's step and 9 % of chatglm-6b's.

KV memory is what vLLM has available: 90 % of the GPU's memory, less the weights and 1.237 GB for activations and the
CUDA context. For Llama-3.1-8B on an RTX 4090 these are 2,588 blocks, as vLLM 0.19 reported.

flan-t5-xxl has no profile, as the cost model of an iteration does not hold for an encoder-decoder.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.profile_fitting import load_profile, load_tables
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile, IterationTables

MEMORY_SHARE = 0.9  # vLLM's default gpu_memory_utilization
_LARGE_MEMORY_GB = 70 * 2**30 / 1e9  # from here on vLLM takes larger iterations
OVERHEAD_GB = 1.237  # 1.236 to 1.238 reproduce the 2,588 blocks


@dataclasses.dataclass(frozen=True)
class Llm:
    """Size of an LLM in 16-bit numbers."""

    weights_gb: float
    matrix_params: float  # 10^9 parameters in the matrices that each iteration reads
    kv_bytes_per_token: int  # 2 x layers x KV heads x head size x 2 bytes


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the experts' serving engine is set."""

    async_scheduling: bool  # an iteration is scheduled when the one before it starts
    prefix_cache: bool  # a preempted request finds its own blocks again
    token_budget: int | None  # tokens in one iteration; None for vLLM's default on the GPU


ENGINES = {
    "vllm": Engine(
        async_scheduling=True, prefix_cache=True, token_budget=None
    ),  # as vLLM runs by default, 0.14 to 0.32
    "vllm-sync": Engine(async_scheduling=False, prefix_cache=False, token_budget=TOKEN_BUDGET),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: memory, timing for LLaMA-7B, and power."""

    memory_gb: float  # as CUDA reports it
    step_base_ms: float
    kv_ms_per_1000_tokens: float
    prefill_base_ms: float
    prefill_ms_per_token: float
    per_sequence_ms: float
    idle_w: float  # with a model in memory and no request
    busy_w: float
    standby_w: float = 0.0  # after the last token of a batch
    standby_s: float = 0.0  # for this time; without a measurement, the GPU is idle at once


_LLAMA_7B = Llm(13.5, 6.607, 524_288)
_MPT_7B = Llm(13.3, 6.442, 524_288)
_LLAMA_13B = Llm(26.0, 12.852, 819_200)
_PYTHIA_12B = Llm(23.7, 11.584, 737_280)

# From the published configurations; matrix_params does not count weights that are shared with the embedding.
LLMS = {
    "alpaca-native": _LLAMA_7B,
    "koala-7B-HF": _LLAMA_7B,
    "llama-7b-hf-baize-lora-bf16": _LLAMA_7B,
    "mpt-7b": _MPT_7B,
    "mpt-7b-instruct": _MPT_7B,
    "chatglm-6b": Llm(12.3, 5.638, 458_752),
    "stablelm-tuned-alpha-7b": Llm(15.7, 7.558, 393_216),
    "vicuna-13b-1.1": _LLAMA_13B,
    "dolly-v2-12b": _PYTHIA_12B,
    "oasst-sft-4-pythia-12b-epoch-3.5": _PYTHIA_12B,
    "moss-moon-003-sft": Llm(33.4, 16.060, 835_584),
    "llama-3.1-8b": Llm(16.06, 7.505, 131_072),
    # By their names in AlpacaEval; the last two have multi-query attention and therefore a small KV cache.
    "alpaca-7b": _LLAMA_7B,
    "vicuna-7b": _LLAMA_7B,
    "baize-v2-7b": _LLAMA_7B,
    "vicuna-13b": _LLAMA_13B,
    "baize-v2-13b": _LLAMA_13B,
    "nous-hermes-13b": _LLAMA_13B,
    "wizardlm-13b": _LLAMA_13B,
    "oasst-sft-pythia-12b": _PYTHIA_12B,
    "pythia-12b-mix-sft": _PYTHIA_12B,
    "chatglm2-6b": Llm(12.5, 5.977, 28_672),
    "falcon-7b-instruct": Llm(14.4, 7.217, 8_192),
}

# Timing is from two sources. [LLMServingSim]: casys-kaist/LLMServingSim (RTX 4090 at 5daddb2), Llama-3.1-8B with output
# head, scaled to LLaMA-7B by parameters (6.607 / 7.505) and KV bytes. [Vidur]: microsoft/vidur 7d47513 and
# AKafakA/vidur_opt_scheduler 20bdc49, Llama-2-7B without output head, with the step base scaled by 6.607 / 6.476.
# KV slopes are measured on RTX 4090 and A100; the others assume 80 to 83 % of the memory bandwidth, as on RTX 4090.
# Memory is what CUDA reports in public logs. Busy power is the vendor's limit (TDP), idle power as published in the
# sources below. Standby was measured on A6000 only. A40, A100 and H100 keep their clocks up for as long as a model is
# loaded, so their idle power is already that of standby. RTX 4090, RTX 3090 and A30 are assumed to be idle at once, and
# their energy is a lower bound.
GPUS = {
    # [LLMServingSim]. 25,250,627,584 bytes in that run. 22 W in nvidia-smi at P8, github.com/RLinf/RLinf/issues/255.
    "RTX 4090": Gpu(25.250627584, 14.8, 0.64, 7.51, 0.083, 0.0445, idle_w=22.0, busy_w=450.0),
    # [LLMServingSim]. 23.56 GiB, noonghunna/club-3090 issue 58. 28 W with 21 GB loaded, its issue 127.
    "RTX 3090": Gpu(25.30, 18.9, 0.675, 13.59, 0.200, 0.0859, idle_w=28.0, busy_w=350.0),
    # [LLMServingSim]. 47.54 GiB in PyTorch logs. Power with Llama-3.1-8B in vLLM, from its figure 6 (e0f4911): 298 to
    # 299 W with 2 to 8 requests in a batch, 90 W for 17 to 18 s after the last token, then 33 W.
    "A6000": Gpu(51.05, 20.8, 0.822, 10.90, 0.1346, 0.0459, idle_w=33.0, busy_w=299.0, standby_w=90.0, standby_s=17.5),
    # [Vidur]. 46,068 MiB less 569 reserved and 110 W with a model loaded, NVIDIA/open-gpu-kernel-modules issue 874.
    "A40": Gpu(47.71, 24.0, 0.94, 16.09, 0.126, 0.11, idle_w=110.0, busy_w=300.0),
    # [Vidur]. 23.53 GiB, google/RB-Modulation issue 5. 33 W with PyTorch loaded, Stanford Yens guide.
    "A30": Gpu(25.27, 19.35, 0.677, 5.36, 0.1292, 0.036, idle_w=33.0, busy_w=165.0),
    # SXM, 80 GB. [Vidur]. 79.25 GiB, HiDream-ai/VAREdit issue 6. 80 W with a model loaded, arXiv 2605.23918.
    "A100": Gpu(85.09, 9.3, 0.32, 3.60, 0.065, 0.046, idle_w=80.0, busy_w=400.0),
    # SXM, 80 GB. [Vidur]. 79.11 GiB, vllm-project/vllm issue 27508. 121.7 W with a model loaded, arXiv 2605.23918.
    "H100": Gpu(84.94, 5.70, 0.189, 4.84, 0.0184, 0.0069, idle_w=121.7, busy_w=700.0),
}

# Pairs whose own kernels were measured: what qos-jax fit-profile wrote for [LLMServingSim], with errors and sources.
MEASURED = {
    ("llama-3.1-8b", "RTX 4090"): pathlib.Path(__file__).with_name("measured") / "llama-3.1-8b_rtx-4090.json",
}


def expert_profile(
    pairs: Sequence[tuple[str, str]], max_running: int = 32, max_waiting: int = 32, engine: str = "vllm-sync"
) -> ExpertProfile:
    """Builds the profile of N experts.

    Args:
        pairs: LLM and GPU of each expert, names in `LLMS` and `GPUS`.
        max_running: maximum number of requests in one iteration.
        max_waiting: maximum number of waiting requests; an expert with a full queue drops further ones.
        engine: of all experts, a name in `ENGINES`.

    Returns:
        The profile, fields are NumPy arrays [N]. Pairs in `MEASURED` have the coefficients of their own kernels, and
        `kernels` holds their tables if all of the pairs are such.

    Raises:
        InputError: there is no pair, a name is unknown, an LLM does not fit its GPU, or a limit is below 1.
    """
    if len(pairs) == 0:
        raise InputError("there are no experts; give one or more pairs of an LLM and a GPU")
    for name, limit in (("max_running", max_running), ("max_waiting", max_waiting)):
        if limit < 1:
            raise InputError(f"{name} is {limit}, must be at least 1")
    _check_names("LLM", [llm for llm, _ in pairs], list(LLMS))
    _check_names("GPU", [gpu for _, gpu in pairs], list(GPUS))
    llms, gpus = [LLMS[llm] for llm, _ in pairs], [GPUS[gpu] for _, gpu in pairs]
    size = np.array([llm.matrix_params / _LLAMA_7B.matrix_params for llm in llms])
    kv_bytes = np.array([float(llm.kv_bytes_per_token) for llm in llms])
    gpu_columns = {f.name: np.array([getattr(gpu, f.name) for gpu in gpus]) for f in dataclasses.fields(Gpu)}
    timing = {
        "step_base_s": gpu_columns["step_base_ms"] * size / 1e3,
        "prefill_base_s": gpu_columns["prefill_base_ms"] * size / 1e3,
        "prefill_per_token_s": gpu_columns["prefill_ms_per_token"] * size / 1e3,
        "per_sequence_s": gpu_columns["per_sequence_ms"] / 1e3,
        "per_kv_token_s": gpu_columns["kv_ms_per_1000_tokens"] * kv_bytes / _LLAMA_7B.kv_bytes_per_token / 1e6,
    }
    tables = {}
    for expert, pair in enumerate(pairs):
        if path := MEASURED.get((pair[0], pair[1])):
            tables[expert] = load_tables(path)
            for name, value in load_profile(path).items():
                timing[name][expert] = value
    return ExpertProfile(
        **timing,
        kernels=_side_by_side(list(tables.values())) if len(tables) == len(pairs) else None,
        kv_blocks=np.array([_kv_blocks(*pair) for pair in pairs]),
        max_running=np.full(len(pairs), max_running),
        max_waiting=np.full(len(pairs), max_waiting),
        network_s=np.zeros(len(pairs)),
        idle_w=gpu_columns["idle_w"],
        busy_w=gpu_columns["busy_w"],
        standby_w=gpu_columns["standby_w"],
        standby_s=gpu_columns["standby_s"],
        kv_block_gb=BLOCK_SIZE_TOKENS * kv_bytes / 1e9,
        **engine_fields(engine, [gpu for _, gpu in pairs]),
    )


def engine_fields(name: str, gpus: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the fields [N] of `ExpertProfile` that the engine sets.

    Args:
        name: of the engine, in `ENGINES`.
        gpus: of the N experts, names in `GPUS`.

    Raises:
        InputError: the engine is unknown.
    """
    _check_names("engine", [name], list(ENGINES))
    engine = ENGINES[name]
    return {
        "token_budget": np.array([engine.token_budget or _default_token_budget(gpu) for gpu in gpus]),
        "async_scheduling": np.full(len(gpus), engine.async_scheduling),
        "prefix_cache": np.full(len(gpus), engine.prefix_cache),
    }


def _default_token_budget(gpu_name: str) -> int:
    """Returns vLLM's default of `max_num_batched_tokens` on a GPU (vllm/engine/arg_utils.py, 0.32)."""
    large = GPUS[gpu_name].memory_gb >= _LARGE_MEMORY_GB and gpu_name != "A100"
    return 8192 if large else TOKEN_BUDGET


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


def _kv_blocks(llm_name: str, gpu_name: str) -> int:
    """Returns the number of KV blocks that fit in memory beside the weights."""
    llm, gpu = LLMS[llm_name], GPUS[gpu_name]
    free_gb = MEMORY_SHARE * gpu.memory_gb - llm.weights_gb - OVERHEAD_GB
    blocks = math.floor(free_gb * 1e9 / (BLOCK_SIZE_TOKENS * llm.kv_bytes_per_token))
    if blocks < 1:
        raise InputError(
            f"LLM {llm_name} with {llm.weights_gb:g} GB of weights does not fit {gpu_name}, "
            f"which has {MEMORY_SHARE * gpu.memory_gb - OVERHEAD_GB:.1f} GB for weights and KV cache"
        )
    return blocks


def _check_names(kind: str, names: Sequence[str], legal: Sequence[str]) -> None:
    unknown = [name for name in names if name not in legal]
    if unknown:
        raise InputError(f"{kind} {unknown[0]!r} is unknown; choose from {', '.join(legal)}")
