"""The engine: continuous batching over a paged KV cache, as pure functions of arrays.

The rules are those of vLLM's V1 scheduler reduced to what sets timing (docs/simulator.md). Three facts make them fast
without making them less exact:

* Requests run in arrival order and are preempted from the tail, so on one expert the running requests come before the
  waiting ones in arrival order. One array of slots in that order serves both queues, a request is running if it has
  computed tokens, and every scheduling rule is a condition on a prefix sum over the slots.
* Between two scheduling events the batch only decodes, so a whole stretch is one closed form (``qos_jax.sim.cost``).
* Finished requests stay where they are until room is needed (``compact``), and whoever keeps the books may read them
  there.

Times are relative to "now", the time to which the experts were last advanced, so float32 stays exact for runs of any
length; what a request took is fixed relative to its arrival when it happens.

Shapes: ``L`` stands for any leading axes (environments, experts); a lane is one expert of one environment. The public
functions are ``custom_vmap``: a batched call is the same program with more lanes, so that its loops and branches look
at all lanes at once instead of turning into selects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.sim.cost import blocks_of, blocks_summed, iteration_s, iterations_started, stretch_s
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """What fixes array shapes and integer arithmetic; a change recompiles."""

    slots: int  # S, requests that one expert can hold, running and waiting
    token_budget: int = TOKEN_BUDGET  # tokens per iteration
    block_size: int = BLOCK_SIZE_TOKENS  # tokens per KV block


class Slots(struct.PyTreeNode):
    """Requests on the experts in arrival order; a slot is empty where ``output_tokens`` is 0."""

    prompt_tokens: Array  # [L, S] int32
    output_tokens: Array  # [L, S] int32
    generated: Array  # [L, S] int32 tokens emitted
    computed: Array  # [L, S] int32 tokens in the KV cache; 0 while waiting
    preemptions: Array  # [L, S] int32
    arrival_s: Array  # [L, S] s, relative to now
    first_token_s: Array  # [L, S] s since arrival; set once generated > 0
    finish_s: Array  # [L, S] s since arrival; set once finished
    payload: Any  # pytree of [L, S], whatever the caller wants kept beside a request

    @property
    def live(self) -> Array:
        """[L, S] bool: running or waiting."""
        return self.generated < self.output_tokens

    @property
    def running(self) -> Array:
        """[L, S] bool."""
        return self.live & (self.computed > 0)

    @property
    def waiting(self) -> Array:
        """[L, S] bool."""
        return self.live & (self.computed == 0)

    @property
    def finished(self) -> Array:
        """[L, S] bool: done and not yet compacted away."""
        return (self.output_tokens > 0) & ~self.live


class ExpertState(struct.PyTreeNode):
    """The state of every expert, and its integrals since they were last set to zero."""

    slots: Slots
    clock_s: Array  # [L] s, relative to now: when the next iteration may start
    busy_s: Array  # [L] s of iterations
    kv_block_s: Array  # [L] blocks x s held during iterations
    passes: Array  # [L] int32 passes through the engine's loops, a measure of its work and not of the world's


def init_state(spec: EngineSpec, lanes: tuple[int, ...], payload: Any = (), dtype: Any = jnp.float32) -> ExpertState:
    """Returns idle experts; ``payload`` gives one request's payload, an array for each leaf."""
    shape = (*lanes, spec.slots)
    tokens, times = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, dtype)
    slots = Slots(
        tokens, tokens, tokens, tokens, tokens, times, times, times,
        jax.tree.map(lambda leaf: jnp.zeros(shape, jnp.asarray(leaf).dtype), payload),
    )  # fmt: skip
    zero = jnp.zeros(lanes, dtype)
    return ExpertState(slots, zero, zero, zero, jnp.zeros(lanes, jnp.int32))


def advance(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, duration_s: Array) -> ExpertState:
    """Runs every iteration that starts before ``duration_s`` [] or [L] from now, and makes that time the new now."""
    return _advance(spec)(experts, state, jnp.broadcast_to(duration_s, state.clock_s.shape).astype(state.clock_s.dtype))


def drain(spec: EngineSpec, experts: ExpertProfile, state: ExpertState) -> ExpertState:
    """Runs until no expert has work left; now stays where it is."""
    never = jnp.full_like(state.clock_s, 1e30)
    return _drain(spec)(experts, state, never)


