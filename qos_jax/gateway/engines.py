"""The engines behind the gateway at run time: their breakers, their last scrape, and the loop that reads it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import random
import time
from collections.abc import Sequence

import aiohttp
import numpy as np

from qos_jax.gateway.breaker import Breaker
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.ledger import LIVE, PROMPT, STREAMED, Ledger
from qos_jax.gateway.measures import Measures
from qos_jax.gateway.scrape import MAX_BYTES, Load, kv_share_of_slots, read_load
from qos_jax.gateway.settings import Settings
from qos_jax.io.files import parse_json
from qos_jax.sim.types import BLOCK_SIZE_TOKENS

_READ = aiohttp.ClientTimeout(total=2.0)  # s
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Engine:
    """One engine at run time."""

    backend: Backend
    breaker: Breaker = dataclasses.field(default_factory=Breaker)
    load: Load | None = None  # None until its metrics were read
    scraped_s: float = -math.inf  # s of the monotonic clock
    own_in_flight: int = 0  # requests of the gateway there at that time
    reads_fail: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of requests to it; the key is read anew, so that it is held nowhere."""
        key = os.environ.get(self.backend.api_key_env or "", "")
        return {"authorization": f"Bearer {key}"} if key else {}

    def others(self) -> tuple[int, int]:
        """Returns how many requests run and wait there that the gateway did not send."""
        if self.load is None:
            return 0, 0
        others = max(self.load.running + self.load.waiting - self.own_in_flight, 0)
        waiting = min(others, self.load.waiting)
        return others - waiting, waiting


class Engines:
    """All engines, and what is known of them as rows of numbers."""

    def __init__(
        self, backends: Sequence[Backend], ledger: Ledger, kv_blocks: np.ndarray, settings: Settings, measures: Measures
    ) -> None:
        """Takes the engines of a fleet, and the KV blocks [N] that each of them is said to have."""
        self.all = [Engine(backend) for backend in backends]
        self.ledger, self.kv_blocks, self.settings, self.measures = ledger, kv_blocks, settings, measures

    def available(self, now_s: float) -> np.ndarray:
        """Returns [N] bool: the breaker lets a request through."""
        return np.array([engine.breaker.allows(now_s) for engine in self.all])

    def kv_used_blocks(self) -> np.ndarray:
        """Returns the KV blocks [N] in use: as the engines say, or where they do not, by the ledger's tokens."""
        columns = self.ledger.columns
        held = np.ceil((columns[PROMPT] + columns[STREAMED]) / BLOCK_SIZE_TOKENS) * columns[LIVE]
        guess = np.sum(np.where(columns[STREAMED] > 0, held, 0.0), -1)
        share = [None if engine.load is None else engine.load.kv_share for engine in self.all]
        told = np.array([math.nan if value is None else value for value in share]) * self.kv_blocks
        return np.minimum(np.where(np.isnan(told), guess, told), self.kv_blocks)

    async def watch(self, client: aiohttp.ClientSession) -> None:
        """Reads the metrics of all engines for ever."""
        async with asyncio.TaskGroup() as group:
            for index in range(len(self.all)):
                group.create_task(self._watch(client, index))

    async def _watch(self, client: aiohttp.ClientSession, index: int) -> None:
        while True:
            await self.scrape(client, index)
            await asyncio.sleep(self.settings.scrape_s * random.uniform(0.9, 1.1))  # not all at the same moment

    async def scrape(self, client: aiohttp.ClientSession, index: int) -> None:
        """Reads the metrics of one engine; one that does not answer with a legal page keeps its last load."""
        engine, own = self.all[index], int(self.ledger.in_flight[index])
        try:
            load = read_load(engine.backend.kind, await _page(client, engine, "/metrics"))
            if engine.backend.kind == "llama.cpp":
                load = dataclasses.replace(load, kv_share=await _llama_cpp_share(client, engine))
        except Exception as error:  # of whatever kind: an engine's page must not end the watching of the others
            if not engine.reads_fail:
                fields = {"engine": engine.backend.name, "error": f"{type(error).__name__}: {error}"[:300]}
                _log.warning("metrics cannot be read", extra={"fields": fields})
            engine.reads_fail = True
            return
        engine.reads_fail = False
        engine.load, engine.scraped_s, engine.own_in_flight = load, time.monotonic(), own
        name = engine.backend.name
        self.measures.running.labels(name).set(load.running)
        self.measures.waiting.labels(name).set(load.waiting)
        if load.kv_share is not None:
            self.measures.kv_share.labels(name).set(load.kv_share)


async def _page(client: aiohttp.ClientSession, engine: Engine, path: str) -> str:
    """Returns a page of an engine, which may not be endless."""
    content = bytearray()
    async with client.get(
        engine.backend.url + path, headers=engine.headers, timeout=_READ, allow_redirects=False, raise_for_status=True
    ) as response:
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > MAX_BYTES:
                raise ValueError(f"{path} is longer than {MAX_BYTES} bytes")
    return content.decode(errors="replace")


async def _llama_cpp_share(client: aiohttp.ClientSession, engine: Engine) -> float | None:
    """Returns the share of KV memory in use, None where the server was started without /slots."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
        return kv_share_of_slots(parse_json(await _page(client, engine, "/slots"), "/slots"))
    return None
