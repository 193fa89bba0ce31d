"""A workload from three parts: arrivals, contents and predictions, sampled one request at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.sim.types import Request
from qos_jax.workload.arrivals import ArrivalProcess, ArrivalState
from qos_jax.workload.content import RequestContent, SampledContent
from qos_jax.workload.prediction import Predictions
from qos_jax.workload.session_law import SessionLaw

_TURN = 0x7475726E  # folded into a key for a stream of its own


@struct.dataclass
class RecordedLengths:
    """Lengths of G recorded requests, each behind the recorded gap of the same number."""

    prompt_tokens: Array  # [G] int32 tokens
    output_tokens: Array  # [G] int32 tokens, of every expert

    def at(self, index: Array, sampled: SampledContent) -> SampledContent:
        """Returns a sampled content with the lengths of number ``index`` [] int32."""
        output_tokens = jnp.broadcast_to(self.output_tokens[index], sampled.output_tokens.shape)
        return sampled._replace(prompt_tokens=self.prompt_tokens[index], output_tokens=output_tokens)

    def moments(self, num_experts: int) -> dict[str, Array]:
        """Returns the moments of the lengths of N experts, by field of a content, for predictions."""
        log_length = jnp.log(self.output_tokens.astype(float))
        return {
            "log_length_mean": jnp.full(num_experts, log_length.mean()),
            "log_length_sd": jnp.full(num_experts, log_length.std()),
            "log_length_correlation": jnp.asarray(1.0),
            "max_output_tokens": jnp.full(num_experts, self.output_tokens.max(), float),
        }


@struct.dataclass
class RequestWorkload:
    """A `Workload` with three independent parts; only the arrivals have a state.

    Experts may share answers: expert n gets what ``content`` and ``prediction`` say of number ``answers_of[n]``.
    Recorded arrivals may have their own lengths, which replace those of the content. With sessions, a request is a turn
    of a conversation, and its prompt is what the user adds.
    """

    arrivals: ArrivalProcess
    content: RequestContent
    prediction: Predictions
    answers_of: Array | None = None  # [N] int32; None: each expert has answers of its own
    lengths: RecordedLengths | None = None  # of recorded arrivals
    sessions: SessionLaw | None = None  # None: each request stands alone

    def init(self, key: Array) -> ArrivalState:
        """Returns the state before the first request."""
        return self.arrivals.init(key)

    def next(self, key: Array, state: ArrivalState) -> tuple[Array, Request, ArrivalState]:
        """Returns the gap to the next arrival [s], that request, and the state after it."""
        gap_key, content_key, prediction_key = jax.random.split(key, 3)
        sampled = self.content.sample(content_key)
        if self.lengths is not None:
            sampled = self.lengths.at(state.recorded_index, sampled)
        gap_s, state = self.arrivals.next_gap(gap_key, state)
        predicted = self.prediction.predict(prediction_key, self.content, sampled)
        answers = [sampled.output_tokens, sampled.score, *predicted]
        if self.answers_of is not None:
            answers = [each[self.answers_of] for each in answers]
        output_tokens, score, predicted_score, predicted_tokens = answers
        request = Request(
            prompt_tokens=sampled.prompt_tokens,
            output_tokens=output_tokens,
            score=score,
            latency_limit_s=sampled.latency_limit_s,
            predicted_score=predicted_score,
            predicted_tokens=predicted_tokens,
            limits=sampled.limits,
            turn=None if self.sessions is None else self.sessions.sample(jax.random.fold_in(key, _TURN)),
        )
        return gap_s, request, state

    def with_rate(self, rate_per_s: Array | float) -> RequestWorkload:
        """Returns the same workload at another mean arrival rate [requests/s]."""
        return dataclasses.replace(self, arrivals=self.arrivals.with_rate(rate_per_s))
