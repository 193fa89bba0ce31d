"""Schedules random workloads with vLLM's own Scheduler and AsyncScheduler classes, without a model, on a virtual clock.

A program of its own, as vLLM needs an environment of its own: ``python tests/helpers/vllm_scheduler.py 50 FOLDER``
writes 50 workloads with vLLM's answers into ``FOLDER/golden-scheduler``, in the form that tests/sim/
test_golden_scheduler.py compares the engine and its reference with. See ``make vllm``.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

# Of the two, the one that runs without Triton; both see the same batches.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE_TOKENS = 16
MAX_MODEL_LEN = 32_768
MODES = {
    "async_and_sync": {"sync": (False, False), "async": (True, False)},
    "own_prefix_cache": {"prefix": (False, True), "async_prefix": (True, True)},
}  # file -> mode -> (asynchronous scheduling, prefix cache)

Workload = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Regime:
    """Ranges of what a workload draws; token counts are log-uniform, the rest is uniform."""

    prompts: tuple[int, int] = (4, 900)
    outputs: tuple[int, int] = (1, 400)
    spare_blocks: tuple[int, int] = (20_000, 20_000)  # beyond those that the largest request needs
    max_running: tuple[int, int] = (16, 256)
    token_budget: tuple[int, ...] = (2048,)
    mean_gap_s: tuple[float, float] = (0.02, 0.6)
    burst: int = 1  # requests at the same instant


REGIMES = {
    "light": Regime(mean_gap_s=(0.2, 1.0)),
    "memory": Regime(spare_blocks=(20, 150)),
    "tight": Regime(prompts=(4, 300), outputs=(1, 300), spare_blocks=(0, 30), mean_gap_s=(0.01, 0.2)),
    "long": Regime(prompts=(500, 12_000)),
    "longmem": Regime(prompts=(300, 7000), spare_blocks=(0, 300), mean_gap_s=(0.02, 0.2)),
    "budget": Regime(spare_blocks=(0, 100), token_budget=(16, 64, 256, 512), mean_gap_s=(0.02, 0.3)),
    "burst": Regime(prompts=(4, 2500), spare_blocks=(50, 400), burst=20),
    "running": Regime(max_running=(1, 8)),
    "answers": Regime(prompts=(1, 200), outputs=(1, 4), spare_blocks=(5, 60), mean_gap_s=(0.002, 0.05)),
}


def draw(seed: int) -> Workload:
    """The workload of a seed; the regimes take turns."""
    rng = random.Random(seed)
    name = list(REGIMES)[seed % len(REGIMES)]
    regime = REGIMES[name]
    size = rng.randint(30, 90)

    def tokens(low: int, high: int) -> list[int]:
        return [round(low * (high / low) ** rng.random()) for _ in range(size)]

    prompt_tokens, output_tokens = tokens(*regime.prompts), tokens(*regime.outputs)
    largest = max(p + o for p, o in zip(prompt_tokens, output_tokens, strict=True))
    mean_gap_s = rng.uniform(*regime.mean_gap_s) * regime.burst
    arrival_s, clock_s = [], 0.0
    for j in range(size):
        clock_s += rng.expovariate(1 / mean_gap_s) if j % regime.burst == 0 else 0.0
        arrival_s.append(clock_s)
    token_budget = rng.choice(regime.token_budget)
    return {
        "regime": name,
        "step_base_s": rng.uniform(0.005, 0.03),
        "prefill_base_s": rng.uniform(0.0, 0.03),
        "prefill_per_token_s": rng.uniform(2e-5, 2e-4),
        "per_sequence_s": rng.uniform(0.0, 5e-4),
        "per_kv_token_s": rng.uniform(0.0, 2e-6),
        "kv_blocks": -(-largest // BLOCK_SIZE_TOKENS) + rng.randint(*regime.spare_blocks),
        "max_running": min(rng.randint(*regime.max_running), token_budget),  # vLLM wants no more places than tokens
        "token_budget": token_budget,
        "arrival_s": arrival_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }


def make_scheduler(workload: Workload, *, asynchronous: bool, prefix_cache: bool) -> Scheduler:
    """vLLM's scheduler for the limits of a workload."""
    budget = workload.get("token_budget", 2048)
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
            max_num_seqs=workload["max_running"],
            max_num_batched_tokens=budget,
            async_scheduling=asynchronous,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE_TOKENS, enable_prefix_caching=prefix_cache),
        device_config=DeviceConfig("cpu"),
    )
    # What it asks a model for. A real model configuration would need weights or a registry of models.
    config.model_config = SimpleNamespace(
        uses_mrope=False,
        is_encoder_decoder=False,
        max_model_len=MAX_MODEL_LEN,
        runner_type="generate",
        is_diffusion=False,
        supports_multimodal_inputs=False,
        return_sampling_mask=False,
        multimodal_config=None,
        skip_tokenizer_init=True,
    )
    blocks = workload["kv_blocks"] + 1  # it keeps one as the null block
    config.cache_config.num_gpu_blocks = blocks
    attention = FullAttentionSpec(block_size=BLOCK_SIZE_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return (AsyncScheduler if asynchronous else Scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], attention)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE_TOKENS,
    )


