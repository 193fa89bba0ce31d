"""The demo and its page, also in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from qos_jax.gateway.core import Gateway
from qos_jax.gateway.demo import demo
from qos_jax.gateway.level import Level
from qos_jax.gateway.settings import Settings
from qos_jax.routers.heuristics import least_kv
from tests.helpers.browser import BROWSER_FLAGS, CHROMIUM
from tests.helpers.gateways import decider, eventually, in_loop, profile


@contextlib.asynccontextmanager
async def running_demo() -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    settings = Settings(scrape_s=0.1, level=Level(latency_per_token_s=1.0))
    deciders = [decider(2), decider(2, least_kv)]
    started = demo(
        ["one <b>", "two"], profile(2), [0.4, 0.6], deciders, settings, host="127.0.0.1", port=0, rate_per_s=20.0
    )
    async with started as (gateway, server):
        serving = asyncio.create_task(server.serve())
        await eventually(lambda: len(gateway.recent) >= 5)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
            yield gateway, client
        server.should_exit = True
        await serving


@in_loop
async def test_the_page_tells_of_queues_and_decisions_and_switches_the_router() -> None:
    async with running_demo() as (gateway, client):
        state = (await client.get("/page/state")).json()
        assert [each["name"] for each in state["engines"]] == ["one <b>", "two"]
        assert state["routers"] == ["round_robin", "least_kv"]
        assert state["qos"] == pytest.approx(sum(each["qos"] for each in gateway.recent) / len(gateway.recent), abs=0.1)
        assert {len(each["net"]) for each in state["decisions"]} == {2}
        assert (await client.post("/page/router", json={"router": "least_kv"})).status_code == 200
        before = len(gateway.recent)
        await eventually(lambda: len(gateway.recent) >= before + 5)
        assert gateway.recent[-1]["router"] == "least_kv"
        assert (await client.post("/page/router", json={"router": "best"})).status_code == 400


@in_loop
async def test_no_other_site_reaches_the_page_through_a_browser() -> None:
    async with running_demo() as (gateway, client):
        assert (await client.get("/", headers={"host": "evil.example"})).status_code == 403
        form = await client.post("/page/router", data={"router": "least_kv"})
        plain = await client.post(
            "/page/router", content=b'{"router": "least_kv"}', headers={"content-type": "text/plain"}
        )
        assert (form.status_code, plain.status_code, gateway.active) == (415, 415, "round_robin")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@in_loop
async def test_a_browser_shows_it_without_an_error(tmp_path) -> None:
    async with running_demo() as (_, client):
        program = await asyncio.create_subprocess_exec(
            str(CHROMIUM), *BROWSER_FLAGS, "--virtual-time-budget=3000", f"--user-data-dir={tmp_path}/profile",
            str(client.base_url),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        shown, told = (each.decode() for each in await program.communicate())
    assert "CONSOLE" not in told
    assert "<td>one &lt;b&gt;</td>" in shown
    assert '<option value="least_kv">' in shown
    assert re.search(r'class="chosen">0\.\d', shown)
    assert not re.search(r"(src|href)=.https?:", shown)
