"""Routes the same requests to three real engines by several routers, and compares their QoS with the simulator's.

python -m experiments.real_engines --out=runs/real-engines

The engines are llama.cpp's server with models of random weights, so that times are real and scores are given: an answer
of an engine is worth the mean score of its name. The study takes the steps that an operator would take:

1. requests are routed in turn for a while, and logged;
2. ``qos-jax observe`` fits a fleet file to the log;
3. ``qos-jax train`` trains a router in the fitted world, with a proxy's view;
4. every router serves the same blocks of Poisson requests, in an order that changes from block to block;
5. every router serves as many requests like these in the simulator of the fitted fleet.

real-engines.json holds the blocks' QoS of each router and paired gains over the first router, and ``simulated`` the
same of the simulator. A run that is stopped goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import shlex
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import numpy as np
from absl import flags

from experiments.llama_engine import LlamaEngine, write_model
from qos_jax import evaluate, make, make_router, scenarios
from qos_jax.evaluation.statistics import summarise
from qos_jax.fleet.fleet_file import Fleet, load_fleet
from qos_jax.gateway.app import make_app
from qos_jax.gateway.core import Gateway
from qos_jax.gateway.decision import Decider, program_of
from qos_jax.gateway.fleet import backends_of
from qos_jax.gateway.level import levels_of
from qos_jax.gateway.observed import FLEET, observe, write_observed
from qos_jax.gateway.records import REQUESTS
from qos_jax.gateway.request_log import read_requests
from qos_jax.gateway.serve import listener
from qos_jax.gateway.settings import Settings
from qos_jax.io.files import parse_json, writable_folder, write_whole
from qos_jax.io.provenance import made_by, plain
from qos_jax.io.text_files import json_lines, read_text
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.train_once import train_once
from qos_jax.routers import Router
from qos_jax.training.load import load_router

SIZES = {"large": (12, 512, 0.8), "medium": (8, 384, 0.65), "small": (4, 256, 0.5)}  # layers, width, mean score
SLOTS, CONTEXT = 4, 4096  # of each engine
RESULTS = "real-engines.json"
_PROMPT_WORDS, _ANSWER_TOKENS = (3.3, 0.8, 300), (3.6, 0.7, 250)  # mean and sd of logarithms, and most
_LEARNED = "mvr"
_SCRAPE_S = 0.1  # between two readings of the engines' metrics
_WARM_UP_S = 5.0  # of a block, whose requests do not count
_SIMULATED_SEEDS = 16


@dataclasses.dataclass(frozen=True)
class PlannedRequest:
    """A request that will be sent."""

    at_s: float  # s since the block began
    prompt: str
    tokens: int  # of the answer


def planned(seed: int, rate_per_s: float, duration_s: float) -> list[PlannedRequest]:
    """Returns Poisson requests with lognormal lengths."""
    lot, requests, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + lot.expovariate(rate_per_s)) < duration_s:
        words, tokens = (
            max(1, min(round(lot.lognormvariate(mean, sd)), most)) for mean, sd, most in (_PROMPT_WORDS, _ANSWER_TOKENS)
        )
        requests.append(PlannedRequest(at_s, " ".join(f"w{lot.randrange(745)}" for _ in range(words)), tokens))
    return requests


async def send(client: httpx.AsyncClient, requests: Sequence[PlannedRequest]) -> None:
    """Sends the requests at their times, and returns when the last has ended."""

    async def one(request: PlannedRequest) -> None:
        body = {"model": "auto", "prompt": request.prompt, "max_tokens": request.tokens, "stream": True}
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response:
                async for _ in response.aiter_bytes():
                    pass

    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for request in requests:
            await asyncio.sleep(began_s + request.at_s - time.monotonic())
            group.create_task(one(request))


@contextlib.contextmanager
def engines(folder: pathlib.Path, values: flags.FlagValues) -> Any:
    """Starts the engines, and gives the fleet file that names them."""
    folder.mkdir(exist_ok=True)
    started: list[LlamaEngine] = []
    try:
        for name, (layers, width, _) in SIZES.items():
            write_model(folder / f"{name}.gguf", layers=layers, width=width, context=CONTEXT)
            started.append(LlamaEngine(folder / f"{name}.gguf", name, slots=SLOTS))
            started[-1].start()
        path = folder / FLEET
        write_whole(path, _fleet_text(started, values.latency_ms_per_token))
        yield load_fleet(path)
    finally:
        for engine in started:
            engine.kill()


def _fleet_text(started: Sequence[LlamaEngine], limit_ms: float) -> str:
    scores = ", ".join(f'"{name}" = {score}' for name, (_, _, score) in SIZES.items())
    lines = [
        "format = 1",
        "[limits]",
        f"latency_ms_per_token = {limit_ms}",
        "[quality]",
        f"mean_score = {{ {scores} }}",
    ]
    for engine in started:
        layers, width, _ = SIZES[engine.name]
        parameters = layers * (4 * width**2 + 9 * width**2) / 1e9
        lines += [
            "[[experts]]",
            f'name = "{engine.name}"',
            f'url = "{engine.url}"',
            f'llm = {{ name = "{engine.name}", weights_gb = {2 * parameters:.4f}, '
            f"matrix_params_billion = {parameters:.4f}, kv_bytes_per_token = {4 * layers * width}, layers = {layers}, "
            f"attention_size = {width} }}",
            'device = { name = "one thread", memory_gb = 4, bandwidth_gb_per_s = 10, fp16_tflops = 0.05 }',
            f'engine = {{ kind = "llama.cpp", max_num_seqs = {SLOTS}, max_waiting = 32, kv_blocks = {CONTEXT // 16} }}',
        ]
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def gateway_of(
    fleet: Fleet, routers: Sequence[Router], folder: pathlib.Path | None
) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    """Starts a gateway, and gives it and a client."""
    settings = Settings(scrape_s=_SCRAPE_S, level=levels_of(fleet.limits)[0])
    env, params = make(fleet, rate_per_s=1.0)
    deciders = [Decider(program_of(router, params.experts, env.spec.engine.slots)) for router in routers]
    gateway = Gateway(backends_of(fleet), deciders, settings, folder=folder)
    server = listener(make_app(gateway), "127.0.0.1", 0, settings)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=120) as client:
        yield gateway, client
    server.should_exit = True
    await task


async def log_requests(fleet: Fleet, folder: pathlib.Path, values: flags.FlagValues) -> None:
    """Routes requests in turn at rising rates, and logs them."""
    env, params = make(fleet, rate_per_s=1.0)
    async with gateway_of(fleet, [make_router("round_robin", env, params)], folder) as (_, client):
        for number, share in enumerate((0.5, 1.0, 1.5)):
            await send(client, planned(10_000 + number, share * values.log_rate, values.log_s / 3))


async def serve_block(
    gateway: Gateway, client: httpx.AsyncClient, name: str, requests: Sequence[PlannedRequest], log: pathlib.Path
) -> dict[str, Any]:
    """Serves one block by one router, and returns what it was worth."""
    gateway.active, began = name, time.time()
    await send(client, requests)
    records = [record for _, record in json_lines(read_text(log), log) if record["time"] >= began + _WARM_UP_S]
    answered = [each for each in records if each["status"] == "ok"]
    return {
        "qos": float(np.mean([each["qos"] for each in records])),
        "answered": len(answered) / len(records),
        "in_time": float(np.mean([each["in_time"] for each in records])),
        "latency_per_token_s": float(np.mean([each["end_s"] / max(each["output_tokens"], 1) for each in answered])),
        "shares": {engine: sum(each["engine"] == engine for each in answered) / len(records) for engine in SIZES},
        "requests": len(records),
    }


async def serve_blocks(fleet: Fleet, routers: Sequence[Router], rate_per_s: float, done: Results, blocks: int) -> None:
    """Serves every block by every router, in an order that changes from block to block."""
    names = [router.name for router in routers]
    folder = writable_folder(done.path.parent / "served")
    async with gateway_of(fleet, routers, folder) as (gateway, client):
        for block in range(blocks):
            requests = planned(block, rate_per_s, done.duration_s)
            turn = block % len(names)
            for name in names[turn:] + names[:turn]:
                if name not in done.blocks.setdefault(str(block), {}):
                    done.blocks[str(block)][name] = await serve_block(
                        gateway, client, name, requests, folder / REQUESTS
                    )
                    done.save()
                    print(f"block {block} {name}: QoS {done.blocks[str(block)][name]['qos']:.3f}", flush=True)


@dataclasses.dataclass
class Results:
    """What is known so far."""

    path: pathlib.Path
    duration_s: float
    blocks: dict[str, dict[str, dict[str, Any]]]  # by block and router
    more: dict[str, Any]

    def save(self) -> None:
        """Writes all."""
        content = self.more | {"duration_s": self.duration_s, "blocks": self.blocks}
        write_whole(self.path, json.dumps(plain(content), indent=2) + "\n")


def _command() -> str:
    return shlex.join(["python", "-m", "experiments.real_engines", *sys.argv[1:]])


def trained(folder: pathlib.Path, fleet: pathlib.Path, steps: int) -> Router:
    """Trains the learned router for the fitted fleet, or takes the one that is there."""
    view = f"--observe=proxy --scrape={_SCRAPE_S}".split()
    train_once(folder / _LEARNED, [f"--fleet={fleet}", *view, f"--steps={steps}"], quiet=True)
    return load_router(folder / _LEARNED, name=_LEARNED)


def simulated(fleet: Fleet, routers: Sequence[Router], rate_per_s: float, count: int) -> dict[str, list[float]]:
    """Returns the mean QoS of each router in the fitted world, seed by seed."""
    env, params = make(fleet, rate_per_s=rate_per_s, observe="proxy", scrape_s=_SCRAPE_S)
    params = params.replace(saturation_per_s=rate_per_s)
    runs = evaluate(
        env, params, routers, scenarios(params, (1.0,), range(10_000, 10_000 + _SIMULATED_SEEDS)), count,
        warmup=count // 10,
    )  # fmt: skip
    return {
        router.name: [float(run.metrics["qos"]) for run in runs if run.router.name == router.name] for router in routers
    }


def gains(qos: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Returns the mean QoS of each router, and its paired gain over the first one, with 95 % intervals."""
    first = np.array(next(iter(qos.values())))
    return {
        name: {"qos": summarise(values)} | ({"gain": summarise(np.array(values) - first)} if index else {})
        for index, (name, values) in enumerate(qos.items())
    }


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "real_engines")
    group.string("out", None, "Folder for models, log, fitted fleet and results.", required=True)
    group.texts("routers", ["round_robin", "shortest_queue", "impact_greedy"], "Routers; gains are over the first.")
    group.integer("train_steps", 300_000, "Requests that a learned router is trained with; 0 leaves it out.", 0)
    group.number("log_s", 150.0, "Seconds of requests to fit the engines to.", 15.0)
    group.number("log_rate", 5.0, "Requests/s of them, on average.", 0.1)
    group.number("latency_ms_per_token", 40.0, "Limit of the mean latency per token.", 1.0)
    group.number("load", 0.9, "Rate of the blocks, as a share of what the fitted fleet finishes at most.", 0.01, 10.0)
    group.integer("blocks", 8, "Blocks of requests that every router serves.", 2)
    group.number("block_s", 60.0, "Seconds of a block.", 10.0)


