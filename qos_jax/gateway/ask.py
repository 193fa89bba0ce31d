"""What a client asks for: the body and the headers of a request, checked before anything else is done with them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_PROMPTS = 64  # of one call of /v1/completions
_SESSION = re.compile(r"[\x21-\x7e]{1,128}")
_HEADERS_MS = {"x-slo-ttft-ms": "ttft_s", "x-slo-tpot-ms": "tpot_s"}


class RefusedError(Exception):
    """A request that is answered by an error, in the form that clients of OpenAI know."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> None:
        """Makes the answer: a status of HTTP, a message for people, a kind for programs, and more headers."""
        super().__init__(message)
        self.status, self.kind = status, kind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> bytes:
        """Returns the body of the answer, JSON."""
        error = {"message": str(self), "type": self.kind, "code": self.status}
        return json.dumps({"error": error}).encode()


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request of a client, checked."""

    path: str  # /v1/chat/completions or /v1/completions
    body: dict[str, Any]  # as the client sent it
    model: str
    stream: bool
    text: str  # of the prompt, for predictions
    max_tokens: int | None
    ttft_s: float | None = None  # s, the client's limit on the time to the first token
    tpot_s: float | None = None  # s/token, on each further token
    slo_class: str | None = None  # of users, whose limit per token counts without those above
    session: str | None = None  # requests of one session prefer the engine of the one before

    def upstream_body(self, model: str) -> bytes:
        """Returns the body for an engine: with its own name of the model, and with the usage at the end of a stream."""
        body = self.body | {"model": model}
        if self.stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return json.dumps(body, ensure_ascii=False).encode()

    @property
    def wants_usage(self) -> bool:
        """The client has asked for the usage at the end of a stream itself."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))


def parse(path: str, content: bytes, headers: Mapping[str, str]) -> Ask:
    """Returns what a client asks for.

    Args:
      path: of the URL.
      content: the body.
      headers: with names in small letters.

    Raises:
      RefusedError: the body is not a request of this kind, or a header is not legal.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object")
    text = _chat_text(body) if path.endswith("/chat/completions") else _prompt_text(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise RefusedError(400, "model must be a text")
    for name in ("stream",):
        if not isinstance(body.get(name, False), bool | None):
            raise RefusedError(400, f"{name} must be true or false")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise RefusedError(400, "stream_options must be an object")
    limits = {field: _limit_s(name, headers.get(name)) for name, field in _HEADERS_MS.items()}
    session = headers.get("x-session-id")
    if session is not None and not _SESSION.fullmatch(session):
        raise RefusedError(400, "x-session-id must be 1 to 128 printable characters without spaces")
    return Ask(
        path,
        body,
        model,
        bool(body.get("stream")),
        text,
        _max_tokens(body),
        slo_class=headers.get("x-slo-class"),
        session=session,
        **limits,
    )


def _chat_text(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages must be a list with at least one message")
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            raise RefusedError(400, "each of messages must be an object")
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):  # of parts, of which only texts count
            parts += [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        elif content is not None:
            raise RefusedError(400, "content of a message must be a text or a list of parts")
    return "\n".join(parts)


def _prompt_text(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and 0 < len(prompt) <= MAX_PROMPTS and all(isinstance(each, str) for each in prompt):
        return "\n".join(prompt)
    if isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt):
        return " ".join(["four"] * len(prompt))  # token numbers: as long as so many short words
    raise RefusedError(400, f"prompt must be a text, a list of 1 to {MAX_PROMPTS} texts, or a list of token numbers")


def _max_tokens(body: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise RefusedError(400, f"{name} must be a whole number of at least 1")
            return value
    return None


def _limit_s(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value_ms = float(text)
    except ValueError:
        value_ms = math.nan
    if not 0 < value_ms < 1e9:
        raise RefusedError(400, f"{name} must be a number of milliseconds above 0")
    return value_ms / 1e3
