"""The world between two decisions: a request is sent, time passes, answers come back, the router looks again.

Each function is for one environment, takes and returns plain pytrees, and knows nothing of episodes, rewards or traces;
the environment and the evaluator are both made of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim import engine
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.types import (
    RATE_WINDOWS_S,
    ArrivedView,
    ExpertProfile,
    ExpertView,
    Observation,
    Request,
    RequestView,
)


@dataclasses.dataclass(frozen=True)
class WorldSpec:
    """What fixes the shapes of the world; everything else is traced."""

    num_experts: int  # N
    engine: EngineSpec
    allow_drop: bool = True  # the router may refuse a request
    history: int = 0  # snapshots kept for a router that sees metrics late; 0: it sees them fresh


class SlotPayload(struct.PyTreeNode):
    """What the engine keeps for us beside each request on an expert."""

    score: Array  # [N, S] true quality there
    latency_limit_s: Array  # [N, S] s/token
    predicted_score: Array  # [N, S]
    predicted_tokens: Array  # [N, S] tokens


class Snapshots(struct.PyTreeNode):
    """The last ``history`` looks at the experts, and how old each is."""

    age_s: Array  # [H] s
    newest: Array  # [] int32, index of the newest
    looks: tuple[ExpertView, RequestView]  # leaves [H, ...]; the profile is left out


class Telemetry(struct.PyTreeNode):
    """What the router's side remembers."""

    arrivals: Array  # [K] requests so far, each counted less the longer ago, with the time constants RATE_WINDOWS_S
    snapshots: Snapshots | None  # of a router that sees metrics late


class World(struct.PyTreeNode):
    """Experts with the requests on them, and what the router's side remembers."""

    experts: ExpertState  # payload: SlotPayload
    telemetry: Telemetry | None  # None where nobody looks


class Completions(struct.PyTreeNode):
    """Sums over the requests that finished in an interval, and what the experts used in it."""

    finished: Array  # [] int32 requests
    qos: Array  # [] sum of QoS
    score: Array  # [] sum of scores
    latency_per_token_s: Array  # [] sum of latencies per token
    violations: Array  # [] int32 requests beyond their limit
    busy_s: Array  # [N] s
    kv_block_s: Array  # [N] blocks x s
    passes: Array  # [] int32 passes through the engine's loops


def empty_world(spec: WorldSpec, profile: ExpertProfile) -> World:
    """Returns idle experts."""
    dtype = jnp.asarray(profile.step_base_s).dtype
    zero = jnp.zeros((), dtype)
    experts = engine.init_state(spec.engine, (spec.num_experts,), SlotPayload(zero, zero, zero, zero), dtype)
    arrivals = jnp.zeros(len(RATE_WINDOWS_S), dtype)
    if spec.history == 0:
        return World(experts, Telemetry(arrivals, None))
    looks = jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.history, *x.shape)), _look(spec, experts))
    age_s = jnp.full((spec.history,), jnp.inf, dtype)
    return World(experts, Telemetry(arrivals, Snapshots(age_s, jnp.int32(0), looks)))


def dispatch(
    spec: WorldSpec, profile: ExpertProfile, world: World, request: Request, action: Array
) -> tuple[World, Array]:
    """Sends ``request`` to expert ``action`` [] int32; ``num_experts`` drops it, as does an expert that cannot take it.

    Returns the world and [] bool: the request was dropped.
    """
    experts = engine.compact_if_full(spec.engine, world.experts)
    chosen = jnp.arange(spec.num_experts) == action
    admissible = engine.admissible(spec.engine, profile, experts, request.prompt_tokens, request.output_tokens)
    taken = chosen & admissible & ~engine.needs_compact(experts)
    payload = jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.num_experts,)), payload_of(request))
    prompt_tokens = jnp.broadcast_to(request.prompt_tokens, (spec.num_experts,))
    experts = engine.push(experts, taken, prompt_tokens, request.output_tokens, payload)
    return world.replace(experts=experts), ~jnp.any(taken)


def advance(spec: WorldSpec, profile: ExpertProfile, world: World, duration_s: Array) -> World:
    """Runs the experts for ``duration_s`` [] s, until the next arrival, which is remembered."""
    experts = engine.advance(spec.engine, profile, world.experts, duration_s)
    return record_arrival(spec, world.replace(experts=experts), duration_s)


def record_arrival(spec: WorldSpec, world: World, duration_s: Array) -> World:
    """Adds an arrival ``duration_s`` [] s after the last one, and what the experts look like then."""
    if world.telemetry is None:
        return world
    arrivals = 1.0 + world.telemetry.arrivals * jnp.exp(-duration_s / jnp.array(RATE_WINDOWS_S, duration_s.dtype))
    seen = world.telemetry.snapshots
    if seen is None:
        return world.replace(telemetry=Telemetry(arrivals, None))
    newest = (seen.newest + 1) % spec.history
    looks = jax.tree.map(lambda ring, now: ring.at[newest].set(now), seen.looks, _look(spec, world.experts))
    age_s = jnp.where(jnp.arange(spec.history) == newest, 0.0, seen.age_s + duration_s)
    return world.replace(telemetry=Telemetry(arrivals, Snapshots(age_s, newest, looks)))


