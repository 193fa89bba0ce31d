"""Lanes of a replay: each expert replays its own requests, and all run side by side in one loop.

On a CPU a few lanes run side by side in each of several threads; other devices run all of them at once. When a lane has
no free slot left, the finished requests of all are collected and their slots are compacted. Lanes do not wait for each
other, but for those of one card: there a request for which an LLM is loaded waits until the lane of the LLM before it
has ended.
"""

from __future__ import annotations

import concurrent.futures
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.sim import engine, scheduler
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.failures import without_requests
from qos_jax.sim.shared_cards import CardTurns
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, AnyArray, ExpertProfile

_MIN_LIVE = 32  # requests on one expert, for which slots are allocated first, and as many for finished ones
_MIN_ROWS = 64  # requests of one lane, for which a program is compiled
_CPU_LANES = 16  # side by side: few, so that their state stays in cache and that one slow lane delays few
_NEVER_S = 1e30  # s


class LaneRequests(struct.PyTreeNode):
    """The requests of L lanes in order of arrival, padded at the end; the request axis is first, for ``lax.scan``."""

    gap_s: AnyArray  # [J, L] s since the lane's previous request
    prompt_tokens: AnyArray  # [J, L] int32
    output_tokens: AnyArray  # [J, L] int32, 0 for padding
    shared_tokens: AnyArray  # [J, L] int32, of the prompt
    fails: AnyArray | None  # [J, L] bool: no request, but a failure in which the lane loses all; None if none fails
    turns: CardTurns | None = None  # [J, L] each; None where each expert has a card of its own


class LaneLog(struct.PyTreeNode):
    """What happened on each lane; times are relative to the arrival of the request."""

    finish_s: np.ndarray  # [J, L] s, NaN for dropped requests and padding
    first_token_s: np.ndarray  # [J, L] s, NaN for dropped requests and padding
    preemptions: np.ndarray  # [J, L] int32
    dropped: np.ndarray  # [J, L] bool
    busy_s: np.ndarray  # [L] s of iterations
    standby_s: np.ndarray  # [L] s of standby, that after the last token included
    kv_block_s: np.ndarray  # [L] blocks x s held


def replay_lanes(
    experts: ExpertProfile,
    requests: LaneRequests,
    *,
    block_size: int = BLOCK_SIZE_TOKENS,
    dtype: Any = np.float64,
    min_rows: int = 1,
    together: int | None = None,
) -> LaneLog:
    """Replays every lane to its end.

    The number of slots starts at what most workloads need, and doubles where a lane has no free one.

    Args:
      experts: profile with one entry per lane, fields [L].
      requests: of each lane.
      block_size: tokens per KV block.
      dtype: of the engine's times.
      min_rows: requests for which a program is compiled at least, so that similar runs share it.
      together: lanes of one fleet, which follow each other; None where lanes do not wait for each other.

    Returns:
      The log of each lane.

    Raises:
      InputError: a size or the type is not legal.
    """
    if dtype not in (np.float64, np.float32):
        raise InputError(f"dtype is {dtype!r}, must be np.float64 or np.float32")
    length, lanes = requests.gap_s.shape
    rows = 1 << (max(length, min_rows, _MIN_ROWS) - 1).bit_length()  # powers of two, so that few shapes are compiled
    used = requests.output_tokens > 0 if requests.fails is None else (requests.output_tokens > 0) | requests.fails
    counts = used.sum(0).astype(np.int32)
    width = together or (min(lanes, _CPU_LANES) if jax.default_backend() == "cpu" else lanes)
    # Lanes of about one length end together.
    order = np.argsort(-counts, kind="stable") if together is None else np.arange(lanes)
    groups = [order[i : i + width] for i in range(0, lanes, width)]

    def run(group: np.ndarray) -> tuple[Any, ...]:
        lane, missing = np.resize(group, width), np.arange(width) >= len(group)
        part = jax.tree.map(lambda x: np.pad(x[:, lane], ((0, rows - length), (0, 0))), requests)
        fleet = jax.tree.map(lambda x: x[lane], experts)
        spec = EngineSpec(2 * _MIN_LIVE, block_size)
        with jax.enable_x64(np.dtype(dtype) == np.float64):
            own_counts = np.where(missing, 0, counts[lane])
            so_far, overflow = _replay(spec, fleet, part, own_counts, _start(spec, part, own_counts))
            while overflow:
                spec = EngineSpec(2 * spec.slots, block_size)
                so_far, overflow = _replay(spec, fleet, part, own_counts, _with_more_slots(spec, so_far))
            log = so_far.log | {"dropped": so_far.at.dropped}
            standby_s = so_far.integrals["standby_s"] + so_far.at.state.standby_left_s  # that after the last token
            found = log, so_far.integrals | {"standby_s": standby_s}
        return jax.tree.map(lambda x: np.asarray(x)[..., : len(group)], found)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(run, groups))
    log, integrals = jax.tree.map(lambda *parts: np.concatenate(parts, -1)[..., np.argsort(order)], *found)
    log = {name: values[:length] for name, values in log.items()}
    for name in ("finish_s", "first_token_s"):  # the loop has no NaN, which JAX's debugging takes for a fault
        log[name] = np.where(np.isinf(log[name]), np.nan, log[name])
    return LaneLog(**log, **{name: values.astype(np.float64) for name, values in integrals.items()})


