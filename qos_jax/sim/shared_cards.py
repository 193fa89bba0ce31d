"""LLMs that share a card, of which one is loaded at a time.

A request for another LLM of the card has it loaded in place of the loaded one. That one takes no further request, ends
those that it has, and leaves; then the other is loaded, which takes ``load_s``. Requests for it wait in its queue. An
LLM that is leaving takes no request until its last one has ended; then it may be loaded again. Its cache is empty then.

No request comes to an LLM that is leaving, so when it will have ended is known when the request for the other arrives.
The clock of the other's expert is set to that time and the loading: nothing else couples the experts of a card.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax.sim import engine
from qos_jax.sim.engine_state import EngineSpec, ExpertState
from qos_jax.sim.failures import without_requests
from qos_jax.sim.sessions import forget
from qos_jax.sim.types import AnyArray, ExpertProfile, SharedCards


def first_loaded(cards: SharedCards) -> Array:
    """Returns [N] bool: the expert is the first one of its card."""
    before = jnp.tril(_on_same_card(cards), -1)
    return ~jnp.any(before, -1)


def leaving(experts: ExpertState, loaded: Array) -> Array:
    """Returns [N] bool: another LLM is loaded once the requests of this one have ended; it takes none."""
    return (experts.live > 0) & ~loaded


def load(
    spec: EngineSpec, profile: ExpertProfile, experts: ExpertState, loaded: Array, chosen: Array
) -> tuple[ExpertState, Array]:
    """Loads the LLM of the expert that is to serve the request that arrives now, if it is not the loaded one.

    Args:
      spec: static sizes.
      profile: of the N experts, with ``cards``.
      experts: before the request is theirs.
      loaded: [N] bool.
      chosen: [N] bool, one expert at most; not one that is ``leaving``.

    Returns:
      The experts, and which are loaded now.
    """
    assert profile.cards is not None
    loads = chosen & ~loaded
    leaves = loaded & jnp.any(_on_same_card(profile.cards) & loads[None, :], -1)
    ended_s = engine.drain(spec, profile, without_requests(experts, ~leaves)[0]).clock_s
    start_s = jnp.sum(jnp.where(leaves, ended_s, 0.0)) + profile.cards.load_s
    experts = experts.replace(clock_s=jnp.where(loads, start_s.astype(experts.clock_s.dtype), experts.clock_s))
    return forget(experts, loads), (loaded & ~leaves) | loads


def load_left_s(profile: ExpertProfile, experts: ExpertState, loaded: Array) -> Array:
    """Returns how long [N] s loading will take, or will still take, before each expert can run a request.

    It does not tell how long the requests of an LLM that is leaving will take before that.
    """
    assert profile.cards is not None
    loads = loaded & (experts.waiting > 0) & (experts.running == 0)
    load_s = jnp.asarray(profile.cards.load_s, experts.clock_s.dtype)
    return jnp.where(loaded, jnp.where(loads, jnp.minimum(experts.clock_s, load_s), 0.0), load_s)


def largest_of_others(cards: SharedCards, values: Array) -> Array:
    """Returns the largest value [N] of the other experts of each card, of ``values`` [N] from 0 on; 0 for one alone."""
    return jnp.max(jnp.where(_on_same_card(cards), values[None, :], 0.0), -1)


def _on_same_card(cards: SharedCards) -> Array:
    """Returns [N, N] bool: two different experts share a card."""
    number = jnp.asarray(cards.number)
    return (number[:, None] == number[None, :]) & ~jnp.eye(number.shape[0], dtype=bool)


class CardTurns(struct.PyTreeNode):
    """Which requests of a replay have an LLM loaded, and in place of which; [J, L] each, or [L] of one row."""

    arrival_s: AnyArray  # s from the first request of the trace; arbitrary behind the last one of a lane
    begins: AnyArray  # bool: it has the LLM of its lane loaded
    other: AnyArray  # int32 lane whose LLM leaves for it; 0 where none does
    other_rows: AnyArray  # int32 requests of that lane before

    def may_begin(self, arrived: Array, experts: ExpertState) -> Array:
        """Returns [L] bool: the other lane has ended all requests before, of which ``arrived`` [L] have come."""
        ended = (arrived[self.other] >= self.other_rows) & (experts.live == 0)[self.other]
        return ~self.begins | ended

    def start_s(self, ended_s: Array) -> Array:
        """Returns when loading starts [L] s, from the arrival on, where the lanes ended at ``ended_s`` [L] s."""
        return jnp.maximum(ended_s[self.other] - self.arrival_s, 0.0)


def card_turns(cards: SharedCards, arrival_s: np.ndarray, assignment: np.ndarray, position: np.ndarray) -> CardTurns:
    """Returns the turns of the LLMs on their cards, under an assignment of the requests of a trace to N experts.

    Args:
      cards: of the experts.
      arrival_s: [J, N] s from the first request of the trace, by row and lane.
      assignment: expert of each request in order of arrival, -1 for none.
      position: row of each request in the lane of its expert.
    """
    number = np.asarray(cards.number).tolist()
    begins, (other, rows) = np.zeros(arrival_s.shape, bool), np.zeros((2, *arrival_s.shape), np.int32)
    loaded = {card: expert for expert, card in reversed(list(enumerate(number)))}
    sent = np.zeros(len(number), np.int32)
    for j in np.flatnonzero(assignment >= 0):
        expert, row = assignment[j], position[j]
        before = loaded[number[expert]]
        if before != expert:
            begins[row, expert], other[row, expert], rows[row, expert] = True, before, sent[before]
            loaded[number[expert]] = expert
        sent[expert] += 1
    return CardTurns(arrival_s, begins, other, rows)
