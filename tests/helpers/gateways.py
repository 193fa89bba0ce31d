"""A gateway before fake engines on real sockets of this machine, all in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import numpy as np

from experiments.servers import EngineProcess
from qos_jax.gateway.app import make_app
from qos_jax.gateway.core import Gateway
from qos_jax.gateway.decision import Decider, program_of
from qos_jax.gateway.fake_engine import FakeEngine
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.level import Level
from qos_jax.gateway.serve import Listener, listener
from qos_jax.gateway.settings import Settings
from qos_jax.routers.heuristics import round_robin
from qos_jax.sim.types import ExpertProfile

if TYPE_CHECKING:
    import openai

Engine = TypeVar("Engine", bound=EngineProcess)

SLOTS = 8  # of a decider here: small arrays compile as long as large ones


def profile(num_experts: int, **fields: float) -> ExpertProfile:
    """A fleet of equal experts with iterations of 1 ms and more."""
    values = {
        "step_base_s": 1e-3, "prefill_base_s": 1e-3, "prefill_per_token_s": 1e-6, "per_sequence_s": 1e-5,
        "per_kv_token_s": 1e-9, "kv_blocks": 1000, "max_running": 4, "max_waiting": 4,
    }  # fmt: skip
    whole = ("kv_blocks", "max_running", "max_waiting")
    return ExpertProfile(
        **{
            name: np.full(num_experts, value, np.int32 if name in whole else np.float32)
            for name, value in (values | fields).items()
        },
        prefix_cache=np.full(num_experts, True),
    )


@functools.cache
def decider(num_experts: int = 2, router: Callable[[], Any] = round_robin) -> Decider:
    """A compiled router; gateways may share it."""
    return Decider(program_of(router(), profile(num_experts), SLOTS))


@dataclasses.dataclass
class Running:
    """A gateway and its engines, all of them listening."""

    gateway: Gateway
    engines: list[FakeEngine]
    listeners: list[Listener]  # of the engines
    client: httpx.AsyncClient  # of the gateway
    face: Listener  # of the gateway

    @property
    def port(self) -> int:
        """Of the gateway."""
        return self.face.port

    async def complete(self, **body: Any) -> httpx.Response:
        """The answer to one prompt that is not streamed."""
        headers = body.pop("headers", {})
        return await self.client.post(
            "/v1/completions", json={"model": "auto", "prompt": "hello", "max_tokens": 3} | body, headers=headers
        )

    @contextlib.asynccontextmanager
    async def streamed(self, **body: Any) -> AsyncIterator[httpx.Response]:
        """The open answer to one prompt that is streamed."""
        body = {"model": "auto", "prompt": "hello", "max_tokens": 3, "stream": True} | body
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            yield response

    async def records(self, count: int) -> list[dict[str, Any]]:
        """The records, once so many requests have ended."""
        await eventually(lambda: len(self.gateway.recent) >= count)
        return list(self.gateway.recent)


async def eventually(is_so: Callable[[], Any], most_s: float = 20.0) -> None:
    """Waits until something is so; fails if it never is."""
    async with asyncio.timeout(most_s):
        while not is_so():
            await asyncio.sleep(0.005)


async def listen(app: Any, settings: Settings | None = None, port: int = 0) -> tuple[Listener, asyncio.Task[None]]:
    """Starts a server."""
    server = listener(app, "127.0.0.1", port, settings or Settings())
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started or task.done())
    return server, task


async def kill(server: Listener, task: asyncio.Task[None]) -> None:
    """Ends a server with all its connections at once, as a killed process would."""
    for each in server.servers:
        each.close()
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    server.should_exit = server.force_exit = True
    await task


@contextlib.asynccontextmanager
async def running(
    settings: Settings | None = None,
    *,
    num_engines: int = 2,
    router: Callable[[], Any] = round_robin,
    kind: str = "vllm",
    folder: pathlib.Path | None = None,
    **fields: float,
) -> AsyncIterator[Running]:
    """Starts engines, of ``fields`` other than those of ``profile``, and a gateway before them."""
    settings = settings or Settings(scrape_s=0.02, level=Level(latency_per_token_s=1.0), connect_s=1.0)
    engines = [FakeEngine(f"m{i}", profile(num_engines, **fields), i, kind) for i in range(num_engines)]
    servers = [await listen(engine.app) for engine in engines]
    backends = [
        Backend(f"e{i}", f"http://127.0.0.1:{server.port}", kind, f"m{i}", api_key_env=f"TEST_ENGINE_KEY_{i}")
        for i, (server, _) in enumerate(servers)
    ]
    gateway = Gateway(backends, [decider(num_engines, router)], settings, folder=folder)
    face, task = await listen(make_app(gateway), settings)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=30, trust_env=False) as client:
            yield Running(gateway, engines, [server for server, _ in servers], client, face)
    finally:
        for server, one in ((face, task), *servers):
            if not one.done():
                await kill(server, one)


def started(engines: Iterable[Engine]) -> Iterator[list[Engine]]:
    """Starts real engines one after the other, and kills them in the end; for a fixture."""
    running: list[Engine] = []
    try:
        for engine in engines:
            running.append(engine)
            engine.start()
        yield running
    finally:
        for engine in running:
            engine.kill()


@contextlib.asynccontextmanager
async def gateway_of(
    engines: Sequence[EngineProcess], kind: str, decider: Decider
) -> AsyncIterator[tuple[Gateway, openai.AsyncOpenAI]]:
    """Starts a gateway before real engines, and gives it and the client of OpenAI."""
    import openai

    backends = [Backend(engine.name, engine.url, kind, engine.name) for engine in engines]
    gateway = Gateway(backends, [decider], Settings(scrape_s=0.1, level=Level(latency_per_token_s=1.0)))
    server, task = await listen(make_app(gateway))
    try:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:
            yield gateway, client
    finally:
        await kill(server, task)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(300):  # only ends what hangs
                await test(*args, **options)

        asyncio.run(bounded())

    return run


def events(content: bytes) -> list[Any]:
    """The values of a stream of events, without its end."""
    datas = [part.removeprefix(b"data: ") for part in content.split(b"\n\n") if part]
    return [json.loads(data) for data in datas if data != b"[DONE]"]


async def raw(port: int, content: bytes, *, wait_for: bytes = b"") -> bytes:
    """What a server answers to these very bytes, to the end or to some piece of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(content)
        await writer.drain()
        got = b""
        while piece := await reader.read(65536):
            got += piece
            if wait_for and wait_for in got:
                break
        return got
    except ConnectionError:
        return got
    finally:
        writer.close()
