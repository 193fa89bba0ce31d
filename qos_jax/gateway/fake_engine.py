"""Fake engines: OpenAI's streams and an engine's metrics, with the timing of the simulator's cost model.

They serve tests of load and faults, and the demo. One process runs many of them; each has its own batch, queue and KV
memory, and answers with as many words as ``max_tokens`` or the prompt's own random length says.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import math
import random
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile

FAULTS = ("none", "refuse", "overloaded", "stall", "break_stream")
_MEAN_TOKENS, _LOG_SD = 60, 0.6  # of answers without max_tokens


@dataclasses.dataclass(eq=False)
class _Job:
    """A request on the engine."""

    prompt_tokens: int
    output_tokens: int
    tokens: asyncio.Queue[int] = dataclasses.field(default_factory=asyncio.Queue)  # their numbers, as they are made
    made: int = 0

    @property
    def blocks(self) -> int:
        """KV blocks that it holds."""
        return -(-(self.prompt_tokens + self.made) // BLOCK_SIZE_TOKENS)


class FakeEngine:
    """One engine: an asyncio task runs its iterations."""

    def __init__(
        self,
        name: str,
        profile: ExpertProfile,
        index: int = 0,
        kind: str = "vllm",
        speed: float = 1.0,
        *,
        stamps: bool = False,
    ) -> None:
        """Makes an idle engine.

        Args:
          name: of its model.
          profile: fields [N]; ``index`` picks the expert.
          index: see ``profile``.
          kind: whose names its metrics have: vllm, sglang or llama.cpp.
          speed: it is so many times as fast as its profile says.
          stamps: each word of a streamed chat is ``SENT/WAY``, the time at which it was sent by the monotonic clock
            and how long after the time with which its message begins the request was there, both in s. Texts pass any
            proxy.
        """
        self.name, self.kind, self.speed, self.stamps = name, kind, speed, stamps
        self.fault = "none"
        self.padding = ""  # of each event, to make it long
        self.received = self.cancelled = 0
        self._cost = {
            field: float(np.broadcast_to(getattr(profile, field), np.shape(profile.step_base_s))[index])
            for field in ("step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s",
                          "kv_blocks", "max_running", "max_waiting", "token_budget")
        }  # fmt: skip
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running: list[_Job] = []
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def app(self) -> Starlette:
        """Its paths."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
                Route("/v1/completions", self._answer, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/metrics", self._metrics),
                Route("/slots", self._slots),
                Route("/fault", self._set_fault, methods=["POST"]),
            ]
        )

    @property
    def kv_share(self) -> float:
        """Share of its KV memory in use."""
        return min(sum(job.blocks for job in self._running) / self._cost["kv_blocks"], 1.0)

    async def _answer(self, request: Request) -> Response:
        self.received += 1
        body = await request.json()
        if self.fault == "refuse":
            return JSONResponse({"error": {"message": "broken"}}, 500)
        if self.fault == "overloaded" or len(self._waiting) >= self._cost["max_waiting"]:
            return JSONResponse({"error": {"message": "full"}}, 429)
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        job = _Job(max(1, len(prompt) // 4), body.get("max_tokens") or _length_of(prompt))
        self._waiting.append(job)
        self._work.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        is_chat = request.url.path.endswith("/chat/completions")
        if body.get("stream"):
            return StreamingResponse(self._stream(job, is_chat, body), media_type="text/event-stream")
        # In one piece, but as a stream, which ends when the client leaves.
        return StreamingResponse(self._whole(job, is_chat), media_type="application/json")

    async def _stream(self, job: _Job, is_chat: bool, body: dict[str, Any]) -> AsyncIterator[bytes]:
        there_s = time.monotonic() - float(body["messages"][-1]["content"].split()[0]) if self.stamps else 0.0
        try:
            for number in range(job.output_tokens):
                made = await job.tokens.get()
                word = f"{time.monotonic():.6f}/{there_s:.6f} " if self.stamps else _word(made)
                choice = {"delta": {"content": word}} if is_chat else {"text": word}
                last = "length" if number + 1 == job.output_tokens else None
                more: dict[str, Any] = {"padding": self.padding} if self.padding else {}
                yield self._event([{"index": 0, **choice, "finish_reason": last}], is_chat, **more)
                if self.fault == "break_stream":
                    raise ConnectionError("a fault was asked for")
            if (body.get("stream_options") or {}).get("include_usage"):
                yield self._event([], is_chat, usage=_usage(job))
            yield b"data: [DONE]\n\n"
        finally:
            self._leave(job)

    def _event(self, choices: list[Any], is_chat: bool, **more: Any) -> bytes:
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        value = {"id": "fake", "object": kind, "created": 0, "model": self.name, "choices": choices, **more}
        return f"data: {json.dumps(value)}\n\n".encode()

    async def _whole(self, job: _Job, is_chat: bool) -> AsyncIterator[bytes]:
        try:
            text = "".join([_word(await job.tokens.get()) for _ in range(job.output_tokens)])
        finally:
            self._leave(job)
        answer = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        kind = "chat.completion" if is_chat else "text_completion"
        choices = [{"index": 0, **answer, "finish_reason": "length"}]
        value = {"id": "fake", "object": kind, "created": 0, "model": self.name, "choices": choices}
        yield json.dumps(value | {"usage": _usage(job)}).encode()

    def _leave(self, job: _Job) -> None:
        """Takes a request off the engine, whose client may have left before its end."""
        for queue in (self._waiting, self._running):
            if job in queue:
                queue.remove(job)
                self.cancelled += 1

    async def _run(self) -> None:
        """Runs iterations until nobody asks for anything; the clock is absolute, so that no time is lost."""
        loop = asyncio.get_running_loop()
        clock_s = loop.time()
        while self._waiting or self._running:
            started = self._start_waiting()
            clock_s = max(clock_s, loop.time() - 0.1) + self._iteration_s(started) / self.speed
            await asyncio.sleep(max(clock_s - loop.time(), 0.0))
            while self.fault == "stall":
                await asyncio.sleep(0.01)
            for job in list(self._running):
                job.made += 1
                job.tokens.put_nowait(job.made)
                if job.made >= job.output_tokens:
                    self._running.remove(job)

    def _start_waiting(self) -> list[_Job]:
        """Starts those that wait, while there is a place, memory and budget; whole prompts only."""
        started: list[_Job] = []
        budget = self._cost["token_budget"] - len(self._running)
        while self._waiting and len(self._running) < self._cost["max_running"]:
            job = self._waiting[0]
            held = sum(each.blocks for each in self._running)
            if self._running and held + job.blocks > self._cost["kv_blocks"]:
                break
            if started and job.prompt_tokens > budget:
                break
            budget -= job.prompt_tokens
            started.append(self._waiting.popleft())
            self._running.append(job)
        return started

    def _iteration_s(self, started: list[_Job]) -> float:
        """Returns the simulator's duration of one iteration (``qos_jax.sim.cost``)."""
        cost = self._cost
        prompt_tokens = sum(job.prompt_tokens for job in started)
        kv_tokens = sum(job.prompt_tokens + job.made for job in self._running) - prompt_tokens
        prefill_s = cost["prefill_base_s"] + cost["prefill_per_token_s"] * prompt_tokens if prompt_tokens else 0.0
        return (
            max(cost["step_base_s"], prefill_s)
            + cost["per_sequence_s"] * len(self._running)
            + cost["per_kv_token_s"] * kv_tokens
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _metrics(self, request: Request) -> Response:
        running, waiting = len(self._running), len(self._waiting)
        names: dict[str, dict[str, float]] = {
            "vllm": {"vllm:num_requests_running": running, "vllm:num_requests_waiting": waiting,
                     "vllm:kv_cache_usage_perc": self.kv_share},
            "sglang": {"sglang:num_running_reqs": running, "sglang:num_queue_reqs": waiting,
                       "sglang:token_usage": self.kv_share},
            "llama.cpp": {"llamacpp:requests_processing": running, "llamacpp:requests_deferred": waiting},
        }  # fmt: skip
        values = names[self.kind.removesuffix("-sync")]
        lines = [f"# TYPE {name} gauge\n{name} {value}\n" for name, value in values.items()]
        return PlainTextResponse("".join(lines))

    async def _slots(self, request: Request) -> Response:
        context = int(self._cost["kv_blocks"]) * BLOCK_SIZE_TOKENS
        used = sum(job.prompt_tokens + job.made for job in self._running)
        return JSONResponse([{"id": 0, "n_ctx": context, "n_past": used, "is_processing": used > 0}])

    async def _set_fault(self, request: Request) -> Response:
        fault = (await request.json()).get("fault")
        if fault not in FAULTS:
            return JSONResponse({"error": f"fault must be one of {', '.join(FAULTS)}"}, 400)
        self.fault = fault
        return JSONResponse({"fault": fault})


def many(engines: list[FakeEngine]) -> Starlette:
    """Returns one application with the paths of each engine under /0, /1 and so on."""
    return Starlette(routes=[Mount(f"/{index}", engine.app) for index, engine in enumerate(engines)])


def _length_of(prompt: str) -> int:
    """Returns a random length, the same for the same prompt."""
    lot = random.Random(zlib.crc32(prompt.encode()))
    return max(1, round(math.exp(lot.gauss(math.log(_MEAN_TOKENS), _LOG_SD))))


def _word(number: int) -> str:
    return f"w{number} "


def _usage(job: _Job) -> dict[str, int]:
    total = job.prompt_tokens + job.output_tokens
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.output_tokens, "total_tokens": total}
