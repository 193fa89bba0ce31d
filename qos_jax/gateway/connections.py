"""Connections to engines: httpx's, with a pool whose cost does not grow with the number of connections.

httpcore's own pool walks over all connections for each of them at each request: with 200 streams open, half of the
gateway's time.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpcore
import httpx

_KEEP_S = 2.0  # s that an idle connection is kept: engines close theirs after 5 s
_MAX_IDLE = 128  # connections to each engine


def engine_client() -> httpx.AsyncClient:
    """Returns a client without proxies, keys or redirects from elsewhere: engines are where the fleet file says."""
    return httpx.AsyncClient(transport=_Transport(), trust_env=False, follow_redirects=False)


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport on the pool below."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self._pool: Any = _Pool(httpx.create_ssl_context(trust_env=False))


class _Pool(httpcore.AsyncConnectionPool):
    """Idle connections of each engine, of which the last one used is taken first."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(ssl_context=ssl_context)
        self._context = ssl_context
        self._idle: dict[tuple[bytes, bytes, int], list[httpcore.AsyncHTTPConnection]] = {}

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        origin = request.url.origin
        idle = self._idle.setdefault((origin.scheme, origin.host, origin.port), [])
        connection = await self._taken(idle)
        if connection is None:
            connection = httpcore.AsyncHTTPConnection(origin, self._context, _KEEP_S)
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        stream = _Stream(response.stream, connection, idle)
        return httpcore.Response(
            response.status, headers=response.headers, content=stream, extensions=response.extensions
        )

    async def _taken(self, idle: list[httpcore.AsyncHTTPConnection]) -> httpcore.AsyncHTTPConnection | None:
        while idle:
            connection = idle.pop()
            if connection.is_idle() and not connection.has_expired():
                return connection
            await connection.aclose()
        return None

    async def aclose(self) -> None:
        for idle in self._idle.values():
            while idle:
                await idle.pop().aclose()


class _Stream:
    """The body of an answer; the connection is idle again after its end, or closed if it was not read to it."""

    def __init__(
        self, stream: Any, connection: httpcore.AsyncHTTPConnection, idle: list[httpcore.AsyncHTTPConnection]
    ) -> None:
        self._stream, self._connection, self._idle = stream, connection, idle
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._stream.aclose()
        if self._connection.is_idle() and len(self._idle) < _MAX_IDLE:
            self._idle.append(self._connection)
        else:
            await self._connection.aclose()
