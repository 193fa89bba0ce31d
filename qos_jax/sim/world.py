"""The world between two decisions: dispatch of a request, time until the next arrival, completions, observation.

Each function is for one environment and takes and returns pytrees. Episodes, rewards and traces are not part of the
world; the environment and the evaluator are both built from these functions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.sim import engine, shared_cards
from qos_jax.sim.cost import fits_in_memory
from qos_jax.sim.failures import FailureLaw, all_up, next_interval, run
from qos_jax.sim.service_level import margin_s
from qos_jax.sim.sessions import (
    OpenTurn,
    SessionSlots,
    after_answer,
    keep_finished,
    no_conversations,
    no_prefixes,
    open_turn,
    reuse,
)
from qos_jax.sim.telemetry import no_telemetry, observed, with_arrival
from qos_jax.sim.types import (
    BLOCK_SIZE_TOKENS,
    RATE_WINDOWS_S,
    ArrivedView,
    ExpertProfile,
    Observation,
    Request,
    ServiceLimits,
    SharedCards,
    Turn,
)
from qos_jax.sim.world_state import Completions, SlotPayload, World, WorldSpec


def empty_world(
    spec: WorldSpec,
    profile: ExpertProfile,
    scrape_s: Array | float = 0.0,
    failure_law: FailureLaw | None = None,
    key: Array | None = None,
) -> World:
    """Returns a world with idle experts and no arrivals so far.

    Args:
      spec: static part of the world.
      profile: of the experts.
      scrape_s: [] s between two readings of the engines' metrics, where routers observe what a proxy does.
      failure_law: of the experts, where they fail.
      key: random key of the failures, which may have other uses; needed with a law.
    """
    world = _without_failures(spec, profile, scrape_s)
    if spec.shared_cards:
        assert profile.cards is not None
        world = world.replace(loaded=shared_cards.first_loaded(profile.cards))
    if not spec.failures or failure_law is None:
        return world
    assert key is not None
    return world.replace(failures=all_up(failure_law, key))


def _without_failures(spec: WorldSpec, profile: ExpertProfile, scrape_s: Array | float) -> World:
    dtype = jnp.asarray(profile.step_base_s).dtype
    zero = jnp.zeros((), dtype)
    limits = ServiceLimits(zero, zero, zero) if spec.service_limits else None
    session, said = SessionSlots(jnp.int32(0), jnp.int32(0)) if spec.sessions else None, None
    payload = SlotPayload(zero, zero, zero, zero, limits, session)
    experts = engine.init_state(spec.engine, (spec.num_experts,), payload, dtype)
    if spec.sessions:
        said = no_conversations(spec.sessions)
        experts = experts.replace(prefixes=no_prefixes(spec.num_experts, spec.sessions))
    return World(experts, no_telemetry(spec, experts, scrape_s), said)


def dispatch(
    spec: WorldSpec, profile: ExpertProfile, world: World, request: Request, action: Array
) -> tuple[World, Array]:
    """Sends ``request`` to expert ``action`` [] int32; the action ``num_experts`` drops it.

    An expert that is down, has a full queue or no memory for the request drops it too, and so does one whose LLM leaves
    its card.

    Returns:
      The world, and [] bool: the request was dropped.
    """
    experts, turn = engine.compact_if_full(spec.engine, world.experts), turn_of(profile, world, request)
    text_tokens, prompt_tokens = request.prompt_tokens, whole_prompt(request, turn)
    chosen = jnp.arange(spec.num_experts) == action
    admissible = engine.admissible(spec.engine, profile, experts, prompt_tokens, request.output_tokens)
    taken = chosen & admissible & ~closed(world) & ~engine.needs_compact(experts)
    if world.loaded is not None:
        experts, loaded = shared_cards.load(spec.engine, profile, experts, world.loaded, taken)
        world = world.replace(loaded=loaded)
    payload = payload_of(request)
    if turn is not None and world.said is not None:
        payload = payload.replace(session=SessionSlots(turn.place, turn.number))
        more_tokens = text_tokens + jnp.sum(jnp.where(taken, request.output_tokens, 0), dtype=jnp.int32)
        said = after_answer(world.said, turn, jnp.where(jnp.any(taken), more_tokens, 0))
        world = world.replace(said=said)
        experts = experts.replace(prefixes=reuse(experts.prefixes, turn, taken))
    payload = jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.num_experts,)), payload)
    prompt_tokens = jnp.broadcast_to(prompt_tokens, (spec.num_experts,))
    cached_blocks = None if turn is None else turn.cached_blocks
    experts = engine.push(experts, taken, prompt_tokens, request.output_tokens, payload, cached_blocks)
    return world.replace(experts=experts), ~jnp.any(taken)


def turn_of(profile: ExpertProfile, world: World, request: Request) -> OpenTurn | None:
    """Returns the part of a request in its session; None in a world without sessions."""
    if world.said is None:
        return None
    turn = open_turn(profile, world.experts, world.said, request)
    if world.loaded is None:
        return turn
    cached, sent = (jnp.where(world.loaded, blocks, 0) for blocks in (turn.cached_blocks, turn.sent_blocks))
    return turn.replace(cached_blocks=cached, sent_blocks=sent)


def closed(world: World) -> Array:
    """Returns which experts take no request [N] or [] bool: those that are down, and those whose LLM is leaving."""
    none = jnp.bool_(False)
    down = none if world.failures is None else world.failures.down
    leaves = none if world.loaded is None else shared_cards.leaving(world.experts, world.loaded)
    return down | leaves


def whole_prompt(request: Request, turn: OpenTurn | None) -> Array:
    """Returns the tokens [] of the prompt of a request with its context."""
    return request.prompt_tokens if turn is None else request.prompt_tokens + turn.context_tokens


def advance(spec: WorldSpec, profile: ExpertProfile, world: World, duration_s: Array) -> World:
    """Runs the experts for ``duration_s`` [] s until the next arrival, and records that arrival in the telemetry."""
    if world.failures is None:
        world = world.replace(experts=engine.advance(spec.engine, profile, world.experts, duration_s))
    else:
        interval, failures = next_interval(world.failures, duration_s)
        experts, lost = run(spec.engine, profile, world.experts, interval)
        world = world.replace(experts=experts, failures=failures.replace(lost=failures.lost + lost))
    return record_arrival(spec, world, duration_s)


def record_arrival(spec: WorldSpec, world: World, duration_s: Array) -> World:
    """Records an arrival ``duration_s`` [] s after the last one, with a snapshot of the experts, in the telemetry."""
    if world.telemetry is None:
        return world
    return world.replace(telemetry=with_arrival(spec, world.experts, world.telemetry, duration_s))


def payload_of(request: Request) -> SlotPayload:
    """Returns the slot payload of a request; leaves [N] or []."""
    return SlotPayload(
        request.score, request.latency_limit_s, request.predicted_score, request.predicted_tokens, request.limits
    )


def slot_latency_per_token_s(profile: ExpertProfile, slots: engine.Slots) -> Array:
    """Returns the latency per token [..., N, S] s/token of the requests in the slots; valid for finished requests."""
    network_s = jnp.broadcast_to(jnp.asarray(profile.network_s), slots.finish_s.shape[:-1])[..., None]
    return (slots.finish_s + network_s) / jnp.maximum(slots.output_tokens, 1).astype(slots.finish_s.dtype)


def slot_margin_s(profile: ExpertProfile, slots: engine.Slots) -> Array:
    """Returns the margin [..., N, S] s/token to the nearest limit of the requests in the slots, if finished."""
    if slots.payload.limits is None:
        return slots.payload.latency_limit_s - slot_latency_per_token_s(profile, slots)
    network_s = jnp.broadcast_to(jnp.asarray(profile.network_s), slots.finish_s.shape[:-1])[..., None]
    tokens = jnp.maximum(slots.output_tokens, 1).astype(slots.finish_s.dtype)
    return margin_s(slots.payload, tokens, slots.finish_s + network_s, slots.first_token_s + network_s)


def collect(profile: ExpertProfile, world: World) -> tuple[World, Completions]:
    """Removes the finished requests from the slots, and returns their sums and the experts' integrals, now reset."""
    experts, slots = world.experts, world.experts.slots
    if experts.prefixes is not None:
        experts = keep_finished(profile, experts)
    done = slots.finished
    latency_per_token_s = slot_latency_per_token_s(profile, slots)
    in_time = done & (slot_margin_s(profile, slots) >= 0)
    completions = Completions(
        finished=jnp.sum(done, dtype=jnp.int32),
        qos=jnp.sum(jnp.where(in_time, slots.payload.score, 0.0)),
        score=jnp.sum(jnp.where(done, slots.payload.score, 0.0)),
        latency_per_token_s=jnp.sum(jnp.where(done, latency_per_token_s, 0.0)),
        violations=jnp.sum(done & ~in_time, dtype=jnp.int32),
        busy_s=experts.busy_s,
        standby_s=experts.standby_s,
        kv_block_s=experts.kv_block_s,
        passes=jnp.max(experts.passes),
        lost=jnp.int32(0) if world.failures is None else world.failures.lost,
    )
    if world.failures is not None:
        world = world.replace(failures=world.failures.replace(lost=jnp.int32(0)))
    zero = jnp.zeros_like(experts.busy_s)
    slots = slots.replace(output_tokens=jnp.where(done, 0, slots.output_tokens))
    experts = experts.replace(
        slots=slots, busy_s=zero, standby_s=zero, kv_block_s=zero, passes=jnp.zeros_like(experts.passes)
    )
    return world.replace(experts=experts), completions


