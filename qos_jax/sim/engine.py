"""The engine: continuous batching over a paged KV cache, as pure functions of arrays.

The rules are those of vLLM's V1 scheduler, reduced to what determines timing (docs/guide/simulator.md). Three
properties make the implementation fast and keep it exact:

* Requests run in arrival order and are preempted from the tail, so the running requests of an expert have arrived
  before its waiting ones. One array of slots in arrival order therefore holds both queues, a request is running if it
  has computed tokens, and every scheduling rule is a condition on a prefix sum over the slots.
* Between two scheduling events the batch only decodes, so a whole stretch has a closed form (``sim.scheduler``).
* Finished requests stay in their slots until room is needed (``compact``), where a caller can read their times.

Times are relative to "now", the time to which the experts were last advanced, so float32 stays exact for runs of any
length. The times of a request's first token and finish are relative to its arrival.

Shapes: ``L`` stands for any leading axes (environments, experts); a lane is one expert of one environment. The public
functions are ``custom_vmap``: a batched call is the same program with more lanes, so loops and branches test all lanes
at once instead of being converted to selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qos_jax.sim import scheduler
from qos_jax.sim.cost import fits_in_memory
from qos_jax.sim.engine_state import EngineSpec, ExpertState, Slots, prefix_sums, slot_numbers, total
from qos_jax.sim.types import ExpertProfile

_LARGE_FLEET = 32  # experts, of which so few are busy at a time that moving them is worth it
_BLOCK = 32  # lanes that a CPU moves at a time; other devices move a part of all
_PART_OF_LANES = 4
_FEW_FINISHED = 4  # requests on a full expert, up to which one is removed at a time
_ONLY_READ = ("prompt_tokens", "output_tokens", "arrival_s")  # fields of slots that no iteration writes
NEVER_TAKEN = 2**30  # blocks; a run takes fewer


def init_state(spec: EngineSpec, lanes: tuple[int, ...], payload: Any = (), dtype: Any = jnp.float32) -> ExpertState:
    """Returns idle experts.

    Args:
      spec: static sizes.
      lanes: the leading axes [L].
      payload: payload of one request, leaves []; gives structure and types.
      dtype: of times.
    """
    shape = (*lanes, spec.slots)
    tokens, times = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, dtype)
    slots = Slots(
        tokens, tokens, tokens, tokens, tokens > 0, tokens > 0, tokens, tokens, tokens, times, times, times,
        jax.tree.map(lambda leaf: jnp.zeros(shape, jnp.asarray(leaf).dtype), payload),
    )  # fmt: skip
    zero_s, zero = jnp.zeros(lanes, dtype), jnp.zeros(lanes, jnp.int32)
    return ExpertState(
        slots=slots,
        used=zero,
        running=zero,
        waiting=zero,
        clock_s=zero_s,
        scheduled_s=zero_s,
        taken_blocks=zero,
        standby_left_s=zero_s,
        busy_s=zero_s,
        standby_s=zero_s,
        kv_block_s=zero_s,
        steady=zero > 0,
        passes=zero,
    )


def advance(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, duration_s: Array) -> ExpertState:
    """Runs every iteration that starts within ``duration_s`` [] or [L] from now; now moves to the end of that time."""
    return _advance(spec)(experts, state, jnp.broadcast_to(duration_s, state.clock_s.shape).astype(state.clock_s.dtype))


def drain(spec: EngineSpec, experts: ExpertProfile, state: ExpertState) -> ExpertState:
    """Runs every request to its end, and the standby after it; now stays unchanged."""
    never = jnp.full_like(state.clock_s, 1e30)
    return _drain(spec)(experts, state, never)


def needs_compact(state: ExpertState) -> Array:
    """Returns [L] bool: the last slot is taken, so ``push`` needs ``compact`` first."""
    return state.used >= state.slots.output_tokens.shape[-1]


def compact(spec: EngineSpec, state: ExpertState) -> ExpertState:
    """Moves the live requests to the front, in order, and removes the finished ones."""
    slots = state.slots
    (count,) = prefix_sums(jnp.float32, slots.live)
    number = slot_numbers(slots.live)
    # Before the live request number k + 1 lie the slots up to which at most k are live. A sort takes twice as long on a
    # CPU, and a scatter is slow on a GPU.
    order = total(count[..., None, :] <= number[..., None])
    used = number < count[..., -1:]
    slots = jax.tree.map(lambda x: jnp.where(used, jnp.take_along_axis(x, order, -1), jnp.zeros_like(x)), slots)
    return state.replace(slots=slots, used=count[..., -1])


def admissible(
    spec: EngineSpec, experts: ExpertProfile, state: ExpertState, prompt_tokens: Array, output_tokens: Array
) -> Array:
    """Returns [L] bool: the queue has a free place, and the KV memory can hold all ``prompt + output`` tokens [L].

    A request that is not admissible is dropped on arrival (docs/guide/simulator.md).
    """
    fits = fits_in_memory(experts, prompt_tokens, output_tokens, spec.block_size)
    return fits & (state.waiting < experts.max_waiting)


def compact_if_full(spec: EngineSpec, state: ExpertState) -> ExpertState:
    """Makes room for a request on every lane whose last slot is taken, unless all its requests are live.

    All lanes are compacted, which spreads the cost over many arrivals, but where full lanes have few finished requests:
    they would be full again at once, so only one is removed from each.
    """
    return _compact_if_full(spec)(state)


def push(
    state: ExpertState,
    lane: Array,
    prompt_tokens: Array,
    output_tokens: Array,
    payload: Any,
    shared_blocks: Array | None = None,
) -> ExpertState:
    """Appends a request that arrives now to the queue of each selected lane that has a free slot.

    Args:
      state: before the arrival.
      lane: [L] bool, selected lanes.
      prompt_tokens: [L] tokens.
      output_tokens: [L] tokens, at least 1.
      payload: leaves [L] or broadcast to it.
      shared_blocks: [L] blocks of the prompt that other requests have computed; nobody takes them. None: 0.
    """
    slots = state.slots
    target = (slot_numbers(slots.output_tokens) == state.used[..., None]) & lane[..., None]

    def put(old: Array, new: Any) -> Array:
        return jnp.where(target, jnp.asarray(new, old.dtype)[..., None], old)

    slots = slots.replace(  # the other fields are 0 behind the last request
        prompt_tokens=put(slots.prompt_tokens, prompt_tokens),
        output_tokens=put(slots.output_tokens, output_tokens),
        arrival_s=put(slots.arrival_s, 0.0),
        payload=jax.tree.map(put, slots.payload, payload),
    )
    if shared_blocks is not None:
        slots = slots.replace(
            cached_blocks=put(slots.cached_blocks, shared_blocks), taken_at=put(slots.taken_at, NEVER_TAKEN)
        )
    # The clock is never behind now: an idle expert starts now, a busy one schedules the request in its next iteration.
    pushed = (lane & ~needs_compact(state)).astype(jnp.int32)
    counts = {"used": state.used + pushed, "waiting": state.waiting + pushed}
    return state.replace(slots=slots, steady=state.steady & ~lane, **counts)


@lru_cache
def _advance(spec: EngineSpec) -> Callable[[ExpertProfile, ExpertState, Array], ExpertState]:
    return _over_lanes(
        lambda experts, state, duration_s: rebase(_run_until(spec, experts, state, duration_s), duration_s)
    )


@lru_cache
def _drain(spec: EngineSpec) -> Callable[[ExpertProfile, ExpertState, Array], ExpertState]:
    return _over_lanes(lambda experts, state, never: _run_until(spec, experts, state, never))


@lru_cache
def _compact_if_full(spec: EngineSpec) -> Callable[[ExpertState], ExpertState]:
    def with_room(state: ExpertState) -> ExpertState:
        are_few = jnp.all(_finished_if_full(spec, state) <= _FEW_FINISHED)
        return lax.cond(are_few, _without_first_finished, partial(compact, spec), state)

    return _over_lanes(
        lambda state: lax.cond(jnp.any(_finished_if_full(spec, state) > 0), with_room, lambda s: s, state)
    )


def _finished_if_full(spec: EngineSpec, state: ExpertState) -> Array:
    """Returns [L] int32: the finished requests on each lane whose last slot is taken, 0 on the others."""
    return jnp.where(needs_compact(state), spec.slots - state.live, 0)


def _without_first_finished(state: ExpertState) -> ExpertState:
    """Removes the first finished request of each lane whose last slot is taken: what is behind it moves up."""
    live, number = state.slots.live, slot_numbers(state.slots.live)
    first = jnp.min(jnp.where(live, live.shape[-1], number), -1)
    moves = needs_compact(state) & (first < live.shape[-1])
    behind = moves[..., None] & (number >= first[..., None])

    def moved_up(x: Array) -> Array:
        return jnp.where(behind, jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], -1), x)

    return state.replace(slots=jax.tree.map(moved_up, state.slots), used=state.used - moves.astype(jnp.int32))


def _over_lanes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose batched call is one call with an additional leading axis."""
    lanewise = jax.custom_batching.custom_vmap(function)

    @lanewise.def_vmap
    def _batched(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        def add_axis(x: Array, batched: bool) -> Array:
            return x if batched else jnp.broadcast_to(x, (axis_size, *jnp.shape(x)))

        out = lanewise(*jax.tree.map(add_axis, args, tuple(in_batched)))
        return out, jax.tree.map(lambda _: True, out)

    return lanewise


def _run_until(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, horizon_s: Array) -> ExpertState:
    """Runs every iteration that starts before ``horizon_s`` [L], and standby up to there; now stays unchanged."""
    # Of tables of kernels too much would be moved.
    is_large = state.clock_s.ndim > 0 and state.clock_s.shape[-1] >= _LARGE_FLEET and experts.kernels is None
    run = _run_busy_lanes if is_large else _run_lanes
    after = run(spec, experts, state, horizon_s)
    # No request arrives meanwhile, so an expert is without work only at the end; it has iterated if its clock moved.
    whole_s = jnp.asarray(experts.standby_s, horizon_s.dtype)
    left_s = jnp.where(after.clock_s > state.clock_s, whole_s, state.standby_left_s)
    return stand_by(after.replace(standby_left_s=left_s), horizon_s)


def _run_busy_lanes(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, horizon_s: Array) -> ExpertState:
    """Runs ``_run_lanes`` on the busy lanes only, a block of them at a time: all others would be copied."""
    shape = state.clock_s.shape
    lanes = math.prod(shape)
    block = _BLOCK if jax.default_backend() == "cpu" else -(-lanes // _PART_OF_LANES)
    is_busy, steady = busy(state, horizon_s).reshape(-1), state.steady.reshape(-1)
    # Steady lanes come last: a block of them runs no iteration by all rules. Sorting would take longer.
    fresh, decodes = (jnp.cumsum(mask, dtype=jnp.int32) for mask in (is_busy & ~steady, is_busy & steady))
    place = jnp.where(is_busy, jnp.where(steady, fresh[-1] + decodes, fresh) - 1, lanes)
    # Behind the busy lanes are numbers of none.
    busy_first = jnp.full(lanes + block, lanes).at[place].set(jnp.arange(lanes), mode="drop")

    profile = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), experts)
    only_read = {name: getattr(state.slots, name) for name in _ONLY_READ}

    def without_read(state: ExpertState) -> ExpertState:
        slots = state.slots.replace(**dict.fromkeys(only_read), payload=None)
        return state.replace(slots=slots, prefixes=None)

    def run_block(carry: tuple[Array, ExpertState]) -> tuple[Array, ExpertState]:
        done, rows = carry
        # The number of none is that of a row behind the last: it reads the last row and writes nothing.
        chosen = jnp.unravel_index(lax.dynamic_slice_in_dim(busy_first, done, block), (shape[0] + 1, *shape[1:]))
        before = rows.replace(slots=rows.slots.replace(**only_read))
        part = jax.tree.map(lambda x: x[chosen], (profile, before, horizon_s))
        after = without_read(_run_lanes(spec, *part))
        return done + block, jax.tree.map(lambda x, new: x.at[chosen].set(new, mode="drop"), rows, after)

    count = fresh[-1] + decodes[-1]
    _, after = lax.while_loop(lambda carry: carry[0] < count, run_block, (jnp.int32(0), without_read(state)))
    read = {name: getattr(state.slots, name) for name in (*_ONLY_READ, "payload")}
    return after.replace(slots=after.slots.replace(**read), prefixes=state.prefixes)