def needs_compact(state: ExpertState) -> Array:
    """Returns [L] bool: the last slot is taken, so nothing can be pushed before ``compact``."""
    return state.slots.output_tokens[..., -1] > 0


def compact(spec: EngineSpec, state: ExpertState) -> ExpertState:
    """Moves the live requests to the front, in order, and forgets the finished ones."""
    slots = state.slots
    order = jnp.argsort(~slots.live, axis=-1, stable=True)
    used = jnp.arange(spec.slots) < jnp.sum(slots.live, -1, dtype=jnp.int32, keepdims=True)
    slots = jax.tree.map(lambda x: jnp.where(used, jnp.take_along_axis(x, order, -1), jnp.zeros_like(x)), slots)
    return state.replace(slots=slots)


def admissible(
    spec: EngineSpec, experts: ExpertProfile, state: ExpertState, prompt_tokens: Array, output_tokens: Array
) -> Array:
    """Returns [L] bool: the queue has a place for one more request, and its ``prompt + output`` tokens [L] can fit.

    A request that is not admissible is dropped at once (docs/simulator.md).
    """
    fits = blocks_of(prompt_tokens + output_tokens, spec.block_size) <= experts.kv_blocks
    return fits & (jnp.sum(state.slots.waiting, -1) < experts.max_waiting)


def compact_if_full(spec: EngineSpec, state: ExpertState) -> ExpertState:
    """Compacts all lanes if any of them needs it, so that the cost is paid once in many arrivals."""
    return _compact_if_full(spec)(state)


def push(state: ExpertState, lane: Array, prompt_tokens: Array, output_tokens: Array, payload: Any) -> ExpertState:
    """Puts a request that arrives now behind the others of each lane where ``lane`` [L] is set and a slot is free.

    ``prompt_tokens`` and ``output_tokens`` are [L], the leaves of ``payload`` broadcast to [L].
    """
    slots = state.slots
    occupied = slots.output_tokens > 0
    slot = jnp.arange(occupied.shape[-1], dtype=jnp.int32)
    tail = jnp.max(jnp.where(occupied, slot + 1, 0), -1)
    here = (slot == tail[..., None]) & lane[..., None]

    def put(old: Array, new: Any) -> Array:
        return jnp.where(here, jnp.asarray(new, old.dtype)[..., None], old)

    slots = slots.replace(
        prompt_tokens=put(slots.prompt_tokens, prompt_tokens),
        output_tokens=put(slots.output_tokens, output_tokens),
        generated=put(slots.generated, 0),
        computed=put(slots.computed, 0),
        preemptions=put(slots.preemptions, 0),
        arrival_s=put(slots.arrival_s, 0.0),
        payload=jax.tree.map(put, slots.payload, payload),
    )
    # The clock is never behind now: an idle expert starts now, a busy one sees the request at its next boundary.
    return state.replace(slots=slots)


@lru_cache
def _advance(spec: EngineSpec) -> Callable[[ExpertProfile, ExpertState, Array], ExpertState]:
    return _over_lanes(
        lambda experts, state, duration_s: _rebase(_run_until(spec, experts, state, duration_s), duration_s)
    )


@lru_cache
def _drain(spec: EngineSpec) -> Callable[[ExpertProfile, ExpertState, Array], ExpertState]:
    return _over_lanes(lambda experts, state, never: _run_until(spec, experts, state, never))


@lru_cache
def _compact_if_full(spec: EngineSpec) -> Callable[[ExpertState], ExpertState]:
    return _over_lanes(
        lambda state: lax.cond(jnp.any(needs_compact(state)), lambda s: compact(spec, s), lambda s: s, state)
    )


