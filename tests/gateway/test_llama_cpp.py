"""The gateway before three real engines of different sizes, with the client of OpenAI.

Needs the packages in requirements-gateway.lock; `make gateway` installs them and runs this.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import pathlib
from collections.abc import Iterator

import pytest

from experiments.llama_engine import LlamaEngine, write_model
from qos_jax.gateway.decision import Decider, program_of
from qos_jax.routers.impact_greedy import impact_greedy
from tests.helpers.gateways import eventually, gateway_of, in_loop, profile, started

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

SIZES = {"small": (2, 128), "medium": (4, 256), "large": (6, 384)}
SLOTS = 2  # of each engine


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LlamaEngine]]:
    folder: pathlib.Path = tmp_path_factory.mktemp("models")

    def made(name: str, layers: int, width: int) -> LlamaEngine:
        write_model(folder / f"{name}.gguf", layers=layers, width=width)
        return LlamaEngine(folder / f"{name}.gguf", name, slots=SLOTS)

    yield from started(made(name, *size) for name, size in SIZES.items())


@pytest.fixture(scope="module")
def decider() -> Decider:
    """A router that drops nothing by itself, so that only full queues do."""
    timing = profile(3, step_base_s=5e-3, max_running=SLOTS, max_waiting=6, kv_blocks=256)
    return Decider(program_of(impact_greedy(price=-1.0), timing, slots=8))


def messages(text: str = "tell me a story") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@in_loop
async def _streams(engines: list[LlamaEngine], decider: Decider) -> None:
    async with gateway_of(engines, "llama.cpp", decider) as (gateway, client):
        for name in SIZES:
            stream = await client.chat.completions.create(
                model=name, messages=messages(), max_tokens=12, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
        whole = await client.completions.create(model="auto", prompt="hello", max_tokens=5)
        assert whole.usage.completion_tokens <= 5
        records = list(gateway.recent)
        assert [each["engine"] for each in records[:3]] == list(SIZES)
        assert [each["status"] for each in records] == ["ok"] * 4
        assert [each["output_tokens"] for each in records[:3]] == [12] * 3
        assert all(0 < each["first_token_s"] <= each["end_s"] for each in records)


@in_loop
async def _cancel(engines: list[LlamaEngine], decider: Decider) -> None:
    async with gateway_of(engines, "llama.cpp", decider) as (gateway, client):
        stream = await client.completions.create(
            model="large", prompt="x", max_tokens=800, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        large = gateway.engines.all[2]
        await eventually(lambda: large.load.running == 1 and large.load.kv_share > 0)
        await stream.close()
        await eventually(lambda: large.load.running == 0)  # long before 800 tokens
        assert gateway.recent[-1]["status"] == "cancelled"
        assert gateway.recent[-1]["output_tokens"] < 800


@in_loop
async def _killed(engines: list[LlamaEngine], decider: Decider) -> None:
    async with gateway_of(engines, "llama.cpp", decider) as (gateway, client):

        async def one(number: int, tokens: int) -> str:
            stream = await client.completions.create(
                model="auto",
                prompt=f"request {number}",
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            try:
                async for _ in stream:
                    pass
            except openai.APIError:
                return "told"
            return "ok"

        # So long that the first is not done before the last has come, also on the smallest engine.
        tasks = [asyncio.create_task(one(number, 400)) for number in range(5)]
        await eventually(lambda: gateway.ledger.in_flight[0] and sum(gateway.ledger.in_flight) == 5)
        serving = int(gateway.ledger.in_flight[0])
        engines[0].kill()
        counts = collections.Counter(await asyncio.gather(*tasks))
        assert counts["told"] <= serving
        assert sum(counts.values()) == 5
        assert set(await asyncio.gather(*(one(number, 40) for number in range(4)))) == {"ok"}
        await asyncio.to_thread(engines[0].start)
        async with asyncio.timeout(60):  # longer than the breaker ever waits
            while gateway.engines.all[0].breaker.state != "closed":
                # Who asks for this model is told that it cannot be reached until the breaker has waited.
                with contextlib.suppress(openai.InternalServerError):
                    await client.completions.create(model="small", prompt="again", max_tokens=2)
                await asyncio.sleep(0.05)
        await client.completions.create(model="small", prompt="again", max_tokens=2)


@in_loop
async def _overload(engines: list[LlamaEngine], decider: Decider) -> None:
    async with gateway_of(engines, "llama.cpp", decider) as (gateway, client):

        async def one() -> int:
            try:
                await client.completions.create(
                    model="auto", prompt="much to do", max_tokens=400, extra_body={"ignore_eos": True}
                )
            except openai.APIStatusError as error:
                return int(error.status_code)
            return 200

        counts = collections.Counter(await asyncio.gather(*(one() for _ in range(40))))
        assert set(counts) == {200, 429}
        assert counts[200] >= 3 * SLOTS
        assert sum(gateway.ledger.in_flight) == 0
        assert await one() == 200


def test_answers_are_streamed_by_every_engine(engines, decider) -> None:
    _streams(engines, decider)


def test_a_cancel_frees_the_engine(engines, decider) -> None:
    _cancel(engines, decider)


def test_a_killed_engine_costs_only_what_it_was_serving(engines, decider) -> None:
    _killed(engines, decider)


def test_overload_is_told_and_the_rest_is_served(engines, decider) -> None:
    _overload(engines, decider)