def payload_of(request: Request) -> SlotPayload:
    """Returns what the engine keeps of a request; scores still one per expert."""
    return SlotPayload(request.score, request.latency_limit_s, request.predicted_score, request.predicted_tokens)


def slot_latency_per_token_s(profile: ExpertProfile, slots: engine.Slots) -> Array:
    """Returns the latency per token [..., N, S] s/token of the requests in the slots; read only where one finished."""
    latency_s = slots.finish_s + jnp.asarray(profile.network_s)[..., None]
    return latency_s / jnp.maximum(slots.output_tokens, 1)


def collect(profile: ExpertProfile, world: World) -> tuple[World, Completions]:
    """Takes the finished requests and the experts' integrals out of the world."""
    experts, slots = world.experts, world.experts.slots
    done = slots.finished
    latency_per_token_s = slot_latency_per_token_s(profile, slots)
    in_time = done & (latency_per_token_s <= slots.payload.latency_limit_s)
    completions = Completions(
        finished=jnp.sum(done, dtype=jnp.int32),
        qos=jnp.sum(jnp.where(in_time, slots.payload.score, 0.0)),
        score=jnp.sum(jnp.where(done, slots.payload.score, 0.0)),
        latency_per_token_s=jnp.sum(jnp.where(done, latency_per_token_s, 0.0)),
        violations=jnp.sum(done & ~in_time, dtype=jnp.int32),
        busy_s=experts.busy_s,
        kv_block_s=experts.kv_block_s,
        passes=jnp.max(experts.passes),
    )
    zero = jnp.zeros_like(experts.busy_s)
    slots = slots.replace(
        output_tokens=jnp.where(done, 0, slots.output_tokens), generated=jnp.where(done, 0, slots.generated)
    )
    experts = experts.replace(slots=slots, busy_s=zero, kv_block_s=zero, passes=jnp.zeros_like(experts.passes))
    return world.replace(experts=experts), completions


def observe(
    spec: WorldSpec, profile: ExpertProfile, world: World, request: Request, staleness_s: Array | float = 0.0
) -> Observation:
    """Returns what the router sees when ``request`` arrives: fresh, or the newest snapshot at least that old."""
    assert world.telemetry is not None
    if world.telemetry.snapshots is None:
        staleness_s = 0.0
        experts, requests = _look(spec, world.experts)
    else:
        experts, requests = _look_back(world.telemetry.snapshots, staleness_s)
    experts = experts.replace(profile=profile)
    arrived = ArrivedView(
        request.prompt_tokens,
        request.latency_limit_s,
        request.predicted_score,
        request.predicted_tokens,
        world.telemetry.arrivals / jnp.array(RATE_WINDOWS_S, world.telemetry.arrivals.dtype),
    )
    fits = blocks_of(request.prompt_tokens + 1, spec.engine.block_size) <= profile.kv_blocks
    legal = fits & (experts.waiting < profile.max_waiting)
    action_mask = jnp.append(legal, spec.allow_drop)
    staleness_s = jnp.asarray(staleness_s, world.telemetry.arrivals.dtype)
    return Observation(arrived, experts, requests, action_mask, staleness_s)


def _look(spec: WorldSpec, experts: ExpertState) -> tuple[ExpertView, RequestView]:
    slots = experts.slots
    running, waiting = slots.running, slots.waiting
    requests = RequestView(
        running=running,
        waiting=waiting,
        prompt_tokens=slots.prompt_tokens,
        generated_tokens=slots.generated,
        computed_tokens=slots.computed,
        age_s=-slots.arrival_s,
        latency_limit_s=slots.payload.latency_limit_s,
        predicted_score=slots.payload.predicted_score,
        predicted_tokens=jnp.maximum(slots.payload.predicted_tokens, slots.generated + 1),
    )
    view = ExpertView(
        profile=None,  # the same for every look, so it is put in by the caller
        running=jnp.sum(running, -1, dtype=jnp.int32),
        waiting=jnp.sum(waiting, -1, dtype=jnp.int32),
        kv_used_blocks=jnp.sum(
            jnp.where(running, blocks_of(slots.computed, spec.engine.block_size), 0), -1, dtype=jnp.int32
        ),
    )
    return view, requests


def _look_back(seen: Snapshots, staleness_s: Array | float) -> tuple[ExpertView, RequestView]:
    """Picks the newest snapshot that is at least ``staleness_s`` old, or the oldest one if none is."""
    history = seen.age_s.shape[0]
    back = jnp.arange(history)
    newest_first = (seen.newest - back) % history
    old_enough = (seen.age_s[newest_first] >= staleness_s) | (back == history - 1)
    pick = newest_first[jnp.argmax(old_enough)]
    return jax.tree.map(lambda ring: ring[pick], seen.looks)
