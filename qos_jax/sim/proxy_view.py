"""What a proxy in front of the experts can know of them: its own ledger, and the counts that it has read from engines.

A proxy sees requests come and tokens pass. It does not see which tokens are computed, nor who was preempted; how many
requests wait on an engine, and how much memory is in use, it knows as of the last time that it read the engine's
metrics, the scrape. ``proxy_view`` makes of both what routers observe, in the simulator and in the gateway.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim.types import AnyArray, ExpertView, RequestView, ServiceLimits


class LedgerView(struct.PyTreeNode):
    """The requests that a proxy has sent to each expert and that have not ended, in order of arrival."""

    live: AnyArray  # [N, S] bool; the other fields have no meaning elsewhere
    prompt_tokens: AnyArray  # [N, S] int32 tokens
    streamed_tokens: AnyArray  # [N, S] int32 tokens that have passed
    age_s: AnyArray  # [N, S] s since arrival
    latency_limit_s: AnyArray  # [N, S] s/token
    predicted_score: AnyArray  # [N, S]
    predicted_tokens: AnyArray  # [N, S] tokens
    limits: ServiceLimits | None = None  # [N, S] each
    first_token_s: AnyArray | None = None  # [N, S] s from arrival to first token, once passed; with limits only


class Scrape(struct.PyTreeNode):
    """What each engine's metrics said when they were last read."""

    age_s: AnyArray  # [N] s since then, infinite before the first time
    waiting: AnyArray  # [N] int32 requests
    kv_used_blocks: AnyArray  # [N] int32 blocks
    others_running: AnyArray = 0  # [N] int32 requests that the proxy did not send
    others_waiting: AnyArray = 0  # [N] int32


def proxy_view(ledger: LedgerView, scrape: Scrape) -> tuple[ExpertView, RequestView]:
    """Returns what a router observes of experts, without their profile, and of requests.

    A request runs if a token of it has passed. Of those without a token, engines start the first to arrive first: so
    the last ``scrape.waiting`` of those that were there at the scrape wait still, and so do all that came later.
    """
    started = ledger.live & (ledger.streamed_tokens > 0)
    seen = ledger.live & (ledger.age_s > jnp.asarray(scrape.age_s)[..., None])
    seen_after = jnp.sum(seen, -1, dtype=jnp.int32)[..., None] - jnp.cumsum(seen, -1, dtype=jnp.int32)
    running = started | (seen & (seen_after >= jnp.asarray(scrape.waiting)[..., None]))
    waiting = ledger.live & ~running
    requests = RequestView(
        running=running,
        waiting=waiting,
        prompt_tokens=ledger.prompt_tokens,
        generated_tokens=ledger.streamed_tokens,
        computed_tokens=jnp.where(started, ledger.prompt_tokens + ledger.streamed_tokens - 1, 0),
        age_s=ledger.age_s,
        latency_limit_s=ledger.latency_limit_s,
        predicted_score=ledger.predicted_score,
        predicted_tokens=jnp.maximum(
            ledger.predicted_tokens, (ledger.streamed_tokens + 1).astype(ledger.predicted_tokens.dtype)
        ),
        limits=ledger.limits,
        first_token_s=ledger.first_token_s,
    )
    experts = ExpertView(
        profile=None,
        running=_count(running) + scrape.others_running,
        waiting=_count(waiting) + scrape.others_waiting,
        kv_used_blocks=jnp.asarray(scrape.kv_used_blocks, jnp.int32),
    )
    return experts, requests


def _count(mask: Array) -> Array:
    return jnp.sum(mask, -1, dtype=jnp.int32)
