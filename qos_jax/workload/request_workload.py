"""A workload from three parts: arrivals, contents and predictions, sampled one request at a time."""

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
    """A `Workload` with three independent parts; only the arrivals have a state."""

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
        sampled = self.content.sample(content_key)
        predicted_score, predicted_tokens = self.prediction.predict(prediction_key, self.content, sampled)
        request = Request(
            prompt_tokens=sampled.prompt_tokens,
            output_tokens=sampled.output_tokens,
            score=sampled.score,
            latency_limit_s=sampled.latency_limit_s,
            predicted_score=predicted_score,
            predicted_tokens=predicted_tokens,
        )
        return gap_s, request, state

    def with_rate(self, rate_per_s: Array | float) -> RequestWorkload:
        """Returns the same workload at another mean arrival rate [requests/s]."""
        return dataclasses.replace(self, arrivals=self.arrivals.with_rate(rate_per_s))
