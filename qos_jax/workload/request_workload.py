"""The stream of requests that a simulation is fed: arrivals, contents and predictions, drawn one request at a time."""

from __future__ import annotations

import dataclasses

import jax
from flax import struct
from jax import Array

from qos_jax.sim.types import Request
from qos_jax.workload.arrivals import ArrivalProcess, ArrivalState
from qos_jax.workload.content import RequestContent
from qos_jax.workload.prediction import Predictions


@struct.dataclass
class RequestWorkload:
    """A `Workload` whose three parts are drawn independently; contents and predictions keep no state."""

    arrivals: ArrivalProcess
    content: RequestContent
    prediction: Predictions

    def init(self, key: Array) -> ArrivalState:
        """Returns the state before the first request."""
        return self.arrivals.init(key)

    def next(self, key: Array, state: ArrivalState) -> tuple[Array, Request, ArrivalState]:
        """Returns the gap to the next arrival [s], that request, and the state after it."""
        gap_key, content_key, prediction_key = jax.random.split(key, 3)
        gap_s, state = self.arrivals.next_gap(gap_key, state)
        answers = self.content.sample(content_key)
        predicted_score, predicted_tokens = self.prediction.predict(prediction_key, self.content, answers)
        request = Request(
            prompt_tokens=answers.prompt_tokens,
            output_tokens=answers.output_tokens,
            score=answers.score,
            latency_limit_s=answers.latency_limit_s,
            predicted_score=predicted_score,
            predicted_tokens=predicted_tokens,
        )
        return gap_s, request, state

    def with_rate(self, rate_per_s: Array | float) -> RequestWorkload:
        """Returns the same workload at another mean rate [requests/s]."""
        return dataclasses.replace(self, arrivals=self.arrivals.with_rate(rate_per_s))
