"""The gateway without its HTTP: who takes a request, and what is noted of it."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qos_jax.gateway import decision as rows
from qos_jax.gateway import records
from qos_jax.gateway.ask import Ask, RefusedError
from qos_jax.gateway.decision import Decider, Decision
from qos_jax.gateway.engines import Engines
from qos_jax.gateway.fleet import Backend
from qos_jax.gateway.ledger import ARRIVAL, ArrivalRates, Entry, Ledger
from qos_jax.gateway.level import Level
from qos_jax.gateway.measures import Measures
from qos_jax.gateway.predict import Expectations, Prediction
from qos_jax.gateway.settings import Settings
from qos_jax.predictor.predictor import Predictor
from qos_jax.sim.constants import BLOCK_SIZE_TOKENS

ANY_MODEL = "auto"
"""The name of a model that stands for all engines."""
_RETRY_AFTER_S = 1
_RECENT_S = 60.0  # that records are kept for people to look at
_MAX_RECENT = 5_000


@dataclasses.dataclass
class Served:
    """One request from its arrival to its end: what is noted of it."""

    ask: Ask
    prediction: Prediction
    limit_s: float  # s/token, the latency by which routers steer, for an answer as long as predicted
    allowed: np.ndarray  # [N] bool: engines of the model that is asked for
    rates_per_s: np.ndarray  # [K] recent arrival rates, with it
    arrival_s: float  # s of the monotonic clock
    time: float = dataclasses.field(default_factory=records.wall_time)
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    tried: list[int] = dataclasses.field(default_factory=list)  # engines, in order
    in_flight: list[int] = dataclasses.field(default_factory=list)  # requests on each engine at the decision
    decision: Decision | None = None  # the last one
    shadow: int | None = None  # engine by the shadow's first decision, N to drop
    decision_s: float = 0.0
    first_token_s: float | None = None  # s since arrival
    end_s: float = 0.0
    prompt_tokens: int | None = None  # as the engine counts them
    output_tokens: int = 0
    status: str = "failed"
    answer: list[str] = dataclasses.field(default_factory=list)  # only if texts are kept


class LastTurn(NamedTuple):
    """The last request of a session that was answered."""

    expert: int
    tokens: int  # of the prompt and the answer


class Gateway:
    """A fleet of engines, a router, and the ledger."""

    def __init__(
        self,
        backends: Sequence[Backend],
        deciders: Sequence[Decider],
        settings: Settings,
        *,
        shadow: str | None = None,
        predictor: Predictor | None = None,
        folder: pathlib.Path | None = None,
    ) -> None:
        """Begins with nothing in flight.

        Args:
          backends: N engines.
          deciders: routers for as many experts. By the first requests are routed; ``active`` may name another later.
          settings: of the gateway.
          shadow: name of one of the routers that decides, too, and is only recorded.
          predictor: of scores and lengths; without one, means count.
          folder: for requests.jsonl; None writes nothing.

        Raises:
          InputError: the file cannot be written.
        """
        first = deciders[0]
        self.backends, self.settings = tuple(backends), settings
        self.deciders = {decider.name: decider for decider in deciders}
        self.active, self.shadow = first.name, shadow
        self.ledger = Ledger(len(backends), first.slots, time.monotonic())
        self.measures = Measures([backend.name for backend in backends])
        self.engines = Engines(backends, self.ledger, first.kv_blocks, settings, self.measures)
        self.expectations = Expectations(
            [backend.quality for backend in backends], [backend.mean_tokens for backend in backends], predictor
        )
        self.recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MAX_RECENT)
        self.draining = False
        self._rates = ArrivalRates()
        self._sessions: collections.OrderedDict[str, LastTurn] = collections.OrderedDict()
        self._file = records.RequestFile(folder)

    def drain(self) -> None:
        """Has /healthz say that no more requests shall come."""
        self.draining = True

    def models(self) -> list[str]:
        """Returns what clients may ask for: all engines, or those of one name."""
        names = [ANY_MODEL, *(backend.model for backend in self.backends), *(each.name for each in self.backends)]
        return list(dict.fromkeys(names))

    async def arrive(self, ask: Ask) -> Served:
        """Takes a request in.

        Raises:
          RefusedError: no engine has the model that is asked for, or the class of users is unknown.
        """
        arrival_s = time.monotonic()
        if ask.slo_class is not None and ask.slo_class not in self.settings.classes:
            known = ", ".join(self.settings.classes) or "there are none"
            raise RefusedError(400, f"x-slo-class is {ask.slo_class[:100]!r}, must be one of: {known}")
        allowed = np.array([ask.model in (ANY_MODEL, backend.model, backend.name) for backend in self.backends])
        if not allowed.any():
            raise RefusedError(404, f"model {ask.model[:100]!r} is unknown; GET /v1/models lists those there are",
                          "model_not_found")  # fmt: skip
        prediction = await self.expectations.predict(ask.text, ask.max_tokens)
        limit_s = self.level(ask).per_token_s(float(np.mean(prediction.tokens)))
        return Served(ask, prediction, limit_s, allowed, self._rates.arrive(arrival_s), arrival_s)

    def place(self, served: Served) -> int:
        """Decides which engine takes a request; those that it was sent to before are left out.

        Returns:
          The index of the engine.

        Raises:
          RefusedError: the router drops it, or no engine can be reached.
        """
        now_s = time.monotonic()
        available = self.engines.available(now_s) & served.allowed
        available[served.tried] = False
        if not available.any():
            raise RefusedError(
                503, "no engine of this model can be reached", "overloaded", Retry_After=str(_RETRY_AFTER_S)
            )
        started_s = time.perf_counter()
        last = self._sessions.get(served.ask.session or "")
        ledger, experts = self._packed(now_s, available, served.prediction, last)
        arguments: dict[str, Any] = {
            "prompt_tokens": served.prediction.prompt_tokens,
            "limit_s": served.limit_s,
            "may_drop": not self.settings.best_effort,
            "rates_per_s": served.rates_per_s,
        }
        decision = self.deciders[self.active].decide(ledger, experts, **arguments)
        served.decision_s = time.perf_counter() - started_s
        self.measures.decision_s.observe(served.decision_s)
        if not served.tried:
            served.in_flight = self.ledger.in_flight.tolist()
            if self.shadow is not None:
                other = self.deciders[self.shadow].decide(ledger, experts, **arguments).expert
                served.shadow = len(self.backends) if other is None else other
        served.decision = decision
        expert = self._of_session(last, available, decision.expert)
        if expert is None and self.settings.best_effort:  # every queue is full
            expert = int(np.argmin(np.where(available, self.ledger.in_flight, math.inf)))
        if expert is None:
            raise RefusedError(429, "the engines are too busy for this request to be served in time", "overloaded",
                          Retry_After=str(_RETRY_AFTER_S))  # fmt: skip
        return expert

    def begin(self, served: Served, expert: int) -> Entry:
        """Notes that a request is sent to an engine."""
        served.tried.append(expert)
        self.engines.all[expert].breaker.sent()
        self.measures.in_flight.labels(self.backends[expert].name).inc()
        return self.ledger.add(
            expert,
            served.arrival_s,
            prompt_tokens=served.prediction.prompt_tokens,
            limit_s=served.limit_s,
            score=float(served.prediction.score[expert]),
            tokens=float(served.prediction.tokens[expert]),
        )

    def leave(self, entry: Entry) -> None:
        """Notes that an engine has no more to do with a request."""
        self.ledger.end(entry)
        self.measures.in_flight.labels(self.backends[entry.expert].name).dec()

    def level(self, ask: Ask) -> Level:
        """Returns the limits of a request: its client's own, in place of those of its class."""
        level = self.settings.level_of(ask.slo_class)
        if ask.tpot_s is not None:
            return Level(ttft_s=level.ttft_s if ask.ttft_s is None else ask.ttft_s, tpot_s=ask.tpot_s)
        return level if ask.ttft_s is None else dataclasses.replace(level, ttft_s=ask.ttft_s)

    def finish(self, served: Served) -> None:
        """Notes the end of a request: in the metrics, in what is expected of others, and in requests.jsonl."""
        served.end_s = time.monotonic() - served.arrival_s
        expert = served.tried[-1] if served.tried else None
        name = "none" if expert is None else self.backends[expert].name
        self.measures.requests.labels(name, served.status).inc()
        self.measures.retries.inc(max(len(served.tried) - 1, 0))
        if expert is not None and served.status == "ok":
            self.expectations.learn(
                expert, len(served.ask.text.encode()), served.prompt_tokens, max(served.output_tokens, 1)
            )
            self.measures.tokens.labels(name).inc(served.output_tokens)
            if served.first_token_s is not None and served.ask.stream:
                self.measures.ttft_s.labels(name).observe(served.first_token_s)
                if served.output_tokens > 1:
                    self.measures.token_s.labels(name).observe(
                        (served.end_s - served.first_token_s) / (served.output_tokens - 1)
                    )
            if served.ask.session is not None:
                tokens = (served.prompt_tokens or served.prediction.prompt_tokens) + served.output_tokens
                self._remember(served.ask.session, LastTurn(expert, tokens))
        record = self.record(served)
        self.measures.qos.inc(record["qos"])
        while self.recent and self.recent[0]["time"] < record["time"] - _RECENT_S:
            self.recent.popleft()
        self.recent.append(record)
        self._file.write(record | self._texts(served))

    def record(self, served: Served) -> dict[str, Any]:
        """Returns the line of requests.jsonl of a request that has ended; times are in s."""
        expert = served.tried[-1] if served.tried else None
        in_time = served.status == "ok" and self._in_time(served)
        score = 0.0 if expert is None else float(served.prediction.score[expert])
        names = [backend.name for backend in self.backends]
        return {
            "id": served.id,
            "time": served.time,
            "status": served.status,
            "stream": served.ask.stream,
            "engine": None if expert is None else names[expert],
            "names": names,
            "tried": [names[each] for each in served.tried],
            "router": self.active,
            "shadow": None if served.shadow is None else [*names, "drop"][served.shadow],
            "prompt_tokens": served.prompt_tokens or served.prediction.prompt_tokens,
            "output_tokens": served.output_tokens,
            "first_token_s": _rounded(served.first_token_s),
            "end_s": _rounded(served.end_s),
            "decision_s": _rounded(served.decision_s),
            "slo_class": served.ask.slo_class,
            "ttft_limit_s": served.ask.ttft_s,
            "tpot_limit_s": served.ask.tpot_s,
            "limit_s_per_token": _rounded(served.limit_s),
            "in_time": in_time,
            "qos": round(score * in_time, 6),
            "in_flight": served.in_flight,
            "predicted_score": _list(served.prediction.score),
            "predicted_tokens": _list(served.prediction.tokens),
            "estimate": None if served.decision is None else _estimate(served.decision),
        }

    def close(self) -> None:
        """Closes requests.jsonl."""
        self._file.close()

    def _packed(
        self, now_s: float, available: np.ndarray, prediction: Prediction, last: LastTurn | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ledger with ages, and what is known of the experts, as ``Decider`` takes them."""
        ledger = self.ledger.columns.copy()
        ledger[ARRIVAL] = now_s - self.ledger.start_s - ledger[ARRIVAL]
        experts = np.zeros((rows.NUM_EXPERT_ROWS, len(self.backends)))
        experts[rows.AVAILABLE] = available
        experts[rows.SCRAPE_AGE] = [now_s - engine.scraped_s for engine in self.engines.all]
        experts[rows.WAITING] = [0 if each.load is None else each.load.waiting for each in self.engines.all]
        experts[rows.KV_BLOCKS] = self.engines.kv_used_blocks()
        others = [engine.others() for engine in self.engines.all]
        experts[rows.OTHERS_RUNNING], experts[rows.OTHERS_WAITING] = zip(*others, strict=True)
        experts[rows.SCORE], experts[rows.TOKENS] = prediction.score, prediction.tokens
        if last is not None:
            experts[rows.CACHED, last.expert] = last.tokens // BLOCK_SIZE_TOKENS * BLOCK_SIZE_TOKENS
        return ledger, experts

    def _of_session(self, last: LastTurn | None, available: np.ndarray, decided: int | None) -> int | None:
        """Returns the engine of the session's last request if it can be reached and the router drops nothing."""
        if decided is None or last is None or not self.settings.sticky_sessions:
            return decided
        return last.expert if available[last.expert] else decided

    def _remember(self, session: str, turn: LastTurn) -> None:
        self._sessions[session] = turn
        self._sessions.move_to_end(session)
        if len(self._sessions) > self.settings.max_sessions:
            self._sessions.popitem(last=False)

    def _in_time(self, served: Served) -> bool:
        """Tells whether an answer met its service level; one that is not streamed has its first token at its end."""
        first_s = served.end_s if served.first_token_s is None else served.first_token_s
        return self.level(served.ask).met(first_s, served.end_s, served.output_tokens)

    def _texts(self, served: Served) -> dict[str, Any]:
        return {"text": served.ask.text, "answer": "".join(served.answer)} if self.settings.log_texts else {}


def _estimate(decision: Decision) -> dict[str, list[float | None]]:
    return {
        field.name: _list(getattr(decision.estimate, field.name)) for field in dataclasses.fields(decision.estimate)
    }


def _list(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
