"""The ledger: every request that the gateway has sent to an engine and that has not ended, as columns of numbers.

The columns are kept up to date token by token, so that a decision costs no walk over the requests.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qos_jax.sim.types import RATE_WINDOWS_S

LIVE, PROMPT, STREAMED, ARRIVAL, LIMIT, SCORE, TOKENS = range(7)
"""Rows of ``Ledger.columns``; ARRIVAL is a time of the ledger's clock, in s since ``Ledger.start_s``."""
NUM_COLUMNS = 7


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One request on one engine."""

    expert: int
    arrival_s: float  # s of the monotonic clock
    slot: int | None = None  # None where the expert had more requests than the observation has slots
    streamed: int = 0  # tokens


class Ledger:
    """The requests on N engines; S of each are observed."""

    def __init__(self, num_experts: int, slots: int, start_s: float) -> None:
        """Makes an empty ledger.

        Args:
          num_experts: N.
          slots: S.
          start_s: time of the monotonic clock from which arrivals count, so that they are exact.
        """
        self.columns = np.zeros((NUM_COLUMNS, num_experts, slots))
        self.in_flight = np.zeros(num_experts, int)
        self.start_s = start_s
        self._entries: list[list[Entry]] = [[] for _ in range(num_experts)]
        self._tail = [0] * num_experts

    def add(
        self, expert: int, now_s: float, *, prompt_tokens: int, limit_s: float, score: float, tokens: float
    ) -> Entry:
        """Enters a request that is sent to an engine now.

        Args:
          expert: index of the engine.
          now_s: time of the monotonic clock at which it arrived at the gateway.
          prompt_tokens: of the request.
          limit_s: latency limit, s/token.
          score: predicted score of this engine's answer.
          tokens: predicted tokens of it.
        """
        entry = Entry(expert, now_s)
        self.in_flight[expert] += 1
        if self._tail[expert] == self.columns.shape[-1]:
            self._compact(expert)
        if self._tail[expert] < self.columns.shape[-1]:
            entry.slot = self._tail[expert]
            self._tail[expert] += 1
            self.columns[:, expert, entry.slot] = (1, prompt_tokens, 0, now_s - self.start_s, limit_s, score, tokens)
            self._entries[expert].append(entry)
        return entry

    def stream(self, entry: Entry, tokens: int) -> None:
        """Notes that so many more tokens of a request have passed."""
        entry.streamed += tokens
        if entry.slot is not None:
            self.columns[STREAMED, entry.expert, entry.slot] = entry.streamed

    def end(self, entry: Entry) -> None:
        """Removes a request that is finished, cancelled or failed."""
        self.in_flight[entry.expert] -= 1
        if entry.slot is not None:
            self.columns[:, entry.expert, entry.slot] = 0
            self._entries[entry.expert].remove(entry)
            entry.slot = None

    def _compact(self, expert: int) -> None:
        """Moves the requests of an expert to its first slots, in order."""
        entries = self._entries[expert]
        columns = self.columns[:, expert]
        columns[:, : len(entries)] = columns[:, np.array([entry.slot for entry in entries], int)]
        columns[:, len(entries) :] = 0
        for slot, entry in enumerate(entries):
            entry.slot = slot
        self._tail[expert] = len(entries)


class ArrivalRates:
    """Recent arrival rates over ``RATE_WINDOWS_S``, as the simulator's worlds count them."""

    def __init__(self) -> None:
        """Begins with no arrival so far."""
        self._arrivals = np.zeros(len(RATE_WINDOWS_S))
        self._last_s = -math.inf

    def arrive(self, now_s: float) -> np.ndarray:
        """Counts an arrival, and returns the rates [K] requests/s with it."""
        windows_s = np.array(RATE_WINDOWS_S)
        self._arrivals = 1.0 + self._arrivals * np.exp(-(now_s - self._last_s) / windows_s)
        self._last_s = now_s
        return self._arrivals / windows_s
