"""Server-sent events of engines: which of them carry tokens, and what they say of usage."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

MAX_EVENT_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Event:
    """One event of a stream."""

    raw: bytes  # with the empty line at its end
    tokens: int = 0  # pieces of text in it: engines send one event for each token, or for several at once
    usage: dict[str, Any] | None = None
    only_usage: bool = False  # without a choice: sent because the gateway asked for the usage
    done: bool = False
    error: str | None = None  # the engine's message, as it sends it within a stream


class EventReader:
    """Cuts a stream of bytes into events."""

    def __init__(self) -> None:
        """Begins with nothing read."""
        self._rest = b""

    def feed(self, content: bytes) -> list[Event]:
        """Returns the events that end in these bytes.

        Raises:
          ValueError: an event is longer than ``MAX_EVENT_BYTES``.
        """
        *parts, self._rest = (self._rest + content).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of the engine's stream is longer than {MAX_EVENT_BYTES} bytes")
        return [_event(part + b"\n\n") for part in parts]


def _event(raw: bytes) -> Event:
    data = b"\n".join(line[5:].strip() for line in raw.split(b"\n") if line.startswith(b"data:"))
    if data == b"[DONE]":
        return Event(raw, done=True)
    try:
        value = json.loads(data)
    except ValueError:
        return Event(raw)  # a comment, or what an engine sends to keep the connection
    if not isinstance(value, dict):
        return Event(raw)
    if "error" in value:
        return Event(raw, error=str(value["error"])[:500])
    choices = value.get("choices") or []
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else None
    return Event(raw, sum(map(_has_text, choices)), usage, only_usage=usage is not None and not choices)


def _has_text(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return False
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(
        delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")
    )


def tokens_of(usage: dict[str, Any] | None, name: str) -> int | None:
    """Returns a count of a usage, None where it is not told."""
    value = (usage or {}).get(name)
    return value if type(value) is int and value >= 0 else None
