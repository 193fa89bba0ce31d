"""The scheduler of the engine: one iteration by all rules, or a stretch of decoding in closed form.

The rules are those of vLLM's V1 scheduler (docs/guide/simulator.md), as conditions on prefix sums over the slots of
each lane (``sim.engine``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from qos_jax.sim.cost import (
    Batch,
    blocks_of,
    decode_s,
    iteration_s,
    iterations_started,
    max_kv_blocks,
    mean_blocks,
    stretch_s,
)
from qos_jax.sim.engine_state import EngineSpec, ExpertState, Slots, of_slots, prefix_sums, total, totals
from qos_jax.sim.prefix_cache import find_own_blocks, keep_cached, not_yet_taken
from qos_jax.sim.types import ExpertProfile


class _Schedule(NamedTuple):
    """What an iteration does with each request [L, S]."""

    running: Array  # bool, it ran before
    waiting: Array  # bool, it waited before
    admitted: Array  # bool
    preempted: Array  # bool
    lacks_memory: Array  # bool, it would be admitted if there were more memory
    known_tokens: Array  # int32, of its prompt and its answer, with the one in flight
    cached_tokens: Array  # int32, known ones whose keys and values are there already
    new_tokens: Array  # int32, computed now
    reused_blocks: Array  # int32, of its own that it finds
    decodes: Array  # bool, its one new token is the last one of its answer so far


def iterate(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array) -> ExpertState:
    """Runs one iteration on the ``active`` [L] lanes, with every rule of the scheduler.

    A lane with asynchronous scheduling runs the iteration that was scheduled when the one before it started, and
    schedules the next; if none was, it schedules one and takes no time.
    """
    slots, is_async = state.slots, of_slots(experts.async_scheduling)
    now = _schedule(spec, experts, state, active)
    computed = jnp.where(now.preempted, 0, now.cached_tokens + now.new_tokens)
    will_emit = (now.new_tokens > 0) & (computed == now.known_tokens)
    emitted = jnp.where(is_async, slots.emitting & slots.live & active[..., None], will_emit)
    generated = slots.generated + emitted.astype(jnp.int32)
    finished = emitted & (generated == slots.output_tokens)

    has_place = (now.running & ~now.preempted) | now.admitted
    held_blocks, next_blocks = (
        jnp.where(mask, blocks_of(tokens, spec.block_size), 0)
        for mask, tokens in ((now.running, slots.computed), (has_place, computed))
    )
    partly_filled = finished & has_place & (computed % spec.block_size > 0)
    # A block of a finished request that is not full goes to the head of the free queue, and counts as not taken.
    columns, pairs = _computed(experts, state.clock_s.dtype, now.new_tokens, now.cached_tokens, now.decodes)
    blocks, new_blocks, completions, places, left_waiting, no_memory, unsteady, *sums = totals(
        next_blocks,
        next_blocks - held_blocks - partly_filled.astype(jnp.int32),
        finished,
        has_place & ~finished,
        now.waiting & ~now.admitted,
        now.lacks_memory,
        (now.running | now.admitted) & ~(will_emit | finished),
        *columns,
    )
    batch = Batch(*sums).replace(pairs=pairs)
    next_s = iteration_s(experts, batch)
    duration_s = jnp.where(active, jnp.where(experts.async_scheduling, state.scheduled_s, next_s), 0.0)
    next_s = jnp.where(batch.requests > 0, next_s, 0.0)
    clock_s = state.clock_s + duration_s
    age_s = clock_s[..., None] - slots.arrival_s
    taken_blocks = state.taken_blocks + new_blocks
    moved = now.preempted, now.admitted, now.reused_blocks, partly_filled
    cached_blocks, taken_at, taken_blocks = lax.cond(
        jnp.any(now.preempted | (active[..., None] & _may_reuse(slots))),
        lambda: keep_cached(spec, experts, state, *moved, taken_blocks),
        lambda: (slots.cached_blocks, slots.taken_at, taken_blocks),
    )
    admits_none = (left_waiting == 0) | (places >= experts.max_running) | ((no_memory > 0) & (completions == 0))
    return state.replace(
        slots=slots.replace(
            generated=generated,
            computed=computed,
            emitting=jnp.where(active[..., None], will_emit & is_async, slots.emitting),
            decoding=jnp.where(active[..., None], will_emit & now.decodes & is_async, slots.decoding),
            cached_blocks=cached_blocks,
            taken_at=taken_at,
            preemptions=slots.preemptions + now.preempted.astype(jnp.int32),
            first_token_s=jnp.where(emitted & (slots.generated == 0), age_s, slots.first_token_s),
            finish_s=jnp.where(finished, age_s, slots.finish_s),
        ),
        clock_s=clock_s,
        scheduled_s=jnp.where(active & experts.async_scheduling, next_s, state.scheduled_s),
        taken_blocks=taken_blocks,
        busy_s=state.busy_s + duration_s,
        kv_block_s=state.kv_block_s + duration_s * blocks.astype(duration_s.dtype),
        running=jnp.where(active, places, state.running),
        waiting=jnp.where(active, state.live - completions - places, state.waiting),
        steady=jnp.where(active, admits_none & (unsteady == 0) & (places > 0), state.steady),
        passes=state.passes + 1,
    )


def _schedule(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array) -> _Schedule:
    """Returns what the next iteration of the ``active`` [L] lanes does with each request."""
    slots, token_budget = state.slots, of_slots(experts.token_budget)
    live = slots.live & active[..., None]
    running, waiting = live & (slots.computed > 0), live & (slots.computed == 0)
    # A token in flight counts as known, although it is not: the request decodes on as if it were there.
    in_flight = slots.emitting.astype(jnp.int32)
    known_tokens = slots.prompt_tokens + slots.generated + in_flight
    uncached_tokens = known_tokens - slots.computed

    # Running requests are scheduled first. All but the last one decode: a prompt is cut only where the budget ends, and
    # no request is admitted behind a cut prompt. The last one gets what the others leave, at least 1 token. A request
    # whose last token is in flight is not scheduled, but keeps its place and its blocks.
    decodes_on = running & (slots.generated + in_flight < slots.output_tokens)
    max_tokens = token_budget + 1 - total(decodes_on)[..., None]
    new_tokens = jnp.where(decodes_on, jnp.minimum(uncached_tokens, max_tokens), 0)

    # Preemption from the tail keeps the longest prefix whose blocks, with those of this iteration, fit in memory.
    # Nothing fits behind a preempted request, so no request is admitted in the same iteration.
    next_tokens = jnp.where(running, slots.computed + new_tokens, known_tokens)
    next_blocks = jnp.where(live, blocks_of(next_tokens, spec.block_size), 0)
    wanted_tokens = jnp.where(waiting, jnp.minimum(known_tokens, token_budget), new_tokens)
    fits, budget_left, has_turn, reused_blocks = _room(spec, experts, state, active, next_blocks, wanted_tokens)
    preempted = running & ~fits
    uncached_tokens = uncached_tokens - reused_blocks * spec.block_size
    eligible = waiting & (budget_left > 0) & has_turn
    admitted = eligible & fits
    of_admitted = jnp.minimum(uncached_tokens, budget_left)
    new_tokens = jnp.where(admitted, of_admitted, jnp.where(preempted, 0, new_tokens))
    return _Schedule(
        running=running,
        waiting=waiting,
        admitted=admitted,
        preempted=preempted,
        lacks_memory=eligible & ~fits,
        known_tokens=known_tokens,
        cached_tokens=slots.computed + jnp.where(admitted, reused_blocks * spec.block_size, 0),
        new_tokens=new_tokens,
        reused_blocks=reused_blocks,
        decodes=(new_tokens > 0) & (slots.generated + in_flight > 0) & (uncached_tokens == 1),
    )


def decode_stretch(
    spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array, horizon_s: Array
) -> ExpertState:
    """Runs the ``active`` [L] lanes to the next completion, to the horizon, or until the KV memory is full.

    Active lanes are steady: every running request decodes and none can be admitted. The ``kv_block_s`` integral takes
    all iterations at the mean duration of the stretch. With asynchronous scheduling the first iteration is the
    scheduled one, in which prompts may end; a request that finishes takes no part in the one that is scheduled last.
    """
    slots = state.slots
    running = slots.running & active[..., None]
    is_async = experts.async_scheduling & active
    lead_s = jnp.where(is_async, state.scheduled_s, 0.0)
    iterations, duration_s = _stretch(spec, experts, state, active, horizon_s)
    runs, clock_s = iterations > 0, state.clock_s + duration_s
    generated = slots.generated + jnp.where(running, iterations[..., None], 0)
    finished = running & (generated == slots.output_tokens)
    is_last = finished & is_async[..., None]
    tokens = jnp.where(running, iterations[..., None], 0) - is_last.astype(jnp.int32)
    computed = slots.computed + tokens
    first_token_s = (state.clock_s + lead_s)[..., None] - slots.arrival_s
    decodes = running & ~finished

    held_blocks, next_blocks = (blocks_of(tokens, spec.block_size) for tokens in (slots.computed, computed))
    mean = mean_blocks(slots.computed, jnp.maximum(tokens, 1), spec.block_size, duration_s.dtype)
    partly_filled = finished & (computed % spec.block_size > 0)
    new_blocks, decoding, kv_tokens = totals(
        jnp.where(running, next_blocks - held_blocks, 0) - partly_filled.astype(jnp.int32),
        decodes,
        jnp.where(decodes, computed - 1, 0),
    )
    next_s, _ = decode_s(experts, decoding, kv_tokens)
    taken_blocks = state.taken_blocks + new_blocks
    waits_for_own = _may_reuse(slots)
    cached_blocks = lax.cond(
        jnp.any(waits_for_own),
        lambda: jnp.where(
            waits_for_own, not_yet_taken(slots, (taken_blocks + total(partly_filled))[..., None]), slots.cached_blocks
        ),
        lambda: slots.cached_blocks,
    )
    # Where requests wait, a completion may admit one.
    stays_steady = runs & (decoding > 0) & ((state.waiting == 0) | (decoding == state.running))
    return state.replace(
        slots=slots.replace(
            generated=generated,
            computed=computed,
            decoding=(running & is_async[..., None] & runs[..., None]) | slots.decoding,
            cached_blocks=cached_blocks,
            first_token_s=jnp.where(running & (slots.generated == 0), first_token_s, slots.first_token_s),
            finish_s=jnp.where(finished, clock_s[..., None] - slots.arrival_s, slots.finish_s),
        ),
        clock_s=clock_s,
        scheduled_s=jnp.where(is_async & runs, jnp.where(decoding > 0, next_s, 0.0), state.scheduled_s),
        taken_blocks=taken_blocks,
        busy_s=state.busy_s + duration_s,
        kv_block_s=state.kv_block_s + duration_s * jnp.sum(jnp.where(running, mean, 0.0), -1),
        running=jnp.where(active, decoding, state.running),
        steady=jnp.where(active, stays_steady, state.steady),
        passes=state.passes + 1,
    )


def _stretch(
    spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array, horizon_s: Array
) -> tuple[Array, Array]:
    """Returns how many iterations [L] a stretch of decoding has, and how long [L] s they take; 0 on other lanes."""
    slots = state.slots
    running = slots.running & active[..., None]
    is_async = experts.async_scheduling & active
    left_tokens = jnp.where(running, slots.output_tokens - slots.generated, jnp.iinfo(jnp.int32).max)
    requests, kv_tokens = jnp.where(active, state.running, 0), total(jnp.where(running, slots.computed, 0))
    first_s, growth_s = decode_s(experts, requests, kv_tokens)
    as_time = partial(jnp.asarray, dtype=first_s.dtype)
    lead, lead_s = is_async.astype(jnp.int32), jnp.where(is_async, state.scheduled_s, 0.0)
    left_s = jnp.where(active, horizon_s - state.clock_s - lead_s, 1.0)
    iterations = iterations_started(first_s, growth_s, jnp.maximum(left_s, 1e-9), jnp.min(left_tokens, -1) - lead)
    iterations = jnp.where(active, lead + jnp.where(left_s > 0, iterations, 0), 0)
    # In floating point, as the stretch may go far beyond the memory, and beyond int32.
    max_blocks = as_time(requests) + (as_time(kv_tokens) + as_time(requests) * as_time(iterations)) / spec.block_size
    iterations = lax.cond(
        jnp.any(max_blocks > as_time(max_kv_blocks(experts, spec.block_size))),
        lambda: _limit_to_memory(spec, experts, slots, running, iterations),
        lambda: iterations,
    )
    duration_s = jnp.where(iterations > 0, lead_s + stretch_s(first_s, growth_s, iterations - lead), 0.0)
    return iterations, duration_s


def _may_reuse(slots: Slots) -> Array:
    """Returns [L, S] bool: the request waits, and may find blocks of its own."""
    return slots.waiting & (slots.cached_blocks > 0)


def _room(
    spec: EngineSpec,
    experts: ExpertProfile,
    state: ExpertState,
    active: Array,
    next_blocks: Array,
    wanted_tokens: Array,
) -> tuple[Array, Array, Array, Array]:
    """Returns what those before it leave each request.

    Where nothing is scarce, their order does not matter, and no prefix sums are needed.

    Args:
      spec: static sizes.
      experts: profile [L].
      state: before the iteration is scheduled.
      active: [L] bool, lanes that run it.
      next_blocks: [L, S] that each would hold after the iteration.
      wanted_tokens: [L, S] that each would compute, if it found no block of its own.

    Returns:
      [L, S] bool: its blocks fit in memory with theirs; [L, S] int32 tokens left of the budget; [L, S] bool: fewer than
      ``max_running`` are before it; and [L, S] int32 blocks of its own that it finds.
    """
    max_blocks, token_budget, max_running = (
        max_kv_blocks(experts, spec.block_size),
        experts.token_budget,
        experts.max_running,
    )
    blocks, tokens = totals(next_blocks, wanted_tokens)
    live, requests = state.slots.live & active[..., None], jnp.where(active, state.live, 0)
    may_reuse = live & _may_reuse(state.slots)
    is_scarce = (blocks > max_blocks) | (tokens > token_budget) | (requests > max_running)

    def in_order() -> tuple[Array, Array, Array, Array]:
        count, blocks_so_far, tokens_so_far = prefix_sums(state.clock_s.dtype, live, next_blocks, wanted_tokens)
        reused_blocks, wanted, tokens_so_far = lax.cond(
            jnp.any(may_reuse),
            lambda: find_own_blocks(spec, experts, state, may_reuse, wanted_tokens, next_blocks, blocks_so_far),
            lambda: (jnp.zeros_like(wanted_tokens), wanted_tokens, tokens_so_far),
        )
        budget_left = of_slots(token_budget) - (tokens_so_far - wanted)
        return blocks_so_far <= of_slots(max_blocks), budget_left, count <= of_slots(max_running), reused_blocks

    def at_once() -> tuple[Array, Array, Array, Array]:
        every, none = jnp.ones_like(live), jnp.zeros_like(wanted_tokens)
        return every, of_slots(token_budget) - none, every, none

    return lax.cond(jnp.any(is_scarce) | jnp.any(may_reuse), in_order, at_once)


def _computed(
    experts: ExpertProfile, dtype: Any, new_tokens: Array, cached_tokens: Array, decoding: Array
) -> tuple[tuple[Array, ...], Array | float]:
    """Returns what an iteration computes: columns [L, S] whose sums begin a ``Batch``, and its ``pairs`` [L].

    Only tables ask for more than the first three columns.

    Args:
      experts: profile [L].
      dtype: of times.
      new_tokens: [L, S] that each request computes, 0 for those that are not scheduled.
      cached_tokens: [L, S] of each request before the iteration.
      decoding: [L, S] bool: it computes its newest token.
    """
    of_prompt = jnp.where(decoding, 0, new_tokens)
    columns = (new_tokens > 0, of_prompt, jnp.where(decoding, cached_tokens, 0))
    if experts.kernels is None:
        return columns, 0.0
    tokens, cached = of_prompt.astype(dtype), cached_tokens.astype(dtype)  # their product may exceed int32
    pairs = jnp.sum(tokens * (cached + tokens / 2.0), -1)
    return (*columns, decoding, jnp.where(of_prompt > 0, cached_tokens, 0)), pairs


def _limit_to_memory(
    spec: EngineSpec, experts: ExpertProfile, slots: Slots, running: Array, iterations: Array
) -> Array:
    """Halves ``iterations`` [L] until the blocks of the running requests fit in memory; 0 if one iteration does not."""
    dtype = slots.finish_s.dtype

    def exceed_memory(iterations: Array) -> Array:
        blocks = jnp.where(running, blocks_of(slots.computed + iterations[..., None], spec.block_size), 0)
        held = jnp.sum(blocks.astype(dtype), -1)  # may exceed int32
        return (held > max_kv_blocks(experts, spec.block_size).astype(dtype)) & (iterations > 0)

    return lax.while_loop(
        lambda iterations: jnp.any(exceed_memory(iterations)),
        lambda iterations: jnp.where(exceed_memory(iterations), iterations // 2, iterations),
        iterations,
    )
