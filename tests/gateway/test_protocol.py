"""What clients and engines see of the gateway: streams, errors, cancels, failures and limits."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket

import httpx
import jax.numpy as jnp
import pytest

from qos_jax.gateway.level import Level
from qos_jax.gateway.settings import Settings
from qos_jax.routers.base import Router
from tests.helpers.gateways import events, eventually, in_loop, kill, listen, raw, running

QUICK = Settings(scrape_s=0.02, level=Level(latency_per_token_s=1.0), connect_s=1.0)


def dropper() -> Router:
    """Drops every request that it may."""
    return Router(
        "dropper", "heuristic", tuple, lambda key, obs, memory: (jnp.where(obs.action_mask[-1], 2, 0), memory)
    )


@in_loop
async def test_answers_come_whole_or_streamed_and_name_their_engine() -> None:
    async with running() as world:
        whole = await world.complete()
        assert whole.status_code == 200
        assert whole.json()["choices"][0]["text"] == "w1 w2 w3 "
        async with world.streamed() as response:
            content = await response.aread()
        assert content.endswith(b"data: [DONE]\n\n")
        assert "".join(each["choices"][0]["text"] for each in events(content)) == "w1 w2 w3 "
        chat = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answer = await world.client.post("/v1/chat/completions", json=chat)
        assert answer.json()["choices"][0]["message"]["content"] == "w1 w2 "
        assert {whole.headers["x-qos-engine"], response.headers["x-qos-engine"]} == {"e0", "e1"}
        records = await world.records(3)
        assert [each["status"] for each in records] == ["ok"] * 3
        assert [each["output_tokens"] for each in records] == [3, 3, 2]
        assert world.gateway.ledger.in_flight.tolist() == [0, 0]


@in_loop
async def test_the_usage_is_streamed_only_to_clients_that_ask_for_it() -> None:
    async with running() as world:
        for wanted in (False, True):
            async with world.streamed(stream_options={"include_usage": wanted}) as response:
                values = events(await response.aread())
            assert any(each.get("usage") for each in values) is wanted


@in_loop
async def test_a_named_model_is_served_by_its_engine_only() -> None:
    async with running() as world:
        assert {(await world.complete(model="m1")).headers["x-qos-engine"] for _ in range(3)} == {"e1"}
        models = (await world.client.get("/v1/models")).json()["data"]
        assert [each["id"] for each in models] == ["auto", "m0", "m1", "e0", "e1"]


@pytest.mark.parametrize("model", ["http://127.0.0.1:1/", "../e0", "e0@evil.example", "m0\r\nx-evil: 1", "e0/../../x"])
def test_no_name_of_a_model_makes_the_gateway_speak_to_anything_else(model: str) -> None:
    @in_loop
    async def scenario() -> None:
        async with running() as world:
            answer = await world.complete(model=model)
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] == "model_not_found"
            assert "x-evil" not in answer.headers
            assert sum(engine.received for engine in world.engines) == 0

    scenario()


@in_loop
async def test_bad_requests_are_told_and_reach_no_engine() -> None:
    bodies = [
        b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"model": "auto"}', b'{"model": "auto", "prompt": 3}',
        b'{"model": 1, "prompt": "x"}', b'{"model": "auto", "prompt": "x", "max_tokens": -1}',
        b'{"model": "auto", "prompt": "x", "stream": "yes"}', b'{"model": "auto", "prompt": "\xff"}',
        b'{"model": "auto", "prompt": "x", "stream_options": 1, "stream": true}',
    ]  # fmt: skip
    async with running() as world:
        for body in bodies:
            answer = await world.client.post("/v1/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
        for name, value in (("x-slo-ttft-ms", "soon"), ("x-slo-tpot-ms", "-3"), ("x-session-id", "a b")):
            answer = await world.complete(headers={name: value})
            assert answer.status_code == 400
            assert name in answer.json()["error"]["message"]
        assert sum(engine.received for engine in world.engines) == 0
        assert (await world.complete()).status_code == 200


@in_loop
async def test_huge_bodies_and_headers_are_refused_before_they_are_read() -> None:
    async with running(dataclasses.replace(QUICK, max_body_bytes=1000)) as world:
        assert (await world.complete(prompt="x" * 1000)).status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
        chunks = (b"1f4\r\n" + b"x" * 500 + b"\r\n") * 3
        answer = await raw(world.port, head + b"transfer-encoding: chunked\r\n\r\n" + chunks, wait_for=b"1000 bytes")
        assert b" 413 " in answer
        answer = await raw(world.port, head + b"content-length: 999999999999\r\n\r\n", wait_for=b"1000 bytes")
        assert b" 413 " in answer
        assert b" 431 " in await raw(world.port, head + b"a: " + b"x" * 50_000 + b"\r\n\r\n", wait_for=b"16384 bytes")
        assert b" 400 " in await raw(world.port, head + b"a: " + b"x" * 500_000 + b"\r\n\r\n")
        for endless in (
            b"1;" + b"x" * 500_000,
            b"1\r\n{\r\n0\r\na: " + b"x" * 500_000,
            b"0\r\n" + b"a: x\r\n" * 90_000,
        ):
            assert b" 400 " in await raw(world.port, head + b"transfer-encoding: chunked\r\n\r\n" + endless)


@in_loop
async def test_a_body_that_comes_too_slowly_is_refused() -> None:
    async with running(dataclasses.replace(QUICK, client_s=0.1)) as world:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        assert b" 408 " in await raw(world.port, head, wait_for=b"too slowly")


@in_loop
async def test_a_client_that_takes_no_answer_loses_its_engine() -> None:
    async with running(dataclasses.replace(QUICK, client_s=0.2), step_base_s=1e-4) as world:
        body = json.dumps({"model": "auto", "prompt": "x", "stream": True, "max_tokens": 100_000}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        for engine in world.engines:
            engine.padding = "x" * 20_000  # so that buffers are soon full
        world.face.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:  # which never reads
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", world.port))
            client.sendall(head + body)
            [record] = await world.records(1)
        assert record["status"] == "cancelled"
        connections = world.listeners[int(record["engine"][1])].server_state.connections
        await eventually(lambda: len(connections) <= 1)  # that of the scrapes
        assert sum(world.gateway.ledger.in_flight) == 0


@in_loop
async def test_a_cancel_of_the_client_reaches_the_engine() -> None:
    async with running(step_base_s=0.01) as world:
        async with world.streamed(max_tokens=100_000) as response:
            await anext(response.aiter_bytes())
            assert sum(world.gateway.ledger.in_flight) == 1
        await eventually(lambda: sum(engine.cancelled for engine in world.engines) == 1)
        with pytest.raises(httpx.ReadTimeout):
            await world.client.post("/v1/completions", json={"model": "auto", "prompt": "x", "max_tokens": 100_000},
                                    timeout=0.1)  # fmt: skip
        await eventually(lambda: sum(engine.cancelled for engine in world.engines) == 2)
        assert [each["status"] for each in await world.records(2)] == ["cancelled"] * 2
        assert sum(world.gateway.ledger.in_flight) == 0


@pytest.mark.parametrize("fault", ["refuse", "overloaded", "stall"])
def test_an_engine_that_fails_before_its_first_token_costs_a_retry_only(fault: str) -> None:
    @in_loop
    async def scenario() -> None:
        async with running(dataclasses.replace(QUICK, first_token_s=0.3)) as world:
            world.engines[0].fault = fault
            answers = [await world.complete(model="auto") for _ in range(4)]
            assert {answer.headers.get("x-qos-engine") for answer in answers} == {"e1"}
            tried = [each["tried"] for each in await world.records(4)]
            assert ["e0", "e1"] in tried

    scenario()


@in_loop
async def test_a_stream_that_breaks_is_told_and_not_retried() -> None:
    async with running() as world:
        for engine in world.engines:
            engine.fault = "break_stream"
        async with world.streamed() as response:
            values = events(await response.aread())
        assert values[-1]["error"]["type"] == "engine_failed"
        assert sum(engine.received for engine in world.engines) == 1
        assert [each["status"] for each in await world.records(1)] == ["broken_off"]


@in_loop
async def test_a_killed_engine_is_left_alone_and_tried_again_when_it_is_back() -> None:
    async with running() as world:
        dead, port = world.listeners[0], world.listeners[0].port
        await kill(dead, asyncio.create_task(asyncio.sleep(0)))
        answers = [await world.complete() for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-qos-engine"] for answer in answers} == {"e1"}
        tries = sum(each["tried"] == ["e0", "e1"] for each in await world.records(12))
        assert tries == world.gateway.engines.all[0].breaker.failures_to_open
        assert (await world.client.get("/healthz")).json()["engines"] == 1
        server, task = await listen(world.engines[0].app, port=port)
        world.gateway.engines.all[0].breaker.opened_until_s = 0.0  # its wait is over
        names = {(await world.complete()).headers["x-qos-engine"] for _ in range(4)}
        assert names == {"e0", "e1"}
        await kill(server, task)


@in_loop
async def test_without_engines_clients_are_told_when_to_come_back() -> None:
    async with running() as world:
        for engine in world.engines:
            engine.fault = "refuse"
        first = await world.complete()
        assert (first.status_code, first.json()["error"]["type"]) == (502, "engine_failed")
        for _ in range(8):
            last = await world.complete()
        assert (last.status_code, last.headers["retry-after"]) == (503, "1")
        assert (await world.client.get("/healthz")).status_code == 503
        assert sum(world.gateway.ledger.in_flight) == 0


@pytest.mark.parametrize(("best_effort", "status"), [(False, 429), (True, 200)])
def test_a_dropped_request_is_refused_or_served_as_well_as_can_be(best_effort: bool, status: int) -> None:
    @in_loop
    async def scenario() -> None:
        async with running(dataclasses.replace(QUICK, best_effort=best_effort), router=dropper) as world:
            answer = await world.complete()
            assert answer.status_code == status
            assert ("retry-after" in answer.headers) is (status == 429)
            [record] = await world.records(1)
            assert record["status"] == ("ok" if best_effort else "rejected")

    scenario()


@in_loop
async def test_limits_of_the_client_count_for_its_request() -> None:
    async with running(step_base_s=0.02) as world:
        await world.complete(headers={"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"})
        async with world.client.stream(
            "POST", "/v1/completions", headers={"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "1"},
            json={"model": "auto", "prompt": "x", "stream": True, "max_tokens": 5},
        ) as response:  # fmt: skip
            await response.aread()
        kept, missed = await world.records(2)
        assert (await world.complete(headers={"x-slo-class": "patient"})).status_code == 400
        assert (kept["in_time"], missed["in_time"]) == (True, False)
        assert (kept["qos"], missed["qos"]) == (0.5, 0.0)
        assert missed["limit_s_per_token"] == pytest.approx((60 + 0.001 * 4) / 5)


@in_loop
async def test_classes_of_users_have_their_limits() -> None:
    async with running(
        dataclasses.replace(
            QUICK,
            classes={"patient": Level(latency_per_token_s=9.0), "hasty": Level(latency_per_token_s=1e-6)},
        )
    ) as world:
        await world.complete(headers={"x-slo-class": "patient"})
        await world.complete(headers={"x-slo-class": "hasty"})
        patient, hasty = await world.records(2)
        assert (patient["limit_s_per_token"], patient["in_time"]) == (9.0, True)
        assert (hasty["limit_s_per_token"], hasty["in_time"]) == (1e-6, False)


@in_loop
async def test_requests_of_one_session_stay_on_one_engine_while_it_can_be_reached() -> None:
    async with running() as world:
        names = [(await world.complete(headers={"x-session-id": "a"})).headers["x-qos-engine"] for _ in range(3)]
        assert len(set(names)) == 1
        world.engines[int(names[0][1])].fault = "refuse"
        moved = [(await world.complete(headers={"x-session-id": "a"})).headers["x-qos-engine"] for _ in range(3)]
        assert set(moved) == {"e0", "e1"} - set(names)


def refuses_what_is_cached() -> Router:
    """Takes the first engine, and drops what an engine has some of already."""

    def act(key, obs, memory):
        return jnp.where(jnp.max(obs.arrived.cached_tokens) > 0, obs.action_mask.shape[0] - 1, 0), memory

    return Router("refuses_what_is_cached", "heuristic", tuple, act)


def leaves_what_is_cached() -> Router:
    """Takes the first engine that has nothing of the prompt."""

    def act(key, obs, memory):
        return jnp.argmin(obs.arrived.cached_tokens), memory

    return Router("leaves_what_is_cached", "heuristic", tuple, act)


@in_loop
async def test_routers_see_what_the_last_turn_of_a_session_left() -> None:
    async with running(dataclasses.replace(QUICK, sticky_sessions=False), router=leaves_what_is_cached) as world:
        asked = {"headers": {"x-session-id": "a"}, "prompt": "word " * 100, "max_tokens": 20}
        assert [(await world.complete(**asked)).headers["x-qos-engine"] for _ in range(3)] == ["e0", "e1", "e0"]
    async with running(router=leaves_what_is_cached) as world:
        assert [(await world.complete(**asked)).headers["x-qos-engine"] for _ in range(3)] == ["e0"] * 3
    async with running(router=refuses_what_is_cached) as world:
        long = {"prompt": "word " * 100, "max_tokens": 20}
        codes = [
            (await world.complete(headers={"x-session-id": name}, **long)).status_code for name in ("a", "b", "a", "b")
        ]
        assert codes == [200, 200, 429, 429]
        assert (await world.complete(**long)).status_code == 200


@in_loop
async def test_an_engine_can_neither_send_the_gateway_elsewhere_nor_mark_it() -> None:
    async with running(num_engines=2) as world:
        asked: list[list[tuple[bytes, bytes]]] = []

        async def elsewhere(scope, receive, send):
            asked.append(scope["headers"])
            location = f"http://127.0.0.1:{world.listeners[1].port}{scope['path']}".encode()
            headers = [(b"location", location), (b"set-cookie", b"mark=1"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 307, "headers": headers})
            await send({"type": "http.response.body", "body": b""})

        for connection in list(world.listeners[0].server_state.connections):
            connection.app = elsewhere
        world.listeners[0].config.loaded_app = elsewhere
        for _ in range(2):
            answer = await world.complete(model="m0")
            assert (answer.status_code, answer.headers.get("location"), answer.content) == (307, None, b"")
        assert world.engines[1].received == 0
        assert len(asked) >= 2
        assert not any(name == b"cookie" for headers in asked for name, _ in headers)


@in_loop
async def test_keys_are_asked_for_and_neither_they_nor_engines_keys_are_passed_on_or_logged(
    tmp_path, monkeypatch, caplog, capfd
) -> None:
    monkeypatch.setenv("TEST_ENGINE_KEY_0", "engine-secret")
    settings = dataclasses.replace(QUICK, api_keys=frozenset({"client-secret"}))
    seen: list[dict[str, str]] = []
    async with running(settings, num_engines=2, folder=tmp_path) as world:
        world.engines[1].fault = "refuse"  # so that there is a log
        app = world.listeners[0].config.loaded_app

        async def spy(scope, receive, send):
            seen.append({name.decode(): value.decode() for name, value in scope.get("headers", [])})
            await app(scope, receive, send)

        for connection in list(world.listeners[0].server_state.connections):
            connection.app = spy
        world.listeners[0].config.loaded_app = spy
        for key, status in (("", 401), ("Bearer wrong", 401), ("Bearer client-secret", 200)):
            answer = await world.complete(headers={"authorization": key} if key else {}, prompt="a private text")
            assert answer.status_code == status
        await world.complete(headers={"authorization": "Bearer client-secret"})
        assert (await world.client.get("/v1/models")).status_code == 401
        posted = [headers for headers in seen if "content-type" in headers]
        assert {headers["authorization"] for headers in posted} == {"Bearer engine-secret"}
        page = (await world.client.get("/metrics")).text
    written = (tmp_path / "requests.jsonl").read_text() + caplog.text + "".join(capfd.readouterr()) + page
    assert "engine failed" in caplog.text
    for secret in ("client-secret", "engine-secret", "a private text"):
        assert secret not in written
    assert "client-secret" not in repr(settings)


@in_loop
async def test_a_client_can_forge_neither_headers_nor_lines_of_the_log(tmp_path) -> None:
    async with running(folder=tmp_path) as world:
        evil = "x\r\nx-evil: 1"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-session-id: a\rb\r\n\r\n"
        assert b" 400 " in await raw(world.port, head)
        assert (await world.complete(prompt=evil)).status_code == 200
        assert (await world.complete(headers={"x-request-id": "forged"})).headers["x-request-id"] != "forged"
        await world.records(2)
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["ok", "ok"]
    assert evil not in lines[0]


@in_loop
async def test_texts_are_written_only_on_request(tmp_path) -> None:
    async with running(dataclasses.replace(QUICK, log_texts=True), folder=tmp_path) as world:
        async with world.streamed(prompt="a question") as response:
            await response.aread()
        await world.records(1)
    record = json.loads((tmp_path / "requests.jsonl").read_text())
    assert record["text"] == "a question"
    assert "w3" in record["answer"]


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp"])
def test_the_load_of_every_kind_of_engine_is_read(kind: str) -> None:
    @in_loop
    async def scenario() -> None:
        long = {"model": "m0", "max_tokens": 1000, "prompt": "x" * 4000}
        async with running(kind=kind, step_base_s=0.01) as world, world.streamed(**long):
            engine = world.gateway.engines.all[0]
            await eventually(lambda: engine.load and engine.load.running == 1 and engine.load.kv_share > 0.06)
            assert world.gateway.engines.kv_used_blocks()[1] == 0
            page = (await world.client.get("/metrics")).text
            assert 'qos_gateway_engine_running{engine="e0"} 1.0' in page
            assert 'qos_gateway_in_flight{engine="e0"} 1.0' in page

    scenario()
