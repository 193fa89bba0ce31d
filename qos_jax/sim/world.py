"""The world between two decisions: dispatch of a request, time until the next arrival, completions, observation.

Each function is for one environment and takes and returns pytrees. Episodes, rewards and traces are not part of the
world; the environment and the evaluator are both built from these functions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim import engine, shared_cards
from qos_jax.sim.cost import blocks_of, fits_in_memory
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.failures import FailureLaw, Failures, all_up, next_interval, run
from qos_jax.sim.proxy_view import LedgerView, Scrape, proxy_view
from qos_jax.sim.service_level import margin_s
from qos_jax.sim.sessions import (
    Conversations,
    OpenTurn,
    SessionSlots,
    after_answer,
    keep_finished,
    no_conversations,
    no_prefixes,
    open_turn,
    reuse,
)
from qos_jax.sim.types import (
    BLOCK_SIZE_TOKENS,
    RATE_WINDOWS_S,
    ArrivedView,
    ExpertProfile,
    ExpertView,
    Observation,
    Request,
    RequestView,
    ServiceLimits,
    SharedCards,
    Turn,
)


@dataclasses.dataclass(frozen=True)
class WorldSpec:
    """The static part of a world; everything else is traced."""

    num_experts: int  # N
    engine: EngineSpec
    allow_drop: bool = True  # the router may drop a request
    history: int = 0  # H, snapshots kept for stale metrics; at 0, routers observe fresh metrics
    service_limits: bool = False  # requests have ``limits`` beside that on the latency per token
    observe: str = "engine"  # one of OBSERVE: what an engine knows, or a proxy in front of it (``sim.proxy_view``)
    sessions: int = 0  # K, most conversations at a time; at 0 each request stands alone
    failures: bool = False  # experts fail and return
    shared_cards: bool = False  # some LLMs share a card, on which one is loaded at a time


class SlotPayload(struct.PyTreeNode):
    """The payload of the engine's slots: what the world stores with each request on an expert."""

    score: Array  # [N, S] true quality of this expert's answer
    latency_limit_s: Array  # [N, S] s/token
    predicted_score: Array  # [N, S]
    predicted_tokens: Array  # [N, S] tokens
    limits: ServiceLimits | None = None  # [N, S] each
    session: SessionSlots | None = None  # [N, S] each


class Snapshots(struct.PyTreeNode):
    """The last H snapshots of the experts, a ring."""

    age_s: Array  # [H] s
    newest: Array  # [] int32, index of the newest snapshot
    views: tuple[ExpertView, RequestView]  # leaves [H, ...], without the profile


class LastScrape(struct.PyTreeNode):
    """The counts of the engines when a proxy last read them: with the first arrival after each ``period_s``."""

    period_s: Array  # [] s
    age_s: Array  # [] s, below ``period_s``
    waiting: Array  # [N] int32 requests
    kv_used_blocks: Array  # [N] int32 blocks


class Telemetry(struct.PyTreeNode):
    """What is recorded for the router at each arrival."""

    arrivals: Array  # [K] requests so far, discounted by age with the time constants RATE_WINDOWS_S
    snapshots: Snapshots | None  # None for fresh metrics
    scrape: LastScrape | None = None  # None unless routers observe what a proxy does


class World(struct.PyTreeNode):
    """The experts with the requests on them, and the telemetry."""

    experts: ExpertState  # payload: SlotPayload
    telemetry: Telemetry | None  # None if no router observes this world
    said: Conversations | None = None  # None without sessions
    failures: Failures | None = None  # None where no expert fails
    loaded: Array | None = None  # [N] bool: its LLM is loaded; None where each expert has a card of its own


class Completions(struct.PyTreeNode):
    """Sums over the requests that finished in an interval, and the resources that the experts used in it."""

    finished: Array  # [] int32 requests
    qos: Array  # [] sum of QoS
    score: Array  # [] sum of scores
    latency_per_token_s: Array  # [] sum of latencies per token
    violations: Array  # [] int32 requests beyond a limit
    busy_s: Array  # [N] s
    standby_s: Array  # [N] s
    kv_block_s: Array  # [N] blocks x s
    passes: Array  # [] int32 passes through the engine's loops
    lost: Array | int = 0  # [] int32 requests that a failure ended, and which did not finish


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
    arrivals = jnp.zeros(len(RATE_WINDOWS_S), dtype)
    if spec.observe == "proxy":
        none, period_s = jnp.zeros(spec.num_experts, jnp.int32), jnp.asarray(scrape_s, dtype)
        return World(experts, Telemetry(arrivals, None, LastScrape(period_s, jnp.zeros((), dtype), none, none)), said)
    if spec.history == 0:
        return World(experts, Telemetry(arrivals, None), said)
    views = jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.history, *x.shape)), _view(spec, experts))
    age_s = jnp.full((spec.history,), jnp.inf, dtype)
    return World(experts, Telemetry(arrivals, Snapshots(age_s, jnp.int32(0), views)), said)


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
    duration_s = duration_s.astype(world.telemetry.arrivals.dtype)
    arrivals = 1.0 + world.telemetry.arrivals * jnp.exp(-duration_s / jnp.array(RATE_WINDOWS_S, duration_s.dtype))
    snapshots, scrape = world.telemetry.snapshots, world.telemetry.scrape
    if scrape is not None:
        return world.replace(telemetry=Telemetry(arrivals, None, _scraped(spec, world.experts, scrape, duration_s)))
    if snapshots is None:
        return world.replace(telemetry=Telemetry(arrivals, None))
    newest = (snapshots.newest + 1) % spec.history
    views = jax.tree.map(lambda ring, now: ring.at[newest].set(now), snapshots.views, _view(spec, world.experts))
    age_s = jnp.where(jnp.arange(spec.history) == newest, 0.0, snapshots.age_s + duration_s)
    return world.replace(telemetry=Telemetry(arrivals, Snapshots(age_s, newest, views)))


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
    slots = slots.replace(
        output_tokens=jnp.where(done, 0, slots.output_tokens), generated=jnp.where(done, 0, slots.generated)
    )
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
    if world.telemetry.scrape is not None:
        staleness_s = 0.0
        experts, requests = _proxy_view(world.experts, world.telemetry.scrape)
    elif world.telemetry.snapshots is None:
        staleness_s = 0.0
        experts, requests = _view(spec, world.experts)
    else:
        experts, requests = _stale_view(world.telemetry.snapshots, staleness_s)
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


def _view(spec: WorldSpec, experts: ExpertState) -> tuple[ExpertView, RequestView]:
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
        profile=None,  # the caller adds it, as it is the same for all snapshots
        running=jnp.sum(running, -1, dtype=jnp.int32),
        waiting=jnp.sum(waiting, -1, dtype=jnp.int32),
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


def _proxy_view(experts: ExpertState, scrape: LastScrape) -> tuple[ExpertView, RequestView]:
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


def _stale_view(snapshots: Snapshots, staleness_s: Array | float) -> tuple[ExpertView, RequestView]:
    """Returns the newest snapshot that is at least ``staleness_s`` old, or the oldest snapshot if none is."""
    history = snapshots.age_s.shape[0]
    steps_back = jnp.arange(history)
    newest_first = (snapshots.newest - steps_back) % history
    old_enough = (snapshots.age_s[newest_first] >= staleness_s) | (steps_back == history - 1)
    index = newest_first[jnp.argmax(old_enough)]
    return jax.tree.map(lambda ring: ring[index], snapshots.views)