def _over_lanes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a function of arrays with any leading axes the vmap rule that it is: one more leading axis."""
    lanewise = jax.custom_batching.custom_vmap(function)

    @lanewise.def_vmap
    def _batched(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        def spread(x: Array, batched: bool) -> Array:
            return x if batched else jnp.broadcast_to(x, (axis_size, *jnp.shape(x)))

        out = lanewise(*jax.tree.map(spread, args, tuple(in_batched)))
        return out, jax.tree.map(lambda _: True, out)

    return lanewise


def _run_until(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, horizon_s: Array) -> ExpertState:
    """Runs every iteration that starts before ``horizon_s`` [L]; now stays where it is."""

    def busy(state: ExpertState) -> Array:
        return (state.clock_s < horizon_s) & jnp.any(state.slots.live, -1)

    def schedule_then_decode(state: ExpertState) -> ExpertState:
        state, steady = iterate(spec, experts, state, busy(state))
        none_wait = ~jnp.any(state.slots.waiting, -1)  # so that completions admit nobody

        def decode(carry: tuple[ExpertState, Array]) -> tuple[ExpertState, Array]:
            state, again = _decode_stretch(spec, experts, *carry, horizon_s)
            return state, again & none_wait

        return lax.while_loop(lambda carry: jnp.any(carry[1]), decode, (state, steady & busy(state)))[0]

    return lax.while_loop(lambda state: jnp.any(busy(state)), schedule_then_decode, state)


def _rebase(state: ExpertState, now_s: Array) -> ExpertState:
    """Moves now to ``now_s`` [L]; an idle expert's clock stays at now, lest it lag without bound."""
    slots = state.slots.replace(arrival_s=state.slots.arrival_s - now_s[..., None])
    return state.replace(slots=slots, clock_s=jnp.maximum(state.clock_s - now_s, 0.0))


def iterate(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array) -> tuple[ExpertState, Array]:
    """Runs one iteration on the lanes ``active`` [L], by every rule of the scheduler.

    Returns the state and [L] bool: from here on the lane only decodes until a request finishes or memory runs out.
    """
    slots = state.slots
    known = slots.prompt_tokens + slots.generated
    missing = known - slots.computed
    live = slots.live & active[..., None]
    running, waiting = live & (slots.computed > 0), live & (slots.computed == 0)

    # Running requests come first. All but the last of them decode (a prompt is cut only where the budget ends, and
    # nothing is admitted behind it), so that one may take what the others leave: 1 at least, as it was admitted.
    queued_tokens = jnp.where(waiting, jnp.minimum(known, spec.token_budget), 0)
    count, queued_tokens_so_far = _prefix_sums(live, queued_tokens)
    take = jnp.where(running, jnp.minimum(missing, spec.token_budget + 1 - _total(running)[..., None]), 0)
    budget_left = (spec.token_budget - _total(take))[..., None] - (queued_tokens_so_far - queued_tokens)

    # Preempting from the tail keeps the longest prefix whose blocks, this iteration's included, fit in memory. Behind a
    # preempted request nothing fits, so nothing is admitted in the same iteration.
    blocks = jnp.where(running, blocks_of(slots.computed + take, spec.block_size), blocks_of(known, spec.block_size))
    (blocks_so_far,) = _prefix_sums(jnp.where(live, blocks, 0))
    fits = blocks_so_far <= jnp.asarray(experts.kv_blocks)[..., None]
    preempted = running & ~fits
    welcome = waiting & (budget_left > 0) & (count <= jnp.asarray(experts.max_running)[..., None])
    admitted = welcome & fits
    take = jnp.where(admitted, jnp.minimum(known, budget_left), jnp.where(preempted, 0, take))

    scheduled = take > 0
    decoding = scheduled & (slots.generated > 0) & (missing == 1)
    requests = _total(scheduled)
    duration_s = iteration_s(
        experts,
        prefill_tokens=_total(jnp.where(decoding, 0, take)),
        requests=requests,
        kv_tokens=_total(jnp.where(decoding, slots.computed, 0)),
    )
    duration_s = jnp.where(active, duration_s, 0.0)
    clock_s = state.clock_s + duration_s

    computed = jnp.where(preempted, 0, slots.computed + take)
    emitted = scheduled & (computed == known)
    generated = slots.generated + emitted
    finished = emitted & (generated == slots.output_tokens)
    age_s = clock_s[..., None] - slots.arrival_s
    first_token_s = jnp.where(emitted & (slots.generated == 0), age_s, slots.first_token_s)
    finish_s = jnp.where(finished, age_s, slots.finish_s)
    held_blocks = _total(jnp.where(live, blocks_of(computed, spec.block_size), 0))

    completions = _total(finished)
    full = requests - completions >= experts.max_running
    no_memory = jnp.any(welcome & ~fits, -1) & (completions == 0)
    closed = ~jnp.any(waiting & ~admitted, -1) | full | no_memory
    steady = closed & jnp.all(emitted | ~(running | admitted), -1)
    state = ExpertState(
        slots=slots.replace(
            generated=generated,
            computed=computed,
            preemptions=slots.preemptions + preempted,
            first_token_s=first_token_s,
            finish_s=finish_s,
        ),
        clock_s=clock_s,
        busy_s=state.busy_s + duration_s,
        kv_block_s=state.kv_block_s + duration_s * held_blocks,
        passes=state.passes + 1,
    )
    return state, steady


