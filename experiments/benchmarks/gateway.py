"""The suites ``gateway`` and ``decision``: what the gateway adds to the way to an engine, and how long it decides.

Three processes run on this machine: fake engines that answer at a steady pace, the gateway, and clients that send
requests at random times. A request tells when it was sent, and so does each piece of an answer, by the one clock of the
machine. What the gateway adds is the time on both ways to the first token, less that of requests that went straight to
the engines.

With ``GATEWAY_LITELLM=/path/to/litellm`` in the environment, the proxy of LiteLLM takes the gateway's place in the same
run. It chooses among the engines at random, its default, and keeps no record of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.servers import free_port, wait_until_up
from qos_jax.gateway.app import make_app
from qos_jax.gateway.core import Gateway
from qos_jax.gateway.decision import (
    AVAILABLE,
    NUM_EXPERT_ROWS,
    TOKENS,
    Decider,
    decide_in_the_calling_thread,
    program_of,
)
from qos_jax.gateway.fake_engine import FakeEngine, many
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.ledger import ARRIVAL, LIMIT, LIVE, NUM_COLUMNS, PROMPT
from qos_jax.gateway.ledger import TOKENS as PREDICTED
from qos_jax.gateway.level import Level
from qos_jax.gateway.serve import fast_loop, listener
from qos_jax.gateway.settings import Settings
from qos_jax.routers import Router, make_router
from qos_jax.sim.types import ExpertProfile
from qos_jax.worlds.build import make

_NUM_ENGINES, _TOKENS, _STEP_S = 4, 12, 0.05
_RATE_PER_S = float(os.environ.get("GATEWAY_RATE", 300))  # at 12 tokens of 50 ms, 180 to 200 streams are open
_MEMORY_ROWS = 5  # readings of the memory over a run
_DECISIONS = 2000
_LITELLM = os.environ.get("GATEWAY_LITELLM")  # its command
_START_S = 120.0  # that LiteLLM may take to start
_STAMPS = re.compile(rb'"content": ?"([0-9.]+)/([0-9.]+) ')  # of the first word of an answer


def rows(num_requests: int) -> Iterator[dict[str, Any]]:
    """Measures requests through the gateway, and as many straight to the engines.

    Args:
      num_requests: of each.
    """
    module = (sys.executable, "-m", "experiments.benchmarks.gateway")
    with _Process([*module, "engines"]) as engines, contextlib.ExitStack() as stack:
        paths = [f"/{i}" for i in range(_NUM_ENGINES)]
        straight = _row(_run(_clients(paths, engines.port, num_requests)))
        yield {"case": "straight", **straight}
        proxies = {"gateway": stack.enter_context(_Process([*module, "gateway", str(engines.port)]))}
        if _LITELLM is not None:
            proxies["LiteLLM"] = stack.enter_context(_litellm(_LITELLM, engines.port))
        for name, proxy in proxies.items():
            yield from _through(name, proxy, straight, num_requests)


def _through(name: str, proxy: _Process, straight: dict[str, Any], num_requests: int) -> Iterator[dict[str, Any]]:
    """Measures requests through a proxy, and what it adds to those that went straight."""
    before_s = proxy.cpu_s
    found = _run(_clients([""], proxy.port, num_requests, proxy.pid))
    cpu_s, row = proxy.cpu_s - before_s, _row(found)
    yield {"case": f"through {name}", **row}
    if not found["ok"]:
        return
    added = {key: row[key] - straight[key] for key in row if key.endswith("_ms")}
    first, last = found["memory"][1], found["memory"][-1]  # the first reading is before the first request
    memory = {"memory_mb": last / 2**20, "growth_kb_per_1000": (last - first) / 1024 / (num_requests / 1000)}
    yield {"case": f"added by {name}", **added, "cpu_ms_per_request": 1e3 * cpu_s / num_requests, **memory}


def _row(found: dict[str, Any]) -> dict[str, Any]:
    quantiles = _quantiles(found["way_s"]) if found["ok"] else {}
    return {"requests": found["ok"], "failed": found["failed"], "streams": found["streams"], **quantiles}


def decisions() -> Iterator[dict[str, Any]]:
    """Measures decisions with 8 experts and 32 requests on each."""
    env, params = make("edge-8", rate_per_s=50.0)
    for name in ("round_robin", "impact_greedy"):
        yield {"case": name, **decision_ms(make_router(name, env, params), params.experts, env.spec.engine.slots)}


def decision_ms(router: Router, profile: ExpertProfile, slots: int, requests: int = 32) -> dict[str, float]:
    """Returns quantiles of the time of a decision, in ms, with so many requests on each expert."""
    decider = Decider(program_of(router, profile, slots))
    num_experts = decider.num_experts
    ledger = np.zeros((NUM_COLUMNS, num_experts, slots))
    ledger[:, :, :requests] = 1.0
    ledger[[LIVE, PROMPT, ARRIVAL, LIMIT, PREDICTED], :, :requests] = np.array([1, 100, 2, 0.05, 200])[:, None, None]
    experts = np.zeros((NUM_EXPERT_ROWS, num_experts))
    experts[AVAILABLE], experts[TOKENS] = 1, 200
    times_s = []
    for _ in range(_DECISIONS):
        started_s = time.perf_counter()
        decider.decide(ledger, experts, prompt_tokens=100, limit_s=0.05, may_drop=True, rates_per_s=np.ones(3))
        times_s.append(time.perf_counter() - started_s)
    return _quantiles(times_s)


def _quantiles(times_s: list[float]) -> dict[str, float]:
    return {f"p{q}_ms": float(1e3 * np.quantile(times_s, q / 100)) for q in (50, 90, 99)}


class _Process:
    """One of the processes, from its first to its last moment."""

    def __init__(self, command: Sequence[str], port: int | None = None) -> None:
        """Takes the command, and the port that it will listen to; without one, its first line tells that."""
        self._command, self.port = command, port or 0

    def __enter__(self) -> _Process:
        output = subprocess.DEVNULL if self.port else subprocess.PIPE
        self.popen = subprocess.Popen(self._command, stdout=output, stderr=subprocess.DEVNULL)
        self.pid = self.popen.pid
        if self.popen.stdout is not None:
            self.port = int(self.popen.stdout.readline())
        return self

    def __exit__(self, *error: Any) -> None:
        self.popen.kill()
        self.popen.communicate()

    @property
    def cpu_s(self) -> float:
        """CPU time that it has used."""
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


@contextlib.contextmanager
def _litellm(command: str, engines_port: int) -> Iterator[_Process]:
    """Runs the proxy of LiteLLM before the engines, without its records, with one worker as the gateway has."""
    engines = [
        {
            "model_name": "auto",
            "litellm_params": {
                "model": f"openai/m{i}", "api_base": f"http://127.0.0.1:{engines_port}/{i}/v1", "api_key": "none",
            },
        }
        for i in range(_NUM_ENGINES)
    ]  # fmt: skip
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "config.yaml")  # JSON is YAML
        settings = {
            "model_list": engines,
            "litellm_settings": {"telemetry": False},
            "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},  # no key, as at the gateway
        }
        config.write_text(json.dumps(settings))
        arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        with _Process([command, *arguments], port) as process:
            wait_until_up(process.popen, f"http://127.0.0.1:{port}/health/liveliness", "LiteLLM", _START_S)
            yield process


def _resident_bytes(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def _clients(prefixes: list[str], port: int, num_requests: int, pid: int | None = None) -> dict[str, Any]:
    """Sends requests at random times, each on a connection of its own.

    Returns:
      What came of them, with readings of the memory of process ``pid``, if one is given.
    """
    lot, loop = random.Random(0), asyncio.get_running_loop()
    found: dict[str, Any] = {"way_s": [], "failed": 0, "open": 0, "streams": 0, "ok": 0, "memory": []}
    gc.freeze()
    due_s, tasks = loop.time(), set()
    for number in range(num_requests):
        if pid is not None and number % (num_requests // _MEMORY_ROWS) == 0:
            found["memory"].append(_resident_bytes(pid))
        due_s += lot.expovariate(_RATE_PER_S)
        await asyncio.sleep(max(due_s - loop.time(), 0))
        tasks.add(task := asyncio.create_task(_client(prefixes[number % len(prefixes)], port, found)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    if pid is not None:
        found["memory"].append(_resident_bytes(pid))
    return found


async def _client(prefix: str, port: int, found: dict[str, Any]) -> None:
    found["open"] += 1
    found["streams"] = max(found["streams"], found["open"])
    stream = _Stream(prefix)
    try:
        await asyncio.get_running_loop().create_connection(lambda: stream, "127.0.0.1", port)
        await stream.ended.wait()
    except OSError:
        pass
    found["open"] -= 1
    if stream.way_s is None or b"[DONE]" not in stream.last:
        found["failed"] += 1
    else:
        found["ok"] += 1
        found["way_s"].append(stream.way_s)


class _Stream(asyncio.Protocol):
    """One request; a client that did all of HTTP would take more of the machine than the gateway."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.ended = prefix, asyncio.Event()
        self.way_s: float | None = None  # to the engine and back, of the first word
        self.last = b""  # the end of the answer; up to the first word all of it

    def connection_made(self, transport: Any) -> None:
        messages = [{"role": "user", "content": f"{time.monotonic()} " + "tell me a story " * 8}]
        body = json.dumps({"model": "auto", "messages": messages, "max_tokens": _TOKENS, "stream": True})
        head = (
            f"POST {self.prefix}/v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}"
        )
        transport.write(f"{head}\r\n\r\n{body}".encode())

    def data_received(self, data: bytes) -> None:
        self.last = (self.last if self.way_s is None else self.last[-100:]) + data
        if self.way_s is None and (stamps := _STAMPS.search(self.last)):
            sent_s, there_s = map(float, stamps.groups())
            self.way_s = there_s + time.monotonic() - sent_s

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def _profile() -> ExpertProfile:
    fields = {"step_base_s": _STEP_S, "prefill_base_s": 0.0, "prefill_per_token_s": 0.0, "per_sequence_s": 0.0,
              "per_kv_token_s": 0.0, "kv_blocks": 100_000, "max_running": 96, "max_waiting": 64}  # fmt: skip
    kinds = {"kv_blocks": np.int32, "max_running": np.int32, "max_waiting": np.int32}
    arrays: dict[str, Any] = {
        name: np.full(_NUM_ENGINES, value, kinds.get(name, np.float32)) for name, value in fields.items()
    }
    return ExpertProfile(**arrays)


async def _serve(app: Any) -> None:
    """Serves for ever on a free port, which is printed."""
    gc.freeze()  # collections of what was imported would count as the way of a request
    server = listener(app, "127.0.0.1", 0, Settings())
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.port, flush=True)
    await task


def _run(work: Any) -> Any:
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return runner.run(work)


def _engines() -> None:
    engines = [FakeEngine(f"m{i}", _profile(), i, stamps=True) for i in range(_NUM_ENGINES)]
    _run(_serve(many(engines)))


def _gateway(port: str) -> None:
    decide_in_the_calling_thread()
    backends = [Backend(f"e{i}", f"http://127.0.0.1:{port}/{i}", "vllm", f"m{i}") for i in range(_NUM_ENGINES)]
    env, params = make("paper-3", rate_per_s=1.0)
    decider = Decider(
        program_of(make_router("impact_greedy", env, params), jax.tree.map(np.asarray, _profile()), slots=160)
    )
    _run(_serve(make_app(Gateway(backends, [decider], Settings(level=Level(latency_per_token_s=0.2))))))


if __name__ == "__main__":
    _engines() if sys.argv[1] == "engines" else _gateway(sys.argv[2])
