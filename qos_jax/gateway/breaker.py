"""The circuit breaker: an engine that fails is left alone for a while, then tried with one request."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Breaker:
    """Of one engine; times are s of the monotonic clock."""

    failures_to_open: int = 3  # in a row
    first_wait_s: float = 1.0  # doubled after each failed try
    max_wait_s: float = 30.0
    failures: int = 0  # in a row
    opened_until_s: float | None = None  # None: closed
    trying: bool = False  # one request is under way to find out whether the engine is back
    _wait_s: float = 0.0

    def allows(self, now_s: float) -> bool:
        """Tells whether a request may be sent: always if closed, one at a time after the wait."""
        if self.opened_until_s is None:
            return True
        return now_s >= self.opened_until_s and not self.trying

    def sent(self) -> None:
        """Notes that a request is sent."""
        if self.opened_until_s is not None:
            self.trying = True

    def succeeded(self) -> None:
        """Notes that the engine has answered; the breaker closes."""
        self.failures, self.opened_until_s, self.trying, self._wait_s = 0, None, False, 0.0

    def failed(self, now_s: float) -> None:
        """Notes that the engine cannot be reached, does not answer or answers that it is broken."""
        self.failures += 1
        if self.opened_until_s is not None and not self.trying:
            return  # sent before it opened
        if self.trying or self.failures >= self.failures_to_open:
            self._wait_s = min(max(2 * self._wait_s, self.first_wait_s), self.max_wait_s)
            self.opened_until_s, self.trying = now_s + self._wait_s, False

    def given_up(self) -> None:
        """Notes that a request ended without telling anything of the engine, as when its client has left."""
        self.trying = False

    @property
    def state(self) -> str:
        """One of closed, open and trying, for people and metrics."""
        return "closed" if self.opened_until_s is None else "trying" if self.trying else "open"
