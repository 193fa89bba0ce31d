"""Connections to engines, by aiohttp: its parser is compiled, and it runs for each word of an answer."""

from __future__ import annotations

import aiohttp

_KEEP_S = 2.0  # s that an idle connection is kept: engines close theirs after 5 s


def engine_client() -> aiohttp.ClientSession:
    """Returns a client of all engines, without proxies, keys or cookies from elsewhere; needs a running event loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"accept-encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )
