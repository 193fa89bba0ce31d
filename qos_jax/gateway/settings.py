"""The settings of a gateway."""

from __future__ import annotations

import dataclasses
import math

from qos_jax.errors import InputError
from qos_jax.gateway.level import Level

_LEVEL = Level(latency_per_token_s=0.03)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that an operator may set; times are in s."""

    level: Level = _LEVEL  # of requests that name no class
    classes: dict[str, Level] = dataclasses.field(default_factory=dict)  # of users, by name
    best_effort: bool = False  # send a request that the router would drop, rather than answer 429
    sticky_sessions: bool = True  # sessions stay on one engine, whatever the router decides but for a drop
    retries: int = 1  # on other engines, if nothing was streamed
    scrape_s: float = 0.5  # between two readings of an engine's metrics
    connect_s: float = 2.0
    first_token_s: float = 60.0
    token_s: float = 30.0  # between two tokens
    total_s: float = 600.0
    client_s: float = 30.0  # that a client may take to accept a piece of its answer, or to send its request
    max_body_bytes: int = 2**20
    max_header_bytes: int = 2**14
    max_connections: int = 2048  # of clients
    max_sessions: int = 10_000  # whose last engine is remembered
    log_texts: bool = False  # prompts and answers go into requests.jsonl
    api_keys: frozenset[str] = frozenset()  # of clients; with none, no key is asked for

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
          InputError: one is out of range.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "retries":
                if value < 0:
                    raise InputError(f"retries is {value}, must be at least 0")
            elif type(value) in (int, float) and not 0 < value < math.inf:
                raise InputError(f"{field.name} is {value}, must be above 0 and finite")

    def level_of(self, slo_class: str | None) -> Level:
        """Returns the service level of a class of users, or that of requests that name none."""
        return self.level if slo_class is None else self.classes[slo_class]

    def __repr__(self) -> str:
        """Returns the settings without the keys, so that no log can hold them."""
        return f"Settings(keys={len(self.api_keys)}, retries={self.retries}, best_effort={self.best_effort})"