class _Progress(struct.PyTreeNode):
    """How far each of L lanes is."""

    state: ExpertState
    arrived: Array  # [L] int32 requests
    until_s: Array  # [L] s from now to the next one; ``_NEVER_S`` after the last, and before one that has an LLM loaded
    dropped: Array  # [J, L] bool

    @property
    def busy(self) -> Array:
        """[L] bool: an iteration starts before the next request arrives."""
        return engine.busy(self.state, self.until_s)


class _SoFar(struct.PyTreeNode):
    """How far the lanes are, and what has happened."""

    at: _Progress
    log: dict[str, Array]  # fields of ``LaneLog`` [J, L], infinity for what has not happened
    integrals: dict[str, Array]  # its fields [L]


@partial(jax.jit, static_argnums=0)
def _start(spec: EngineSpec, requests: LaneRequests, counts: Array) -> _SoFar:
    """Returns the state before the first request."""
    dtype = jnp.result_type(float)
    shape, lanes = requests.gap_s.shape, counts.shape
    none = jnp.zeros(lanes, dtype)
    at = _Progress(
        state=engine.init_state(spec, lanes, jnp.int32(0), dtype),
        arrived=jnp.zeros(lanes, jnp.int32),
        until_s=_until_s(requests, counts, jnp.zeros_like(counts)),
        dropped=jnp.zeros(shape, bool),
    )
    never = jnp.full(shape, jnp.inf, dtype)
    log = {"finish_s": never, "first_token_s": never, "preemptions": jnp.zeros(shape, jnp.int32)}
    return _SoFar(at, log, {"busy_s": none, "standby_s": none, "kv_block_s": none})


@partial(jax.jit, static_argnums=0)
def _with_more_slots(spec: EngineSpec, so_far: _SoFar) -> _SoFar:
    """Returns the same state with the slots of ``spec``, the new ones free."""

    def widened(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, spec.slots - x.shape[-1])))

    state = so_far.at.state
    state = state.replace(slots=jax.tree.map(widened, state.slots))
    return so_far.replace(at=so_far.at.replace(state=state))


@partial(jax.jit, static_argnums=0)
def _replay(
    spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests, counts: Array, so_far: _SoFar
) -> tuple[_SoFar, Array]:
    """Replays the first ``counts`` [L] requests of each lane, until all have ended or the slots do not suffice.

    Lanes wait for none but those of their card: in each pass of the loop every lane runs an iteration and a stretch of
    decoding, or its next request arrives.

    Returns:
      How far the lanes are; and [] bool: the slots do not suffice.
    """
    dtype = jnp.result_type(float)
    experts = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), experts)
    requests = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), requests)
    length, lane = len(requests.gap_s), jnp.arange(len(counts))[:, None]

    def done(at: _Progress) -> Array:
        return ~at.busy & (at.arrived >= counts)

    def step(at: _Progress) -> _Progress:
        return _arrive(spec, experts, requests, counts, _run(spec, experts, at))

    def collect(carry: tuple[_SoFar, Array]) -> tuple[_SoFar, Array]:
        at = lax.while_loop(lambda at: ~jnp.all(done(at)) & ~jnp.any(engine.needs_compact(at.state)), step, carry[0].at)
        state, slots, (log, integrals) = at.state, at.state.slots, (carry[0].log, carry[0].integrals)
        row = jnp.where(slots.finished, slots.payload, length)  # others are beyond the end, where nothing is written
        log = {name: values.at[row, lane].set(getattr(slots, name), mode="drop") for name, values in log.items()}
        integrals = {name: values + getattr(state, name) for name, values in integrals.items()}
        state = engine.compact(spec, state.replace(**jax.tree.map(jnp.zeros_like, integrals)))
        return _SoFar(at.replace(state=state), log, integrals), jnp.any(engine.needs_compact(state))

    def unfinished(carry: tuple[_SoFar, Array]) -> Array:
        return ~jnp.all(done(carry[0].at)) & ~carry[1]

    return lax.while_loop(unfinished, collect, (so_far, jnp.bool_(False)))


