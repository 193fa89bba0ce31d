"""How a gateway ends: on a signal, with the last request."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest

from qos_jax.gateway.app import make_app
from qos_jax.gateway.core import Gateway
from qos_jax.gateway.fake_engine import FakeEngine
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.level import Level
from qos_jax.gateway.serve import listener, serve_until_signal
from qos_jax.gateway.settings import Settings
from tests.helpers.gateways import decider, eventually, in_loop, kill, listen, profile


@in_loop
async def test_a_signal_ends_the_gateway_after_the_requests_that_it_serves() -> None:
    settings = Settings(scrape_s=0.05, level=Level(latency_per_token_s=1.0))
    engines = [FakeEngine(f"m{i}", profile(2, step_base_s=0.02), i) for i in range(2)]
    servers = [await listen(engine.app) for engine in engines]
    backends = [
        Backend(f"e{i}", f"http://127.0.0.1:{each.port}", "vllm", f"m{i}") for i, (each, _) in enumerate(servers)
    ]
    gateway = Gateway(backends, [decider()], settings)
    face = listener(make_app(gateway), "127.0.0.1", 0, settings)
    serving = asyncio.create_task(serve_until_signal(face, gateway.drain))
    await eventually(lambda: face.started)
    port = face.port
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
        body = {"model": "auto", "prompt": "x", "max_tokens": 20, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.aiter_bytes()
            content = await anext(pieces)
            os.kill(os.getpid(), signal.SIGTERM)
            async for piece in pieces:
                content += piece
    assert content.count(b'"text"') == 20
    assert content.endswith(b"[DONE]\n\n")
    await serving
    assert gateway.draining
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
    assert [each["status"] for each in gateway.recent] == ["ok"]
    for server, task in servers:
        await kill(server, task)


@in_loop
async def test_a_second_signal_waits_for_no_request() -> None:
    engine = FakeEngine("m", profile(1, step_base_s=0.05), 0)
    face = listener(engine.app, "127.0.0.1", 0, Settings())
    face.config.lifespan = "off"
    serving = asyncio.create_task(serve_until_signal(face, lambda: None))
    await eventually(lambda: face.started)
    body = {"model": "m", "prompt": "x", "max_tokens": 2000, "stream": True}
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=30, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        pieces = response.aiter_bytes()
        await anext(pieces)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: face.should_exit)
        assert not serving.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 10)
        with pytest.raises(httpx.TransportError):
            async for _ in pieces:
                pass
