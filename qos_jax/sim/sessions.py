"""Sessions: conversations of several turns, whose context grows and whose prefix stays in the cache of who served them.

A place holds one conversation at a time, and each turn names its place. Its prompt is the text of the user behind the
context: all prompts and answers of the conversation so far. An expert with a prefix cache does not compute the full
blocks of the context that it still has from an earlier turn.

As in ``sim.prefix_cache``, counters stand for the free queue of blocks. A finished request leaves its full blocks at
the end of that queue, and each block that is taken later shortens what is left, from the end of the context on. Three
things are simpler than in an engine: a finished request counts as finished at the next arrival, when the block that it
did not fill lies at the head of the queue again; what a turn finds is decided when it arrives, and not lost while it
waits; and a turn that does not wait for the answer before it finds nothing of that. An answer belongs to the context
from the moment its request is sent, also if a failure ends it.

Shapes: ``N`` experts, ``K`` places, ``S`` slots of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax.sim.constants import BLOCK_SIZE_TOKENS
from qos_jax.sim.cost import blocks_of, max_kv_blocks
from qos_jax.sim.engine_state import ExpertState, total
from qos_jax.sim.types import ExpertProfile, Request, Turn


class Conversations(struct.PyTreeNode):
    """What has been said so far."""

    number: Array  # [K] int32, counts the conversations of each place
    tokens: Array  # [K] int32 tokens of all prompts and answers of the conversation


class CachedPrefixes(struct.PyTreeNode):
    """What each expert may still have in its prefix cache."""

    number: Array  # [N, K] int32, the conversation of that place, -1 for none
    blocks: Array  # [N, K] int32 blocks, when its last turn here finished
    taken_at: Array  # [N, K] int32 value of ``ExpertState.taken_blocks`` at which the last of these is taken


class SessionSlots(struct.PyTreeNode):
    """To which conversation the requests in the slots belong."""

    place: Array  # [N, S] int32
    number: Array  # [N, S] int32


class OpenTurn(struct.PyTreeNode):
    """A turn that has arrived."""

    place: Array  # [] int32
    number: Array  # [] int32, of its conversation
    context_tokens: Array  # [] int32 tokens of the conversation before it
    cached_blocks: Array  # [N] int32 blocks of these that each expert has
    sent_blocks: Array  # [N] int32 blocks of these that it had when it finished a turn: more a proxy does not know


def no_conversations(places: int) -> Conversations:
    """Returns K places in which nothing has been said."""
    zero = jnp.zeros(places, jnp.int32)
    return Conversations(zero, zero)


def no_prefixes(num_experts: int, places: int) -> CachedPrefixes:
    """Returns N empty caches."""
    zero = jnp.zeros((num_experts, places), jnp.int32)
    return CachedPrefixes(zero - 1, zero, zero)


def open_turn(profile: ExpertProfile, experts: ExpertState, said: Conversations, request: Request) -> OpenTurn:
    """Returns the turn of a request: with its context, if that fits, or as the first of a new conversation.

    Args:
      profile: of the N experts.
      experts: with ``prefixes``.
      said: the conversations before it.
      request: with ``turn``; its prompt is the text of the user alone.
    """
    turn, prefixes = request.turn, experts.prefixes
    assert turn is not None
    before = said.tokens[turn.place]
    begins = turn.begins | (before + request.prompt_tokens > turn.max_prompt_tokens)
    number = said.number[turn.place] + begins.astype(jnp.int32)
    context_tokens = jnp.where(begins, 0, before)
    known = (prefixes.number[:, turn.place] == number) & jnp.asarray(profile.prefix_cache) & ~begins
    # A counterfactual copy may have served a longer answer than the one that the conversation goes on from.
    blocks = jnp.minimum(prefixes.blocks[:, turn.place], context_tokens // BLOCK_SIZE_TOKENS)
    sent_blocks = jnp.where(known, blocks, 0)
    left = jnp.clip(prefixes.taken_at[:, turn.place] - experts.taken_blocks, 0, sent_blocks)
    return OpenTurn(turn.place, number, context_tokens, left, sent_blocks)


def after_answer(said: Conversations, turn: OpenTurn, more_tokens: Array) -> Conversations:
    """Returns the conversations once a turn has added ``more_tokens`` [] int32: none if it was dropped."""
    return Conversations(
        said.number.at[turn.place].set(turn.number), said.tokens.at[turn.place].set(turn.context_tokens + more_tokens)
    )


def reuse(prefixes: CachedPrefixes, turn: OpenTurn, taken: Array) -> CachedPrefixes:
    """Returns the caches once the experts ``taken`` [N] bool use their blocks of a turn, which leave the free queue.

    What lies behind them in the queue is taken that much earlier.
    """
    used = jnp.where(taken, turn.cached_blocks, 0)[:, None]
    behind = prefixes.taken_at - prefixes.taken_at[:, turn.place][:, None] > 0  # also where the counter has wrapped
    return prefixes.replace(taken_at=prefixes.taken_at - jnp.where(behind, used, 0))


def keep_finished(profile: ExpertProfile, experts: ExpertState) -> ExpertState:
    """Puts the prefixes of the finished requests, which are in the slots still, into the caches."""
    slots, prefixes = experts.slots, experts.prefixes
    held = total(jnp.where(slots.running, blocks_of(slots.computed, BLOCK_SIZE_TOKENS), 0))
    end_of_queue = experts.taken_blocks + max_kv_blocks(profile, BLOCK_SIZE_TOKENS) - held
    blocks = (slots.prompt_tokens + slots.output_tokens - 1) // BLOCK_SIZE_TOKENS  # the last token is not computed
    at, nowhere = slots.payload.session, prefixes.number.shape[-1]
    rows = jnp.arange(at.place.shape[0])[:, None]

    def highest(old: Array, place: Array, new: Array) -> Array:
        # The order of writes is not defined, and several turns of one place may have finished.
        return old.at[rows, place].max(jnp.broadcast_to(new, place.shape), mode="drop")

    place = jnp.where(slots.finished, at.place, nowhere)
    number = highest(prefixes.number, place, at.number)
    place = jnp.where(at.number == number[rows, at.place], place, nowhere)  # not of a conversation that is over
    known_blocks = jnp.where(number == prefixes.number, prefixes.blocks, 0)
    lowest = prefixes.taken_at.at[rows, place].set(jnp.iinfo(jnp.int32).min, mode="drop")
    return experts.replace(
        prefixes=CachedPrefixes(
            number, highest(known_blocks, place, blocks), highest(lowest, place, end_of_queue[:, None])
        )
    )


def forget(experts: ExpertState, which: Array) -> ExpertState:
    """Returns the experts, of which ``which`` [N] bool have an empty cache, also of what has just finished."""
    if experts.prefixes is None:
        return experts
    slots = experts.slots
    session = slots.payload.session
    number = jnp.where(which[:, None], -1, session.number)
    return experts.replace(
        slots=slots.replace(payload=slots.payload.replace(session=session.replace(number=number))),
        prefixes=jax.tree.map(lambda x: jnp.where(which[:, None], jnp.full_like(x, -1), x), experts.prefixes),
    )


def contexts_of(turn: Turn, prompt_tokens: np.ndarray, output_tokens: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns the context of each of J requests on its expert, tokens [J], if sessions stay with one expert.

    Args:
      turn: of each request, fields [J].
      prompt_tokens: [J] tokens of the user's text.
      output_tokens: [J, N] tokens.
      assignment: [J] expert; requests of one place on different experts belong to different sessions.
    """
    said: dict[tuple[int, int], int] = {}
    contexts = np.zeros(len(assignment), np.int64)
    for j, expert in enumerate(assignment):
        session = int(expert), int(turn.place[j])
        before = 0 if turn.begins[j] else said.get(session, 0)
        contexts[j] = before if before + prompt_tokens[j] <= turn.max_prompt_tokens[j] else 0
        said[session] = int(contexts[j] + prompt_tokens[j] + output_tokens[j, expert])
    return contexts
