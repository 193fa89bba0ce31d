"""The answer to one request: sent to an engine, passed on piece by piece, and sent elsewhere if that engine fails."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp

from qos_jax.gateway.ask import RefusedError
from qos_jax.gateway.core import Gateway, Served
from qos_jax.gateway.ledger import Entry
from qos_jax.gateway.stream import Event, EventReader, tokens_of

MAX_ANSWER_BYTES = 32 * 2**20  # of an answer that is not streamed
Send = Callable[[dict[str, Any]], Awaitable[None]]
_log = logging.getLogger(__name__)


class EngineError(Exception):
    """An engine cannot be reached, does not answer, or answers that it is broken or full."""

    def __init__(self, message: str, *, broken: bool = True) -> None:
        """Tells what happened; ``broken`` counts against the engine."""
        super().__init__(message)
        self.broken = broken


class SlowClientError(Exception):
    """A client takes too long to accept its answer."""


@dataclasses.dataclass
class Answer:
    """The answer to one request."""

    gateway: Gateway
    client: aiohttp.ClientSession
    served: Served
    send: Send
    begun: bool = False  # the client has been sent something, so that no other engine can take over

    async def run(self) -> None:
        """Answers the request, on another engine if one fails before anything was sent; notes how it ended.

        Raises:
          RefusedError: no engine took it.
        """
        served = self.served
        try:
            while True:
                try:
                    await self._by(self.gateway.place(served))
                    return
                except EngineError as error:
                    if not await self._may_retry(error):
                        return
        except RefusedError as refused:
            served.status = {429: "rejected", 503: "no_engine"}.get(refused.status, "failed")
            raise
        except asyncio.CancelledError:
            served.status = "cancelled"
            raise
        except (SlowClientError, OSError):  # OSError: it has left, and the server found out first
            served.status = "cancelled"
        finally:
            self.gateway.finish(served)

    async def _may_retry(self, error: EngineError) -> bool:
        """Tells of a failure, and whether the request may be sent elsewhere: not if a part of an answer was sent.

        Raises:
          RefusedError: it was sent to as many engines as it may be.
        """
        served = self.served
        name = self.gateway.backends[served.tried[-1]].name
        _log.warning("engine failed", extra={"fields": {"engine": name, "id": served.id, "error": str(error)}})
        if self.begun:
            served.status = "broken_off"
            await self._send_body(
                _sse({"error": {"message": "the engine failed", "type": "engine_failed"}}), more=False
            )
            return False
        if len(served.tried) > self.gateway.settings.retries:
            raise RefusedError(502 if error.broken else 429, "the engine failed, and so did the retry" if error.broken
                          else "the engines are full", "engine_failed", Retry_After="1") from error  # fmt: skip
        return True

    async def _by(self, expert: int) -> None:
        """Has one engine answer."""
        gateway, engine = self.gateway, self.gateway.engines.all[expert]
        entry, now_s = gateway.begin(self.served, expert), time.monotonic
        try:
            await self._attempt(expert, entry)
            engine.breaker.succeeded()
        except aiohttp.ClientError as error:
            engine.breaker.failed(now_s())
            raise EngineError(type(error).__name__) from error
        except EngineError as error:
            engine.breaker.failed(now_s()) if error.broken else engine.breaker.succeeded()
            raise
        finally:
            engine.breaker.given_up()
            gateway.leave(entry)

    async def _attempt(self, expert: int, entry: Entry) -> None:
        settings, backend = self.gateway.settings, self.gateway.backends[expert]
        headers = {"content-type": "application/json", "x-request-id": self.served.id}
        patience = _Patience(settings.first_token_s, settings.total_s)
        async with (
            patience,
            self.client.post(
                backend.url + self.served.ask.path,
                data=io.BytesIO(self.served.ask.upstream_body(backend.model)),
                headers=headers | self.gateway.engines.all[expert].headers,
                timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s),
                allow_redirects=False,
            ) as response,
        ):
            await self._pass_on(response, entry, patience)

    async def _pass_on(self, response: aiohttp.ClientResponse, entry: Entry, patience: _Patience) -> None:
        if response.status == 429:
            raise EngineError("status 429", broken=False)
        if response.status >= 500:
            raise EngineError(f"status {response.status}")
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if response.status == 200 and is_stream:
            await self._pass_stream(response, entry, patience)
        else:
            await self._pass_whole(response, entry, patience)

    async def _pass_stream(self, response: aiohttp.ClientResponse, entry: Entry, patience: _Patience) -> None:
        reader, served, settings = EventReader(), self.served, self.gateway.settings
        done = False
        async for chunk in response.content.iter_any():
            out = b""
            for event in self._events(reader, chunk):
                if event.error is not None and not self.begun:
                    raise EngineError(f"error in its stream: {event.error}")
                self._note(event, entry)
                done = done or event.done
                if not event.only_usage or served.ask.wants_usage:
                    out += event.raw
            if out:
                patience.client_turn(settings.client_s)
                await self._start(200, b"text/event-stream; charset=utf-8")
                await self._send_body(out, more=True)
            patience.engine_turn(settings.token_s if served.first_token_s else settings.first_token_s)
        if not done:
            raise EngineError("the stream ended early")
        await self._send_body(b"", more=False)
        served.status = "ok"

    async def _pass_whole(self, response: aiohttp.ClientResponse, entry: Entry, patience: _Patience) -> None:
        served, content = self.served, bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise EngineError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        usage = _usage(bytes(content))
        served.output_tokens = tokens_of(usage, "completion_tokens") or 0
        served.prompt_tokens = tokens_of(usage, "prompt_tokens")
        served.first_token_s = time.monotonic() - served.arrival_s
        self.gateway.ledger.stream(entry, served.output_tokens)
        served.status = "ok" if response.status == 200 else "refused_by_engine"
        patience.client_turn(self.gateway.settings.client_s)
        await self._start(response.status, b"application/json")
        await self._send_body(bytes(content), more=False)

    def _events(self, reader: EventReader, chunk: bytes) -> Iterator[Event]:
        try:
            yield from reader.feed(chunk)
        except ValueError as error:
            raise EngineError(str(error)) from error

    def _note(self, event: Event, entry: Entry) -> None:
        served = self.served
        if event.tokens:
            if served.first_token_s is None:
                served.first_token_s = time.monotonic() - served.arrival_s
            served.output_tokens += event.tokens
            self.gateway.ledger.stream(entry, event.tokens)
            if self.gateway.settings.log_texts:
                served.answer.append(event.raw.decode(errors="replace"))
        if event.usage is not None:
            served.prompt_tokens = tokens_of(event.usage, "prompt_tokens")
            served.output_tokens = tokens_of(event.usage, "completion_tokens") or served.output_tokens

    async def _start(self, status: int, content_type: bytes) -> None:
        if self.begun:
            return
        self.begun = True
        headers = [
            (b"content-type", content_type),
            (b"cache-control", b"no-store"),
            (b"x-request-id", self.served.id.encode()),
            (b"x-qos-engine", self.gateway.backends[self.served.tried[-1]].name.encode()),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, content: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": content, "more_body": more})


class _Patience:
    """How long the engine and the client may take in turn: one timer that is set anew at each piece."""

    def __init__(self, first_s: float, total_s: float) -> None:
        self._now_s = asyncio.get_running_loop().time
        self._end_s, self._is_engine = self._now_s() + total_s, True
        self._timeout = asyncio.timeout_at(min(self._now_s() + first_s, self._end_s))

    def engine_turn(self, seconds: float) -> None:
        """Gives the engine so many seconds for its next piece."""
        self._is_engine = True
        self._set(seconds)

    def client_turn(self, seconds: float) -> None:
        """Gives the client so many seconds to accept a piece."""
        self._is_engine = False
        self._set(seconds)

    def _set(self, seconds: float) -> None:
        self._timeout.reschedule(min(self._now_s() + seconds, self._end_s))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as late:
            raise EngineError("took too long") if self._is_engine else SlowClientError from late


def _usage(content: bytes) -> dict[str, Any] | None:
    try:
        usage = json.loads(content).get("usage")
    except (ValueError, AttributeError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None


def _sse(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()
