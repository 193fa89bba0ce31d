"""The demo: fake engines, clients that send random requests, and the gateway between them, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import aiohttp
import jax
import numpy as np

from qos_jax.gateway.app import make_app
from qos_jax.gateway.core import Gateway
from qos_jax.gateway.decision import Decider
from qos_jax.gateway.fake_engine import FakeEngine, many
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.page import page_routes
from qos_jax.gateway.serve import Listener, listener
from qos_jax.gateway.settings import Settings
from qos_jax.sim.types import ExpertProfile

_LOG_MEAN_TOKENS, _LOG_SD = 4.0, 0.7  # of the answers that are asked for


@contextlib.asynccontextmanager
async def demo(
    names: Sequence[str],
    profile: ExpertProfile,
    quality: Sequence[float],
    deciders: Sequence[Decider],
    settings: Settings,
    *,
    host: str,
    port: int,
    rate_per_s: float,
) -> AsyncIterator[tuple[Gateway, Listener]]:
    """Starts engines and clients, and gives the gateway and its server, which the caller starts.

    Args:
      names: of the engines.
      profile: of them, [N] each.
      quality: [N] mean scores of their answers.
      deciders: routers to choose from.
      settings: of the gateway.
      host: address of the gateway.
      port: of it.
      rate_per_s: mean rate of the clients' requests.
    """
    profile = jax.tree.map(np.asarray, profile)
    engines = [FakeEngine(name, profile, index) for index, name in enumerate(names)]
    behind = listener(many(engines), "127.0.0.1", 0, settings)
    behind.config.lifespan = "off"  # they have none, and end at once
    serving = asyncio.create_task(behind.serve())
    while not behind.started:
        await asyncio.sleep(0.01)
    backends = [
        Backend(name, f"http://127.0.0.1:{behind.port}/{index}", "vllm", name, quality=score)
        for index, (name, score) in enumerate(zip(names, quality, strict=True))
    ]
    gateway = Gateway(backends, deciders, settings)
    server = listener(make_app(gateway, page_routes(gateway)), host, port, settings)
    clients = asyncio.create_task(_clients(server, settings, rate_per_s))
    try:
        yield gateway, server
    finally:
        clients.cancel()
        # First, so that their connections are closed before the engines drop theirs.
        await asyncio.gather(clients, return_exceptions=True)
        behind.should_exit = behind.force_exit = True
        await asyncio.gather(serving, return_exceptions=True)


async def _clients(server: Listener, settings: Settings, rate_per_s: float) -> None:
    """Sends requests at random times for ever."""
    while not server.started:
        await asyncio.sleep(0.05)
    lot = random.Random(0)
    headers = {"authorization": f"Bearer {min(settings.api_keys)}"} if settings.api_keys else {}
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", headers=headers) as client,
        asyncio.TaskGroup() as group,
    ):
        while True:
            await asyncio.sleep(lot.expovariate(rate_per_s))
            tokens = max(1, min(round(lot.lognormvariate(_LOG_MEAN_TOKENS, _LOG_SD)), 500))
            group.create_task(_one(client, "tell me a story " * lot.randint(1, 30), tokens))


async def _one(client: aiohttp.ClientSession, prompt: str, tokens: int) -> None:
    body = {"model": "auto", "prompt": prompt, "max_tokens": tokens, "stream": True}
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with client.post("/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=60)) as response:
            async for _ in response.content.iter_any():
                pass
