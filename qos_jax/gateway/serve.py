"""Serving an application by uvicorn: limits on connections and headers, and the end on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qos_jax.gateway.settings import Settings

_HEADERS_S = 10.0  # that a client may take to send its headers
_FORCED_EVERY_S = 0.1  # between two looks at whether to wait no longer


class _Wary(HttpToolsProtocol):
    """Closes a connection whose headers do not come to an end; uvicorn itself would wait for ever and take them all.

    Counted is all that comes without being a body: headers, frames of chunks, and the headers that may follow a body in
    chunks, which are dropped.
    """

    _headers_timer: asyncio.TimerHandle | None = None
    _headers_bytes = 0
    _has_headers = False  # all those of the request that is read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._headers_bytes += len(data)
        super().data_received(data)
        most = self.config.h11_max_incomplete_event_size  # uvicorn heeds it with h11 only, which is slower
        if most is not None and self._headers_bytes > most and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")
        self._watch()

    def on_message_begin(self) -> None:
        self._has_headers = False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_headers = True
        self._headers_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._headers_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._headers_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(_HEADERS_S, self.transport.close)

    def _forget(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None


class Listener(uvicorn.Server):
    """A server that leaves signals to its program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for open connections; drops them where ``force_exit`` is set, now or later, and ends the application.

        uvicorn leaves both open then, and from Python 3.12 on asyncio waits until connections are closed.
        """
        ending = asyncio.create_task(super().shutdown(sockets))
        try:
            while not ending.done():
                await asyncio.wait([ending], timeout=_FORCED_EVERY_S)
                await self._drop_if_forced()
        finally:
            ending.cancel()  # does nothing where it is done
        await ending
        if self.force_exit:
            await self.lifespan.shutdown()

    async def _drop_if_forced(self) -> None:
        if self.force_exit:
            await asyncio.sleep(0)  # what was just accepted becomes a connection
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)  # they close

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])


def listener(app: Any, host: str, port: int, settings: Settings, drain_s: float | None = None) -> Listener:
    """Returns a server for an application; ``serve`` starts it.

    Args:
      app: the ASGI application.
      host: address to listen on.
      port: to listen on; 0 takes a free one.
      settings: limits.
      drain_s: s that requests may take to end after the server is told to; None for as long as they need.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        http=_Wary,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        h11_max_incomplete_event_size=settings.max_header_bytes,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=None if drain_s is None else max(1, round(drain_s)),
        backlog=2048,
    )
    return Listener(config)


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns what makes an event loop of uvloop, which takes half the time, or None where it is not installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve_until_signal(server: uvicorn.Server, on_signal: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT, then takes no more connections and ends with the last request.

    What there is at the start is no longer looked at by the garbage collector.

    Args:
      server: see ``listener``.
      on_signal: called at the signal.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        on_signal()
        server.force_exit = server.should_exit  # the second signal waits for nothing
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    gc.collect()
    gc.freeze()  # a full collection of all that was imported and compiled would hold streams up for 0.1 s
    await server.serve()
