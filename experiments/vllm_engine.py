"""Measures a real vLLM on one CPU core at loads that operators choose; ``experiments.vllm_fidelity`` compares.

A program of its own, as vLLM needs an environment of its own:

make .venv-vllm/installed
.venv-vllm/bin/python -m experiments.vllm_engine --out=runs/vllm-cpu

The engine runs in this process, and its clock is the CPU time of its steps. Even that differs by a third from minute to
minute on a shared machine, so it is divided by how much slower than at the start a fixed matrix product is at the time.
While nobody is there the clock jumps to the next arrival. The model is a LLaMA of 27 million random weights. The engine
schedules synchronously, as it does in one process.

A second engine like it serves other requests for a profile. The two take turns of a second, so that both see the same
machine: a matrix product shows not all of how fast it is at the time.

Written is one folder for each load: the run in the format of ``qos-jax fidelity``, ``iterations.csv`` with what each
iteration computed and how long it took, and ``profile.csv``, the same of the other engine.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.llm_engine import LLMEngine

from experiments.vllm_server import write_model

KV_BLOCKS = 128  # usable ones; vLLM keeps one more as the null block
BLOCK_SIZE_TOKENS = 32  # the smallest with which vLLM starts on a CPU
MAX_RUNNING = 16
TOKEN_BUDGET = 512
MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 1500, 300
PROFILE_CONCURRENCY = (1, 2, 3, 4, 6, 8, 12, 16)
PROBES_PER_PLACE = 4  # so that all numbers of requests are seen in about as many iterations
TICK_S = 1.0
TURN_S = 1.0  # CPU time of one engine, then of the other
PACE_EVERY_S = 0.2  # CPU time of the engine
_VOCABULARY = 1024


@dataclasses.dataclass
class Iteration:
    """What one iteration computed, as ``qos_jax.fleet.profile_fitting.Iterations`` has it, and its time."""

    prompt_tokens: int = 0
    requests: int = 0
    kv_tokens: int = 0
    prefix_tokens: int = 0
    pairs: float = 0.0
    decodes: int = 0
    time_s: float = 0.0


@dataclasses.dataclass
class Request:
    """One request, with the times of its tokens by the clock of the engine."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    generated: int = 0


class Pace:
    """How slow the core is, by the time of a matrix product as large as the model, relative to the first ones."""

    def __init__(self) -> None:
        """Measures the first ones."""
        lot = torch.Generator().manual_seed(0)
        self.weights = torch.randn(36, 512, 1408, generator=lot)
        self.tokens = torch.randn(8, 512, generator=lot)
        for _ in range(10):
            self._product_s()
        self.start_s = statistics.median(self._product_s() for _ in range(50))
        self.recent_s = [self.start_s]
        self.slowness = 1.0

    def measure(self) -> None:
        """Measures it now; the median of the last five counts."""
        self.recent_s = [*self.recent_s[-4:], self._product_s()]
        self.slowness = statistics.median(self.recent_s) / self.start_s

    def _product_s(self) -> float:
        began_s = time.process_time()
        for weights in self.weights:
            self.tokens @ weights
        return time.process_time() - began_s