def make_requests(workload: Workload) -> list[Request]:
    """Requests that share no block of their prompts."""
    hasher = get_request_block_hasher(BLOCK_SIZE_TOKENS, sha256)
    return [
        Request(
            request_id=str(j),
            prompt_token_ids=[j + 1] * prompt,
            sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
            pooling_params=None,
            arrival_time=arrival_s,
            block_hasher=hasher,
        )
        for j, (arrival_s, prompt, output) in enumerate(
            zip(workload["arrival_s"], workload["prompt_tokens"], workload["output_tokens"], strict=True)
        )
    ]


def duration(workload: Workload, batch: SchedulerOutput, requests: list[Request]) -> float:
    """Seconds of an iteration by the five coefficients; 0 of an empty one. Valid just after it was scheduled."""
    if not batch.num_scheduled_tokens:
        return 0.0
    prefill_tokens = decoded_kv_tokens = 0
    for name, take in batch.num_scheduled_tokens.items():
        request = requests[int(name)]
        cached = request.num_computed_tokens - take
        if take == 1 and cached >= request.num_prompt_tokens and not request.is_prefill_chunk:
            decoded_kv_tokens += cached
        else:
            prefill_tokens += take
    prefill_s = workload["prefill_base_s"] + workload["prefill_per_token_s"] * prefill_tokens if prefill_tokens else 0.0
    return (
        max(workload["step_base_s"], prefill_s)
        + workload["per_sequence_s"] * len(batch.num_scheduled_tokens)
        + workload["per_kv_token_s"] * decoded_kv_tokens
    )


def sampled(batch: SchedulerOutput, requests: list[Request]) -> ModelRunnerOutput:
    """A token for each request that a batch computes to its end. Valid just after the batch was scheduled."""
    names = list(batch.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[] if requests[int(name)].is_prefill_chunk else [int(name) + 1] for name in names],
    )


def run(workload: Workload, *, asynchronous: bool, prefix_cache: bool) -> Iterator[tuple[int, float, int]]:
    """Yields (request, seconds, preemptions) at each token, by the loop of vLLM's EngineCore.step_with_batch_queue."""
    scheduler = make_scheduler(workload, asynchronous=asynchronous, prefix_cache=prefix_cache)
    requests = make_requests(workload)
    to_come = collections.deque(requests)
    under_way: collections.deque[tuple[SchedulerOutput, ModelRunnerOutput, float]] = collections.deque()
    clock_s = 0.0
    while to_come or under_way or scheduler.has_unfinished_requests():
        while to_come and to_come[0].arrival_time <= clock_s:
            scheduler.add_request(to_come.popleft())
        if scheduler.has_requests():
            batch = scheduler.schedule()
            under_way.append((batch, sampled(batch, requests), duration(workload, batch, requests)))
            if len(under_way) <= asynchronous:
                continue
        elif not under_way:
            clock_s = to_come[0].arrival_time
            continue
        batch, tokens, duration_s = under_way.popleft()
        clock_s += duration_s
        for outputs in scheduler.update_from_output(batch, tokens).values():
            for output in outputs.outputs:
                if output.new_token_ids:
                    j = int(output.request_id)
                    yield j, clock_s, requests[j].num_preemptions


def answer(workload: Workload, *, asynchronous: bool, prefix_cache: bool) -> dict[str, list[Any]]:
    """First token, finish [J] s and preemptions [J] by vLLM; fails if it did not emit every token."""
    times: list[list[float]] = [[] for _ in workload["arrival_s"]]
    preemptions = [0] * len(times)
    for j, time_s, preempted in run(workload, asynchronous=asynchronous, prefix_cache=prefix_cache):
        times[j].append(time_s)
        preemptions[j] = preempted
    if [len(emitted) for emitted in times] != workload["output_tokens"]:
        raise RuntimeError(f"vLLM has not emitted every token of a workload: {workload}")
    return {
        "finish_s": [emitted[-1] for emitted in times],
        "first_token_s": [emitted[0] for emitted in times],
        "preemptions": preemptions,
    }


def solve(seed: int) -> dict[str, Workload]:
    """The workload of a seed with vLLM's answers, for each file."""
    workload = draw(seed)
    return {
        name: workload
        | {
            mode: answer(workload, asynchronous=asynchronous, prefix_cache=prefix_cache)
            for mode, (asynchronous, prefix_cache) in modes.items()
        }
        for name, modes in MODES.items()
    }


def main(count: int, folder: pathlib.Path) -> None:
    """Writes ``count`` workloads with the answers of all modes."""
    init_none_hash(sha256)
    with multiprocessing.get_context("fork").Pool() as pool:  # to import vLLM takes 10 s
        rows = pool.map(solve, range(count), chunksize=1)
    folder = folder / "golden-scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODES:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row[name]) + "\n" for row in rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
