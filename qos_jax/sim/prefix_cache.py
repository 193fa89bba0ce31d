"""The own prefix cache: which of its blocks a preempted request finds again, by counters instead of lists of blocks.

See docs/guide/simulator.md, "Own prefix cache", and decision 36. Shapes are those of ``qos_jax.sim.engine_state``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qos_jax.sim.cost import blocks_of, max_kv_blocks
from qos_jax.sim.engine_state import EngineSpec, ExpertState, Slots, of_slots, prefix_sums, slot_numbers, total, totals
from qos_jax.sim.types import ExpertProfile


def not_yet_taken(slots: Slots, taken_blocks: Array) -> Array:
    """Returns the cached blocks [L, S] that are left once ``taken_blocks`` [L, S] are taken in all."""
    return jnp.clip(slots.taken_at - taken_blocks, 0, slots.cached_blocks)


def find_own_blocks(
    spec: EngineSpec,
    experts: ExpertProfile,
    state: ExpertState,
    waiting: Array,
    wanted_tokens: Array,
    next_blocks: Array,
    blocks_so_far: Array,
) -> tuple[Array, Array, Array]:
    """Returns which of its own blocks each waiting request would find again, and what it then has to compute.

    Running requests take their new blocks first, then the requests before it in the queue. It is assumed that these
    find all their blocks. If one does not, then those of the requests behind it, which lie before its own in the free
    queue, are gone anyway.

    Args:
      spec: static sizes.
      experts: profile [L].
      state: before the iteration is scheduled.
      waiting: [L, S] bool.
      wanted_tokens: [L, S], that each request would compute, as if none found any block.
      next_blocks: [L, S], that each request would hold after the iteration.
      blocks_so_far: [L, S], their inclusive prefix sums.

    Returns:
      The blocks found [L, S], the tokens wanted then [L, S], and their inclusive prefix sums [L, S].
    """
    slots = state.slots
    held_blocks = total(jnp.where(slots.running, blocks_of(slots.computed, spec.block_size), 0))
    reusable = jnp.where(waiting, slots.cached_blocks, 0)
    (reusable_so_far,) = prefix_sums(state.clock_s.dtype, reusable)
    blocks_before = blocks_so_far - next_blocks - (reusable_so_far - reusable) - held_blocks[..., None]
    found = jnp.where(waiting, not_yet_taken(slots, state.taken_blocks[..., None] + blocks_before), 0)
    left_tokens = slots.prompt_tokens + slots.generated - found * spec.block_size
    wanted_tokens = jnp.where(waiting, jnp.minimum(left_tokens, of_slots(experts.token_budget)), wanted_tokens)
    return found, wanted_tokens, prefix_sums(state.clock_s.dtype, wanted_tokens)[0]


def keep_cached(
    spec: EngineSpec,
    experts: ExpertProfile,
    state: ExpertState,
    preempted: Array,
    admitted: Array,
    reused_blocks: Array,
    partly_filled: Array,
    taken_blocks: Array,
) -> tuple[Array, Array, Array]:
    """Returns ``cached_blocks``, ``taken_at`` and ``taken_blocks`` after preemptions and admissions.

    The full blocks of a preempted request go to the end of the free queue and are known to the prefix cache; the others
    go to its head. Requests are preempted from the tail, each because the queue is empty, so that all but the one
    preempted last find none of theirs.

    Args:
      spec: static sizes.
      experts: profile [L].
      state: before the iteration was scheduled.
      preempted: [L, S] bool.
      admitted: [L, S] bool.
      reused_blocks: [L, S], that the admitted requests found.
      partly_filled: [L, S] bool: the request finished with a block that is not full.
      taken_blocks: [L], as if each request had held its blocks throughout and no admitted one had found any.
    """
    slots = state.slots
    held = jnp.where(slots.running, blocks_of(slots.computed, spec.block_size), 0)
    full = jnp.where(preempted, (slots.computed - slots.decoding.astype(jnp.int32)) // spec.block_size, 0)
    lost = jnp.where(preempted, held, 0)
    held, full_blocks, lost_blocks, reused, at_head = totals(
        held, full, lost, jnp.where(admitted, reused_blocks, 0), partly_filled
    )
    most_taken = taken_blocks + lost_blocks - reused + at_head  # before blocks are put at the head
    waiting = slots.waiting & ~admitted
    left = jnp.where(waiting, not_yet_taken(slots, most_taken[..., None]), 0)

    last = preempted & (slot_numbers(preempted) == jnp.argmax(preempted, -1, keepdims=True).astype(jnp.int32))
    end_of_queue = state.taken_blocks + max_kv_blocks(experts, spec.block_size) - held + full_blocks
    taken_at = jnp.where(last, end_of_queue[..., None], slots.taken_at)
    taken_blocks = most_taken - (lost_blocks - full_blocks)
    kept = jnp.maximum(end_of_queue - taken_blocks, 0)[..., None]
    kept = jnp.where(last & of_slots(experts.prefix_cache), jnp.minimum(full, kept), 0)
    found_or_left = jnp.where(admitted, reused_blocks, left)
    return jnp.where(preempted, kept, found_or_left), taken_at, taken_blocks - at_head
