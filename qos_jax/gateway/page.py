"""The page for people: live queues, the last decisions, the QoS of the last minute, and a switch of the router.

It is served by the demo only, asks for no key, and answers only to names of this machine, so that no page of another
site can reach it through a browser.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from qos_jax.gateway.core import Gateway

_HTML = pathlib.Path(__file__).with_name("page.html")
_NUM_DECISIONS = 12
_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def page_routes(gateway: Gateway) -> list[Route]:
    """Returns the paths of the page."""

    async def page(request: Request) -> Response:
        return _local(request) or HTMLResponse(_HTML.read_text(encoding="utf-8"))

    async def state(request: Request) -> Response:
        return _local(request) or JSONResponse(state_of(gateway))

    async def router(request: Request) -> Response:
        if refused := _local(request):
            return refused
        if not request.headers.get("content-type", "").startswith("application/json"):  # a form of another site
            return JSONResponse({"error": "the content must be JSON"}, 415)
        try:
            name = json.loads(await request.body()).get("router")
        except (ValueError, AttributeError, RecursionError):
            name = None
        if name not in gateway.deciders:
            return JSONResponse({"error": f"router must be one of {', '.join(gateway.deciders)}"}, 400)
        gateway.active = name
        return JSONResponse({"router": name})

    return [Route("/", page), Route("/page/state", state), Route("/page/router", router, methods=["POST"])]


def state_of(gateway: Gateway) -> dict[str, Any]:
    """Returns what the page shows."""
    recent = [record for record in gateway.recent if record["status"] != "cancelled"]
    count = len(recent)
    engines = []
    for engine, in_flight in zip(gateway.engines.all, gateway.ledger.in_flight.tolist(), strict=True):
        load = engine.load
        waiting = 0 if load is None else min(load.waiting, in_flight)
        engines.append(
            {
                "name": engine.backend.name,
                "running": in_flight - waiting,
                "waiting": waiting,
                "kv_share": None if load is None else load.kv_share,
                "state": engine.breaker.state,
            }
        )
    return {
        "routers": list(gateway.deciders),
        "active": gateway.active,
        "requests": count,
        "qos": sum(record["qos"] for record in recent) / count if count else None,
        "in_time": sum(record["in_time"] for record in recent) / count if count else None,
        "dropped": sum(record["status"] == "rejected" for record in recent),
        "engines": engines,
        "decisions": [
            {"id": each["id"], "engine": each["engine"], "status": each["status"], "net": each["estimate"]["net"]}
            for each in reversed(recent[-_NUM_DECISIONS:])
            if each["estimate"] is not None
        ],
    }


def _local(request: Request) -> Response | None:
    """Returns the refusal of a request to a name that is not this machine's, None for others."""
    host = request.headers.get("host", "").rsplit(":", 1)[0]
    return None if host in _HOSTS else JSONResponse({"error": "the page is served on this machine only"}, 403)