def _run(spec: EngineSpec, experts: ExpertProfile, at: _Progress) -> _Progress:
    """Runs one iteration on each busy lane that is not steady, then the steady ones up to a completion."""
    before, fresh = at.state, at.busy & ~at.state.steady
    state = lax.cond(jnp.any(fresh), lambda: scheduler.iterate(spec, experts, before, fresh), lambda: before)
    decodes = engine.busy(state, at.until_s) & state.steady
    state = scheduler.decode_stretch(spec, experts, state, decodes, at.until_s)
    left_s = jnp.where(state.clock_s > before.clock_s, experts.standby_s, before.standby_left_s)
    return at.replace(state=state.replace(standby_left_s=left_s))


def _arrive(
    spec: EngineSpec, experts: ExpertProfile, requests: LaneRequests, counts: Array, at: _Progress
) -> _Progress:
    """Lets the next request of each lane arrive that has run up to it."""
    arrives = ~at.busy & (at.arrived < counts)
    length, lane = len(requests.gap_s), jnp.arange(len(counts))
    request = jax.tree.map(lambda x: x[jnp.minimum(at.arrived, length - 1), lane], requests)
    if request.turns is not None:
        arrives &= request.turns.may_begin(at.arrived, at.state)
    is_request = arrives if request.fails is None else arrives & ~request.fails

    def arrived() -> tuple[ExpertState, Array]:
        moves_s = jnp.where(arrives, request.gap_s, 0.0)  # the clock is never behind now
        state = engine.rebase(engine.stand_by(at.state, moves_s), moves_s)
        if requests.turns is not None and experts.cards is not None:
            before_s = jnp.where(at.arrived > 0, requests.turns.arrival_s[at.arrived - 1, lane], -_NEVER_S)
            start_s = request.turns.start_s(before_s + at.state.clock_s) + experts.cards.load_s
            state = state.replace(clock_s=jnp.where(arrives & request.turns.begins, start_s, state.clock_s))
        if request.fails is not None:
            state, _ = without_requests(state, arrives & request.fails)
        admissible = engine.admissible(spec, experts, state, request.prompt_tokens, request.output_tokens)
        shared_blocks = jnp.where(experts.prefix_cache, request.shared_tokens // spec.block_size, 0)
        tokens = request.prompt_tokens, request.output_tokens
        return engine.push(state, is_request & admissible, *tokens, at.arrived, shared_blocks), ~admissible

    state, refused = lax.cond(jnp.any(arrives), arrived, lambda: (at.state, jnp.zeros_like(arrives)))
    row = jnp.where(is_request & refused, at.arrived, length)  # others are beyond the end, where nothing is written
    after = at.arrived + arrives.astype(jnp.int32)
    return at.replace(
        state=state,
        arrived=after,
        until_s=jnp.where(arrives, _until_s(requests, counts, after), at.until_s),
        dropped=at.dropped.at[row, lane].set(True, mode="drop"),
    )


def _until_s(requests: LaneRequests, counts: Array, arrived: Array) -> Array:
    """Returns how long [L] s each lane runs, from the arrival of the last one of ``arrived`` requests."""
    row, lane = jnp.minimum(arrived, len(requests.gap_s) - 1), jnp.arange(len(counts))
    goes_on = arrived < counts
    if requests.turns is not None:  # an LLM that is to be loaded again ends its requests before
        goes_on &= ~requests.turns.begins[row, lane]
    return jnp.where(goes_on, requests.gap_s[row, lane], _NEVER_S)