def main(values: flags.FlagValues) -> None:
    """Takes the four steps, writes the results and prints them."""
    folder = writable_folder(values.out)
    with engines(folder / "engines", values) as fleet:
        if not (folder / "observed" / FLEET).exists():
            asyncio.run(log_requests(fleet, writable_folder(folder / "log"), values))
            records = read_requests(folder / "log")
            observed = observe(records, fleet)
            write_observed(observed, records, fleet, writable_folder(folder / "observed"), made_by(_command()))
            print(observed.as_text(), flush=True)
        fitted = load_fleet(folder / "observed" / FLEET)
        env, params = make(fitted, load=values.load)
        rate_per_s = values.load * float(params.saturation_per_s)
        path = folder / RESULTS
        known = parse_json(read_text(path), str(path)) if path.exists() else {}
        done = Results(path, values.block_s, known.get("blocks", {}), made_by(_command()))
        done.more["rate_per_s"] = rate_per_s
        print(f"{rate_per_s:.2f} requests/s", flush=True)
        routers = [make_router(name, env, params) for name in values.routers]
        if values.train_steps:
            routers.append(trained(folder, folder / "observed" / FLEET, values.train_steps))
        urls = {expert.name: expert.url for expert in fleet.experts}  # of engines that were started again
        fitted = dataclasses.replace(
            fitted, experts=tuple(dataclasses.replace(each, url=urls[each.name]) for each in fitted.experts)
        )
        asyncio.run(serve_blocks(fitted, routers, rate_per_s, done, values.blocks))
    names = [router.name for router in routers]
    served = {name: [block[name]["qos"] for block in done.blocks.values() if name in block] for name in names}
    done.more["real"] = gains(served)
    done.more["simulated"] = gains(simulated(fitted, routers, rate_per_s, int(rate_per_s * values.block_s)))
    done.save()
    for name in names:
        print(f"{name:20} {'   '.join(f'{kind} {_told(done.more[kind][name])}' for kind in ('real', 'simulated'))}")


def _told(found: dict[str, Any]) -> str:
    gain = " ({mean:+.3f} [{low:+.3f}, {high:+.3f}])".format(**found["gain"]) if "gain" in found else ""
    return f"{found['qos']['mean']:.3f}{gain}"


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.real_engines", summary="routes requests to real engines")
