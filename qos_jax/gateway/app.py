"""The HTTP face of the gateway: an ASGI application with the paths of OpenAI, /metrics and /healthz."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from qos_jax.gateway.answer import Answer, Send
from qos_jax.gateway.ask import RefusedError, parse
from qos_jax.gateway.connections import engine_client
from qos_jax.gateway.core import Gateway

PATHS = ("/v1/chat/completions", "/v1/completions")
_CLIENT = "client"  # the connections to engines, in the state of the application's lifespan


def make_app(gateway: Gateway, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Returns the application; its lifespan opens the connections to engines and watches their metrics.

    Args:
      gateway: what it serves.
      more_routes: further paths, as those of the page for people.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with engine_client() as client:
            await asyncio.gather(*(gateway.engines.scrape(client, index) for index in range(len(gateway.backends))))
            watch = asyncio.create_task(gateway.engines.watch(client))
            try:
                yield {_CLIENT: client}
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
                gateway.close()

    completions = Completions(gateway)
    routes: list[BaseRoute] = [Route(path, completions, methods=["POST"]) for path in PATHS]
    routes += [
        Route("/v1/models", _models(gateway), methods=["GET"]),
        Route("/metrics", _metrics(gateway), methods=["GET"]),
        Route("/healthz", _health(gateway), methods=["GET"]),
    ]
    limit = Middleware(_HeaderLimit, most=gateway.settings.max_header_bytes)
    return Starlette(routes=[*routes, *more_routes], lifespan=lifespan, middleware=[limit])


class _HeaderLimit:
    """Refuses long headers: the server takes any that come in one piece."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        size = sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if size + len(scope.get("raw_path", b"")) > self.most:
            await send_refused(
                RefusedError(431, f"the headers are longer than {self.most} bytes", Connection="close"), send
            )
        else:
            await self.app(scope, receive, send)


class Completions:
    """The paths that answer prompts. It is plain ASGI, so that a client that leaves ends the work at once."""

    def __init__(self, gateway: Gateway) -> None:
        """Takes the gateway."""
        self.gateway = gateway

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Answers one request."""
        headers = _plain_headers(scope["headers"])
        try:
            check_key(self.gateway, headers)
            content = await self._body(headers, receive)
            served = await self.gateway.arrive(parse(scope["path"], content, headers))
            await _until_gone(Answer(self.gateway, scope["state"][_CLIENT], served, send).run(), receive)
        except RefusedError as refused:
            await send_refused(refused, send)
        except _GoneError:
            pass

    async def _body(self, headers: Mapping[str, str], receive: Any) -> bytes:
        """Returns the body of a request, which may neither be too long nor come too slowly."""
        most, content, more = self.gateway.settings.max_body_bytes, bytearray(), True
        too_long = RefusedError(413, f"the body is longer than {most} bytes", Connection="close")
        if int(headers.get("content-length", "0")) > most:
            raise too_long
        try:
            async with asyncio.timeout(self.gateway.settings.client_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    content += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(content) > most:
                        raise too_long
        except TimeoutError as error:
            raise RefusedError(408, "the body came too slowly", Connection="close") from error
        return bytes(content)


class _GoneError(Exception):
    """The client has left."""


async def _until_gone(work: Any, receive: Any) -> None:
    """Awaits the work, and cancels it when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise _GoneError
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def check_key(gateway: Gateway, headers: Mapping[str, str]) -> None:
    """Checks the key of a client.

    Raises:
      RefusedError: keys are asked for, and this is none.
    """
    keys = gateway.settings.api_keys
    given = headers.get("authorization", "").removeprefix("Bearer ").encode()
    # Hashes are of equal length, so that the time of a comparison tells nothing.
    digest = hashlib.sha256(given).digest()
    if keys and not any([hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]):
        raise RefusedError(401, "the API key is missing or wrong", "authentication_error", WWW_Authenticate="Bearer")


async def send_refused(refused: RefusedError, send: Send) -> None:
    """Answers by an error."""
    body = refused.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _plain_headers(raw: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}


def _models(gateway: Gateway) -> Any:
    async def models(request: Request) -> Response:
        try:
            check_key(gateway, dict(request.headers))
        except RefusedError as refused:
            return Response(refused.body(), refused.status, refused.headers, "application/json")
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "qos-jax"} for name in gateway.models()]
        return JSONResponse({"object": "list", "data": data})

    return models


def _metrics(gateway: Gateway) -> Any:
    async def metrics(request: Request) -> Response:
        for engine in gateway.engines.all:
            gateway.measures.up.labels(engine.backend.name).set(engine.breaker.state == "closed")
        return Response(gateway.measures.page(), media_type="text/plain; version=1.0.0; charset=utf-8")

    return metrics


def _health(gateway: Gateway) -> Any:
    async def health(request: Request) -> Response:
        closed = [engine.breaker.state == "closed" for engine in gateway.engines.all]
        status = "draining" if gateway.draining else "ok" if any(closed) else "no engine can be reached"
        value = {"status": status, "engines": sum(closed), "of": len(closed)}
        return Response(json.dumps(value), 200 if status == "ok" else 503, media_type="application/json")

    return health