def busy(state: ExpertState, horizon_s: Array) -> Array:
    """Returns [L] bool: an iteration starts before the horizon."""
    return (state.clock_s < horizon_s) & (state.live > 0)


def _run_lanes(spec: EngineSpec, experts: ExpertProfile, state: ExpertState, horizon_s: Array) -> ExpertState:
    """Runs every iteration that starts before ``horizon_s`` [L]."""

    def unsteady(state: ExpertState) -> Array:
        return busy(state, horizon_s) & ~state.steady

    def steady(state: ExpertState) -> Array:
        return busy(state, horizon_s) & state.steady

    def schedule(state: ExpertState) -> ExpertState:
        return scheduler.iterate(spec, experts, state, unsteady(state))

    def decode(state: ExpertState) -> ExpertState:
        return scheduler.decode_stretch(spec, experts, state, steady(state), horizon_s)

    def schedule_then_decode(state: ExpertState) -> ExpertState:
        state = lax.while_loop(lambda state: jnp.any(unsteady(state)), schedule, state)
        return lax.while_loop(lambda state: jnp.any(steady(state)), decode, state)

    return lax.while_loop(lambda state: jnp.any(busy(state, horizon_s)), schedule_then_decode, state)


def stand_by(state: ExpertState, horizon_s: Array) -> ExpertState:
    """Adds the standby from the last iteration, if it ends before ``horizon_s`` [L], up to there or to its own end."""
    standby_s = jnp.clip(horizon_s - state.clock_s, 0.0, state.standby_left_s)
    return state.replace(standby_left_s=state.standby_left_s - standby_s, standby_s=state.standby_s + standby_s)


def rebase(state: ExpertState, now_s: Array) -> ExpertState:
    """Moves now to ``now_s`` [L]; the clock of an idle expert stays at now instead of falling behind without bound."""
    slots = state.slots.replace(arrival_s=state.slots.arrival_s - now_s[..., None])
    return state.replace(slots=slots, clock_s=jnp.maximum(state.clock_s - now_s, 0.0))