def observe(
    spec: WorldSpec, profile: ExpertProfile, world: World, request: Request, staleness_s: Array | float = 0.0
) -> Observation:
    """Returns what the router observes when ``request`` arrives.

    With snapshots, experts and requests are those of the newest snapshot that is at least ``staleness_s`` old; without,
    they are fresh, or what a proxy knows.
    """
    assert world.telemetry is not None
    (experts, requests), staleness_s = observed(spec, world.experts, world.telemetry, staleness_s)
    experts = experts.replace(profile=profile)
    if world.loaded is not None:
        experts = experts.replace(load_left_s=shared_cards.load_left_s(profile, world.experts, world.loaded))
    turn, cached_tokens = turn_of(profile, world, request), None
    prompt_tokens = whole_prompt(request, turn)
    if turn is not None:
        known_blocks = turn.cached_blocks if world.telemetry.scrape is None else turn.sent_blocks
        cached_tokens = known_blocks * BLOCK_SIZE_TOKENS
    arrived = ArrivedView(
        prompt_tokens,
        request.latency_limit_s,
        request.predicted_score,
        request.predicted_tokens,
        world.telemetry.arrivals / jnp.array(RATE_WINDOWS_S, world.telemetry.arrivals.dtype),
        request.limits,
        cached_tokens,
    )
    fits = fits_in_memory(profile, prompt_tokens, 1, spec.engine.block_size)
    legal = fits & (experts.waiting < profile.max_waiting) & ~closed(world)
    action_mask = jnp.append(legal, spec.allow_drop)
    staleness_s = jnp.asarray(staleness_s, world.telemetry.arrivals.dtype)
    return Observation(arrived, experts, requests, action_mask, staleness_s)


def example_observation(spec: WorldSpec) -> Observation:
    """Returns an observation with placeholder values, for the shapes and dtypes of its arrays."""
    floats, counts = jnp.ones(spec.num_experts, jnp.float32), jnp.ones(spec.num_experts, jnp.int32)
    off = jnp.zeros(spec.num_experts, bool)
    fields = *[floats] * 5, *[counts] * 3, *[floats] * 4, counts, *[off] * 2, *[floats] * 2
    profile = ExpertProfile(*fields)  # type: ignore[arg-type]
    if spec.shared_cards:
        profile = profile.replace(cards=SharedCards(counts, floats))
    one = jnp.float32(1.0)
    limits = ServiceLimits(one, one, one) if spec.service_limits else None
    turn = Turn(jnp.int32(0), jnp.bool_(True), jnp.int32(1)) if spec.sessions else None
    request = Request(jnp.int32(1), counts, floats, one, floats, floats, limits, turn)
    law = FailureLaw(floats, floats) if spec.failures else None
    return observe(spec, profile, empty_world(spec, profile, 0.0, law, jax.random.key(0)), request)