class Engine:
    """vLLM in this process, and its clock."""

    def __init__(self, model: pathlib.Path, pace: Pace) -> None:
        """Starts vLLM."""
        self.clock_s = self.unpaced_s = 0.0
        self.pace = pace
        self.iteration = Iteration()
        self.requests: dict[str, Request] = {}
        self.added = 0
        self.llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                load_format="dummy",
                dtype="float32",
                block_size=BLOCK_SIZE_TOKENS,
                num_gpu_blocks_override=KV_BLOCKS + 1,
                max_num_seqs=MAX_RUNNING,
                max_num_batched_tokens=TOKEN_BUDGET,
                max_model_len=2048,
                enforce_eager=True,
                skip_tokenizer_init=True,
                async_scheduling=False,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        self.scheduler = self.llm.engine_core.engine_core.scheduler
        schedule = self.scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> SchedulerOutput:
            output = schedule(*args, **kwargs)
            self.iteration = self._composition(output)
            return output

        self.scheduler.schedule = noted

    def add(self, request: Request) -> None:
        """Hands a request over; its prompt is random, so that no two share a prefix."""
        name, lot = str(self.added), random.Random(self.added)
        self.added += 1
        request.queued_s = self.clock_s
        self.requests[name] = request
        sampling = SamplingParams(
            max_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = [lot.randrange(3, _VOCABULARY) for _ in range(request.prompt_tokens)]
        self.llm.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> Iteration:
        """Runs one iteration, after which the clock has moved on and its tokens are there."""
        began_s = time.process_time()
        outputs = self.llm.step()
        cpu_s = time.process_time() - began_s
        self.unpaced_s += cpu_s
        if self.unpaced_s > PACE_EVERY_S:
            self.pace.measure()
            self.unpaced_s = 0.0
        self.iteration.time_s = cpu_s / self.pace.slowness
        self.clock_s += self.iteration.time_s
        for output in outputs:
            request = self.requests[output.request_id]
            if request.generated == 0:
                request.first_token_s = self.clock_s
            request.generated += len(output.outputs[0].token_ids)
            request.last_token_s = self.clock_s
            if output.finished:
                del self.requests[output.request_id]
        return self.iteration

    def _composition(self, output: SchedulerOutput) -> Iteration:
        cached = output.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        batch = Iteration()
        for internal, tokens in output.num_scheduled_tokens.items():
            request = self.requests[internal.split("-")[0]]  # vLLM adds a random end to each name
            computed = before[internal]
            batch.requests += 1
            if tokens == 1 and request.generated and computed + 1 == request.prompt_tokens + request.generated:
                batch.decodes += 1
                batch.kv_tokens += computed
            else:
                batch.prompt_tokens += tokens
                batch.prefix_tokens += computed
                batch.pairs += tokens * (computed + tokens / 2)
        return batch


def users(seed: int, count: int) -> list[Request]:
    """The requests of users: log-normal lengths, medians 120 and 40 tokens."""
    lot = random.Random(seed)
    return [
        Request(
            min(max(round(lot.lognormvariate(4.8, 1.0)), 8), MOST_PROMPT_TOKENS),
            min(max(round(lot.lognormvariate(3.7, 0.8)), 2), MOST_OUTPUT_TOKENS),
        )
        for _ in range(count)
    ]


def probes(seed: int, count: int) -> list[Request]:
    """Requests for a profile: prompts and answers of all lengths, evenly over their logarithms."""
    lot = random.Random(seed)
    return [
        Request(round(8 * (MOST_PROMPT_TOKENS / 8) ** lot.random()), round(4 * 25 ** lot.random()))
        for _ in range(count)
    ]


def in_a_loop(engine: Engine, requests: list[Request], concurrency: int) -> Iterator[Iteration]:
    """Serves requests, so many at a time."""
    waiting = list(requests)
    while waiting or engine.requests:
        while waiting and len(engine.requests) < concurrency:
            engine.add(waiting.pop())
        yield dataclasses.replace(engine.step())


def profile(engine: Engine) -> Iterator[Iteration]:
    """Serves probes without end, so many at a time as ``PROFILE_CONCURRENCY`` says in turn."""
    for seed, concurrency in enumerate(itertools.cycle(PROFILE_CONCURRENCY)):
        yield from in_a_loop(engine, probes(seed, PROBES_PER_PLACE * concurrency), concurrency)


def poisson(
    engine: Engine, requests: list[Request], rate_per_s: float, seed: int, ticks: list[tuple[float, ...]]
) -> Iterator[Iteration]:
    """Serves requests that arrive by themselves, and appends the state of the engine at each tick."""
    lot, at_s = random.Random(seed), 0.0
    for request in requests:
        request.arrival_s = at_s
        at_s += lot.expovariate(rate_per_s)
    engine.clock_s = 0.0
    waiting = list(reversed(requests))
    prompts = tokens = 0
    while waiting or engine.requests:
        if not engine.requests:
            engine.clock_s = max(engine.clock_s, waiting[-1].arrival_s)
        while waiting and waiting[-1].arrival_s <= engine.clock_s:
            engine.add(waiting.pop())
        iteration = dataclasses.replace(engine.step())
        prompts += iteration.prompt_tokens
        tokens += iteration.decodes
        if engine.clock_s >= TICK_S * (len(ticks) + 1):
            passed_s = engine.clock_s - (ticks[-1][0] if ticks else 0.0)
            running, queued = len(engine.scheduler.running), len(engine.scheduler.waiting)
            share = 100 * engine.scheduler.kv_cache_manager.usage
            ticks.append((engine.clock_s, running, queued, share, prompts / passed_s, tokens / passed_s))
            prompts = tokens = 0
        yield iteration


def side_by_side(first: Iterator[Iteration], second: Iterator[Iteration]) -> tuple[list[Iteration], list[Iteration]]:
    """Takes iterations of two engines in turns, until the first has no more."""
    iterations: tuple[list[Iteration], list[Iteration]] = ([], [])
    while of_first := _turn(first):
        iterations[0].extend(of_first)
        iterations[1].extend(_turn(second))
    return iterations


def _turn(engine: Iterator[Iteration]) -> list[Iteration]:
    taken: list[Iteration] = []
    for iteration in engine:
        taken.append(iteration)
        if sum(each.time_s for each in taken) >= TURN_S:
            break
    return taken


def write_run(
    folder: pathlib.Path, requests: list[Request], iterations: list[Iteration], ticks: list[tuple[float, ...]]
) -> None:
    """Writes a run in the format of ``qos-jax fidelity``; its clock begins in 1970."""
    folder.mkdir(parents=True, exist_ok=True)
    began = datetime.datetime.fromtimestamp(0, datetime.UTC).isoformat()
    meta = {
        "model": "LLaMA of 27 M random weights",
        "vllm_version": vllm.__version__,
        "hardware": {"device_name": "one CPU core"},
        "started_at": began,
        "engine_kwargs": {"max_num_seqs": MAX_RUNNING, "max_num_batched_tokens": TOKEN_BUDGET},
        "kv_cache": {
            "num_gpu_blocks": KV_BLOCKS + 1,
            "block_size": BLOCK_SIZE_TOKENS,
            "enable_prefix_caching": True,
        },
        "resolved_config": {"scheduler_config": {"async_scheduling": False}},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    rows = [
        {
            "request_id": str(number),
            "input_toks": request.prompt_tokens,
            "output_toks": request.output_tokens,
            "arrival_time": round(request.arrival_s, 6),
            "queued_ts": round(request.queued_s, 6),
            "first_token_ts": round(request.first_token_s, 6),
            "last_token_ts": round(request.last_token_s, 6),
        }
        for number, request in enumerate(requests)
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "timeseries.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("t", "running", "waiting", "kv_cache_pct", "prompt_throughput", "gen_throughput"))
        writer.writerows([[round(value, 3) for value in tick] for tick in ticks])
    write_iterations(folder / "iterations.csv", iterations)


def write_iterations(path: pathlib.Path, iterations: list[Iteration]) -> None:
    """Writes one line for each iteration."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Iteration)])
        writer.writerows([*dataclasses.astuple(iteration)[:-1], round(iteration.time_s, 6)] for iteration in iterations)


def main() -> None:
    """Measures the capacity, and runs each load beside a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for the runs")
    parser.add_argument("--loads", default="0.6,0.8,1.0,1.2", help="arrival rates, as shares of the capacity")
    parser.add_argument("--requests", default=400, type=int, help="requests of each run")
    parser.add_argument("--seed", default=0, type=int, help="of the requests of the first run")
    options = parser.parse_args()
    model, pace = options.out / "model", Pace()
    write_model(model, layers=8, width=512)
    engine, other = Engine(model, pace), Engine(model, pace)
    for warmed in (engine, other):
        for _ in in_a_loop(warmed, probes(-1, 20), 8):
            pass  # the first iterations allocate
    began_s = engine.clock_s
    for _ in in_a_loop(engine, users(98, options.requests // 2), MAX_RUNNING):
        pass
    capacity_per_s = (options.requests // 2) / (engine.clock_s - began_s)
    print(f"capacity {capacity_per_s:.3f} requests/s", flush=True)
    profiled = profile(other)
    for number, load in enumerate(options.loads.split(",")):
        requests = users(options.seed + number, options.requests)
        ticks: list[tuple[float, ...]] = []
        served = poisson(engine, requests, float(load) * capacity_per_s, options.seed + number, ticks)
        iterations, measured = side_by_side(served, profiled)
        folder = options.out / f"load-{load}"
        write_run(folder, requests, iterations, ticks)
        write_iterations(folder / "profile.csv", measured)
        count, slowness = len(iterations), pace.slowness
        print(f"load {load}: {count} iterations, {engine.clock_s:.0f} s, slowness {slowness:.2f}", flush=True)


if __name__ == "__main__":
    main()
