"""The law of sessions: which requests are turns of one conversation.

Arrivals keep their own law; a request then goes on with one of the open conversations, drawn at random, or begins a new
one in its place. Conversations have a geometric number of turns, and with C of them open at R requests/s a user sends
the next turn C / R seconds after the last on average.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.errors import InputError
from qos_jax.sim.constants import MAX_LENGTH, MAX_SESSIONS
from qos_jax.sim.types import Turn


@struct.dataclass
class SessionLaw:
    """Conversations that are open at a time, and their lengths; `parse_sessions` builds it."""

    num_open: Array  # [] int32
    mean_turns: Array  # []
    max_prompt_tokens: Array  # [] int32 tokens, context included, beyond which a conversation begins anew

    def sample(self, key: Array) -> Turn:
        """Samples the part of a request in its conversation."""
        place_key, begins_key = jax.random.split(key)
        return Turn(
            place=jax.random.randint(place_key, (), 0, self.num_open, jnp.int32),
            begins=jax.random.bernoulli(begins_key, 1.0 / self.mean_turns),
            max_prompt_tokens=self.max_prompt_tokens,
        )


def check_sessions(text: str) -> tuple[int, float, int]:
    """Returns the numbers of `parse_sessions`.

    Raises:
        InputError: the text is not of that form, or a number is out of range.
    """
    try:
        if not set(text) <= set("0123456789.:"):
            raise ValueError  # int and float would take underscores and the digits of other scripts
        opened, turns, tokens = text.split(":")
        numbers = int(opened), float(turns), int(tokens)
        if 1 <= numbers[0] <= MAX_SESSIONS and 1.0 <= numbers[1] <= 1e6 and 1 <= numbers[2] <= MAX_LENGTH:
            return numbers
    except ValueError:
        pass  # raises the same error as numbers out of range
    raise InputError(
        f"sessions {text!r} must be OPEN:TURNS:TOKENS: conversations open at a time (1 to {MAX_SESSIONS}), their mean "
        f"number of turns (1 to 1e6), and the tokens of a prompt beyond which one begins anew (1 to {MAX_LENGTH})"
    )


def parse_sessions(text: str) -> SessionLaw:
    """Builds the law from `OPEN:TURNS:TOKENS`, for example `128:4:4096`.

    Raises:
        InputError: see `check_sessions`.
    """
    num_open, mean_turns, tokens = check_sessions(text)
    return SessionLaw(jnp.int32(num_open), jnp.asarray(mean_turns, float), jnp.int32(tokens))
