"""What routers are told of the experts: fresh metrics, snapshots of a certain age, or what a proxy knows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.sim.cost import blocks_of
from qos_jax.sim.engine_state import ExpertState
from qos_jax.sim.proxy_view import LedgerView, Scrape, proxy_view
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, ExpertView, RequestView
from qos_jax.sim.world_state import LastScrape, Snapshots, Telemetry, WorldSpec

Views = tuple[ExpertView, RequestView]
"""Metrics of the experts and requests, without the profile: the caller adds it, as it is the same at all times."""


def no_telemetry(spec: WorldSpec, experts: ExpertState, scrape_s: Array | float) -> Telemetry:
    """Returns the telemetry before the first arrival, where idle experts are seen.

    Args:
      spec: static part of the world.
      experts: idle.
      scrape_s: [] s between two readings of the engines' metrics, where routers observe what a proxy does.
    """
    dtype = experts.clock_s.dtype
    arrivals = jnp.zeros(len(RATE_WINDOWS_S), dtype)
    if spec.observe == "proxy":
        none, period_s = jnp.zeros(spec.num_experts, jnp.int32), jnp.asarray(scrape_s, dtype)
        return Telemetry(arrivals, None, LastScrape(period_s, jnp.zeros((), dtype), none, none))
    if spec.history == 0:
        return Telemetry(arrivals, None)
    views = jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.history, *x.shape)), _view(spec, experts))
    return Telemetry(arrivals, Snapshots(jnp.full((spec.history,), jnp.inf, dtype), jnp.int32(0), views))


def with_arrival(spec: WorldSpec, experts: ExpertState, telemetry: Telemetry, duration_s: Array) -> Telemetry:
    """Returns the telemetry once a request has arrived ``duration_s`` [] s after the last one."""
    duration_s = duration_s.astype(telemetry.arrivals.dtype)
    arrivals = 1.0 + telemetry.arrivals * jnp.exp(-duration_s / jnp.array(RATE_WINDOWS_S, duration_s.dtype))
    snapshots, scrape = telemetry.snapshots, telemetry.scrape
    if scrape is not None:
        return Telemetry(arrivals, None, _scraped(spec, experts, scrape, duration_s))
    if snapshots is None:
        return Telemetry(arrivals, None)
    newest = (snapshots.newest + 1) % spec.history
    views = jax.tree.map(lambda ring, now: ring.at[newest].set(now), snapshots.views, _view(spec, experts))
    age_s = jnp.where(jnp.arange(spec.history) == newest, 0.0, snapshots.age_s + duration_s)
    return Telemetry(arrivals, Snapshots(age_s, newest, views))


def observed(
    spec: WorldSpec, experts: ExpertState, telemetry: Telemetry, staleness_s: Array | float
) -> tuple[Views, Array | float]:
    """Returns what a router is told, and how old [] s it is at least: 0 without snapshots.

    Args:
      spec: static part of the world.
      experts: as they are now.
      telemetry: as it is now.
      staleness_s: [] s, least age of the snapshot that it is told of.
    """
    if telemetry.scrape is not None:
        return _proxy_view(experts, telemetry.scrape), 0.0
    if telemetry.snapshots is None:
        return _view(spec, experts), 0.0
    return _stale_view(telemetry.snapshots, staleness_s), staleness_s


def _view(spec: WorldSpec, experts: ExpertState) -> Views:
    """Returns the fresh metrics of the experts and requests, without the profile."""
    slots, computed = experts.slots, experts.slots.computed
    running, waiting = slots.running, slots.waiting
    if spec.sessions:
        computed = jnp.where(waiting, slots.cached_blocks * BLOCK_SIZE_TOKENS, computed)
    requests = RequestView(
        running=running,
        waiting=waiting,
        prompt_tokens=slots.prompt_tokens,
        generated_tokens=slots.generated,
        computed_tokens=computed,
        age_s=-slots.arrival_s,
        latency_limit_s=slots.payload.latency_limit_s,
        predicted_score=slots.payload.predicted_score,
        predicted_tokens=jnp.maximum(
            slots.payload.predicted_tokens, (slots.generated + 1).astype(slots.payload.predicted_tokens.dtype)
        ),
        limits=slots.payload.limits,
        first_token_s=None if slots.payload.limits is None else slots.first_token_s,
    )
    view = ExpertView(
        profile=None,
        running=experts.running,
        waiting=experts.waiting,
        kv_used_blocks=jnp.sum(
            jnp.where(running, blocks_of(slots.computed, spec.engine.block_size), 0), -1, dtype=jnp.int32
        ),
    )
    return view, requests


def _scraped(spec: WorldSpec, experts: ExpertState, scrape: LastScrape, duration_s: Array) -> LastScrape:
    """Returns the last scrape at an arrival, which is this moment's if the one before is ``period_s`` old by now."""
    view, _ = _view(spec, experts)
    age_s = scrape.age_s + duration_s
    old = LastScrape(scrape.period_s, age_s, scrape.waiting, scrape.kv_used_blocks)
    new = LastScrape(scrape.period_s, jnp.zeros_like(age_s), view.waiting, view.kv_used_blocks)
    return jax.tree.map(lambda x, y: jnp.where(age_s >= scrape.period_s, x, y), new, old)


def _proxy_view(experts: ExpertState, scrape: LastScrape) -> Views:
    """Returns what a proxy knows of the experts and requests, without the profile."""
    slots = experts.slots
    ledger = LedgerView(
        live=slots.live,
        prompt_tokens=slots.prompt_tokens,
        streamed_tokens=slots.generated,
        age_s=-slots.arrival_s,
        latency_limit_s=slots.payload.latency_limit_s,
        predicted_score=slots.payload.predicted_score,
        predicted_tokens=slots.payload.predicted_tokens,
        limits=slots.payload.limits,
        first_token_s=None if slots.payload.limits is None else slots.first_token_s,
    )
    age_s = jnp.broadcast_to(scrape.age_s, scrape.waiting.shape)
    return proxy_view(ledger, Scrape(age_s, scrape.waiting, scrape.kv_used_blocks))


def _stale_view(snapshots: Snapshots, staleness_s: Array | float) -> Views:
    """Returns the newest snapshot that is at least ``staleness_s`` old, or the oldest snapshot if none is."""
    history = snapshots.age_s.shape[0]
    steps_back = jnp.arange(history)
    newest_first = (snapshots.newest - steps_back) % history
    old_enough = (snapshots.age_s[newest_first] >= staleness_s) | (steps_back == history - 1)
    index = newest_first[jnp.argmax(old_enough)]
    return jax.tree.map(lambda ring: ring[index], snapshots.views)
