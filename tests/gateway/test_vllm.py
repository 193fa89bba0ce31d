"""The gateway before two real vLLM servers, with the client of OpenAI.

Needs the packages in requirements-gateway.lock, and in the environment variable VLLM_PYTHON an interpreter with those
in requirements-vllm.lock; `make vllm-gateway` installs both and runs this.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from experiments.vllm_server import VllmServer, write_model
from qos_jax.gateway.decision import Decider, program_of
from qos_jax.routers.impact_greedy import impact_greedy
from tests.helpers.gateways import eventually, gateway_of, in_loop, profile, started

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
_PYTHON = os.environ.get("VLLM_PYTHON")
if _PYTHON is None:
    pytest.skip("VLLM_PYTHON names no interpreter with vLLM", allow_module_level=True)

SIZES = {"small": (2, 256), "large": (8, 512)}
MAX_RUNNING = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    folder = tmp_path_factory.mktemp("models")

    def made(name: str, layers: int, width: int) -> VllmServer:
        write_model(folder / name, layers=layers, width=width)
        return VllmServer(os.path.abspath(_PYTHON), folder / name, name, max_running=MAX_RUNNING)

    yield from started(made(name, *size) for name, size in SIZES.items())


@pytest.fixture(scope="module")
def decider() -> Decider:
    """A router that drops nothing by itself, so that only full queues do."""
    timing = profile(2, step_base_s=1e-2, max_running=MAX_RUNNING, max_waiting=8, kv_blocks=256)
    return Decider(program_of(impact_greedy(price=-1.0), timing, slots=8))


@in_loop
async def _streams(engines: list[VllmServer], decider: Decider) -> None:
    async with gateway_of(engines, "vllm", decider) as (gateway, client):
        for name in SIZES:
            stream = await client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "w1 w2 w3"}],
                max_tokens=12,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
        whole = await client.completions.create(model="auto", prompt="w1 w2", max_tokens=5)
        assert whole.usage.prompt_tokens == 2
        records = list(gateway.recent)
        assert [each["engine"] for each in records[:2]] == list(SIZES)
        assert [each["status"] for each in records] == ["ok"] * 3
        assert [(each["prompt_tokens"], each["output_tokens"]) for each in records[:2]] == [(3, 12)] * 2
        assert all(0 < each["first_token_s"] <= each["end_s"] for each in records)


@in_loop
async def _queues(engines: list[VllmServer], decider: Decider) -> None:
    """What waits at an engine is read off its metrics, and who leaves frees it."""
    async with gateway_of(engines, "vllm", decider) as (gateway, client):
        large = gateway.engines.all[1]

        async def opened() -> openai.AsyncStream:
            return await client.completions.create(
                model="large", prompt="w1 " * 100, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )

        asking = [asyncio.create_task(opened()) for _ in range(MAX_RUNNING + 2)]
        await eventually(lambda: large.load.running == MAX_RUNNING and large.load.waiting == 2, 60)
        assert large.load.kv_share > 0
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await eventually(lambda: large.load.running + large.load.waiting == 0, 60)  # long before 900 tokens
        assert sum(gateway.ledger.in_flight) == 0


@in_loop
async def _killed(engines: list[VllmServer], decider: Decider) -> None:
    async with gateway_of(engines, "vllm", decider) as (gateway, client):
        stream = await client.completions.create(
            model="large", prompt="w1", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        engines[1].kill()
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
        for _ in range(4):
            await client.completions.create(model="auto", prompt="w1", max_tokens=3)
        records = list(gateway.recent)
        assert [each["status"] for each in records] == ["broken_off"] + ["ok"] * 4
        assert {each["engine"] for each in records[1:]} == {"small"}


def test_answers_are_streamed_by_every_engine(engines, decider) -> None:
    _streams(engines, decider)


def test_queues_are_seen_and_a_client_that_leaves_frees_its_place(engines, decider) -> None:
    _queues(engines, decider)


def test_a_killed_engine_costs_only_what_it_was_serving(engines, decider) -> None:
    _killed(engines, decider)