def _decode_stretch(
    spec: EngineSpec, experts: ExpertProfile, state: ExpertState, active: Array, horizon_s: Array
) -> tuple[ExpertState, Array]:
    """Jumps over the iterations of the ``active`` [L] lanes to the next completion, the horizon or the end of memory.

    Every request of an active lane that runs is decoding, and none can be admitted. Returns the state and [L] bool: if
    nobody waits, the lane may jump again. The blocks x s integral takes all iterations at the stretch's mean duration.
    """
    slots = state.slots
    running = slots.running & active[..., None]
    left_tokens = jnp.where(running, slots.output_tokens - slots.generated, jnp.iinfo(jnp.int32).max)
    requests = _total(running)
    kv_tokens = _total(jnp.where(running, slots.computed, 0))
    first_s = iteration_s(experts, jnp.zeros_like(requests), requests, kv_tokens)
    growth_s = experts.per_kv_token_s * requests
    duration_s = jnp.where(active, horizon_s - state.clock_s, 1.0)
    iterations = iterations_started(first_s, growth_s, duration_s, jnp.min(left_tokens, -1))
    iterations = jnp.where(active, iterations, 0)
    most_blocks = requests + (kv_tokens + requests * iterations) // spec.block_size
    iterations = lax.cond(
        jnp.any(most_blocks > experts.kv_blocks),
        lambda: _within_memory(spec, experts, slots, running, iterations),
        lambda: iterations,
    )

    duration_s = stretch_s(first_s, growth_s, iterations)
    clock_s = state.clock_s + duration_s
    tokens = jnp.where(running, iterations[..., None], 0)
    computed, generated = slots.computed + tokens, slots.generated + tokens
    finished = running & (generated == slots.output_tokens)
    block_iterations = blocks_summed(computed, spec.block_size) - blocks_summed(slots.computed, spec.block_size)
    block_iterations = _total(jnp.where(running, block_iterations, 0))
    completions = _total(finished)
    again = (completions > 0) & (completions < requests) & (clock_s < horizon_s)
    state = ExpertState(
        slots=slots.replace(
            generated=generated,
            computed=computed,
            finish_s=jnp.where(finished, clock_s[..., None] - slots.arrival_s, slots.finish_s),
        ),
        clock_s=clock_s,
        busy_s=state.busy_s + duration_s,
        kv_block_s=state.kv_block_s + duration_s * block_iterations / jnp.maximum(iterations, 1),
        passes=state.passes + 1,
    )
    return state, again


def _within_memory(spec: EngineSpec, experts: ExpertProfile, slots: Slots, running: Array, iterations: Array) -> Array:
    """Halves ``iterations`` [L] until the blocks that the running requests then hold fit; 0 where not even one fits."""

    def too_many(iterations: Array) -> Array:
        blocks = blocks_of(slots.computed + iterations[..., None], spec.block_size)
        return (_total(jnp.where(running, blocks, 0)) > experts.kv_blocks) & (iterations > 0)

    return lax.while_loop(
        lambda iterations: jnp.any(too_many(iterations)),
        lambda iterations: jnp.where(too_many(iterations), iterations // 2, iterations),
        iterations,
    )


def _prefix_sums(*columns: Array) -> list[Array]:
    """Returns the inclusive sums over the slots of each integer column [L, S], exact below 2^24.

    A product with a triangle of ones is many times faster than a scan on CPUs, and as fast on GPUs.
    """
    stacked = jnp.stack(columns).astype(jnp.float32)
    triangle = jnp.triu(jnp.ones((stacked.shape[-1],) * 2, jnp.float32))
    sums = jnp.matmul(stacked, triangle, precision=lax.Precision.HIGHEST)
    return list(sums.astype(jnp.int32))


def _total(values: Array) -> Array:
    """Returns the int32 sum over the slots, in float64 runs too."""
    return jnp.sum(values, -1, dtype=jnp.int32)
